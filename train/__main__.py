"""`python -m train`."""

from shared.cli import run
from train.cli import main

run(main)
