"""Find outlier rows: those whose source or target is many times as long as is usual in their store.

Attention sinks are such rows (Sun et al. 2024, "Massive activations in large language models"): few, enormous, and
nearly constant. They would dominate a squared error. dictionary_learning and SAEDashboard leave out activations over
10 times the median norm; so does training here, by default.

A block's statistics list its long rows, so that most stores are not read for this. Stores from before there were such
lists are read where their histograms of norms have long rows, or as a whole where there is no histogram.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from shared.config import Config
from shared.console.progress import Progress
from shared.errors import CorruptData
from shared.files.untrusted import read_file
from shared.store.checks import fault, read_ledger
from shared.store.layout import moments_path
from shared.store.statistics import RowParts, bin_end, norm_bin, row_norms

Array = NDArray[Any]
Limits = Mapping[str, float | None]
"""The norm above which a row is an outlier, by side; none: no row is."""
LISTED_ABOVE = 4.0
"""Rows over this many times their block's median norm are listed in the block's statistics."""
_MOST_BYTES = 2**30
_ROWS_AT_ONCE = 4096
_SILENT = 2.0
"""Seconds for which nothing is said of how far the search is."""
_ROUNDING = 1e-3
"""Share by which a norm in float32 can differ from one in float64, and more."""


class Exclusion(Config):
    """Which rows a run leaves out. Resolved against its store and kept in config.json, so that it never changes."""

    source_norm: float | None
    """A row with a longer source is an outlier; none: no row is."""
    target_norm: float | None
    """A row with a longer target is an outlier; none: no row is."""
    training: bool
    """Whether outliers are left out of training."""
    figures: bool
    """Whether outliers are left out of means, scales, thresholds and headline figures."""
    position_0: bool
    """Whether position 0 is left out of training. It is in no headline figure either way."""

    @property
    def limits(self) -> dict[str, float | None]:
        """The limit of each side."""
        return {"source": self.source_norm, "target": self.target_norm}


class LongRows(NamedTuple):
    """The rows of one stratum and side of a block that are longer than `above`."""

    rows: NDArray[np.int64]
    """Counted from the block's first row of the stratum, rising."""
    norms: NDArray[np.float64]
    above: float


def norms_of(stored: RowParts) -> NDArray[np.float64]:
    """Return the Euclidean norms of stored rows [n, d], some thousand at once."""
    return np.concatenate([row_norms(stored[low : low + _ROWS_AT_ONCE])
                           for low in range(0, len(stored), _ROWS_AT_ONCE)] or [np.zeros(0)])  # fmt: skip


def long_rows(norms: NDArray[np.float64], above: float) -> LongRows:
    """List the rows whose norms [n] are above a limit.

    A row that is not finite is a fault and no outlier: training on it fails, and says so.
    """
    rows = np.flatnonzero((norms > above) & np.isfinite(norms))
    return LongRows(rows, norms[rows], above)


def pack_long_rows(found: Mapping[str, LongRows]) -> dict[str, Array]:
    """Return the tensors to save, for lists by `stratum/side`."""
    tensors: dict[str, Array] = {}
    for name, listed in found.items():
        tensors |= {f"{name}/long_rows": listed.rows, f"{name}/long_norms": listed.norms}
        tensors[f"{name}/long_above"] = np.array([listed.above])
    return tensors


def store_outliers(
    path: Path, blocks: int, strata: Mapping[str, int], limits: Limits, read: Callable[[int, str, str], Array]
) -> dict[str, NDArray[np.int64]]:
    """Find the outliers of a store at `path`, by stratum, counted over all of its blocks, rising.

    As `block_outliers`; `read` is told the block, too. Says how far it is where that takes more than two seconds: most
    stores list their long rows.
    """
    found: dict[str, list[NDArray[np.int64]]] = {name: [np.zeros(0, np.int64)] for name in strata}
    shown, began = None, time.monotonic()
    with ExitStack() as stack:
        for block in range(blocks if any(limits.values()) else 0):
            for name, rows in block_outliers(path, block, strata, limits, partial(read, block)).items():
                found[name].append(rows + block * strata[name])
            if time.monotonic() > began + _SILENT:
                shown = shown or stack.enter_context(Progress("finding outlier rows", blocks, "blocks", block))
                shown.update(block + 1)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def block_outliers(
    path: Path, block: int, strata: Mapping[str, int], limits: Limits, read: Callable[[str, str], Array]
) -> dict[str, NDArray[np.int64]]:
    """Find the outliers of a block of the store at `path`, by stratum, counted from the block's first row of each.

    `strata` has each stratum's rows in a block; `read(stratum, side)` gives its stored rows, and is called where the
    block's statistics do not tell. Raises `CorruptData` when the statistics are damaged.
    """
    tensors, found = _statistics(path, block), {}
    for stratum, rows in strata.items():
        parts = [np.zeros(0, np.int64)]
        for side, limit in limits.items():
            if limit is not None:
                parts.append(_side(tensors, f"{stratum}/{side}", rows, limit, partial(read, stratum, side)))
        found[stratum] = np.unique(np.concatenate(parts))
    return found


def _side(
    tensors: Mapping[str, Array], name: str, rows: int, limit: float, read: Callable[[], Array]
) -> NDArray[np.int64]:
    """Return the rows of one stratum and side that are longer than `limit`."""
    above = tensors.get(f"{name}/long_above")
    if above is not None and above.shape == (1,) and above[0] <= limit:
        found, norms = (tensors.get(f"{name}/long_{kind}", np.zeros(0)) for kind in ("rows", "norms"))
        if found.shape != norms.shape or found.dtype != np.int64 or ((found < 0) | (found >= rows)).any():
            raise CorruptData(f"the list of long rows of {name} is not of {rows:,} rows")
        return found[norms > limit]
    bins, counts = tensors.get(f"{name}/bins"), tensors.get(f"{name}/counts")
    if bins is None or counts is None or bins.shape != counts.shape:
        return long_rows(norms_of(read()), limit).rows
    some = counts[bins >= norm_bin(limit * (1 - 1e-6))].any()  # those norms were in float32
    return long_rows(norms_of(read()), limit).rows if some else np.zeros(0, np.int64)


def longest_norms(path: Path, block: int, names: Iterable[str]) -> dict[str, float]:
    """Return the norm that no stored row of a block is above, by `stratum/side` of `names`.

    Infinity where the block's statistics do not tell: those of older stores have no histograms. Raises `CorruptData`
    when the statistics are damaged.
    """
    tensors, found = _statistics(path, block), {}
    for name in names:
        bins = tensors.get(f"{name}/bins", np.zeros(0))
        found[name] = bin_end(int(bins.max())) * (1 + _ROUNDING) if len(bins) else np.inf
    return found


def _statistics(path: Path, block: int) -> dict[str, Array]:
    """Read the tensors of a block's statistics."""
    file, remedy = path / moments_path(block), f"repair it with: harvest repair {path}"
    if wrong := fault(file, read_ledger(path, block).moments):
        raise CorruptData(f"{file}: {wrong}; {remedy}")
    try:
        return load(read_file(file, _MOST_BYTES))
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptData(f"{file}: {error}; {remedy}") from error
