"""Loops over pairs of latents that are active on the same row, or close in direction, compiled by numba.

Every sum runs in one order whatever the number of threads.
Legend: R rows, F latents, O d_out, N active pairs of a row and a latent, M partners kept of a latent.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

Floats = NDArray[Any]
Ints = NDArray[np.int64]

_SUMS = {"contract", "reassoc"}
"""As in `train.model.kernels.numba_loops`."""
_PARTS = 16
"""Of the latents, counted side by side: each needs memory for a count per latent."""


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def partners(
    rows: Ints,
    latents: Ints,
    values: Floats,
    starts: Ints,
    order: Ints,
    by_latent: Ints,
    total: int,
    least_together: int,
    both: bool,
    levels: Floats,
    over: Ints,
    found: Ints,
    correlation: Floats,
    spread: Floats,
) -> None:
    """Correlate every latent with those after it that are active on a row with it, over `total` rows.

    With `both`, with those before it, too: each pair is then met twice.
    Of the pairs with at least `least_together` rows in common, over[f, i] is how many are above levels[i]. The M
    largest correlations above 0 are kept, largest first: found [F, M] says with which latents, -1 for none, and
    correlation [F, M] what they are. spread [F] is the standard deviation of every latent.
    """
    most = found.shape[1]
    latent_count = len(by_latent) - 1
    mean = np.zeros(latent_count)
    for f in prange(latent_count):
        one, square = 0.0, 0.0
        for j in range(by_latent[f], by_latent[f + 1]):
            value = np.float64(values[order[j]])
            one += value
            square += value * value
        mean[f] = one / total
        variance = square / total - mean[f] * mean[f]
        spread[f] = np.sqrt(variance) if variance > 1e-12 * square / total else 0.0  # less is rounding
    for part in prange(_PARTS):
        counts, products = np.zeros(latent_count, np.int32), np.zeros(latent_count)
        touched = np.empty(latent_count, np.int32)
        for f in range(part, latent_count, _PARTS):  # in turn: early latents may fire more, and have more after them
            found[f, :], correlation[f, :], over[f, :] = -1, 0.0, 0
            if by_latent[f + 1] - by_latent[f] < least_together:
                continue
            size = 0
            for j in range(by_latent[f], by_latent[f + 1]):
                value = np.float64(values[order[j]])
                row = rows[order[j]]
                for i in range(starts[row] if both else order[j] + 1, starts[row + 1]):
                    other = latents[i]
                    if other == f:
                        continue
                    if counts[other] == 0:
                        touched[size] = other
                        size += 1
                    counts[other] += 1
                    products[other] += value * values[i]
            for t in range(size):
                other = np.int64(touched[t])
                count, product = counts[other], products[other]
                counts[other], products[other] = 0, 0.0
                scale = spread[f] * spread[other]
                if count < least_together or not scale > 0:
                    continue
                r = (product / total - mean[f] * mean[other]) / scale
                for level in range(len(levels)):
                    over[f, level] += r > levels[level]
                if r <= correlation[f, most - 1]:
                    continue
                place = most - 1
                while place > 0 and correlation[f, place - 1] < r:
                    correlation[f, place], found[f, place] = correlation[f, place - 1], found[f, place - 1]
                    place -= 1
                correlation[f, place], found[f, place] = r, other


@njit(cache=True, nogil=True, error_model="numpy")
def _met(
    rows: Ints, values: Floats, order: Ints, of: tuple[int, int, int, int], low: int, high: int
) -> tuple[int, float]:
    """Count the rows on which two latents are above 0, and sum their products there, but for rows from `low` to `high`.

    `of`: where the values of the first begin and end in `order`, and those of the second.
    """
    i, end, j, other_end = of
    count, total = 0, 0.0
    while i < end and j < other_end:
        one, other = rows[order[i]], rows[order[j]]
        if one < other or not values[order[i]] > 0 or low <= one < high:
            i += 1
        elif other < one or not values[order[j]] > 0:
            j += 1
        else:
            count += 1
            total += np.float64(values[order[i]]) * values[order[j]]
            i += 1
            j += 1
    return count, total


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def meetings(
    first: Ints,
    second: Ints,
    rows: Ints,
    values: Floats,
    order: Ints,
    by_latent: Ints,
    together: Ints,
    products: Floats,
) -> None:
    """Count, for each pair of latents [C], the rows on which both are above 0, and sum their products there."""
    for pair in prange(len(first)):
        of = by_latent[first[pair]], by_latent[first[pair] + 1], by_latent[second[pair]], by_latent[second[pair] + 1]
        together[pair], products[pair] = _met(rows, values, order, of, 0, 0)


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def add_to_sums(
    first: Ints,
    second: Ints,
    rows: Ints,
    values: Floats,
    order: Ints,
    by_latent: Ints,
    low: int,
    high: int,
    total: int,
    fade: float,
    sums: Floats,
) -> None:
    """Add, for each pair of latents [C], `total` rows to `sums` [C, 9], which `fade` multiplies first.

    These are: rows; those on which both are above 0, and the products of their values there; of the first latent the
    rows on which it is above 0, its values and their squares; the same of the second. Rows from `low` up to `high` do
    not count.
    """
    for pair in prange(len(first)):
        one, other = sums[pair, 3:6], sums[pair, 6:9]
        for i in range(9):
            sums[pair, i] *= fade
        sums[pair, 0] += total
        _add_moments(rows, values, order, by_latent[first[pair]], by_latent[first[pair] + 1], low, high, one)
        _add_moments(rows, values, order, by_latent[second[pair]], by_latent[second[pair] + 1], low, high, other)
        of = by_latent[first[pair]], by_latent[first[pair] + 1], by_latent[second[pair]], by_latent[second[pair] + 1]
        count, product = _met(rows, values, order, of, low, high)
        sums[pair, 1] += count
        sums[pair, 2] += product


@njit(cache=True, nogil=True, error_model="numpy")
def _add_moments(
    rows: Ints, values: Floats, order: Ints, begin: int, end: int, low: int, high: int, sums: Floats
) -> None:
    for i in range(begin, end):
        value = np.float64(values[order[i]])
        if value > 0 and not low <= rows[order[i]] < high:
            sums[0] += 1
            sums[1] += value
            sums[2] += value * value


@njit(parallel=True, cache=True, nogil=True, error_model="numpy", fastmath=_SUMS)
def dots(W_dec: Floats, first: Ints, second: Ints, found: Floats) -> None:
    """Compute the dot product of the rows [F, O] of each pair of latents."""
    for pair in prange(len(first)):
        one, other, total = W_dec[first[pair]], W_dec[second[pair]], found[pair] * 0
        for i in range(len(one)):
            total += one[i] * other[i]
        found[pair] = total


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def add_partners(W_dec: Floats, first: Ints, second: Ints, weights: Floats, parts: int, grad: Floats) -> None:
    """Add to each latent's row of `grad` [F, O] that of its pair's other latent by the pair's weight; O in `parts`."""
    width = W_dec.shape[1]
    for part in prange(parts):
        low, high = width * part // parts, width * (part + 1) // parts
        for pair in range(len(first)):
            weight = weights[pair]
            if weight != 0:
                one, other = W_dec[first[pair], low:high], W_dec[second[pair], low:high]
                to_one, to_other = grad[first[pair], low:high], grad[second[pair], low:high]
                for i in range(len(one)):
                    to_one[i] += weight * other[i]
                    to_other[i] += weight * one[i]


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def count_above(products: Floats, floor: float, counts: Ints) -> None:
    """Count the entries of each row of `products` [R, n] that lie above the diagonal and are above `floor`."""
    for i in prange(len(products)):
        row, count = products[i, i + 1 :], np.int64(0)
        for j in range(len(row)):
            count += row[j] > floor
        counts[i] = count


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def list_above(products: Floats, floor: float, starts: Ints, rows: Ints, columns: Ints, values: Floats) -> None:
    """List where the entries of `count_above` are and what they are, each row's from its place in `starts` on."""
    for i in prange(len(products)):
        at, j = starts[i], i + 1
        while at < starts[i + 1]:
            if products[i, j] > floor:
                rows[at], columns[at], values[at] = i, j, products[i, j]
                at += 1
            j += 1


@njit(cache=True, nogil=True, error_model="numpy")
def add_product_gradients(
    first: Ints,
    second: Ints,
    rows: Ints,
    values: Floats,
    order: Ints,
    by_latent: Ints,
    weights: Floats,
    grad: Floats,
) -> None:
    """Add to `grad` [N], for each value, that of its pair's other latent on the row, by the pair's weight [C]."""
    for pair in range(len(first)):
        i, j, weight = by_latent[first[pair]], by_latent[second[pair]], weights[pair]
        while i < by_latent[first[pair] + 1] and j < by_latent[second[pair] + 1]:
            one, other = rows[order[i]], rows[order[j]]
            if one < other or not values[order[i]] > 0:
                i += 1
            elif other < one or not values[order[j]] > 0:
                j += 1
            else:
                grad[order[i]] += weight * values[order[j]]
                grad[order[j]] += weight * values[order[i]]
                i += 1
                j += 1
