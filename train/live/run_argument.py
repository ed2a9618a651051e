"""A run as the argument of a command: found before torch is imported, and completed by the shell."""

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from train.live.run_files import RUNS, config_file, runs_in


class RunType(click.ParamType):
    """The folder of a run."""

    name = "run"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the folder. Raises `UserError` that says which runs there are, when it is none.

        With the option `--index` it is a folder of runs, and is not looked into.
        """
        run = Path(value)
        if not (ctx and ctx.params.get("index")):
            config_file(run)
        return run

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """List the runs of the folder `runs`; else folders."""
        paths = [str(RUNS / name) for name in runs_in(RUNS)]
        return [CompletionItem(path) for path in paths if path.startswith(incomplete)] or [
            CompletionItem(incomplete, type="dir")
        ]


RUN = RunType()
