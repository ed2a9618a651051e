"""`python -m harvest`: parse, build the settings, run. Libraries that load slowly are imported where they are used."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click

import shared.command_line
from harvest.settings import DEFAULT_PRESET, Settings, load_settings
from shared.command_line import COUNT, STORE
from shared.console.signals import stop_at_once
from shared.console.terminal import say, show_path, show_text
from shared.errors import UserError
from shared.files.object_store import address, is_address, local_folder, require_folder
from shared.store.find_store import CACHE, CACHE_VARIABLE, find_store
from shared.store.import_origin import ImportFormat
from shared.store.store import Local


@click.group(cls=shared.command_line.Commands)
@shared.command_line.version_option
def group() -> None:
    """Stage 1: run an LLM once and keep its activations in a store, for any number of training runs."""


_option_of_cache = partial(
    click.option,
    "--cache",
    type=click.Path(path_type=Path),
    default=CACHE,
    show_default=True,
    envvar=CACHE_VARIABLE,
    show_envvar=True,
)
cache_option = _option_of_cache(help="The folder of all stores, or an address such as s3://bucket/cache.")
cache_folder_option = _option_of_cache(help="The folder of all stores (not an address).")


inexact_option = click.option(
    "--inexact", is_flag=True, help="Allow another kind of GPU or another torch version; the last bits may differ."
)


def request_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say which stores are meant: the same for `plan` and `run`."""
    options = (
        click.argument("preset", required=False),
        click.option("--config", type=click.Path(path_type=Path), help="A TOML file in place of a preset."),
        click.option("--model", help="`embedded`, a Hugging Face model folder, or a name on the hub."),
        click.option(
            "--text",
            multiple=True,
            help="`embedded`, a data set on the hub, or a .jsonl, .parquet or .txt file (repeatable).",
        ),
        click.option(
            "--layer", "layers", type=int, multiple=True, help="A layer, from 0 (repeatable: one store per layer)."
        ),
        click.option("--tokens", type=COUNT, help="Tokens to train on, such as 5M; rounded up to whole blocks."),
        click.option("--name", help="Start of the store's name.  [default: the model's name, or the preset's]"),
        cache_option,
        click.option("--seed", type=int, help="Seed of every permutation."),
        click.option(
            "--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Override one setting; repeatable."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _settings(preset: str | None, config: Path | None, assignments: tuple[str, ...], **given: Any) -> Settings:
    if preset and config:
        raise UserError(f"the preset {preset!r} and --config both say which settings to start from; give one of them")
    return load_settings(preset or DEFAULT_PRESET, assignments, file=config, **given)


@group.command()
@request_options
@click.option("--force", is_flag=True, help="Continue even if the disk looks too small.")
@inexact_option
@shared.command_line.verbosity_options
def run(cache: Path, force: bool, inexact: bool, **given: Any) -> None:
    """Write the store of PRESET, or continue, extend or find it; prints its path last (one line per layer)."""
    settings = _settings(**given)
    from harvest.run.pipeline import harvest

    for path in harvest(settings, cache, force=force, inexact=inexact):
        show_path(path)


@group.command()
@request_options
@click.option("--eta", is_flag=True, help="Also load the model and time a few batches.")
@click.option("--force", is_flag=True, help="Show what is needed, and accept a disk that looks too small.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(cache: Path, eta: bool, force: bool, as_json: bool, **given: Any) -> None:
    """Show what `run` would write: rows, bytes, free disk, and what the hooks mean.

    Fails if the store would not fit on the disk.
    """
    settings = _settings(**given)
    from harvest.run import estimate, pipeline

    found = pipeline.estimates(settings, cache)
    pair = pipeline.explain(settings)
    seconds = pipeline.measure(settings, cache) if eta else None
    if as_json:
        stores = [one.as_json() for one in found]
        needed, memory = estimate.needed(found), estimate.block_memory(found)
        facts = {"stores": stores, "pair": pair, "seconds": seconds, "needed_bytes": needed, "block_memory": memory}
        print(json.dumps(facts, indent=2))
    else:
        estimate.show(found, pair, seconds)
    if not force and not is_address(cache):
        estimate.require_space(found)


@group.command("import")
@click.argument("path", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format", "kind", type=click.Choice(get_args(ImportFormat)), required=True, help="Format of the files at PATH."
)
@click.option("--source", help="Name of the sources: a tensor, a column, or the start of a .npy file's name.")
@click.option("--target", help="Name of the targets, in the same way.")
@click.option("--tokens", help="Name of the token ids, in the same way.")
@click.option("--context-size", type=int, help="Tokens per sequence; with `vllm`, tokens taken from each request.")
@click.option("--layer", type=int, help="The layer of the rows; with `clt-forge`, the one to import.")
@click.option("--model", help="The model that computed the rows: a Hugging Face folder, or a name on the hub.")
@cache_folder_option
@click.option("--name", help="Start of the store's name.  [default: imported]")
@click.option("--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Override one setting; repeatable.")
@click.option("--force", is_flag=True, help="Continue even if the disk looks too small.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: the store as `info --json` describes it.")
@shared.command_line.verbosity_options
def import_(
    path: tuple[Path, ...], cache: Path, kind: str, name: str, force: bool, as_json: bool, **given: Any
) -> None:
    """Make a store from activation pairs at PATH that other software wrote; prints its path last.

    With `saelens`, PATH is a folder of cached activations; if each hook has its own, pass the source's and then the
    target's.
    """
    from harvest.commands.describe import describe
    from harvest.imports.import_pairs import import_pairs, load_import_settings

    settings = load_import_settings(given.pop("assignments"), format=kind, label=name, **given)
    store = import_pairs(settings, path, require_folder(cache, "import"), force=force)
    if as_json:
        show_text(json.dumps(describe(store), indent=2))
    else:
        show_path(store)


@group.command("settings")
@request_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_all(cache: Path, as_json: bool, **given: Any) -> None:
    """List every setting with the value that `run` would take, its default and what it does. Runs nothing."""
    from shared.console.list_settings import list_settings, settings_as_json, show_settings

    found = list_settings(_settings(**given))
    if as_json:
        print(settings_as_json(found))
    else:
        show_settings(found, f"settings of harvest run {given['config'] or given['preset'] or DEFAULT_PRESET}")


@group.command()
@click.argument("store", type=STORE)
@click.option(
    "--shuffle", is_flag=True, help="Also measure how well rows are shuffled, on batches like those of training."
)
@click.option("--run-rows", type=click.IntRange(1), help="With --shuffle: the setting rows.run_rows of training.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.local_options
def info(store: Path, shuffle: bool, run_rows: int | None, as_json: bool, local: Local | None) -> None:
    """Describe the finished store STORE: request, strata, blocks, packing, size."""
    from harvest.commands.describe import describe, show

    if run_rows and not shuffle:
        raise UserError("--run-rows says how --shuffle reads; add --shuffle")
    if local and not shuffle:
        raise UserError("--local-folder and --local-bytes say where --shuffle decodes rows; add --shuffle")
    facts = describe(store, local, shuffle=shuffle, run_rows=run_rows)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


@group.command()
@click.argument("store", type=STORE)
@click.option(
    "--against-model",
    "rows",
    type=click.IntRange(1),
    metavar="N",
    help="Also recompute N random rows with the model, and compare.",
)
@click.option("--model", help="The store's model, if it has moved: a Hugging Face folder.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed for choosing those rows.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
@shared.command_line.local_options
def verify(store: Path, rows: int | None, model: str | None, seed: int, as_json: bool, local: Local | None) -> None:
    """Read every file of STORE and compare it with its checksum; fails with the list of damaged files."""
    from harvest.commands.describe import verify as check

    if local and not rows:
        raise UserError("--local-folder and --local-bytes say where --against-model decodes rows; add it")
    report = check(store)
    facts, lines, wrong = report.as_json(), [report.text()], bool(report.faults)
    if rows and not wrong:
        from harvest.commands.recompute import against_model

        found = against_model(store, rows, model, seed, local)
        facts["against_model"], lines, wrong = asdict(found), [*lines, found.text()], bool(found.wrong)
    show_text(json.dumps(facts, indent=2) if as_json else "\n".join(lines))
    if wrong:
        sys.exit(1)


@group.command()
@click.argument("store", type=STORE)
@click.option("--model", help="The store's model, if it has moved: a Hugging Face folder.")
@click.option("--text", multiple=True, help="The store's text, needed if its tokens are damaged; repeatable.")
@click.option(
    "--from",
    "imported_from",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file that an imported store was made from; repeatable.",
)
@click.option("--workers", type=click.IntRange(0), default=0, help="Threads that run batches; 0 is one per core.")
@inexact_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.verbosity_options
def repair(
    store: Path,
    model: str | None,
    text: tuple[str, ...],
    imported_from: tuple[Path, ...],
    workers: int,
    inexact: bool,
    as_json: bool,
) -> None:
    """Verify STORE and rewrite the damaged blocks, and no others."""
    from harvest.commands.repair import repair as mend

    damage = mend(store, model, text, workers, imported_from, inexact=inexact)
    show_text(json.dumps(asdict(damage), indent=2) if as_json else damage.text())


@group.command()
@click.argument("store", type=STORE)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Continue even if the disk looks too small.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
def pack(store: Path, target: Path, force: bool, as_json: bool) -> None:
    """Write STORE compressed to TARGET, for archives and uploads; prints TARGET last.

    TARGET is a new folder, or a new address such as s3://bucket/packed.
    """
    from harvest.commands.archive import pack as write

    target = local_folder(target)
    size, packed = write(local_folder(store), target, force=force)
    if as_json:
        facts = {"path": address(target), "shard_bytes": size, "packed_shard_bytes": packed}
        show_text(json.dumps(facts, indent=2))
    else:
        say(f"{size:,} bytes of rows packed into {packed:,}: {size / packed:.2f} to 1")
        show_path(target)


@group.command()
@click.argument("packed", type=STORE)
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Continue even if the disk looks too small.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
def unpack(packed: Path, target: Path, force: bool, as_json: bool) -> None:
    """Write the packed store PACKED to TARGET as it was before packing, byte for byte; prints TARGET last.

    TARGET is a new folder, or a new address such as s3://bucket/store.
    """
    from harvest.commands.archive import unpack as write

    target = local_folder(target)
    size = write(local_folder(packed), target, force=force)
    if as_json:
        show_text(json.dumps({"path": address(target), "shard_bytes": size}, indent=2))
    else:
        show_path(target)


@group.command()
@click.argument("store", type=STORE)
@click.argument("repository")
@click.option("--public", is_flag=True, help="Make a new repository public.  [default: private]")
@click.option("--license", "licence", help="The hub's name for a licence, such as cc-by-4.0, for the card.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
def push(store: Path, repository: str, public: bool, licence: str | None, as_json: bool) -> None:
    """Upload the packed STORE to the Hugging Face hub as the data set REPOSITORY (OWNER/NAME), with a card.

    STORE may be in object storage. Prints the data set's address last. Run it again to continue a stopped push.
    """
    from harvest.commands.hub_store import push as upload

    url = upload(store, repository, public=public, licence=licence)
    show_text(json.dumps({"url": url}, indent=2) if as_json else url)


@group.command()
@click.argument("repository")
@cache_folder_option
@click.option("--revision", help="A branch, a tag or a commit.")
@click.option("--force", is_flag=True, help="Continue even if the disk looks too small.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
def pull(repository: str, cache: Path, revision: str | None, force: bool, as_json: bool) -> None:
    """Download the packed store in REPOSITORY (OWNER/NAME) on the Hugging Face hub; prints its path last.

    Checks the files that are already there, and fetches the rest.
    """
    from harvest.commands.hub_store import pull as download

    path = download(repository, require_folder(cache, "pull"), revision=revision, force=force)
    if as_json:
        print(json.dumps({"path": str(path)}, indent=2))
    else:
        show_path(path)


@group.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--transcoder",
    type=click.Path(path_type=Path),
    help="Another transcoder to use, from any library, for the same hooks.",
)
@click.option("--step", type=click.IntRange(1), help="A checkpoint's step; default: the newest valid one.")
@click.option("--tokens", type=click.IntRange(1), default=65_536, show_default=True, help="Held-out tokens to run.")
@click.option("--linear", is_flag=True, help="Also put the best linear map, fitted first, in the MLP's place.")
@click.option("--model", help="The store's model, if it has moved: a Hugging Face folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.verbosity_options
def splice(run: Path, as_json: bool, **given: Any) -> None:
    """Put RUN's transcoder in place of the LLM's MLP, and measure the effect: CE recovered and KL."""
    if given["transcoder"] and given["step"]:
        raise UserError("--step names a checkpoint of RUN, and --transcoder another transcoder; leave one out")
    from harvest.splice.measure import SpliceOptions, splice
    from harvest.splice.show import show

    record = splice(run, SpliceOptions(**given))
    if as_json:
        print(json.dumps(record.model_dump(mode="json"), indent=2))
    else:
        show(record)


@group.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="The text, without BOS.")
@click.option(
    "--transcoder",
    type=click.Path(path_type=Path),
    help="Another transcoder to use, from any library, for the same hooks.",
)
@click.option("--step", type=click.IntRange(1), help="A checkpoint's step; default: the newest valid one.")
@click.option(
    "--top", type=click.IntRange(1), default=8, show_default=True, help="Number of strongest latents to show per token."
)
@click.option(
    "--ablate",
    type=shared.command_line.Numbers(),
    default=(),
    metavar="N,N-N",
    help="Latents to set to 0, one at a time.",
)
@click.option(
    "--steer",
    type=shared.command_line.NumberAndValue(),
    multiple=True,
    metavar="LATENT=VALUE",
    help="A latent to set to VALUE on every token; repeatable.",
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Also write a page; by default the strongest latents are ablated."
)
@click.option("--model", help="The store's model, if it has moved: a Hugging Face folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@shared.command_line.quiet_option
def encode(
    run: Path,
    ablate: Sequence[int],
    steer: tuple[tuple[int, float], ...],
    html: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """List the latents of RUN's transcoder that are active on each token of a prompt, and the effect of changing them.

    --ablate and --steer change one latent at a time, and compare the probabilities of the next token.
    """
    from harvest.splice.encode_prompt import encode_prompt, show, with_changes, write_page

    changes = with_changes(ablate, steer, page=html is not None)
    found = encode_prompt(run, **given, changes=changes)
    if html:
        write_page(html, run, found)
    if as_json:
        show_text(json.dumps(found.as_json(), indent=2))
    else:
        show(found)
    if html:
        show_path(html)


@group.command()
@cache_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def ls(cache: Path, as_json: bool) -> None:
    """List the stores of the cache: contents, progress and current users."""
    from harvest.commands import object_stores, stores

    found = object_stores.list_object_stores(cache) if is_address(cache) else stores.list_stores(local_folder(cache))
    if as_json:
        print(json.dumps(stores.as_json(found, cache), indent=2))
    else:
        stores.show(found, cache)


@group.command()
@click.argument("store", nargs=-1, required=True)
@cache_option
@shared.command_line.yes_option
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def rm(store: tuple[str, ...], cache: Path, yes: bool, dry_run: bool) -> None:
    """Remove stores, given by path or by name in the cache; refuses a store that is being written or trained from."""
    from harvest.commands import object_stores, stores
    from shared.console.panel import size

    for name in store:
        path = cache / name if is_address(cache) and not is_address(name) else Path(name)
        there = is_address(path)
        path = path if there else find_store(local_folder(path), local_folder(cache))
        shown = address(path) if there else str(path)
        taken = object_stores.size_of_object_store(path) if there else stores.check_removable(path)
        if dry_run:
            show_text(f"would remove {shown}: {size(taken)}")
        elif yes or shared.command_line.confirm_removal(path, taken):
            (object_stores.remove_object_store if there else stores.remove)(path)
            show_text(f"removed {shown}: {size(taken)}")
    if not dry_run and not is_address(cache):
        stores.sweep(local_folder(cache))


def main() -> None:
    """Run the command line; every signal to stop is as Ctrl-C: what is published stays, and resumes."""
    stop_at_once()
    shared.command_line.run(group)
