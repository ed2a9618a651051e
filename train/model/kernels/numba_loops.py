"""Sparse operations on CPU: loops compiled by numba, parallel over rows of the batch or over latents.

Every sum runs in one order whatever the number of threads, so results repeat bit for bit. Each function is compiled at
its first call on a machine, and kept on disk from then on.
Legend: B rows, O d_out, F latents, P prefixes, N active pairs.
"""

from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Floats = NDArray[Any]
Ints = NDArray[np.int64]

_COMPILED: dict[str, Any] = {"parallel": True, "cache": True, "nogil": True, "error_model": "numpy"}
_SUMS = {"contract", "reassoc"}
"""Products and sums may be fused and taken in lanes; NaN, inf and signed zeros keep their meaning."""
_LANE = 16


def compiled_before() -> bool:
    """Tell whether this machine has the loops already: compiling them takes half a minute."""
    line = adam.py_func.__code__.co_firstlineno
    return any(Path(adam.stats.cache_path).glob(f"numba_loops.adam-{line}.*.nbi"))


@njit(**_COMPILED)
def find_above(pre_acts: Floats, floors: Floats, counts: Ints, flat: Ints, values: Floats) -> None:
    """Find where `pre_acts` [B, F] is above `floors` [F], and its value there; in as many row parts as `counts` has.

    Those of a part lie in `flat` and `values` [B * F], rising, from the part's own place on, and `counts` says how many
    they are. Few entries are above, so lanes without any are passed over.
    """
    width = pre_acts.shape[1]
    size, whole = -(-len(pre_acts) // len(counts)), width // _LANE * _LANE
    for part in prange(len(counts)):
        low = np.int64(min(np.int64(part) * size, np.int64(len(pre_acts))))
        high, at = np.int64(min(low + size, np.int64(len(pre_acts)))), low * width
        for b in range(low, high):
            row = pre_acts[b]
            for lane in range(0, whole, _LANE):
                some = np.int32(0)
                for f in range(lane, lane + _LANE):
                    some |= np.int32(row[f] > floors[f])
                if some:
                    for f in range(lane, lane + _LANE):
                        if row[f] > floors[f]:
                            flat[at], values[at] = b * width + f, row[f]
                            at += 1
            for f in range(whole, width):
                if row[f] > floors[f]:
                    flat[at], values[at] = b * width + f, row[f]
                    at += 1
        counts[part] = at - low * width


@intrinsic
def _widened(_: Any, value: Any) -> Any:
    """Return the bits of a bfloat16 as a float32; a float32 as it is."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        if value != types.uint16:
            return arguments[0]
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(arguments[0], word), word(16)), ir.FloatType())

    return types.float32(value), generate


@njit(**_COMPILED)
def round_rows(rows: Floats, words: Any, bits: Any, norms: Floats, lost: Floats) -> None:
    """Round `rows` [N, D] to the nearest bfloat16, ties to even: `bits` [N, D].

    `words` are the rows' own bits, uint32. `norms` [N] and `lost` [N] get the norms of each row and of what rounding
    took from it, which float32 holds exactly; both sums are in float64.
    """
    for i in prange(len(rows)):
        whole, rest = 0.0, 0.0
        for d in range(rows.shape[1]):
            word = words[i, d]
            short = np.uint16((word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
            bits[i, d] = short
            left = np.float64(rows[i, d] - _widened(short))
            whole += np.float64(rows[i, d]) * np.float64(rows[i, d])
            rest += left * left
        norms[i], lost[i] = np.sqrt(whole), np.sqrt(rest)


@njit(**_COMPILED)
def find_reaching(
    products: Any,
    bias: Floats,
    rows: Floats,
    columns: Floats,
    relative: float,
    floor: float,
    counts: Ints,
    flat: Ints,
    near: Floats,
    upper: Floats,
) -> None:
    """Find where the upper bound of a pre-activation is not below `floor`, in as many parts of rows as `counts` has.

    `products` [B, F] are float32, or the bits of bfloat16, and with `bias` [F] near the pre-activations: these are at
    most relative * |product| + rows[0, b] * columns[0, f] + rows[1, b] * columns[1, f] + columns[2, f] above. Results
    lie as those of `find_above`; one that is NaN is not below any floor.
    """
    width = products.shape[1]
    one, two, alone = columns[0], columns[1], columns[2]
    size = -(-len(products) // len(counts))
    for part in prange(len(counts)):
        whole = width // _LANE * _LANE  # here it is known not to be negative: indices are not checked for it
        low = np.int64(min(np.int64(part) * size, np.int64(len(products))))
        high, at = np.int64(min(low + size, np.int64(len(products)))), low * width
        for b in range(low, high):
            row, first, second = products[b], rows[0, b], rows[1, b]
            for lane in range(0, whole, _LANE):
                some = np.int32(0)
                for f in range(lane, lane + _LANE):
                    value = _widened(row[f])
                    margin = relative * abs(value) + (first * one[f] + (second * two[f] + alone[f]))
                    some |= np.int32(not (value + bias[f] + margin < floor))
                if some:
                    for f in range(lane, lane + _LANE):
                        value = _widened(row[f])
                        margin = relative * abs(value) + (first * one[f] + (second * two[f] + alone[f]))
                        if not (value + bias[f] + margin < floor):
                            flat[at], near[at], upper[at] = b * width + f, value + bias[f], value + bias[f] + margin
                            at += 1
            for f in range(whole, width):
                value = _widened(row[f])
                margin = relative * abs(value) + (first * one[f] + (second * two[f] + alone[f]))
                if not (value + bias[f] + margin < floor):
                    flat[at], near[at], upper[at] = b * width + f, value + bias[f], value + bias[f] + margin
                    at += 1
        counts[part] = at - low * width


@njit(cache=True, nogil=True, error_model="numpy")
def keep_pairs(
    flat: Ints,
    values: Floats,
    counts: Ints,
    size: int,
    width: int,
    least: float,
    rows: Ints,
    latents: Ints,
    kept: Floats,
    starts: Ints,
) -> None:
    """Keep len(rows) pairs of what `find_above` found: all of those above `least`, the first of those equal to it.

    `kept` gets their values, and `starts` [B + 1] where each row's begin.
    """
    ties = len(rows)
    for part in range(len(counts)):
        for i in range(part * size, part * size + counts[part]):
            ties -= values[i] > least
    at, row = 0, 0
    for part in range(len(counts)):
        for i in range(part * size, part * size + counts[part]):
            if values[i] > least or (values[i] == least and ties > 0):
                ties -= values[i] == least
                here = flat[i] // width
                while row <= here:
                    starts[row] = at
                    row += 1
                rows[at], latents[at], kept[at] = here, flat[i] - here * width, values[i]
                at += 1
    starts[row:] = at


@njit(**_COMPILED)
def largest_of_rows(pre_acts: Floats, among: Ints, parts: int, latents: Ints, values: Floats) -> None:
    """Find the largest pre-activations of each row [B, F] among the latents `among` [n], rising, and where they are.

    As many as `latents` [B, k] is wide, at most n; of equal ones the first. A row's k-th largest says about where to
    look in the next, so that few are compared; when they are too few, all are. A NaN that is compared is the largest.
    """
    wanted, size = latents.shape[1], -(-len(pre_acts) // parts)
    for part in prange(parts):
        low = np.int64(min(np.int64(part) * size, np.int64(len(pre_acts))))
        high = np.int64(min(low + size, np.int64(len(pre_acts))))
        found, places = np.empty(len(among), pre_acts.dtype), np.empty(len(among), np.int64)
        floor = pre_acts.dtype.type(-np.inf)
        for b in range(low, high):
            count = 0
            for latent in among:
                found[count], places[count] = pre_acts[b, latent], latent
                count += pre_acts[b, latent] > floor
            if count < wanted:
                count = len(among)
                for j in range(count):
                    found[j], places[j] = pre_acts[b, among[j]], among[j]
            least = np.partition(found[:count], count - wanted)[count - wanted]
            ties = wanted
            for j in range(count):
                ties -= found[j] > least or np.isnan(found[j])
            at = 0
            for j in range(count):
                if found[j] > least or np.isnan(found[j]) or (found[j] == least and ties > 0):
                    ties -= found[j] == least
                    if at < wanted:
                        latents[b, at], values[b, at] = places[j], found[j]
                    at += 1
            floor = least - pre_acts.dtype.type(0.15) * abs(least)


@njit(**_COMPILED)
def add_to_rows(rows: Floats, row: Floats) -> None:
    """Add `row` [F] to each of `rows` [B, F]."""
    for b in prange(len(rows)):
        for f in range(len(row)):
            rows[b, f] += row[f]


@njit(cache=True, nogil=True)
def group(keys: Ints, order: Ints, starts: Ints) -> None:
    """Put pairs in order of `keys` [N], equal ones as they come: `order` [N], and where each key's begin, `starts`."""
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
def products(rows: Ints, latents: Ints, left: Floats, right: Floats, bias: Floats, out: Floats) -> None:
    """Write out[i] = <left[row], right[latent]> + bias[latent] for every pair."""
    for i in prange(len(out)):
        one, other = left[rows[i]], right[latents[i]]
        total = bias[latents[i]]
        for d in range(len(one)):
            total += one[d] * other[d]
        out[i] = total


@njit(fastmath=_SUMS, **_COMPILED)
def prefix_loss(
    values: Floats,
    latents: Ints,
    starts: Ints,
    group: Ints,
    W_dec: Floats,
    base: Floats,
    y: Floats,
    weights: Floats,
    meet: Floats,
    errors: Floats,
    left: Floats,
    grad: Floats,
) -> None:
    """As `Fused.errors_and_gradients`, `weights` [P]. Four pairs at a time: sums are loaded and stored less often."""
    prefixes, width = meet.shape[1], meet.shape[2]
    kind = meet.dtype.type
    for b in prange(len(meet)):
        first, i, end = base[np.int64(b) if len(base) > 1 else np.int64(0)], starts[b], starts[b + 1]
        for o in range(width):
            meet[b, 0, o] = first[o] - y[b, o]
        for p in range(prefixes):
            if p:
                for o in range(width):
                    meet[b, p, o] = meet[b, p - 1, o]
            row, stop = meet[b, p], i
            while stop < end and group[latents[stop]] == p:
                stop += 1
            while i + 4 <= stop:
                v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
                w0, w1, w2, w3 = W_dec[latents[i]], W_dec[latents[i + 1]], W_dec[latents[i + 2]], W_dec[latents[i + 3]]
                for o in range(width):
                    row[o] += (v0 * w0[o] + v1 * w1[o]) + (v2 * w2[o] + v3 * w3[o])
                i += 4
            while i < stop:
                v0, w0 = values[i], W_dec[latents[i]]
                for o in range(width):
                    row[o] += v0 * w0[o]
                i += 1
            total = meet.dtype.type(0)
            for o in range(width):
                total += row[o] * row[o]
            errors[b, p] = total
        for o in range(width):
            left[b, o] = -meet[b, prefixes - 1, o]
            meet[b, prefixes - 1, o] *= kind(2 * weights[prefixes - 1])
        for p in range(prefixes - 2, -1, -1):
            twice = kind(2 * weights[p])
            for o in range(width):
                meet[b, p, o] = meet[b, p + 1, o] + twice * meet[b, p, o]
        for j in range(starts[b], end):
            direction, other = W_dec[latents[j]], meet[b, group[latents[j]]]
            total = meet.dtype.type(0)
            for o in range(width):
                total += direction[o] * other[o]
            grad[j] = total


@njit(fastmath=_SUMS, **_COMPILED)
def sums_by_latent(
    order: Ints, starts: Ints, weights: Floats, rows: Ints, table: Floats, out: Floats, bias: Floats, add: bool
) -> None:
    """Write out[f] = sum over the latent's pairs of weight * table[row]; out [F, O], `add`: added to what is there.

    The sum of the weights is added to bias[f].
    """
    width = out.shape[1]
    for f in prange(len(out)):
        total, alone, j, end = out[f], bias[f], starts[f], starts[f + 1]
        if not add:
            total[:] = 0
        while j + 4 <= end:
            i0, i1, i2, i3 = order[j], order[j + 1], order[j + 2], order[j + 3]
            v0, v1, v2, v3 = weights[i0], weights[i1], weights[i2], weights[i3]
            r0, r1, r2, r3 = table[rows[i0]], table[rows[i1]], table[rows[i2]], table[rows[i3]]
            alone += (v0 + v1) + (v2 + v3)
            for o in range(width):
                total[o] += (v0 * r0[o] + v1 * r1[o]) + (v2 * r2[o] + v3 * r3[o])
            j += 4
        while j < end:
            v0, r0 = weights[order[j]], table[rows[order[j]]]
            alone += v0
            for o in range(width):
                total[o] += v0 * r0[o]
            j += 1
        bias[f] = alone


@njit(fastmath=_SUMS, **_COMPILED)
def row_squares(grad: Floats, rows: Floats, unit: bool, parallel_part: Floats, out: Floats) -> None:
    """Compute each gradient row's squared norm [F, D], in float64; of unit rows, of the part orthogonal to the row.

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


@njit(fastmath=_SUMS, cache=True, nogil=True)
def _square(row: Floats) -> Any:
    total = row.dtype.type(0)
    for d in range(len(row)):
        total += row[d] * row[d]
    return total


@njit(**_COMPILED)
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
    """Take one step of Adam on rows [F, D], in place, with gradients scaled by `scale`.

    Of unit rows the gradient's part along the row is dropped before, and the norm restored after.

    Compiled without leave to fuse products with sums: what is fused, and so the last bit, would differ between the
    process that compiles this and those that load it (a test of tests/test_train.py).
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
            norm = np.sqrt(_square(rows[f]))
            if norm > 0:
                for d in range(rows.shape[1]):
                    rows[f, d] /= norm
