"""Which runs a sweep is made of: a TOML file, the settings of each run, and which are trained at the same time."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.config import Config, brief, build, load_preset
from shared.errors import UserError
from shared.store.store import Local, Store
from train.live.run_files import CONFIG
from train.read_settings import PRESETS, preset_for
from train.run.memory import passing_bytes, standing_bytes, training_bytes
from train.run.settings import RunConfig, Settings, flat, load_settings, read_config, resolve
from train.sweeps.shared_process import rows_digest

MOST_RUNS = 1000
_MEMORY_SHARE = 0.8
"""Of the memory that is free: what runs side by side may take by projection."""
_NOT_COMPARED = ("threads", "device", "blas", "kernels", "resident_rows", "product_dtype")
"""Settings that a run keeps as it has them, where `auto` may now mean something else."""


class SweepFile(Config):
    """What FILE.toml says. Settings are named as for `--set`, as dotted names or as tables."""

    preset: str | None = None
    """The preset of all runs; none: for each store the one that `train run` takes there."""
    config: Path | None = None
    """A TOML file of settings that replaces the preset."""
    stores: tuple[Path, ...] = ()
    """Stores to train on, each run on each of them; `--store` replaces them."""
    set: dict[str, Any] = {}
    """Settings of all runs."""
    grid: dict[str, Any] = {}
    """Settings with a list of values each: a run for every combination."""
    runs: tuple[dict[str, Any], ...] = ()
    """Settings of runs one by one, each with a `name` if it is to have one; with a grid, each is combined with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRun:
    """A run of a sweep."""

    path: Path
    store: Path
    settings: Settings
    """As they are asked for, with a number of threads."""
    config: RunConfig
    """As they are resolved; of a run that is there, its own."""
    differs: dict[str, Any]
    """What the file's grid and list say of it, and the store where there are several."""
    standing_bytes: int
    """Of its device, which it holds from step to step, by projection."""
    passing_bytes: int
    """That it takes beside those while it computes: those of its largest part."""

    @property
    def name(self) -> str:
        """Its folder's."""
        return self.path.name

    @property
    def rows(self) -> str:
        """Digest of the rows it is trained on, and their order."""
        return rows_digest(self.config, self.store)

    @property
    def memory(self) -> int:
        """Bytes of its device that it takes by projection, alone."""
        return self.standing_bytes + self.passing_bytes


def read_sweep(file: Path) -> SweepFile:
    """Read a sweep's file. Raises `UserError` that names what is wrong with it."""
    return build(SweepFile, load_preset(PRESETS, "", file), str(file))


def plan(
    file: SweepFile, origin: Path, folder: Path, stores: Sequence[Path], local: Local | None = None
) -> list[PlannedRun]:
    """Return all runs of a sweep whose folder is `folder`, those with the same rows one after the other.

    Raises `UserError` that names `origin`, the file, and the run: where settings do not fit, two runs have one name, or
    a run is there already with other settings.
    """
    places = tuple(stores) or file.stores
    if not places:
        raise UserError(f"{origin} names no store; pass --store STORE, or write stores = [...] into it")
    _require_names(places, origin)
    wanted = [(place, *one) for place in places for one in _variants(file, origin)]
    if len(wanted) > MOST_RUNS:
        raise UserError(f"{origin} asks for {len(wanted):,} runs, and a sweep has at most {MOST_RUNS:,}")
    opened = {place: Store.open(place, local) for place in dict.fromkeys(places)}
    found: list[PlannedRun] = []
    for place, given, differs in wanted:
        where = {"store": place.name} if len(opened) > 1 else {}
        name = "-".join([*where.values(), given or name_of(differs)])
        path = folder / _folder_name(name, origin)
        if any(path == other.path for other in found):
            raise UserError(f"{origin}: two runs are called {path.name}; give each of [[runs]] another name = ...")
        preset = file.preset or preset_for(opened[place].request)
        settings = _settings(file, preset, differs, f"{origin}, run {path.name}", len(wanted))
        config = _config(path, opened[place], settings, origin)
        found.append(
            PlannedRun(
                path=path,
                store=place,
                settings=settings,
                config=config,
                differs=where | differs,
                **memory_of(config, opened[place]),
            )
        )
    order = list(dict.fromkeys(one.rows for one in found))
    return sorted(found, key=lambda one: order.index(one.rows))


def _require_names(places: Sequence[Path], origin: Path) -> None:
    """Raise `UserError` where two stores have one name: those of their runs' folders begin with it."""
    known: dict[str, Path] = {}
    for place in places:
        if (before := known.setdefault(place.name, place)) is not place:
            raise UserError(
                f"{origin}: the stores {before} and {place} are both called {place.name}, as the folders of their runs "
                "would be; sweep each by itself, with another --runs, or give a folder another name by a link (ln -s)"
            )


def memory_of(config: RunConfig, store: Store) -> dict[str, int]:
    """Return what a run holds of its device's memory, and what it takes beside that while it computes."""
    if config.settings.device == "cpu":
        return {"standing_bytes": standing_bytes(config), "passing_bytes": passing_bytes(config, store)}
    return {"standing_bytes": training_bytes(config), "passing_bytes": 0}  # torch keeps there what a run has freed


def group_bytes(group: Sequence[PlannedRun], at_once: int | None = None) -> int:
    """Return what runs side by side take by projection: those that compute at a time take most."""
    largest = sorted((one.passing_bytes for one in group), reverse=True)
    return sum(one.standing_bytes for one in group) + sum(largest[: lanes(group, at_once)])


def rounds(runs: Sequence[PlannedRun], at_once: int | None = None) -> list[list[PlannedRun]]:
    """Return the runs in groups that are trained side by side, one group after the other.

    As many are in a group as fit into memory by projection, one at least. All of a group are on one device, with one
    number of threads, which is a property of the process.
    """
    free = {device: _free_bytes(device) * _MEMORY_SHARE for device in {one.config.settings.device for one in runs}}
    found: list[list[PlannedRun]] = []
    for one in runs:
        kind = _kind(one)
        for group in found:
            if _kind(group[0]) == kind and group_bytes([*group, one], at_once) <= free[kind[0]]:
                group.append(one)
                break
        else:
            found.append([one])
    return found


def lanes(group: Sequence[PlannedRun], at_once: int | None = None) -> int:
    """Return how many runs of a group work at a time: on CPU one for every so many cores as a run has threads."""
    device, threads = _kind(group[0])
    return min(len(group), at_once or (max(1, _cores() // threads) if device == "cpu" else 1))


def name_of(differs: Mapping[str, Any]) -> str:
    """Return a name for the run of these settings, such as `k32-seed0`."""
    last = [name.rpartition(".")[2] for name in differs]
    short = [part if part == name or last.count(part) == 1 else name for name, part in zip(differs, last, strict=True)]
    return "-".join(f"{name}{_text(value)}" for name, value in zip(short, differs.values(), strict=True)) or "run"


def dotted(tables: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of nested tables by dotted name."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


def _variants(file: SweepFile, origin: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name, empty where none is given, and what differs, for each run on one store."""
    grid = dict(dotted(file.grid))
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{origin}: grid {name} is {brief(values)}: expected a list of values, such as [0, 1, 2]")
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


def _settings(file: SweepFile, preset: str, differs: Mapping[str, Any], where: str, count: int) -> Settings:
    try:
        found = load_settings(preset, dict(dotted(file.set)) | dict(differs), file=file.config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    threads = found.threads or (1 if count >= _cores() else torch.get_num_threads())
    return found.model_copy(update={"threads": threads})


def _config(path: Path, store: Store, settings: Settings, origin: Path) -> RunConfig:
    """Resolve a run's settings. Raises `UserError` when it is there, and was started with others."""
    try:
        config = resolve(store, settings, None)
    except UserError as error:
        raise UserError(f"{origin}, run {path.name}: {error}") from error
    if not (path / CONFIG).is_file():
        return config
    there = read_config(path)
    before, now = flat(there.settings), flat(config.settings)
    odd = [name for name in now if name not in _NOT_COMPARED and before.get(name) != now[name]]
    if odd or there.request != config.request:
        what = f"{odd[0]} = {brief(before.get(odd[0]))}, not {brief(now[odd[0]])}" if odd else "another store"
        raise UserError(f"{path} was started with {what}; give {origin} another file name, or another folder by --runs")
    return there


def _kind(one: PlannedRun) -> tuple[str, int]:
    return one.config.settings.device, one.config.settings.threads


def _cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(found) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
