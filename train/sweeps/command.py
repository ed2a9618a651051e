"""`python -m train sweep`: parses, plans, trains, and shows what has come of it."""

import json
from pathlib import Path

import click

import shared.command_line
from shared.console.terminal import PlainConsole, show_path, show_text
from shared.store.store import Local
from train.sweeps.wanted_runs import wanted_runs


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--store", "stores", multiple=True, type=shared.command_line.STORE,
              help="A finished store, in place of those in FILE; repeatable: all runs on each store.")  # fmt: skip
@click.option("--runs", default="runs", type=click.Path(path_type=Path), show_default=True, help="Folder of all runs.")
@click.option("--dry-run", is_flag=True, help="Show the runs, and which share their rows; train nothing.")
@click.option(
    "--at-once", type=click.IntRange(1), help="Runs that compute at the same time; default: cores divided by threads."
)
@click.option("--force", is_flag=True, help="Start even if the checkpoints may not fit on the disk.")
@click.option("--no-compare", is_flag=True, help="Do not compare the runs at the end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@shared.command_line.local_options
def sweep(
    file: Path,
    stores: tuple[Path, ...],
    runs: Path,
    dry_run: bool,
    at_once: int | None,
    force: bool,
    no_compare: bool,
    as_json: bool,
    local: Local | None,
) -> None:
    """Train many runs side by side, from a grid or a list of settings in a TOML FILE, and read their rows once.

    The same command continues a sweep that was stopped or killed, and leaves finished runs as they are. Prints the
    sweep's folder as its last line.
    """
    wanted = wanted_runs(file, stores, runs, local)  # says what is wrong before torch is imported, which takes seconds
    from train.sweeps.leaderboard import table
    from train.sweeps.plan import plan
    from train.sweeps.run_sweep import train_wanted
    from train.sweeps.show import plan_as_json, print_plan

    if dry_run:
        found = plan(wanted)
        if as_json:
            show_text(json.dumps(plan_as_json(found, at_once), indent=2))
        else:
            print_plan(found, at_once)
        return
    record = train_wanted(wanted, at_once=at_once, force=force, compare=not no_compare)
    folder = runs / file.stem
    if as_json:
        click.echo(json.dumps(record.model_dump(mode="json"), indent=2))
        return
    PlainConsole().print(table(record.runs, f"sweep {file.stem}, held out"))
    for page in record.pages:
        show_path(folder / page)
    show_path(folder)
