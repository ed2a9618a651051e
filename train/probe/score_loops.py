"""Loops over active pairs of a row and a latent, grouped by latent: F1, AUROC and sums by label, compiled by numba.

Legend: R rows, F latents, L labels, N active pairs, M pairs of a row and a label, E pairs of a latent and a label that
are scored, G groups of rows that are drawn together (documents), B draws.
Labels of rows are (label_starts [R + 1], label_ids [M]). A latent is 0 on the rows on which it is not active.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]


@njit(cache=True, nogil=True)
def best_cuts(
    starts: Array,
    rows: Array,
    values: Array,
    used: Array,
    label_starts: Array,
    label_ids: Array,
    positives: Array,
    f1: Array,
    cuts: Array,
) -> None:
    """Fill in the largest `f1` [F, L] of "the latent is above a cut" for the label, and that cut, on the rows `used`.

    `positives` [L] are the rows `used` of each label. A cut of 0 means that the latent is active at all.
    """
    hits = np.zeros(len(positives), np.int64)
    for f in range(len(starts) - 1):
        inside = starts[f] + np.flatnonzero(used[rows[starts[f] : starts[f + 1]]])
        order = inside[np.argsort(-values[inside])]
        hits[:] = 0
        low = 0
        while low < len(order):
            high = low
            while high < len(order) and values[order[high]] == values[order[low]]:
                for at in range(label_starts[rows[order[high]]], label_starts[rows[order[high]] + 1]):
                    hits[label_ids[at]] += 1
                high += 1
            below = values[order[high]] if high < len(order) else 0.0
            for one in order[low:high]:
                for at in range(label_starts[rows[one]], label_starts[rows[one] + 1]):
                    label = label_ids[at]
                    found = 2 * hits[label] / (high + positives[label])
                    if found > f1[f, label]:
                        f1[f, label], cuts[f, label] = found, below
            low = high


@njit(cache=True, nogil=True)
def sums(
    starts: Array,
    rows: Array,
    values: Array,
    used: Array,
    label_starts: Array,
    label_ids: Array,
    total: Array,
    squares: Array,
    by_label: Array,
) -> None:
    """Add each latent's values and squares [F] on the rows `used`, and its values on those of each label [F, L]."""
    for f in range(len(starts) - 1):
        for pair in range(starts[f], starts[f + 1]):
            row, value = rows[pair], np.float64(values[pair])
            if used[row]:
                total[f] += value
                squares[f] += value * value
                for at in range(label_starts[row], label_starts[row + 1]):
                    by_label[f, label_ids[at]] += value


@njit(cache=True, nogil=True)
def score(
    starts: Array,
    rows: Array,
    values: Array,
    used: Array,
    latents: Array,
    labels: Array,
    cuts: Array,
    masks: Array,
    groups: Array,
    weights: Array,
    row_counts: Array,
    label_counts: Array,
    precision: Array,
    recall: Array,
    f1: Array,
    auroc: Array,
) -> None:
    """Fill in precision, recall, F1 of "above its cut" and AUROC of the activation [E, B], on the rows `used`.

    Each of E has a latent, a label with its rows, `masks` [L, R], and a cut. In draw b a row counts `weights`
    [B, G] times by its group, and `row_counts` [B] and `label_counts` [L, B] are how often all rows, and those of a
    label, count. AUROC is the share of pairs of a row with and one without the label that the latent has in the right
    order, ties half; 0.5 where there are no pairs.
    """
    for e in range(len(latents)):
        first, last = starts[latents[e]], starts[latents[e] + 1]
        inside = first + np.flatnonzero(used[rows[first:last]])
        order = inside[np.argsort(-values[inside])]
        value, group, mask = values[order], groups[rows[order]], masks[labels[e]][rows[order]]
        for b in range(len(weights)):
            hits = above = 0.0  # of the rows with the label, and all, as far down as the walk has come
            hits_cut = above_cut = ordered = with_label = without = 0.0
            for i in range(len(value)):
                weight = weights[b, group[i]]
                if mask[i]:
                    with_label += weight
                else:
                    without += weight
                if i + 1 < len(value) and value[i + 1] == value[i]:
                    continue
                ordered += without * (hits + with_label / 2)
                hits, above = hits + with_label, above + with_label + without
                with_label = without = 0.0
                if value[i] > cuts[e]:
                    hits_cut, above_cut = hits, above
            positive, negative = label_counts[labels[e], b], row_counts[b] - label_counts[labels[e], b]
            ordered += (negative - (above - hits)) * (hits + (positive - hits) / 2)
            precision[e, b] = hits_cut / above_cut if above_cut > 0 else 0.0
            recall[e, b] = hits_cut / positive if positive > 0 else 0.0
            f1[e, b] = 2 * hits_cut / (above_cut + positive) if above_cut + positive > 0 else 0.0
            auroc[e, b] = ordered / (positive * negative) if positive * negative > 0 else 0.5


@njit(cache=True, nogil=True)
def logistic(x: Array, y: Array, weights: Array, ridge: float, steps: int) -> Array:
    """Return weights and bias [k + 1] of the logistic regression of `y` [n] on `x` [n, k], by Newton's method.

    Rows count `weights` [n] times; the squares of the weights, but not of the bias, cost half the `ridge`. A step that
    does not lower the loss is halved.
    """
    n, k = x.shape
    found, step = np.zeros(k + 1), np.zeros(k + 1)
    best = np.inf
    gradient, hessian = np.zeros(k + 1), np.zeros((k + 1, k + 1))
    for _ in range(steps):
        tried = found + step
        loss = 0.5 * ridge * (tried[:k] * tried[:k]).sum()
        gradient[:], hessian[:] = 0, 0
        for i in range(n):
            z = tried[k]
            for a in range(k):
                z += tried[a] * x[i, a]
            p = 1 / (1 + np.exp(-np.minimum(np.maximum(z, -500.0), 500.0)))
            loss += weights[i] * (np.log1p(np.exp(-np.abs(z))) + np.maximum(z, 0.0) - y[i] * z)
            slope, curve = weights[i] * (p - y[i]), weights[i] * p * (1 - p)
            for a in range(k):
                gradient[a] += slope * x[i, a]
                for b in range(a + 1):
                    hessian[a, b] += curve * x[i, a] * x[i, b]
                hessian[k, a] += curve * x[i, a]
            gradient[k] += slope
            hessian[k, k] += curve
        if loss > best:
            step /= 2
            continue
        gained, best, found = best - loss, loss, tried
        if gained < 1e-9 * (1 + abs(loss)):
            break
        for a in range(k):
            gradient[a] += ridge * found[a]
            hessian[a, a] += ridge
        hessian[k, k] += 1e-9
        for a in range(k + 1):
            for b in range(a):
                hessian[b, a] = hessian[a, b]
        step = -np.linalg.solve(hessian, gradient)
    return found


@njit(cache=True, nogil=True)
def absorbed(
    tokens: Array,
    starts: Array,
    latents: Array,
    values: Array,
    is_main: Array,
    projection: Array,
    cosine: Array,
    wanted: Array,
    least: tuple[float, float, float],
) -> tuple[float, float]:
    """Return how many of `tokens` are fully absorbed, and the sum of their absorption fractions (SAEBench).

    Active latents of each row are given by (starts [R + 1], latents [N], values [N]); `projection` [F] is what an
    activation of 1 adds along the probe, `cosine` [F] that of a decoder row with it, and `wanted` [R] what the
    target has along it. `least` are the least cosine of an absorbing latent, and of one in the fraction, and the least
    share that they add.
    """
    whole = parts = 0.0
    for row in tokens:
        main, main_active, top, top_cosine = 0.0, False, 0.0, 0.0
        three = np.zeros(3)  # the largest contributions of other latents, falling
        for pair in range(starts[row], starts[row + 1]):
            f = latents[pair]
            part = values[pair] * projection[f]
            if is_main[f]:
                main, main_active = main + part, True
                continue
            if part > top:
                top, top_cosine = part, cosine[f]
            if cosine[f] >= least[1] and part > three[2]:
                three[2] = part
                three[:] = -np.sort(-three)
        if wanted[row] <= 0:
            continue
        whole += (not main_active) and top_cosine >= least[0] and top >= least[2] * wanted[row]
        others = three.sum()
        if main >= wanted[row] or others < least[2] * wanted[row]:
            continue
        if main <= 0:
            parts += 1
        else:
            others = min(others, wanted[row] - main)
            parts += others / (others + main)
    return whole, parts
