"""Which labels each latent stands for: those that its being above a cut tells best.

Legend: R rows, F latents, L labels, E pairs of a latent and a label that are scored, G documents, B draws.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.keyed import hash_integers
from train.probe import score_loops
from train.probe.probed_rows import ByLatent, ProbedRows

Array = NDArray[Any]

LABELS = 3
"""Of a latent that are kept."""
DRAWS = 100
"""Of the bootstrap over documents."""


class Scores(NamedTuple):
    """Latents with their labels, the best of each latent first; chosen on one half, scored on the other."""

    latents: Array
    """[E]"""
    labels: Array
    """[E]"""
    cuts: Array
    """[E] the activation above which the latent tells the label; 0: active at all"""
    precision: Array
    """[E]"""
    recall: Array
    """[E]"""
    f1: Array
    """[E, 3] with the ends of the 95 % interval"""
    auroc: Array
    """[E, 3]"""


def label_latents(pairs: ByLatent, rows: ProbedRows, labels: int = LABELS, draws: int = DRAWS) -> Scores:
    """Choose up to `labels` labels of each latent by F1 on the first half, and score them on the second."""
    latents, found, cuts = chosen_labels(pairs, rows, labels)
    groups = int(rows.groups.max()) + 1
    weights = np.concatenate([np.ones((1, groups)), drawn(np.unique(rows.groups[rows.scored]), groups, draws)])
    figures = [np.empty((len(latents), len(weights))) for _ in range(4)]
    at, masks = rows.groups[rows.scored], rows.masks[:, rows.scored]
    in_groups = np.stack([np.bincount(at[mask], minlength=groups) for mask in masks])
    score_loops.score(
        *pairs, rows.scored, latents, found, cuts, rows.masks, rows.groups, weights,
        weights @ np.bincount(at, minlength=groups), in_groups @ weights.T, *figures,
    )  # fmt: skip
    precision, recall, f1, auroc = figures
    return Scores(latents, found, cuts, precision[:, 0], recall[:, 0], interval(f1), interval(auroc))


def chosen_labels(pairs: ByLatent, rows: ProbedRows, most: int) -> tuple[Array, Array, Array]:
    """Return latents, labels and cuts [E]: the `most` best labels by F1 on the first half, of latents active there."""
    f1 = np.zeros((len(pairs.starts) - 1, len(rows.names)))
    cuts = np.zeros_like(f1)
    positives = rows.masks[:, ~rows.scored].sum(1)
    score_loops.best_cuts(*pairs, ~rows.scored, *rows.by_row, positives, f1, cuts)
    best = np.argsort(-f1, axis=1, kind="stable")[:, :most]
    latents, rank = np.nonzero(np.take_along_axis(f1, best, 1) > 0)
    labels = best[latents, rank]
    return latents, labels, cuts[latents, labels]


def drawn(among: Array, groups: int, draws: int) -> Array:
    """Draw as many of the groups `among` as there are, with repeats: how often each of `groups` was [B, G]."""
    picked = hash_integers(np.arange(draws * len(among)), "probe draws") % np.uint64(len(among))
    found = np.zeros((draws, groups))
    np.add.at(found, (np.arange(draws).repeat(len(among)), among[picked.astype(np.int64)]), 1.0)
    return found


def interval(figures: Array) -> Array:
    """Return [E, 3] the first of each row's figures, and the 2.5th and 97.5th percentile of the others."""
    if figures.shape[1] == 1:
        return np.repeat(figures, 3, 1)
    low, high = np.quantile(figures[:, 1:], [0.025, 0.975], axis=1)
    return np.stack([figures[:, 0], low, high], 1)
