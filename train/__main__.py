"""`python -m train`."""

from shared.command_line import run
from shared.console.process import keep_freed_memory
from train.cli import main

keep_freed_memory()
run(main)
