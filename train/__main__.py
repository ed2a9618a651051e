"""`python -m train`."""

from shared.command_line import run
from shared.console.process import keep_freed_memory
from shared.console.signals import stop_at_once
from train.cli import main

keep_freed_memory()
stop_at_once()  # where a command does not finish its step first
run(main)
