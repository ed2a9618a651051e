"""`transcoder-cache harvest|train ...`: both stages as one program on the PATH.

`python -m train` starts with the current folder on its path, so that in a folder that has a `train.py` it runs that
file. This program does not look there.
"""

import os
import runpy
import sys
from difflib import get_close_matches
from importlib import import_module

_STAGES = {
    "harvest": "run an LLM once, and keep its activations in a store",
    "train": "train transcoders from a store, and report on them",
}
_GROUPS = {"harvest": "group", "train": "main"}
"""What holds the commands of a stage's `cli`."""
_COMPLETE = "_TRANSCODER_CACHE_COMPLETE"


def complete() -> None:
    """Answer the shell that completes a line, or print the script that makes it ask: click does both."""
    import click

    stages = click.Group("transcoder-cache")
    for name, attribute in _GROUPS.items():
        stages.add_command(getattr(import_module(f"{name}.cli"), attribute), name)
    stages.main(prog_name="transcoder-cache", complete_var=_COMPLETE)


def main() -> None:
    """Run the stage that the first argument names, with the other arguments."""
    if _COMPLETE in os.environ:
        complete()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print("Usage: transcoder-cache STAGE COMMAND [OPTIONS]...\n\nStages:")
        print("\n".join(f"  {stage:9}{told}" for stage, told in _STAGES.items()))
        print("\nCommands of a stage: transcoder-cache STAGE --help")
    elif name not in _STAGES:
        near = get_close_matches(name, _STAGES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"error: no stage {name!r}; stages: {', '.join(_STAGES)}{hint}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.argv = [f"{sys.argv[0]} {name}", *rest]
        runpy.run_module(name, run_name="__main__")
