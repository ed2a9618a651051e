"""k-sparse probes: how well the k best of many columns tell a label (Gurnee et al. 2023, arXiv 2305.01610).

Columns are latents, directions or dimensions. Those with the largest difference of means between rows with and without
the label, over their deviation, are chosen on one half of the documents; a logistic regression on the first k of them
is fitted there, with the cut at which its F1 is largest; F1 is that of the other half.

Legend: R rows, C columns, D d_in, L labels, K most columns of a probe.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.probe import score_loops
from train.probe.probed_rows import ByLatent, ProbedRows

Array = NDArray[Any]

MOST = 5
"""Columns of a probe: it is fitted for each number of them up to this one, as splits are found by all."""
SHOWN = (1, 2, 5)
"""Numbers of columns that are headlines."""
_RIDGE, _STEPS = 1.0, 50
_FITTED = 2**13
"""Rows with and without the label, at most, that a probe is fitted on: of more, every n-th counts n times."""


class Columns(Protocol):
    """Columns of all probed rows."""

    def moments(self, rows: ProbedRows) -> tuple[Array, Array, Array]:
        """Return the sums of each [C], of its squares [C], and of its values on each label [C, L]; the first half's."""

    def of(self, chosen: Array) -> Array:
        """Return some of them, [R, n] float64."""


@dataclass(frozen=True, slots=True)
class SparseColumns:
    """The activations of latents."""

    pairs: ByLatent
    count: int
    """R"""

    def moments(self, rows: ProbedRows) -> tuple[Array, Array, Array]:
        """Return as `Columns` does."""
        total, squares = np.zeros((2, len(self.pairs.starts) - 1))
        by_label = np.zeros((len(total), len(rows.names)))
        score_loops.sums(*self.pairs, ~rows.scored, *rows.by_row, total, squares, by_label)
        return total, squares, by_label

    def of(self, chosen: Array) -> Array:
        """Return as `Columns` does."""
        found = np.zeros((self.count, len(chosen)))
        for i, latent in enumerate(chosen):
            at = slice(self.pairs.starts[latent], self.pairs.starts[latent + 1])
            found[self.pairs.rows[at], i] = self.pairs.values[at]
        return found


@dataclass(frozen=True, slots=True)
class DenseColumns:
    """The dimensions of rows."""

    x: Tensor
    """[R, D] float32"""

    def moments(self, rows: ProbedRows) -> tuple[Array, Array, Array]:
        """Return as `Columns` does."""
        x = self.x[torch.from_numpy(~rows.scored)]
        masks = torch.from_numpy(rows.masks[:, ~rows.scored]).to(x)
        sums = x.sum(0, dtype=torch.float64), x.square().sum(0, dtype=torch.float64)
        return sums[0].cpu().numpy(), sums[1].cpu().numpy(), (masks @ x).T.double().cpu().numpy()

    def of(self, chosen: Array) -> Array:
        """Return as `Columns` does."""
        found: Array = self.x[:, torch.from_numpy(chosen)].double().cpu().numpy()
        return found


class SparseProbes(NamedTuple):
    """The probes of every label."""

    chosen: Array
    """[L, K] columns, the best first"""
    f1: Array
    """[L, K] on the second half, of the probe of 1, 2, ... columns"""


def sparse_probes(columns: Columns, rows: ProbedRows) -> SparseProbes:
    """Fit the probes of all labels."""
    difference = differences(*columns.moments(rows), rows)
    chosen = np.argsort(-np.abs(difference), axis=0, kind="stable")[:MOST].T
    f1 = np.stack([_probe(columns.of(one), mask, rows.scored) for one, mask in zip(chosen, rows.masks, strict=True)])
    return SparseProbes(chosen, f1)


def differences(total: Array, squares: Array, by_label: Array, rows: ProbedRows) -> Array:
    """Return the difference of means over the deviation [C, L], of columns with these moments; 0 for a constant one."""
    count = int((~rows.scored).sum())
    positives = rows.masks[:, ~rows.scored].sum(1)
    variance = squares / count - np.square(total / count)
    constant = variance <= 1e-12 * squares / count
    found = by_label / positives - (total[:, None] - by_label) / (count - positives)
    return np.where(constant[:, None], 0.0, found / np.sqrt(np.where(constant, 1.0, variance))[:, None])


def _probe(x: Array, mask: Array, scored: Array) -> Array:
    """Return F1 on the second half of the probe of the first k of columns `x` [R, K], for each k."""
    active = x.any(1)
    quiet = np.array([[(~active & (scored == half) & (mask == label)).sum() for label in (0, 1)] for half in (0, 1)])
    scale = np.sqrt(np.square(x).mean(0))
    x = x / np.where(scale > 0, scale, 1.0)
    parts = []
    for half, most in ((False, _FITTED), (True, len(x))):
        at, weights = _thinned(active & (scored == half), mask, most)
        parts.append((  # rows on which no column is active are two, which count so many times
            np.concatenate([x[at], np.zeros((2, x.shape[1]))]),
            np.concatenate([mask[at], [0.0, 1.0]]),
            np.concatenate([weights, quiet[int(half)]]),
        ))  # fmt: skip
    (fit, fit_label, fit_weight), (test, test_label, test_weight) = parts
    found = []
    for k in range(1, x.shape[1] + 1):
        weights = score_loops.logistic(np.ascontiguousarray(fit[:, :k]), fit_label, fit_weight, _RIDGE, _STEPS)
        cut = best_cut(fit[:, :k] @ weights[:k], fit_label, fit_weight)
        found.append(f1_above(test[:, :k] @ weights[:k], cut, test_label, test_weight))
    return np.array(found)


def _thinned(wanted: Array, mask: Array, most: int) -> tuple[Array, Array]:
    """Return numbers of rows that are `wanted`, about `most` with and as many without the label, and their weights."""
    parts = [np.flatnonzero(wanted & (mask == label)) for label in (False, True)]
    every = [max(1, len(part) // most) for part in parts]
    kept = [part[::n] for part, n in zip(parts, every, strict=True)]
    weights = [np.full(len(some), len(part) / max(len(some), 1)) for some, part in zip(kept, parts, strict=True)]
    return np.concatenate(kept), np.concatenate(weights)


def best_cut(scores: Array, label: Array, weights: Array) -> float:
    """Return the cut [n] rows above which have the largest F1 for `label`; rows count `weights` times."""
    order = np.argsort(-scores, kind="stable")
    scores, hits, above = scores[order], np.cumsum((weights * label)[order]), np.cumsum(weights[order])
    f1 = 2 * hits / np.maximum(above + hits[-1], 1e-300)
    last = np.append(scores[1:] < scores[:-1], True)  # of rows with the same score
    best = int(np.argmax(np.where(last, f1, -1)))
    return float(scores[best + 1]) if best + 1 < len(scores) else -np.inf


def f1_above(scores: Array, cut: float, label: Array, weights: Array) -> float:
    """Return the F1 of "above the cut" for `label`; 0 where nothing is above it and nothing has the label."""
    above = scores > cut
    both = float((weights * label)[above].sum())
    total = float(weights[above].sum() + (weights * label).sum())
    return 2 * both / total if total else 0.0
