"""`python -m train`."""

from shared.cli import run
from shared.process import keep_freed_memory
from train.cli import main

keep_freed_memory()
run(main)
