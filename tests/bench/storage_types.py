"""What rows would lose in smaller storage types than bfloat16, and what a training on such rows loses.

    python -m tests.bench.storage_types NAME STORE [--int8 STORE] [--steps 300] [--seeds 0 1] [--set a.b=value ...]
                                        [--work DIR]

writes docs/benchmarks.json and docs/benchmarks.md under "storage types, NAME". A type's floor is the squared error of
the stored rows over their variance around the mean of each dimension, at natural frequencies and without position 0:
what no transcoder trained on them can get below. Position 0 is told apart. Rows of STORE count as exact, so it is best
harvested in float32; then bfloat16 and float16 are measured as well. No scale sees more than its row, or statistics of
the store.

Trainings get the rows as each type gives them back, rounded to the store's own type, and are judged on the rows as they
are, at one l0. With `--int8`, the same harvest with `store.storage=int8`, no type is tried: trainings are on the two
stores, both judged on the rows of the first, and floors are those that the harvest measured. What was trained is kept
in `--work`, and not trained again.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from shared.store.mapped_array import MappedArray, RowArray
from shared.store.store import Store
from tests.bench.recipe import SMALL, figures_of
from tests.bench.record import record, sized
from tests.stores import decode
from train import load_settings, resume, train

ROWS = sized(16_384, 256)
"""Of each stratum, at most."""
Array = NDArray[np.float32]
Type = Callable[[Array, Array, Array], Array]
"""Rows [n, d] as they come back, from rows, and the mean and deviation [d] of each dimension."""


def _cast(kind: torch.dtype) -> Type:
    return lambda rows, mean, deviation: torch.from_numpy(rows).to(kind).float().numpy()


def _int8_by_row(rows: Array, mean: Array, deviation: Array) -> Array:
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 127
    return (np.rint(rows / scale) * scale).astype(np.float32)


def _int8_by_dimension(rows: Array, mean: Array, deviation: Array) -> Array:
    """Eight deviations either way: what is beyond is cut, and that is what makes the type unsafe."""
    scale = 8 * deviation / 127
    return (np.clip(np.rint((rows - mean) / scale), -127, 127) * scale + mean).astype(np.float32)


def _int8_by_both(rows: Array, mean: Array, deviation: Array) -> Array:
    """In units of each dimension's deviation, around its mean, by the largest of the row: nothing is cut."""
    return _int8_by_row((rows - mean) / deviation, mean, deviation) * deviation + mean


def _fp8_by_row(rows: Array, mean: Array, deviation: Array) -> Array:
    scale = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 448
    return _cast(torch.float8_e4m3fn)(rows / scale, mean, deviation) * scale


def _fp8_by_both(rows: Array, mean: Array, deviation: Array) -> Array:
    return _fp8_by_row((rows - mean) / deviation, mean, deviation) * deviation + mean


TYPES: dict[str, tuple[float, int, Type]] = {
    "bfloat16": (2, 0, _cast(torch.bfloat16)),
    "float16": (2, 0, _cast(torch.float16)),
    "int8, a scale per row": (1, 4, _int8_by_row),
    "int8, a scale per dimension": (1, 0, _int8_by_dimension),
    "int8, a scale per row and per dimension": (1, 4, _int8_by_both),
    "fp8 (e4m3), a scale per row": (1, 4, _fp8_by_row),
    "fp8 (e4m3), a scale per row and per dimension": (1, 4, _fp8_by_both),
}
"""Bytes of a value, bytes more for each row, and what comes back."""
STORED, HARVESTED = "rows as they are", "int8 as harvested"
TRAINED = ("bfloat16", "int8, a scale per row and per dimension", "fp8 (e4m3), a scale per row")
"""Types that a training is tried on."""


def main(arguments: list[str] | None = None) -> None:
    """Measure floors, train, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("store", type=Path)
    parser.add_argument("--int8", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value")
    parser.add_argument("--work", type=Path, default=Path(".recipe"))
    options = parser.parse_args(arguments)
    store = Store.open(options.store)
    other = Store.open(options.int8) if options.int8 else None
    figures = as_harvested(store, other) if other else of_types(store)
    for name in (STORED, HARVESTED) if other else (STORED, *(name for name in types(store) if name in TRAINED)):
        on = other if other and name == HARVESTED else store
        found = [trained(on, store, name, seed, options) for seed in options.seeds]
        if found:
            figures[f"training on {name}: fvu, held out"] = (statistics.mean(found), "")
        if len(found) > 1:
            figures[f"training on {name}: deviation of {len(found)} seeds"] = (statistics.stdev(found), "")
    given = [*(["--int8 STORE"] if other else []), "--steps", str(options.steps)]
    told = " ".join([options.name, "STORE", *given, *(["--set", *options.set] if options.set else [])])
    record(f"storage types, {options.name}", f"python -m tests.bench.storage_types {told}", figures)


def of_types(store: Store) -> dict[str, tuple[float, str]]:
    """Size and floors of each type."""
    figures: dict[str, tuple[float, str]] = {}
    for name, (size, more, kind) in types(store).items():
        width = (store.record.d_in + store.record.d_out) / 2
        figures[f"{name}: bytes of a value"] = (size + more / width, "B")
        figures |= floors(store, name, kind)
    return figures


def as_harvested(store: Store, int8: Store) -> dict[str, tuple[float, str]]:
    """Sizes of two stores of the same rows, and the floors that the harvest of the second measured."""
    if int8.record.storage_floor is None or int8.record.blocks != store.record.blocks:
        raise SystemExit(f"{int8.path} is not the harvest of {store.path} with store.storage=int8")
    bytes_of = {one.request.storage: (one.shard_bytes, "bytes") for one in (store, int8)}
    figures: dict[str, tuple[float, str]] = {f"{name}: rows and tokens": size for name, size in bytes_of.items()}
    floors_ = int8.record.storage_floor.model_dump().items()
    return figures | {f"{HARVESTED}: floor, {side}": (100 * share, "% of fvu") for side, share in floors_}


def types(store: Store) -> dict[str, tuple[float, int, Type]]:
    """Return the types but the store's own, and float16 of bfloat16's rows."""
    if store.request.storage == "float32":
        return TYPES
    return {name: found for name, found in TYPES.items() if "scale" in name}


def floors(store: Store, name: str, kind: Type) -> dict[str, tuple[float, str]]:
    """Squared error over variance, in percent of fvu, by side; and of position 0, over its mean square."""
    found = {}
    for side in ("source", "target"):
        mean, deviation = moments(store, side)
        error = variance = 0.0
        for stratum, part in store.strata.items():
            rows = stored(store, stratum, side)
            back = kind(rows, mean, deviation).astype(np.float64)
            squared = float(((back - rows) ** 2).sum(axis=1).mean())
            if part.stratum.is_position_0:
                whole = float((rows.astype(np.float64) ** 2).sum(axis=1).mean())
                found[f"{name}: floor of position 0, {side}"] = (100 * squared / whole, "% of its mean square")
                continue
            weight = part.stratum.natural_rows
            error += weight * squared
            variance += weight * float(((rows - mean.astype(np.float64)) ** 2).sum(axis=1).mean())
        found[f"{name}: floor, {side}"] = (100 * error / variance, "% of fvu")
    return found


def moments(store: Store, side: str) -> tuple[Array, Array]:
    """Mean and deviation of each dimension [d], of rows without position 0."""
    found = store.statistics["overall"][side]
    return found.mean.astype(np.float32), np.sqrt(found.variance + 1e-12).astype(np.float32)


def stored(store: Store, stratum: str, side: str) -> Array:
    """Rows of a stratum's training blocks [n, d], evenly spread."""
    array: RowArray = getattr(store.strata[stratum], side)
    first = store.record.training_blocks.start * store.strata[stratum].stratum.rows
    step = max(1, (array.rows - first) // ROWS)
    found = array.room(len(range(first, array.rows, step)))
    array.gather([(row, row + 1) for row in range(first, array.rows, step)], found)
    return decode(found, store.request.storage)


def trained(on: Store, store: Store, name: str, seed: int, options: argparse.Namespace) -> float:
    """Train on rows of `on` as a type gives them back, and return the fvu on the rows of `store` as they are."""
    common = (f"steps={options.steps}", f"seed={seed}", "threads=1", "samples.rows=0")
    settings = load_settings("tiny", [*common, *options.set, *SMALL])
    kind = list(TYPES).index(name) if name in TYPES else on.request.storage
    path = options.work.resolve() / f"{options.name}-{kind}-{seed}"
    with through(on, TYPES[name][2] if name in TYPES else None):
        if path.exists():
            resume(path)
        else:
            train(on.path, settings, path)
    return figures_of(path, store)["fvu, reported"]


@contextmanager
def through(store: Store, kind: Type | None) -> Iterator[None]:
    """Have every source and target row that is read come back as `kind` gives it, in the store's own type."""
    if kind is None:
        yield
        return
    known = {side: moments(store, side) for side in ("source", "target")}
    gather = MappedArray.gather

    def changed(self: MappedArray, runs: Any, out: Any) -> None:
        gather(self, runs, out)
        side, count = self.spec.path.split("/")[-1], sum(high - low for low, high in runs)
        if side in known:
            back = kind(decode(out[:count], store.request.storage), *known[side])
            out[:count] = encode(back, store.request.storage)

    with patch.object(MappedArray, "gather", changed):
        yield


def encode(rows: Array, storage: str) -> NDArray[Any]:
    """Return rows as the store keeps them."""
    if storage != "bfloat16":
        return rows.astype(storage)
    return torch.from_numpy(np.ascontiguousarray(rows)).to(torch.bfloat16).view(torch.uint16).numpy()


if __name__ == "__main__":
    main()
