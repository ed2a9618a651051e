"""`python -m harvest`: parse, build the settings, run. Libraries that load slowly are imported where they are used."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

import shared.cli
from harvest.settings import Settings
from shared.config import build, load_preset, override
from shared.errors import UserError

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "tiny"


@click.group()
def group() -> None:
    """Stage 1: run an LLM once and keep its activations in a store that any number of trainings read."""


@group.command()
@click.argument("preset", default=DEFAULT_PRESET)
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file in place of a preset.")
@click.option("--model", help="`embedded`, a Hugging Face model folder, or a name on the hub.")
@click.option(
    "--text", multiple=True, help="`embedded`, a data set on the hub, or a .jsonl, .parquet or .txt file (repeatable)."
)
@click.option("--layer", "layers", type=int, multiple=True, help="A layer, from 0 (repeatable: a store each).")
@click.option("--tokens", type=int, help="Tokens to train on, rounded up to whole blocks.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=Path("cache"),
    show_default=True,
    envvar="TRANSCODER_CACHE",
    show_envvar=True,
    help="The folder that stores are made in.",
)
@click.option("--seed", type=int, help="Seed of every permutation.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Any setting (repeatable).")
@click.option("--force", is_flag=True, help="Go on where the disk looks too small.")
def run(
    preset: str,
    config: Path | None,
    model: str | None,
    text: tuple[str, ...],
    layers: tuple[int, ...],
    tokens: int | None,
    cache: Path,
    seed: int | None,
    assignments: tuple[str, ...],
    force: bool,
) -> None:
    """Make the store of PRESET, or continue, extend or find it; prints its path last (a line per layer)."""
    given = {
        "model": {"name": model},
        "text": {"name": text},
        "capture": {"layers": layers},
        "tokens": tokens,
        "seed": seed,
    }
    settings = resolve(preset, config, given, assignments)
    from harvest.pipeline import harvest

    for path in harvest(settings, cache, force=force):
        print(path)


@group.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def info(store: Path, as_json: bool) -> None:
    """Describe the finished store at STORE: request, strata, blocks, packing, size."""
    from harvest.describe import describe, show

    facts = describe(store)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


@group.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def verify(store: Path, as_json: bool) -> None:
    """Read every file of STORE and compare it with its checksum; fails with the list of damaged files."""
    from harvest.describe import verify as check

    report = check(store)
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(report.text())
    if report.faults:
        sys.exit(1)


def resolve(preset: str, config: Path | None, given: dict[str, Any], assignments: tuple[str, ...]) -> Settings:
    """The settings of a preset or file, with the options that were given, and then `--set`, on top."""
    name = config.stem if config else preset
    settings = {"label": name, **load_preset(PRESETS, preset, config)}
    for key, value in given.items():
        settings = _put(settings, key, value)
    return build(Settings, override(settings, assignments), f"settings of {name}")


def _put(settings: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        table = settings.get(key, {})
        if not isinstance(table, dict):
            raise UserError(f"{key} is a value, expected a group of settings")
        for name, inner in value.items():
            table = _put(table, name, inner)
        return {**settings, key: table}
    return settings if value is None or value == () else {**settings, key: value}


def main() -> None:
    """Run the command line; a termination signal stops a harvest like Ctrl-C: between two files, resumable."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    shared.cli.run(group)
