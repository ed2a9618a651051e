"""Loops over active pairs of a token and a latent, grouped by latent, compiled by numba.

On one thread: they take seconds where the pass takes minutes, and compile in a fraction of the time.

Legend: S sequences, T context, F latents, N active pairs, R rows, P position strata, n samples, C tokens of a context.
A place is a token of S sequences: sequence * T + offset.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.keyed import mix

Array = NDArray[Any]
NOT_STORED = 255
"""The stratum of a token whose row is not in the store."""

_mix = njit(cache=True)(mix)


@njit(cache=True, nogil=True)
def scatter(
    order: Array,
    row_places: Array,
    row_starts: Array,
    row_latents: Array,
    row_values: Array,
    ends: Array,
    places: Array,
    values: Array,
) -> None:
    """Append the pairs of rows, taken in `order`, to those of their latents: `ends` [F] is where each one's end."""
    for row in order:
        for pair in range(row_starts[row], row_starts[row + 1]):
            at = ends[row_latents[pair]]
            places[at], values[at] = row_places[row], row_values[pair]
            ends[row_latents[pair]] = at + 1


@njit(cache=True, nogil=True)
def profile(
    starts: Array,
    places: Array,
    values: Array,
    stratum: Array,
    context_size: int,
    rows: Array,
    sums: Array,
    windows: Array,
    largest: Array,
) -> None:
    """Fill in the figures of every latent.

    They are rows and summed activation by stratum [F, P], sequences [F], and its largest activation [F].
    """
    for f in range(len(starts) - 1):
        last = -1
        for pair in range(starts[f], starts[f + 1]):
            s, sequence = stratum[places[pair]], places[pair] // context_size
            rows[f, s] += 1
            sums[f, s] += values[pair]
            windows[f] += sequence != last
            largest[f] = max(largest[f], values[pair])
            last = sequence


@njit(cache=True, nogil=True)
def _take(preferred: Array, stratum: Array, most: int, out: Array) -> None:
    """Fill `out` with the first of `preferred`, at most `most` of a stratum as long as others are left; rising."""
    counts, count = np.zeros(NOT_STORED + 1, np.int64), 0
    passed, passed_count = np.empty(len(out), np.int64), 0
    for one in preferred:
        if count == len(out):
            break
        if counts[stratum[one]] < most:
            counts[stratum[one]] += 1
            out[count] = one
            count += 1
        elif passed_count < len(out):
            passed[passed_count] = one
            passed_count += 1
    for i in range(min(passed_count, len(out) - count)):
        out[count] = passed[i]
        count += 1
    out[:count] = np.sort(out[:count])


@njit(cache=True, nogil=True)
def _windows(low: int, high: int, places: Array, values: Array, repeats: Array, context_size: int) -> Array:
    """Return the largest pair of every sequence, the first of equals, by falling value.

    `repeats` [S * T] are left out.
    """
    found, count, last = np.empty(high - low, np.int64), 0, -1
    for pair in range(low, high):
        if repeats[places[pair]]:
            continue
        sequence = places[pair] // context_size
        if sequence != last:
            found[count] = pair
            count += 1
        elif values[pair] > values[found[count - 1]]:
            found[count - 1] = pair
        last = sequence
    found = found[:count]
    return found[np.argsort(-values[found], kind="mergesort")]


@njit(cache=True, nogil=True)
def select(
    starts: Array,
    places: Array,
    values: Array,
    stratum: Array,
    repeats: Array,
    context_size: int,
    keys: Array,
    most_of_top: int,
    most_of_bin: int,
    top: Array,
    binned: Array,
    edges: Array,
) -> None:
    """Choose pairs of every latent, one of a sequence at most; see `train.samples.select`.

    `keys` [F] uint64 decide which of a bin are taken. `top` [F, n], `binned` [F, bins, n] are -1 where there are none
    left; `edges` [F, bins + 1] are activations between bins, untouched where nothing is left for them.
    """
    bins = binned.shape[1]
    for f in range(len(starts) - 1):
        windows = _windows(starts[f], starts[f + 1], places, values, repeats, context_size)
        of = stratum[places[windows]]
        ranks = np.full(top.shape[1], -1, np.int64)
        _take(np.arange(len(windows)), of, most_of_top, ranks)
        left = np.ones(len(windows), np.bool_)
        for i in range(len(ranks)):
            if ranks[i] >= 0:
                top[f, i], left[ranks[i]] = windows[ranks[i]], False
        rest = np.flatnonzero(left)
        if not len(rest):
            continue
        for b in range(bins):  # of rising values, and `rest` has them falling
            low, high = len(rest) - len(rest) * (b + 1) // bins, len(rest) - len(rest) * b // bins
            hashes = np.empty(high - low, np.uint64)
            for i in range(low, high):
                hashes[i - low] = _mix(np.uint64(places[windows[rest[i]]]) + keys[f])
            edges[f, b] = values[windows[rest[high - 1]]]
            ranks = np.full(binned.shape[2], -1, np.int64)
            _take(rest[low:high][np.argsort(hashes, kind="mergesort")], of, most_of_bin, ranks)
            for i in range(len(ranks)):
                if ranks[i] >= 0:
                    binned[f, b, i] = windows[ranks[i]]
        edges[f, bins] = values[windows[rest[0]]]


@njit(cache=True, nogil=True)
def _find(wanted: int, among: Array) -> Any:
    """Return where `wanted` is in `among`, which rises; -1 if it is not."""
    at = np.searchsorted(among, wanted)
    return at if at < len(among) and among[at] == wanted else -1


@njit(cache=True, nogil=True)
def contexts(
    peaks: Array,
    latents: Array,
    starts: Array,
    places: Array,
    values: Array,
    stratum: Array,
    tokens: Array,
    documents: Array,
    apart: bool,
    context_size: int,
    after: int,
    known_tokens: Array,
    known_places: Array,
    first: Array,
    length: Array,
    position: Array,
    activations: Array,
    stored: Array,
) -> None:
    """Find the contexts around places `peaks` [n] and what `latents` [n] are there: `activations` and `stored` [n, C].

    `first` [n] is the place of a context's first token, `length` [n] how many it has, and `position` [n] the peak's.
    `after` tokens follow the peak, where there are as many. A context stays in its sequence, and in its document where
    documents are `apart`. Position 0 is looked up at a place of the same token: `known_places` of `known_tokens`.
    """
    width = activations.shape[1]
    for i in range(len(peaks)):
        peak, f = peaks[i], latents[i]
        low = peak // context_size * context_size
        high = low + context_size
        if apart:
            start, stop = peak, peak + 1
            while start > low and documents[start - 1] == documents[peak]:
                start -= 1
            while stop < high and documents[stop] == documents[peak]:
                stop += 1
            low, high = start, stop
        position[i], length[i] = peak - low, min(width, high - low)
        first[i] = min(max(peak + 1 + after - width, low), high - length[i])
        mine = places[starts[f] : starts[f + 1]]
        for c in range(length[i]):
            place = first[i] + c
            if stratum[place] == NOT_STORED and place == low:
                known = _find(tokens[place], known_tokens)
                place = known_places[known] if known >= 0 else place
            stored[i, c] = stratum[place] != NOT_STORED
            found = _find(place, mine)
            activations[i, c] = values[starts[f] + found] if found >= 0 else 0.0
