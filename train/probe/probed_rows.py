"""The rows that are probed: in two halves by document, with their labels.

Legend: S sequences, T context, R rows, F latents, L labels, N active pairs. Rows are numbered by rising place.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError
from train.probe.labels import Labels
from train.samples.context_loops import NOT_STORED
from train.samples.encode import Activations

Array = NDArray[Any]

LEAST_ROWS = 20
"""Rows of each half that a label must have."""
MOST_SHARE = 0.5
"""Of the rows of each half that it may have: what always fires would score high on a more frequent one."""
LEAST_DOCUMENTS = 8
"""With fewer, halves and draws are of sequences."""


class ByLatent(NamedTuple):
    """Active pairs of a row and a latent, grouped by latent, rows rising."""

    starts: Array
    """[F + 1] int64"""
    rows: Array
    """[N] int64"""
    values: Array
    """[N] float32"""


@dataclass(frozen=True, kw_only=True)
class ProbedRows:
    """Rows with labels, all but those of position 0."""

    number: Array
    """[S * T] int64: each place's row, -1 for one that is not probed"""
    unit: Literal["documents", "sequences"]
    groups: Array
    """[R] int64: the document or sequence of each, from 0"""
    scored: Array
    """[R] bool: on the half on which figures are; labels, cuts, latents and weights are chosen on the other"""
    names: tuple[str, ...]
    """[L] of the labels that are probed"""
    masks: Array
    """[L, R] bool"""
    left_out: tuple[str, ...]
    """Labels of too few or too many rows."""

    @cached_property
    def by_row(self) -> tuple[Array, Array]:
        """Where each row's labels begin [R + 1], and the labels."""
        rows, labels = np.nonzero(self.masks.T)
        return np.searchsorted(rows, np.arange(self.masks.shape[1] + 1)), labels

    def pairs(self, found: Activations) -> ByLatent:
        """Return the pairs of these rows."""
        rows = self.number[found.places]
        kept = rows >= 0
        return ByLatent(np.concatenate([[0], np.cumsum(kept)])[found.starts], rows[kept], found.values[kept])


def probed_rows(found: Activations, labels: Labels, position_0: int | None) -> ProbedRows:
    """Take the stored rows of `found`, but those of the stratum numbered `position_0`.

    Raises `UserError` when they are too few to be halved, or no label has the rows that it takes.
    """
    there = found.stratum != NOT_STORED
    if position_0 is not None:
        there &= found.stratum != position_0
    places = np.flatnonzero(there)
    number = np.full(len(there), -1, np.int64)
    number[places] = np.arange(len(places))
    unit: Literal["documents", "sequences"] = "documents"
    groups = np.unique(found.documents.ravel()[places], return_inverse=True)[1]
    if not len(groups) or groups.max() + 1 < LEAST_DOCUMENTS:
        unit, groups = "sequences", np.unique(places // found.tokens.shape[1], return_inverse=True)[1]
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise UserError(f"{len(places)} held-out rows of {len(sizes)} sequences are too few to probe; 2 is the least")
    scored = halves(sizes)[groups]
    masks = labels.masks[:, places]
    kept = np.ones(len(masks), bool)
    for half in (~scored, scored):
        counts = masks[:, half].sum(1)
        kept &= (counts >= LEAST_ROWS) & (counts <= MOST_SHARE * half.sum())
    if not kept.any():
        raise UserError(
            f"none of the {len(kept):,} labels is on at least {LEAST_ROWS} and at most {MOST_SHARE:.0%} of the rows of "
            "both halves; probe more rows with --rows, or give other labels with --labels"
        )
    names = np.array(labels.names, object)
    return ProbedRows(
        number=number,
        unit=unit,
        groups=groups,
        scored=scored,
        names=tuple(names[kept]),
        masks=masks[kept],
        left_out=tuple(names[~kept]),
    )


def halves(sizes: Array) -> Array:
    """Put groups of `sizes` [G] rows into two halves of about as many rows: [G] bool, whether it is the second."""
    second, rows = np.zeros(len(sizes), bool), [0, 0]
    for group in np.argsort(-sizes, kind="stable"):
        second[group] = rows[1] < rows[0]
        rows[int(second[group])] += int(sizes[group])
    return second
