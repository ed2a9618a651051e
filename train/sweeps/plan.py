"""The runs of a sweep as they are resolved, and which are trained at the same time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.config import brief
from shared.errors import UserError
from shared.resources import free_memory, usable_cores
from shared.store.store import Store
from train.live.run_files import CONFIG
from train.run.memory import passing_bytes, standing_bytes, training_bytes
from train.run.settings import RunConfig, Settings, default_threads, flat, load_settings, read_config, resolve
from train.sweeps.shared_process import rows_digest
from train.sweeps.wanted_runs import WantedRun

_MEMORY_SHARE = 0.8
"""Of the memory that is free: what runs side by side may take by projection."""
_NOT_COMPARED = ("threads", "device", "blas", "kernels", "resident_rows", "product_dtype")
"""Settings that a run keeps as it has them, where `auto` may now mean something else."""


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


def plan(wanted: Sequence[WantedRun]) -> list[PlannedRun]:
    """Return the runs of a sweep with all automatic choices made, those with the same rows one after the other.

    Raises `UserError` that names the file and the run: where settings do not fit the device, or a run is there already
    with other settings.
    """
    found = [_planned(one, len(wanted)) for one in wanted]
    order = list(dict.fromkeys(one.rows for one in found))
    return sorted(found, key=lambda one: order.index(one.rows))


def _planned(run: WantedRun, count: int) -> PlannedRun:
    try:
        asked = load_settings(run.preset, run.changes, file=run.file)
        settings = asked.model_copy(update={"threads": asked.threads or _threads(asked, count)})
        config = resolve(run.store, settings, None)
    except UserError as error:
        raise UserError(f"{run.where}: {error}") from error
    config = _as_started(run, config)
    return PlannedRun(
        path=run.path,
        store=run.place,
        settings=settings,
        config=config,
        differs=run.differs,
        **memory_of(config, run.store),
    )


def _threads(asked: Settings, runs: int) -> int:
    """Return the threads of each of so many runs, where the settings leave them to the sweep: a cut run needs 1."""
    return 1 if runs >= usable_cores() or asked.parallel.shards > 1 else default_threads()


def _as_started(run: WantedRun, config: RunConfig) -> RunConfig:
    """Return the settings of a run that is there, else `config`. Raises `UserError` when it was started with others."""
    if not (run.path / CONFIG).is_file():
        return config
    there = read_config(run.path)
    before, now = flat(there.settings), flat(config.settings)
    odd = [name for name in now if name not in _NOT_COMPARED and before.get(name) != now[name]]
    if odd or there.request != config.request:
        what = f"{odd[0]} = {brief(before.get(odd[0]))}, not {brief(now[odd[0]])}" if odd else "another store"
        raise UserError(
            f"{run.path} was started with {what}; give {run.origin} another file name, or another folder by --runs"
        )
    return there


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
    return min(len(group), at_once or (max(1, usable_cores() // threads) if device == "cpu" else 1))


def _kind(one: PlannedRun) -> tuple[str, int]:
    return one.config.settings.device, one.config.settings.threads


def _free_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    return free_memory()
