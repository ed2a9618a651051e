"""Runs that differ in their seeds alone are one arm; arms are compared on the same rows at the same l0."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from shared.config import Config
from shared.console.progress import Progress
from shared.console.terminal import say
from shared.errors import UserError, warn
from shared.store.store import Store
from train.compare.consistency import consistency, densest
from train.compare.measure import Figures, Measured, Point, measure_run, require_finished
from train.run.bindings import foreign_block
from train.run.load_run import check_shards, place_of_store, remember_store
from train.run.settings import RunConfig, Settings, flat, read_config, resolve_exclusion

_NUMBERED = re.compile(r"-\d{3,}$")
"""The end of a name that nobody gave."""
_OF_IMPORTED = (
    *("source", "seed", "transcoder.d_sae", "transcoder.skip", "transcoder.source_rms_eps"),
    *("activation.kind", "activation.k"),
)
"""Settings of an imported run that say what it is; those of training were not used."""


_SEEDS = ("seed", "rows.seed")
"""Settings in which the runs of an arm may differ."""


class Spread(Config):
    """One figure over the seeds of an arm."""

    mean: float
    deviation: float | None
    """Standard deviation (n - 1); none: one seed."""


class Arm(Config):
    """Runs of the same settings but for the seed."""

    name: str
    differs: dict[str, Any]
    """The settings that are not the same in all arms."""
    runs: dict[str, Figures]
    """By path."""
    tradeoff: dict[str, list[Point]]
    """Of each run, held-out fvu by l0."""
    spread: dict[str, Spread]
    """Of every figure; those of a figure's parts by `whole.part`. One that a run lacks is left out."""
    pw_mcc: Spread | None
    """Over pairs of seeds, the mean cosine of decoder rows under the best one-to-one matching; none: one seed."""
    in_all_seeds: Spread | None = None
    """Over seeds, the share of latents that each other seed has, too: matched with a cosine of at least 0.7; none: one
    seed."""


class Comparison(Config):
    """What `python -m train compare` prints as JSON."""

    schema_version: Literal[1] = 1
    store: str
    """Digest of its request."""
    l0: float | None
    """Active latents per row, of all runs, on the calibration rows; none: each has its own."""
    report_rows: int
    """Stored rows of the report blocks, position 0 included."""
    matched_latents: int
    """The densest live latents of each run, at most this many, are matched across seeds."""
    arms: list[Arm]
    """In the order in which the runs were given; others are compared with the first."""


def compare_runs(
    runs: Sequence[Path | str],
    *,
    store: Path | str | None = None,
    l0: float | None = None,
    own_l0: bool = False,
    matched_latents: int = 4096,
    verify: bool = False,
) -> Comparison:
    """Measure finished `runs` on one store at one l0: that of their k, unless another is given.

    `own_l0`, and where they have no k in common: each at the l0 that it has, by its k or its learned thresholds.
    `store`: where it is now, if it was moved. `matched_latents`: as many are matched across seeds, at most. `verify`:
    read all of the store's shard files first, and not only some.

    Raises `UserError` when there are none, one is not finished, two are one run, or they are not of one store.
    """
    paths = [Path(run) for run in runs]
    if len(set(map(os.path.realpath, paths))) < max(len(paths), 1):
        raise UserError("compare needs different runs: RUN RUN ...")
    if l0 is not None and not 0 < l0 < math.inf:
        raise UserError(f"--l0 must be a number above 0, got {l0}")
    if own_l0 and l0 is not None:
        raise UserError("--own-l0 and --l0 cannot be combined; pass one of them")
    configs = [read_config(run) for run in paths]
    opened = _store(paths, configs, Path(store) if store else None)
    check_shards(opened, opened.record.training_blocks, verify=verify)
    found = [require_finished(run, config) for run, config in zip(paths, configs, strict=True)]
    wanted = None if own_l0 else _common_k(configs) if l0 is None else l0
    if wanted is None and not own_l0:
        say("the runs have no k in common: each is measured at its own l0; --l0 N measures all at one")
    groups = _groups(paths, configs)
    with opened.reading(), Progress("compare", len(paths), "runs") as progress:
        measured = []
        for i, run in enumerate(paths):
            measured.append(measure_run(run, opened, wanted, found[i]))
            progress.update(i + 1, run.name)
    if len({one.probed for one in measured if one.probed}) > 1:
        warn("the runs were probed for other labels or on other rows; probe them alike: python -m train probe RUN")
    names = _names(paths, configs, groups)
    arms = [
        _arm(name, [measured[i] for i in group], matched_latents) for name, group in zip(names, groups, strict=True)
    ]
    described = [_described(configs[group[0]]) for group in groups]
    odd = _odd(described)
    differs = [{name: one[name] for name in odd if name in one} for one in described]
    return Comparison(
        store=opened.request.digest,
        l0=wanted,
        report_rows=len(opened.record.report_blocks) * sum(s.rows for s in opened.record.plan.stored_strata),
        matched_latents=matched_latents,
        arms=[arm.model_copy(update={"differs": one}) for arm, one in zip(arms, differs, strict=True)],
    )


def _store(runs: Sequence[Path], configs: Sequence[RunConfig], path: Path | None) -> Store:
    store, first = Store.open(place_of_store(runs[0], configs[0], path)), configs[0]
    for run, config in zip(runs, configs, strict=True):
        if config.request != first.request:
            raise UserError(
                f"{run} was trained on request {config.request[:6]}, {runs[0]} on {first.request[:6]}: compare runs of "
                "one store"
            )
        if config.settings.source != first.settings.source:
            raise UserError(f"{run} reads the {config.settings.source}, {runs[0]} the {first.settings.source}")
    if store.request.digest != first.request:
        raise UserError(
            f"{runs[0]} was trained on request {first.request[:6]}, {store.path} is {store.request.digest[:6]}: pass "
            "the --store that the runs were trained on"
        )
    for run, config in zip(runs, configs, strict=True):
        if wrong := foreign_block(run, config, store, whole=False):
            raise UserError(
                f"{store.path} is not the store that {run} was trained on: {wrong}; compare runs of one store"
            )
        remember_store(run, config, store)
    return store.excluding(resolve_exclusion(store, Settings()))  # all runs are judged on the same rows


def _common_k(configs: Sequence[RunConfig]) -> float | None:
    """Return the k of all runs; none where they have others, or one has none."""
    found = {config.settings.activation.expected_l0 for config in configs}
    return found.pop() if len(found) == 1 else None


def _groups(runs: Sequence[Path], configs: Sequence[RunConfig]) -> list[list[int]]:
    """List the runs of each arm, as indices, in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(json.dumps(_described(config) | dict.fromkeys(_SEEDS), sort_keys=True), []).append(i)
    for arm in found.values():
        seeds = [_seeds(configs[i].settings) for i in arm]
        if len(set(seeds)) < len(seeds):
            raise UserError(
                f"{', '.join(str(runs[i]) for i in arm)} are one arm and have one seed twice: leave one out"
            )
    return list(found.values())


def _seeds(settings: Settings) -> tuple[int, int]:
    """Return the seeds of a run: of its weights, and of the order of its rows."""
    of_rows = settings.rows.seed
    return settings.seed, settings.seed if of_rows is None else of_rows


def _names(paths: Sequence[Path], configs: Sequence[RunConfig], groups: Sequence[Sequence[int]]) -> list[str]:
    """Name each arm: by what the names of its runs have in common; where those are but numbered, by what differs."""
    names = [_common_name([paths[i].name for i in group]) for group in groups]
    asked = [flat(configs[group[0]].asked or configs[group[0]].settings) for group in groups]
    odd = _odd(asked)
    if all(_NUMBERED.search(paths[i].name) for group in groups for i in group) and 1 <= len(odd) <= 2:
        names = [", ".join(f"{name.rpartition('.')[2]}={one.get(name)}" for name in odd) for one in asked]
    return names if len(set(names)) == len(names) else [paths[group[0]].name for group in groups]


def _common_name(names: Sequence[str]) -> str:
    """Return what the names of an arm's runs start with, without a mark of the seed at its end."""
    if len(names) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    if any(name[len(start) :][:1].isdigit() for name in names):  # the seed's number, not a part of it
        start = start.rstrip("0123456789")
    return re.sub(r"[-_.]+(s|seed)?[-_.]*$", "", start) or names[0]


def _odd(described: Sequence[dict[str, Any]]) -> list[str]:
    """List the settings, but for the seed, that are not the same in all arms."""
    names = {name for one in described for name in one}.difference(_SEEDS)
    return sorted(name for name in names if _differs(name, described))


def _differs(name: str, described: Sequence[dict[str, Any]]) -> bool:
    """Tell whether arms have other values of `name`; imported ones, which were not trained here, do not have all."""
    return len({json.dumps(one.get(name)) for one in described if name in one or "imported" not in one}) > 1


def _described(config: RunConfig) -> dict[str, Any]:
    """Return what defines a run, by dotted names."""
    more = config.model_dump(mode="json", include={"init_from", "first_block", "last_block", "extensions"})
    found = flat(config.settings) | more
    if config.imported is None:
        return found
    return {name: found[name] for name in _OF_IMPORTED if name in found} | {"imported": config.imported.name}


def _arm(name: str, runs: list[Measured], most: int) -> Arm:
    found = consistency([one.W_dec[densest(one.live, one.density, most)] for one in runs])
    flat = [dict(_numbers(one.figures.model_dump(mode="json"))) for one in runs]
    shared = [name for name in flat[0] if all(name in one for one in flat)]
    return Arm(
        name=name,
        differs={},
        runs={str(one.path): one.figures for one in runs},
        tradeoff={str(one.path): one.tradeoff for one in runs},
        spread={figure: spread([one[figure] for one in flat]) for figure in shared},
        pw_mcc=spread(found.pw_mcc) if len(runs) > 1 else None,
        in_all_seeds=spread(found.in_all) if len(runs) > 1 else None,
    )


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and standard deviation of at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Spread(mean=mean, deviation=None)
    return Spread(mean=mean, deviation=math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)))


def _numbers(figures: dict[str, Any], start: str = "") -> Iterator[tuple[str, float]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{start}{name}.")
        elif value is not None:
            yield f"{start}{name}", float(value)
