"""The commands for other libraries' formats: export and import."""

import json
from pathlib import Path
from typing import get_args

import click

import shared.command_line
from shared.command_line import STORE
from shared.console.terminal import Verbosity, show_path, show_text, verbosity
from shared.errors import UserError
from shared.store.store import Local, Store
from train.interchange import Format
from train.live.run_argument import RUN
from train.run_folder import new_run_folder


@click.command()
@click.argument("runs", nargs=-1, required=True, type=RUN)
@click.option(
    "--format",
    "kind",
    required=True,
    type=click.Choice(get_args(Format)),
    help="The library that will read it.",
)
@click.option("--out", type=click.Path(path_type=Path), help="A new folder; default: RUN/exports/FORMAT.")
@click.option("--store", type=STORE, help="Where the store is now, if it was moved.")
@click.option("--step", type=int, help="A checkpoint's step; default: the newest valid one.")
@click.option("--prefix", type=int, help="Export only this many of the first latents: one of the Matryoshka prefixes.")
@click.option("--layers", type=click.IntRange(1), help="Layers of the model, for circuit-tracer.")
@click.option("--license", "licence", help="The hub's name for a licence, such as mit, for the card.")
@click.option("--push", "repository", metavar="OWNER/NAME", help="Also upload the folder to the Hugging Face hub.")
@click.option(
    "--private", is_flag=True, help="Make a new repository private; without it, it is public, as with hf upload."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@shared.command_line.local_options
def export(
    runs: tuple[Path, ...],
    kind: Format,
    out: Path | None,
    store: Path | None,
    step: int | None,
    prefix: int | None,
    layers: int | None,
    licence: str | None,
    repository: str | None,
    private: bool,
    as_json: bool,
    local: Local | None,
) -> None:
    """Write a transcoder in another library's format, and compare it with the run on held-out rows.

    neuronpedia and delphi get contexts and activations instead. circuit-tracer takes RUNS of several layers, one each.
    Prints the folder's path as its last line.
    """
    from train.commands import export as export_runs
    from train.interchange.hub import push, require_push
    from train.tables import print_agreements

    if repository:
        require_push(repository)
    elif private:
        raise UserError("--private is for --push OWNER/NAME")
    path, found = export_runs(
        runs, kind, out, store=store, local=local, step=step, prefix=prefix, layers=layers, licence=licence
    )
    url = push(path, repository, private=private) if repository else None
    if as_json:
        where = {"path": str(path)} | ({"url": url} if url else {})
        click.echo(json.dumps(where | {"runs": [one.model_dump(mode="json") for one in found]}, indent=2))
        return
    if found and verbosity() > Verbosity.QUIET:
        print_agreements(found, [str(run) for run in runs], kind)
    if url:
        show_text(url)
    show_path(path)


@click.command("import")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--store", required=True, type=STORE, help="A finished store: its folder, its name in the cache, or its address."
)
@click.option("--runs", default="runs", type=click.Path(path_type=Path), show_default=True, help="Folder of all runs.")
@click.option("--name", help="The run's folder in --runs; default: `import` and the next free number.")
@click.option("--source-hook", help="The hook that it reads, such as ln2.hook_normalized, if its files do not say.")
@click.option("--accept-mismatch", is_flag=True, help="Import it even if its model or hooks are not the store's.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@shared.command_line.local_options
def import_(
    path: Path,
    store: Path,
    runs: Path,
    name: str | None,
    source_hook: str | None,
    accept_mismatch: bool,
    as_json: bool,
    local: Local | None,
) -> None:
    """Turn a transcoder of another library into a finished run, to evaluate, compare, sample, report or export.

    PATH is a folder of SAELens or sparsify, or a file of circuit-tracer, Gemma Scope or dictionary_learning. Prints the
    run's path as its last line.
    """
    from train.commands import import_transcoder
    from train.tables import print_evaluation

    opened = Store.open(store, local)
    with new_run_folder(runs, name, "import") as run:
        found = import_transcoder(path, opened, run, source_hook=source_hook, accept_mismatch=accept_mismatch)
    if as_json:
        click.echo(json.dumps({"path": str(run)} | found.model_dump(mode="json"), indent=2))
        return
    if verbosity() > Verbosity.QUIET:
        print_evaluation(found, str(run), None, stderr=True)
    show_path(run)
