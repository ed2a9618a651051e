"""The commands that look at runs from outside, and remove them."""

import json
from dataclasses import asdict
from pathlib import Path

import click

import shared.command_line
from shared.console.terminal import show_text
from train.live.run_argument import RUN

_runs_option = click.option(
    "--runs", default="runs", type=click.Path(path_type=Path), show_default=True, help="Folder of all runs."
)


@click.command()
@click.argument("run", type=RUN)
@click.option("--once", is_flag=True, help="Show the run as it is now, and exit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, an object for each new row.")
@shared.command_line.verbose_option
def watch(run: Path, once: bool, as_json: bool) -> None:
    """Show a run's progress from its files, whether or not it is running.

    Ends with the run or with Ctrl-C. Changes nothing.
    """
    from train.live.watch import watch as watch_run

    watch_run(run, once=once, as_json=as_json)


@click.command()
@_runs_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(runs: Path, as_json: bool) -> None:
    """List the runs of a folder: store, state, step, held-out figures, size."""
    from train.live.runs import list_runs, print_runs

    found = list_runs(runs)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        print_runs(found, runs)


@click.command()
@click.argument("run", nargs=-1, required=True, type=click.Path(path_type=Path))
@_runs_option
@shared.command_line.yes_option
def rm(run: tuple[Path, ...], runs: Path, yes: bool) -> None:
    """Remove runs, given by path or by name in --runs; refuses one that is being trained."""
    from shared.console.panel import size
    from train.live.runs import check_removable_run, remove_run

    for path in [one if one.is_dir() else runs / one for one in run]:
        taken = check_removable_run(path)
        if yes or shared.command_line.confirm_removal(path, taken):
            remove_run(path)
            show_text(f"removed {path}: {size(taken)}")


@click.command()
@click.argument("run", type=RUN)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def checkpoints(run: Path, as_json: bool) -> None:
    """List the checkpoints of a run: step, size, held-out figures, and whether each verifies."""
    from train.commands import list_checkpoints
    from train.tables import print_checkpoints

    found = list_checkpoints(run)
    if as_json:
        click.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        print_checkpoints(found, str(run))
