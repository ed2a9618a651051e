"""From sums of losses, by document and position stratum, to the figures of a record.

A figure is a ratio of sums over documents. Its standard error is that of the linearised ratio, with documents as the
independent units (Cochran, "Sampling techniques", 1977, chapter 6), and its interval that of Student's t.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from harvest.splice.forward import CLEAN, Losses
from shared.config import Config
from shared.splice_record import ArmFigures, Interval, SplicePart

Array = NDArray[Any]
_LEAST = 1e-9
"""Nats per token by which an ablation must raise the loss."""


class BatchSums(Config):
    """Sums over the predictions of one document in one stratum, a row each; what a batch leaves for a later start."""

    document: list[int]
    stratum: list[int]
    tokens: list[int]
    ce: dict[str, list[float]]
    kl: dict[str, list[float]]
    rows: int
    left: int
    """Rows where the MLP's own output stayed."""


class Table(NamedTuple):
    """The same over all batches, with a row per document."""

    tokens: Array
    """[documents]"""
    ce: dict[str, Array]
    kl: dict[str, Array]


def batch_sums(found: Losses, documents: Array, strata: Array) -> BatchSums:
    """Sum the losses of windows by document and stratum, [S, T] each.

    A prediction belongs to the position at which it is made; those of the first token of another document do not count.
    """
    counts = documents[:, 1:] == documents[:, :-1]
    keys = np.stack([documents[:, :-1][counts], strata[:, :-1][counts]])
    groups, place = np.unique(keys, axis=1, return_inverse=True)
    place = place.ravel()

    def summed(values: Array) -> list[float]:
        return np.bincount(place, values[counts], minlength=groups.shape[1]).tolist()

    return BatchSums(
        document=groups[0].tolist(),
        stratum=groups[1].tolist(),
        tokens=np.bincount(place, minlength=groups.shape[1]).tolist(),
        ce={name: summed(values.cpu().numpy()) for name, values in found.ce.items()},
        kl={name: summed(values.cpu().numpy()) for name, values in found.kl.items()},
        rows=documents.size,
        left=found.left,
    )


def part_of(batches: Sequence[BatchSums], strata: Sequence[int]) -> SplicePart | None:
    """Return the figures of the predictions in some strata; none: there are none."""
    table = _table(batches, strata)
    if not len(table.tokens):
        return None
    total = int(table.tokens.sum())
    arms = {
        name: ArmFigures(
            ce=float(table.ce[name].sum()) / total,
            kl=ratio(table.kl[name], table.tokens),
            ce_recovered=_recovered(table, name, "zero"),
            ce_recovered_of_mean=_recovered(table, name, "mean"),
        )
        for name in table.kl
    }
    clean = float(table.ce[CLEAN].sum()) / total
    return SplicePart(tokens=total, documents=len(table.tokens), clean_ce=clean, arms=arms)


def ratio(above: Array, below: Array) -> Interval:
    """Return sum(above) / sum(below) over documents, [documents] each, with its 95 % interval."""
    value, n = float(above.sum() / below.sum()), len(above)
    if n < 2:
        return Interval(value=value, low=None, high=None)
    error = math.sqrt(n / (n - 1) * float(np.square(above - value * below).sum())) / abs(float(below.sum()))
    half = float(stdtrit(n - 1, 0.975)) * error
    return Interval(value=value, low=value - half, high=value + half)


def _recovered(table: Table, name: str, ablated: str) -> Interval | None:
    lost = table.ce[ablated] - table.ce[CLEAN]
    if lost.sum() <= _LEAST * table.tokens.sum():
        return None
    return ratio(table.ce[ablated] - table.ce[name], lost)


def _table(batches: Sequence[BatchSums], strata: Sequence[int]) -> Table:
    """Sum over batches, document by document."""
    inside = [np.isin(batch.stratum, strata) for batch in batches]

    def joined(columns: Sequence[Sequence[float]]) -> Array:
        return np.concatenate([np.asarray(column)[chosen] for column, chosen in zip(columns, inside, strict=True)])

    documents, place = np.unique(joined([batch.document for batch in batches]), return_inverse=True)

    def summed(columns: Sequence[Sequence[float]]) -> Array:
        return np.bincount(place, joined(columns), minlength=len(documents))

    return Table(
        tokens=summed([batch.tokens for batch in batches]),
        ce={name: summed([batch.ce[name] for batch in batches]) for name in batches[0].ce},
        kl={name: summed([batch.kl[name] for batch in batches]) for name in batches[0].kl},
    )
