"""`python -m train run|resume|watch|checkpoints|evaluate|samples|probe|report|...`: parses, builds, runs."""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import shared.command_line
from shared.check_settings import Change, blaming
from shared.command_line import STORE
from shared.config import changes_of
from shared.console.terminal import Verbosity, show_path, verbosity
from shared.errors import UserError
from shared.files import durable
from shared.store.store import Local
from train import cli_formats, cli_runs, cli_settings
from train.explain.command import explain
from train.live.run_argument import RUN
from train.read_settings import options
from train.run_folder import check_name, new_run_folder
from train.sweeps.command import sweep

_fallback_option = click.option(
    "--fallback-dir",
    "fallback",
    type=click.Path(path_type=Path),
    help="A folder on another disk for a checkpoint that does not fit on the run's.",
)
_verify_option = click.option(
    "--verify",
    is_flag=True,
    help="Read and check all of the store's shard files first; otherwise about 512 MiB of them.",
)


@click.group(name="python -m train", cls=shared.command_line.Commands)
@shared.command_line.version_option
@click.pass_context
def main(context: click.Context) -> None:
    """Stage 2: train transcoders from a store of activations, with no LLM in memory."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        _share(context)


def _share(context: click.Context) -> None:
    """Let processes of torchrun but the first do as it tells them. Raises `UserError` on commands that are for one."""
    is_first = os.environ.get("RANK", "0") == "0"
    if context.invoked_subcommand not in ("run", "resume"):
        if is_first:
            name = context.invoked_subcommand
            raise UserError(f"torchrun is for train run and train resume, and {name} for one process: python -m train")
        sys.exit(UserError.exit_code)
    if not is_first:
        from train.run.follower import follow

        sys.exit(follow())


main.add_command(explain)
main.add_command(cli_formats.export)
main.add_command(cli_formats.import_)
main.add_command(sweep)


def sync_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options to sync the run to W&B, which become the argument `project`."""

    @click.option("--wandb", is_flag=True, help="Sync the run to W&B, offline if there is no key.")
    @click.option(
        "--wandb-project",
        default="transcoder-cache",
        show_default=True,
        envvar="WANDB_PROJECT",
        help="W&B's project, for --wandb.",
    )
    @functools.wraps(command)
    def wrapped(*, wandb: bool, wandb_project: str, **given: Any) -> None:
        command(**given, project=wandb_project if wandb else None)

    return wrapped


@main.command(cls=cli_settings.WithSettings)
@click.argument("preset", required=False)
@click.option("--store", type=STORE, help="A finished store: its folder, its name in the cache, or its address.")
@cli_settings.config_option
@cli_settings.like_option
@click.option("--runs", default="runs", type=click.Path(path_type=Path), show_default=True, help="Folder of all runs.")
@click.option("--name", help="The run's folder in --runs; default: the preset's name and the next free number.")
@click.option("--steps", type=shared.command_line.COUNT, help="Optimizer steps, such as 10k.")
@click.option("--seed", type=int, help="Seed of the initial weights and, unless rows.seed is set, the order of rows.")
@click.option(
    "--init-from", type=click.Path(path_type=Path), help="Weights to start from: a run's, or another library's."
)
@click.option("--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Override one setting; repeatable.")
@click.option("--force", is_flag=True, help="Start even if the checkpoints may not fit on the disk.")
@_fallback_option
@sync_options
@shared.command_line.verbosity_options
@_verify_option
@shared.command_line.local_options
def run(
    preset: str | None,
    store: Path | None,
    file: Path | None,
    like: Path | None,
    runs: Path,
    name: str | None,
    steps: int | None,
    seed: int | None,
    init_from: Path | None,
    assignments: tuple[str, ...],
    force: bool,
    fallback: Path | None,
    project: str | None,
    local: Local | None,
    verify: bool,
) -> None:
    """Train a transcoder. Prints the run's path as its last line.

    PRESET is tiny for stores of the embedded model and base for all others, unless it is named.
    """
    file = cli_settings.settings_file(preset, file, like)
    changes: list[str | Change] = [*assignments, *options(steps=steps, seed=seed)]
    check_name(runs, name)  # what can be found wrong before torch is imported is, since that takes seconds
    opened, preset, note = cli_settings.start_of_run(preset, changes, file, like, store, local)
    from train.commands import train
    from train.run.settings import load_settings

    settings = load_settings(preset, changes, file=file)
    stem = like.resolve().name if like else file.stem if file else preset
    with new_run_folder(runs, name, stem) as path, blaming(changes_of(changes)):
        train(
            opened,
            settings,
            path,
            note=note,
            init_from=init_from,
            force=force,
            fallback=fallback,
            project=project,
            verify=verify,
        )
    _summarise(path)
    show_path(path)


@main.command(cls=cli_settings.WithSettings)
@click.argument("run", type=RUN)
@click.option("--store", type=STORE, help="Where the store is now, if it was moved.")
@click.option(
    "--steps", type=shared.command_line.COUNT, help="Make the run longer: the total number of optimizer steps."
)
@click.option("--threads", type=click.IntRange(1), help="Use another number of CPU threads; the last bits may differ.")
@click.option("--inexact", is_flag=True, help="Allow another processor or other versions; the last bits may differ.")
@_fallback_option
@sync_options
@shared.command_line.verbosity_options
@_verify_option
@shared.command_line.local_options
def resume(
    run: Path,
    store: Path | None,
    steps: int | None,
    threads: int | None,
    inexact: bool,
    fallback: Path | None,
    project: str | None,
    local: Local | None,
    verify: bool,
) -> None:
    """Continue a run from its newest valid checkpoint; the result is that of an uninterrupted run, bit for bit.

    With --steps, the run is made longer: from here on the learning rate follows that of a run of this many steps.
    """
    from train.commands import resume as resume_run

    resume_run(
        run,
        store=store,
        local=local,
        fallback=fallback,
        project=project,
        threads=threads,
        inexact=inexact,
        steps=steps,
        verify=verify,
    )
    _summarise(run)
    show_path(run)


for _command in (cli_settings.list_all, cli_runs.watch, cli_runs.ls, cli_runs.rm, cli_runs.checkpoints):
    main.add_command(_command)


@main.command()
@click.argument("run", type=RUN)
@click.option("--store", type=STORE, help="Another store to evaluate on; default: the run's.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option("--linear", is_flag=True, help="Also fit the best linear map on the training rows, for comparison.")
@click.option("--redundancy", is_flag=True, help="Also find groups of latents that one latent could replace.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_verify_option
@shared.command_line.local_options
def evaluate(
    run: Path,
    store: Path | None,
    step: int | None,
    linear: bool,
    redundancy: bool,
    as_json: bool,
    local: Local | None,
    verify: bool,
) -> None:
    """Show held-out figures of a checkpoint, by stratum and prefix. Changes nothing."""
    from train.commands import evaluate as evaluate_run
    from train.tables import print_evaluation, print_redundancy

    found = evaluate_run(run, store=store, local=local, step=step, linear=linear, redundancy=redundancy, verify=verify)
    twice = found.redundancy
    if as_json:
        extra: dict[str, Any] = {"linear_fvu": found.linear_fvu} if linear else {}
        extra |= {"redundancy": twice.model_dump(mode="json")} if twice else {}
        click.echo(json.dumps({"step": found.step} | found.evaluation.model_dump(mode="json") | extra, indent=2))
        return
    print_evaluation(found.evaluation, f"{run}, step {found.step}", found.linear_fvu)
    if twice:
        print_redundancy(twice)


@main.command()
@click.argument("run", type=RUN)
@click.option("--store", type=STORE, help="Another store to sample; default: the run's.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option("--rows", type=click.IntRange(1), help="Maximum number of stored rows to search for contexts.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Override samples.*; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@_verify_option
@shared.command_line.local_options
def samples(
    run: Path,
    store: Path | None,
    step: int | None,
    rows: int | None,
    assignments: tuple[str, ...],
    as_json: bool,
    local: Local | None,
    verify: bool,
) -> None:
    """Write contexts in which each latent of a checkpoint is active. Prints the file's path as its last line."""
    from train.commands import sample

    path, record = sample(run, store=store, local=local, step=step, rows=rows, changes=assignments, verify=verify)
    if as_json:
        click.echo(json.dumps(record.model_dump(mode="json") | {"path": str(path)}, indent=2))
        return
    click.echo(
        f"step {record.step}: {record.contexts:,} contexts of {record.latents:,} of {record.d_sae:,} latents, "
        f"from {sum(record.rows.values()):,} rows of {record.sequences:,} sequences"
    )
    show_path(path)


@main.command()
@click.argument("run", type=RUN)
@click.option("--store", type=STORE, help="Where the store is now, if it was moved.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option("--linear", is_flag=True, help="Also fit the best linear map on the training rows, for comparison.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Labels of latents, as exported by the browser: JSON or CSV."
)
@click.option(
    "--index",
    is_flag=True,
    is_eager=True,  # so that it is known when RUN is read
    help="RUN is a folder of runs: write a page that lists them all, index.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@sync_options
@shared.command_line.quiet_option
@_verify_option
@shared.command_line.local_options
def report(
    run: Path,
    store: Path | None,
    step: int | None,
    linear: bool,
    labels: Path | None,
    index: bool,
    as_json: bool,
    project: str | None,
    local: Local | None,
    verify: bool,
) -> None:
    """Write report.html, the same in Markdown and JSON, and a browser of all latents.

    Prints the page's path as its last line.
    """
    from train.commands import write_report
    from train.report.runs_index import write_index
    from train.tables import print_verdict

    if index:
        if store or step is not None or linear or labels or project:
            raise UserError("--index lists runs by what they have: it goes with --json alone")
        page, runs = write_index(run)
        if as_json:
            click.echo(json.dumps([one._asdict() for one in runs], indent=2))
        else:
            show_path(page)
        return
    path, found = write_report(
        run, store=store, local=local, step=step, linear=linear, labels=labels, project=project, verify=verify
    )
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json"), indent=2))
        return
    if verbosity() > Verbosity.QUIET:
        print_verdict(found)
    show_path(path)


@main.command()
@click.argument("run", type=RUN)
@click.option(
    "--labels",
    default="auto",
    show_default=True,
    metavar="auto|python|english|FILE",
    help="Labels of tokens: from the store's text, or a Parquet file of (sequence, offset, label).",
)
@click.option("--store", type=STORE, help="Where the store is now, if it was moved.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option("--rows", type=click.IntRange(1), help="Maximum number of held-out rows to probe; default: 131,072.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@_verify_option
@shared.command_line.local_options
def probe(
    run: Path,
    labels: str,
    store: Path | None,
    step: int | None,
    rows: int | None,
    as_json: bool,
    local: Local | None,
    verify: bool,
) -> None:
    """Measure what latents mean by labels of the store's tokens, without an LLM; writes probe.json into the run.

    Prints the file's path as its last line.
    """
    from train.commands import probe as probe_run
    from train.probe.probe_record import FILE
    from train.tables import print_probe

    found = probe_run(run, store=store, local=local, step=step, labels=labels, rows=rows, verify=verify)
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json"), indent=2))
        return
    if verbosity() > Verbosity.QUIET:
        print_probe(found.summary, str(run))
    show_path(run / FILE)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option("--store", type=STORE, help="Where the runs' store is now, if it was moved.")
@click.option(
    "--l0",
    type=float,
    help="Active latents per row at which to compare; default: the runs' k, or each run's own if these differ.",
)
@click.option(
    "--own-l0", is_flag=True, help="Compare each run at its own l0: its k, or the l0 of its learned thresholds."
)
@click.option(
    "--matched-latents",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Maximum number of latents to match across seeds.",
)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Also write a page with plots to FILE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_verify_option
@shared.command_line.quiet_option
def compare(
    runs: tuple[Path, ...],
    store: Path | None,
    l0: float | None,
    own_l0: bool,
    matched_latents: int,
    html: Path | None,
    as_json: bool,
    verify: bool,
) -> None:
    """Compare held-out figures of RUNS of one store side by side; runs that differ only in their seed are one arm."""
    from train.compare.arms import compare_runs
    from train.compare.comparison_table import print_comparison

    if html:  # before all the measuring
        durable.make_folder(html.parent)
        if not os.access(html.parent, os.W_OK):
            raise UserError(f"--html {html}: the folder cannot be written to; name a file in another one")
    found = compare_runs(runs, store=store, l0=l0, own_l0=own_l0, matched_latents=matched_latents, verify=verify)
    if html:
        from train.report import comparison_page

        durable.publish_bytes(html, comparison_page.html(found))
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json"), indent=2))
    else:
        print_comparison(found)


def _summarise(run: Path) -> None:
    """Print the last held-out figures of the run on stderr, unless the user wants quiet."""
    if verbosity() == Verbosity.QUIET:
        return
    from train.live.run_files import METRICS
    from train.run.metrics import Log, evaluation_of
    from train.tables import print_evaluation

    log = Log(run / METRICS)
    if last := evaluation_of(log.rows(tell=False), log.path):
        print_evaluation(last[1], f"{run}, step {last[0]}", None, stderr=True)
