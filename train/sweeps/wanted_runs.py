"""What a sweep's file asks for: its runs, by name, with the settings of each, found to fit. No torch here."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import Config, brief, build, dotted, load_preset
from shared.errors import UserError
from shared.store.store import Local, Store
from train.read_settings import PRESETS, preset_for
from train.run.rules import read_and_check

MOST_RUNS = 1000


class SweepFile(Config):
    """What FILE.toml says. Settings are named as for `--set`, as dotted names or as tables."""

    preset: str | None = None
    """The preset of all runs; none: for each store the one that `train run` takes there."""
    config: Path | None = None
    """A TOML file of settings in place of a preset."""
    stores: tuple[Path, ...] = ()
    """Stores to train on, each run on each of them; `--store` replaces them."""
    set: dict[str, Any] = {}
    """Settings of all runs."""
    grid: dict[str, Any] = {}
    """Settings with a list of values each: a run for every combination."""
    runs: tuple[dict[str, Any], ...] = ()
    """Settings of runs one by one, each with a `name` if it is to have one; with a grid, each is combined with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedRun:
    """A run that a sweep's file asks for."""

    path: Path
    store: Store
    place: Path
    """The store, as it was named."""
    preset: str
    file: Path | None
    """What settings are read from in place of the preset."""
    changes: dict[str, Any]
    """Settings put in, by dotted name: the file's `set`, and what differs."""
    differs: dict[str, Any]
    """What the file's grid and list say of it, and the store where there are several."""
    origin: Path
    """The sweep's file."""

    @property
    def where(self) -> str:
        """What begins a message about it."""
        return f"{self.origin}, run {self.path.name}"


def read_sweep(file: Path) -> SweepFile:
    """Read a sweep's file. Raises `UserError` that names what is wrong with it."""
    found = build(SweepFile, load_preset(PRESETS, "", file), str(file))
    if found.preset and found.config:
        raise UserError(f"{file}: preset and config both say which settings to start from; leave one of them out")
    return found


def wanted_runs(
    file: Path, stores: Sequence[Path] = (), runs: Path = Path("runs"), local: Local | None = None
) -> list[WantedRun]:
    """Return the runs that the TOML `file` asks for, in its order, once all settings are found to fit their stores.

    `stores`: in place of those that the file names. Raises `UserError` that names the file, and the run where one is to
    blame: where settings do not fit, or two runs have one name. What only torch can tell is checked by `plan`.
    """
    asked, folder = read_sweep(file), runs / file.stem
    places = tuple(stores) or asked.stores
    if not places:
        raise UserError(f"{file} names no store; pass --store STORE, or write stores = [...] into it")
    _require_names(places, file)
    variants = [(place, *one) for place in places for one in _variants(asked, file)]
    if len(variants) > MOST_RUNS:
        raise UserError(f"{file} asks for {len(variants):,} runs, and a sweep has at most {MOST_RUNS:,}")
    opened = {place: Store.open(place, local) for place in dict.fromkeys(places)}
    found: dict[Path, WantedRun] = {}
    for place, given, differs in variants:
        where = {"store": place.name} if len(opened) > 1 else {}
        path = folder / _folder_name("-".join([*where.values(), given or name_of(differs)]), file)
        if path in found:
            remedy = "write them as [[runs]], each with another name = ..."
            raise UserError(f"{file}: two runs are called {path.name}; {remedy}")
        found[path] = WantedRun(
            path=path,
            store=opened[place],
            place=place,
            preset=asked.preset or preset_for(opened[place].request),
            file=asked.config,
            changes=dict(dotted(asked.set)) | differs,
            differs=where | differs,
            origin=file,
        )
        _check(found[path])
    return list(found.values())


def _check(run: WantedRun) -> None:
    try:
        read_and_check(run.preset, run.changes, run.file, run.store)
    except UserError as error:
        raise UserError(f"{run.where}: {error}") from error


def _require_names(places: Sequence[Path], origin: Path) -> None:
    """Raise `UserError` where two stores have one name: those of their runs' folders begin with it."""
    known: dict[str, Path] = {}
    for place in places:
        if (before := known.setdefault(place.name, place)) is not place:
            raise UserError(
                f"{origin}: the stores {before} and {place} are both called {place.name}, as the folders of their runs "
                "would be; sweep each by itself, with another --runs, or give a folder another name by a link (ln -s)"
            )


def name_of(differs: Mapping[str, Any]) -> str:
    """Return a name for the run of these settings, such as `k32-seed0`."""
    last = [name.rpartition(".")[2] for name in differs]
    short = [part if part == name or last.count(part) == 1 else name for name, part in zip(differs, last, strict=True)]
    return "-".join(f"{name}{_text(value)}" for name, value in zip(short, differs.values(), strict=True)) or "run"


def _variants(file: SweepFile, origin: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name, empty where none is given, and what differs, for each run on one store."""
    grid = dict(dotted(file.grid))
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{origin}: grid {name} is {brief(values)}: expected a list of values, such as [0, 1, 2]")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise UserError(f"{origin}: grid {name} has {brief(twice[0])} twice; leave one of them out")
    for given in file.runs or ({},):
        one = dict(dotted(given))
        name = one.pop("name", "")
        if both := sorted(one.keys() & grid.keys()):
            raise UserError(f"{origin}: {both[0]} is in [grid] and in [[runs]]; leave one of them out")
        for values in itertools.product(*grid.values()):
            combined = dict(zip(grid, values, strict=True))
            yield (
                ("-".join(filter(None, [str(name), name_of(combined) if combined else ""])) if name else ""),
                (one | combined),
            )


def _text(value: Any) -> str:
    text = "_".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def _folder_name(name: str, origin: Path) -> str:
    if len(name) > 200 or name.startswith(".") or not re.fullmatch(r"[A-Za-z0-9._+-]+", name):
        raise UserError(
            f"{origin}: {brief(name)} cannot be the name of a run's folder; give it a shorter name = ... of letters, "
            "digits and . _ + -"
        )
    return name
