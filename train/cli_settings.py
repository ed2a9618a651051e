"""The options that say which settings a run starts from, and the command that lists settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from shared.check_settings import Change, blaming
from shared.command_line import STORE
from shared.config import changes_of
from shared.console.terminal import show_text
from shared.errors import UserError
from shared.store.store import Local, Store
from train.live.run_files import CONFIG
from train.live.store_place import store_of_run
from train.read_settings import BASE, preset_for, read_settings, setting_called
from train.run.rules import read_and_check

config_option = click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path),
    help="A TOML file or a run's config.json, in place of a preset.",
)
_OF_RUN: dict[str, Any] = {"metavar": "RUN", "type": click.Path(path_type=Path)}
like_option = click.option("--like", **_OF_RUN, help="Start from the settings and the store of a run.")


def settings_file(preset: str | None, file: Path | None, like: Path | None) -> Path | None:
    """Return the file that settings are read from in place of a preset. Raises `UserError` when two were named."""
    named = [f"the preset {preset!r}"] * bool(preset) + ["--config"] * bool(file) + ["--like"] * bool(like)
    if len(named) > 1:
        raise UserError(f"{named[0]} and {named[1]} both say which settings to start from; give one of them")
    if file and file.is_dir():
        hint = f"for the settings of a run: --like {file}" if (file / CONFIG).is_file() else "name a file in it"
        raise UserError(f"--config {file}: it is a folder, and settings are read from a file; {hint}")
    return like / CONFIG if like else file


def usual_preset(store: Store | None, file: Path | None) -> tuple[str, str]:
    """Return the preset of a run for which none was named, and what to say of it: nothing if a `file` replaces it."""
    if file or not store:
        return BASE, ""
    preset = preset_for(store.request)
    why = "the store is of the embedded model" if preset != BASE else "it is for any store"
    return preset, f"preset {preset}: none was named, and {why}"


class WithSettings(click.Command):
    """A command that says of an option which there is not whether it is a setting."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As `click.Command.parse_args`. Raises `UserError` that names the setting."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            given = error.option_name
            told = setting_called(given.lstrip("-").replace("-", "_"))
            if self.name == "resume" and (told or given == "--set"):
                kept = "a run keeps its settings; start another with: python -m train run --like RUN --set NAME=VALUE"
                raise UserError(f"{given}: no such option; {kept}") from error
            if not told:
                raise
            meant = told if " " in told else f"it is a setting: --set {told}=VALUE"
            raise UserError(f"{given}: no such option; {meant}") from error


def start_of_run(
    preset: str | None,
    changes: Sequence[str | Change],
    file: Path | None,
    like: Path | None,
    store: Path | None,
    local: Local | None,
) -> tuple[Store, str, str]:
    """Open the store of a new run, and check the run's settings, without torch, whose import takes seconds.

    Returns the store, the preset, and what to say of it. Raises `UserError` that names what was typed.
    """
    read_settings(preset or BASE, changes, file)
    if not store and not like:
        raise UserError("train run needs a store: --store NAME or FOLDER, or --like RUN for that of another run")
    opened = Store.open(store, local) if store else _store_like(like, local)
    preset, note = (preset, "") if preset else usual_preset(opened, file)
    with blaming(changes_of(changes)):
        read_and_check(preset, changes, file, opened)
    return opened, preset, note


def _store_like(like: Path | None, local: Local | None) -> Store:
    assert like
    try:
        return Store.open(store_of_run(like), local)
    except UserError as error:
        raise UserError(f"--like {like}: {error}") from error


@click.command("settings")
@click.argument("preset", required=False)
@click.option("--store", type=STORE, help="A store, for which automatic choices are shown.")
@config_option
@click.option("--like", **_OF_RUN, help="List the settings of a run, without its store.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=VALUE", help="Override one setting; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_all(
    preset: str | None,
    store: Path | None,
    file: Path | None,
    like: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """List every setting with the value that `run` would take, its default and what it does. Runs nothing.

    PRESET is that of `run` with the same store, and base without a store.
    """
    file = settings_file(preset, file, like)
    read_settings(preset or BASE, assignments, file)
    opened = Store.open(store) if store else None
    preset = preset or usual_preset(opened, file)[0]
    if opened:
        with blaming(changes_of(assignments)):
            read_and_check(preset, assignments, file, opened)
    from shared.console.list_settings import list_settings, settings_as_json, show_settings
    from train.run.settings import load_settings, resolve

    settings, told = load_settings(preset, assignments, file=file), []
    if opened:
        from train.run.advice import advice

        with blaming(changes_of(assignments)):
            config = resolve(opened, settings, None)
        settings, told = config.settings, advice(config, opened)
    found = list_settings(settings)
    if as_json:
        click.echo(settings_as_json(found))
        return
    show_settings(found, f"settings of train run {file or preset}{f', on {store}' if store else ''}")
    for line in told:
        show_text(line)
