"""Which rows of a block are stored and in what order, and their statistics. Pure: takes and returns arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harvest.text.packing import Windows, model_positions
from shared.keyed import permutation
from shared.store.layout import RowCounts, StoreRequest
from shared.store.statistics import BINS, Moments, decode
from shared.store.strata import Stratum, quota, stratum_ranges

Array = NDArray[Any]
Buffers = dict[str, Array]
"""Rows [rows of the layout, width] as stored, by hook."""


class Measured(NamedTuple):
    """What is known of the rows of a hook in a stratum of a block."""

    moments: Moments
    norms: NDArray[np.float64]
    """[n] Euclidean"""


Measures = Mapping[tuple[str, str], Measured]
"""By hook and name of the stratum."""


def candidates(request: StoreRequest, windows: Windows, special: Sequence[int]) -> list[NDArray[np.int64]]:
    """List by stratum the rows of a block that may be stored: numbers `sequence * T + offset`, rising."""
    positions = model_positions(windows, request.documents).ravel()
    allowed = ~np.isin(windows.tokens.ravel(), special)
    ranges = stratum_ranges(request.edges, request.context_size)
    return [np.flatnonzero((positions >= start) & (positions < stop) & allowed) for start, stop in ranges]


def over_norm(rows: int, max_norm_quantile: float) -> int:
    """Return how many of `rows` rows have a norm above the quantile: known before any norm is."""
    return int(rows * (1 - max_norm_quantile) + 1e-9)


def block_counts(
    request: StoreRequest, windows: Windows, special: Sequence[int], rows: Sequence[int] | None = None
) -> list[RowCounts]:
    """Count by stratum where a block's rows go when `rows` of each are stored; none are when not given."""
    natural = [len(found) for found in candidates(request, windows, ())]
    allowed = [len(found) for found in candidates(request, windows, special)] if special else natural
    over = [over_norm(n, request.max_norm_quantile) for n in allowed]
    stored = list(rows or [0] * len(natural))
    return [
        RowCounts(natural=n, special=n - a, over_norm=o, stored=s, repeated=max(0, s - (a - o)))
        for n, a, o, s in zip(natural, allowed, over, stored, strict=True)
    ]


def quotas(request: StoreRequest, fewest: Sequence[int]) -> list[int]:
    """Return the rows of each stratum that every block stores, when each block has at least `fewest` to choose from."""
    starts = [start for start, _ in stratum_ranges(request.edges, request.context_size)]
    return [
        quota(rows, request.keep.get(start, 1.0), request.cap.get(start))
        for start, rows in zip(starts, fewest, strict=True)
    ]


def most_rows(request: StoreRequest, strata: Sequence[Stratum]) -> int:
    """Return the most rows that a block's layout has: where rows are excluded by norm, all have a place until then."""
    return sum(s.rows for s in strata) if request.max_norm_quantile == 1 else request.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """Where the rows of a block go: straight to their permuted place in a buffer, as the model gives them."""

    rows: NDArray[np.int64]
    """[R] the row `sequence * T + offset` that each place of the buffer holds, stratum after stratum"""
    places: dict[str, slice]
    """Where each stratum's rows lie in the buffer."""
    positions: NDArray[np.int64]
    """[S, T] as the model counts them"""
    order: NDArray[np.int64]
    """[R] places in order of the row they hold"""

    def batch(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Find for windows `start:stop` the buffer's places, and the row that goes to each, from the first window's."""
        context = self.positions.shape[1]
        low, high = np.searchsorted(self.rows[self.order], [start * context, stop * context])
        places = self.order[low:high]
        return places, self.rows[places] - start * context


def block_layout(
    request: StoreRequest, strata: Sequence[Stratum], windows: Windows, block: int, special: Sequence[int]
) -> BlockLayout:
    """Return the layout of a block: of every stratum, the first rows of a keyed permutation of its candidates.

    Where rows are excluded by norm, all candidates have a place, and `stored_rows` chooses. A stratum with fewer
    candidates than it stores repeats them in the same order.
    """
    ranges = stratum_ranges(request.edges, request.context_size)
    found = dict(zip(ranges, candidates(request, windows, special), strict=True))
    parts, places, first = [], {}, 0
    for stratum in strata:
        rows = found[stratum.start, stratum.stop]
        rows = rows[permutation(len(rows), "rows", request.seed, block, stratum.start)]
        parts.append(rows if request.max_norm_quantile < 1 else np.resize(rows, stratum.rows))
        places[stratum.name] = slice(first, first + len(parts[-1]))
        first += len(parts[-1])
    flat = np.concatenate(parts)
    positions = model_positions(windows, request.documents)
    return BlockLayout(rows=flat, places=places, positions=positions, order=np.argsort(flat, kind="stable"))


def stored_rows(stratum: Stratum, source: Array, max_norm_quantile: float) -> slice | NDArray[np.int64]:
    """Tell which of a stratum's rows in the buffer are stored, in order; `source` are its source rows [n, d_in]."""
    if max_norm_quantile == 1:
        return slice(None)
    order = np.argsort(np.linalg.norm(decode(source), axis=1), kind="stable")
    kept = np.sort(order[: len(source) - over_norm(len(source), max_norm_quantile)])
    return np.resize(kept, stratum.rows)


def stratum_arrays(
    request: StoreRequest, stratum: Stratum, block: int, layout: BlockLayout, buffers: Buffers
) -> dict[str, Array]:
    """Return the arrays of one stratum of a block, by name; views of the buffers where no row is excluded by norm."""
    places = layout.places[stratum.name]
    source, target = buffers[request.source_hook][places], buffers[request.target_hook][places]
    chosen = stored_rows(stratum, source, request.max_norm_quantile)
    rows = layout.rows[places][chosen]
    sequence, offset = np.divmod(rows, request.context_size)
    return {
        "source": source[chosen],
        "target": target[chosen],
        "position": layout.positions.ravel()[rows].astype(np.uint16),
        "sequence": (sequence + block * request.block_sequences).astype(np.uint32),
        "offset": offset.astype(np.uint16),
    }


def pack_moments(moments: Mapping[str, Moments]) -> dict[str, Array]:
    """Return tensors to save for moments by name; the norms' histogram, nearly all zeros, as its bins that are not."""
    tensors: dict[str, Array] = {}
    for name, value in moments.items():
        bins = np.flatnonzero(value.norms)
        tensors |= {f"{name}/mean": value.mean, f"{name}/m2": value.m2, f"{name}/rows": np.array([value.rows])}
        tensors |= {f"{name}/bins": bins.astype(np.int32), f"{name}/counts": value.norms[bins]}
    return tensors


def unpack_moments(tensors: Mapping[str, Array], name: str) -> Moments:
    """Return the moments saved under `name`."""
    norms = np.zeros(BINS)
    norms[tensors[f"{name}/bins"]] = tensors[f"{name}/counts"]
    rows = float(tensors[f"{name}/rows"][0])
    return Moments(rows=rows, mean=tensors[f"{name}/mean"], m2=tensors[f"{name}/m2"], norms=norms)
