"""Sparse operations on CPU: loops compiled by numba, parallel over rows of the batch or over latents.

Every sum runs in one order whatever the number of threads, so results repeat bit for bit. Each function is compiled at
its first call on a machine, and kept on disk from then on.
Legend: B rows, O d_out, F latents, P prefixes, N active pairs.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Floats = NDArray[Any]
Ints = NDArray[np.int64]

_COMPILED: dict[str, Any] = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
_SUMS = {"contract", "reassoc"}
"""Products and sums may be fused and taken in lanes; NaN, inf and signed zeros keep their meaning."""
_LANE = 16


def compiled_before() -> bool:
    """Whether this machine has the loops already: compiling them takes some twenty seconds."""
    return any(Path(adam.stats.cache_path).glob("loops.adam-*.nbi"))


@njit(**_COMPILED)
def find_above(flat: Floats, floor: float, counts: Ints, out: Ints) -> None:
    """Where `flat` [n] is above `floor`, a number of its type, in as many equal parts as `counts` has.

    Those of a part lie in `out` [n], rising, from the part's own place on, and `counts` says how many they are. Few
    entries are above, so lanes without any are passed over.
    """
    size = -(-len(flat) // len(counts))
    for part in prange(len(counts)):
        low = np.int64(min(np.int64(part) * size, np.int64(len(flat))))
        high = np.int64(min(low + size, np.int64(len(flat))))
        at, whole = low, low + (high - low) // _LANE * _LANE
        for lane in range(low, whole, _LANE):
            some = np.int32(0)
            for i in range(lane, lane + _LANE):
                some |= np.int32(flat[i] > floor)
            if some:
                for i in range(lane, lane + _LANE):
                    if flat[i] > floor:
                        out[at] = i
                        at += 1
        for i in range(whole, high):
            if flat[i] > floor:
                out[at] = i
                at += 1
        counts[part] = at - low


@njit(**_COMPILED)
def largest_of_rows(pre_acts: Floats, dead: Ints, latents: Ints) -> None:
    """The places in `dead` [n], rising, of the largest pre-activations among `dead` latents of each row [B, F].

    As many as `latents` [B, k] is wide, at most n; of equal ones the first.
    """
    wanted = latents.shape[1]
    for b in prange(len(pre_acts)):
        values = np.empty(len(dead), pre_acts.dtype)
        for j in range(len(dead)):
            values[j] = pre_acts[b, dead[j]]
        least = np.partition(values, len(dead) - wanted)[len(dead) - wanted]
        equal = wanted
        for value in values:
            equal -= value > least
        at = 0
        for j in range(len(dead)):
            if values[j] > least or (values[j] == least and equal > 0):
                equal -= values[j] == least
                if at < wanted:
                    latents[b, at] = j
                at += 1


@njit(**_COMPILED)
def add_to_rows(rows: Floats, row: Floats) -> None:
    """Add `row` [F] to each of `rows` [B, F]."""
    for b in prange(len(rows)):
        for f in range(len(row)):
            rows[b, f] += row[f]


@njit(cache=True, nogil=True)
def group(keys: Ints, order: Ints, starts: Ints) -> None:
    """Pairs in order of `keys` [N], equal ones as they come: `order` [N], and where each key's begin, `starts`."""
    starts[:] = 0
    for key in keys:
        starts[key + 1] += 1
    for key in range(len(starts) - 1):
        starts[key + 1] += starts[key]
    place = starts[:-1].copy()
    for i in range(len(keys)):
        order[place[keys[i]]] = i
        place[keys[i]] += 1


@njit(fastmath=_SUMS, **_COMPILED)
def residuals(
    values: Floats, latents: Ints, starts: Ints, segment: Ints, W_dec: Floats, base: Floats, y: Floats, out: Floats
) -> None:
    """out[b, p] = base[b] + sum over the row's latents of prefix p of value * W_dec[latent] - y[b]; out [B, P, O]."""
    prefixes, width = out.shape[1], out.shape[2]
    for b in prange(out.shape[0]):
        first = base[np.int64(b) if len(base) > 1 else np.int64(0)]
        for o in range(width):
            out[b, 0, o] = first[o] - y[b, o]
        i = starts[b]
        for p in range(prefixes):
            if p:
                out[b, p] = out[b, p - 1]
            row = out[b, p]
            while i < starts[b + 1] and segment[latents[i]] == p:
                value, direction = values[i], W_dec[latents[i]]
                for o in range(width):
                    row[o] += value * direction[o]
                i += 1


@njit(fastmath=_SUMS, **_COMPILED)
def squares(rows: Floats, out: Floats) -> None:
    """Squared norm of each row [n, O]."""
    for b in prange(len(rows)):
        total = rows.dtype.type(0)
        for o in range(rows.shape[1]):
            total += rows[b, o] * rows[b, o]
        out[b] = total


@njit(fastmath=_SUMS, **_COMPILED)
def suffix_sums(residual: Floats, weights: Floats, out: Floats) -> None:
    """out[b, p] = sum over q >= p of 2 * weights[b, q] * residual[b, q]: the gradient at latents of segment p."""
    prefixes, width = out.shape[1], out.shape[2]
    for b in prange(out.shape[0]):
        last = 2 * weights[b, prefixes - 1]
        for o in range(width):
            out[b, prefixes - 1, o] = last * residual[b, prefixes - 1, o]
        for p in range(prefixes - 2, -1, -1):
            weight = 2 * weights[b, p]
            for o in range(width):
                out[b, p, o] = out[b, p + 1, o] + weight * residual[b, p, o]


@njit(fastmath=_SUMS, **_COMPILED)
def products(latents: Ints, starts: Ints, segment: Ints, W_dec: Floats, meet: Floats, out: Floats) -> None:
    """out[i] = <W_dec[latent], meet[b, segment of latent]> for every pair; meet [B, P, O]."""
    width = W_dec.shape[1]
    for b in prange(len(starts) - 1):
        for i in range(starts[b], starts[b + 1]):
            direction, other = W_dec[latents[i]], meet[b, segment[latents[i]]]
            total = W_dec.dtype.type(0)
            for o in range(width):
                total += direction[o] * other[o]
            out[i] = total


@njit(fastmath=_SUMS, **_COMPILED)
def sums_by_latent(
    order: Ints, starts: Ints, weights: Floats, rows: Ints, table: Floats, out: Floats, bias: Floats, add: bool
) -> None:
    """out[f] = sum over the latent's pairs of weight * table[row]; out [F, O], `add`: added to what is there.

    The sum of the weights is added to bias[f].
    """
    width = out.shape[1]
    for f in prange(len(out)):
        total, alone = out[f], bias[f]
        if not add:
            total[:] = 0
        for j in range(starts[f], starts[f + 1]):
            weight, row = weights[order[j]], table[rows[order[j]]]
            alone += weight
            for o in range(width):
                total[o] += weight * row[o]
        bias[f] = alone


@njit(fastmath=_SUMS, **_COMPILED)
def row_squares(grad: Floats, rows: Floats, unit: bool, parallel_part: Floats, out: Floats) -> None:
    """Squared norm of each gradient row [F, D], in float64; of unit rows, of the part at right angles to the row.

    `parallel_part` [F] gets <grad, row> for unit rows, and 0 else.
    """
    for f in prange(len(grad)):
        total, along = grad.dtype.type(0), grad.dtype.type(0)
        for d in range(grad.shape[1]):
            total += grad[f, d] * grad[f, d]
        if unit:
            for d in range(grad.shape[1]):
                along += grad[f, d] * rows[f, d]
        parallel_part[f] = along
        out[f] = max(np.float64(total) - np.float64(along) * np.float64(along), 0.0)


@njit(fastmath=_SUMS, **_COMPILED)
def adam(
    rows: Floats,
    grad: Floats,
    first: Floats,
    second: Floats,
    parallel_part: Floats,
    unit: bool,
    scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    correction1: float,
    correction2: float,
) -> None:
    """One step of Adam on rows [F, D], in place, with gradients scaled by `scale`.

    Of unit rows the gradient's part along the row is dropped before, and the norm restored after.
    """
    kind = rows.dtype.type
    a1, a2, b1, b2 = kind(beta1), kind(beta2), kind(1 - beta1), kind(1 - beta2)
    step, root, small = kind(lr / correction1), kind(1 / np.sqrt(correction2)), kind(eps)
    times = kind(scale)
    for f in prange(len(rows)):
        along = parallel_part[f]
        for d in range(rows.shape[1]):
            g = grad[f, d]
            if unit:
                g -= along * rows[f, d]
            g *= times
            m, v = a1 * first[f, d] + b1 * g, a2 * second[f, d] + b2 * g * g
            first[f, d], second[f, d] = m, v
            rows[f, d] -= step * m / (np.sqrt(v) * root + small)
        if unit:
            total = kind(0)
            for d in range(rows.shape[1]):
                total += rows[f, d] * rows[f, d]
            norm = np.sqrt(total)
            if norm > 0:
                for d in range(rows.shape[1]):
                    rows[f, d] /= norm
