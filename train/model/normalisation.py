"""Shift and scale rows by a store's statistics, outliers left out.

The store's statistics hold all rows but those of position 0. Outliers are few and known, so their part is taken out of
mean and variance again, in float64: no pass over the store.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from shared.store.mapped_array import RowArray
from shared.store.statistics import decode
from shared.store.store import Store
from train.data.batches import Side
from train.model.transcoder import Normalisation

Vector = NDArray[np.float64]
_ROWS_AT_ONCE = 4096


def normalisation(store: Store, source: Side, *, over_rms: bool = False) -> Normalisation:
    """Return the shift and scale of a transcoder that reads `source`; outliers are left out as `store.exclusion` says.

    `over_rms`: source rows are divided by their root mean square, and so neither shifted nor scaled. Raises
    `CorruptData` when a block's statistics are damaged.
    """
    sides = [moments(store, side) for side in (source, "target")]
    shift, scale = zip(*((torch.from_numpy(mean).float(), _scale(variance)) for mean, variance in sides), strict=True)
    if over_rms:
        return Normalisation(torch.zeros_like(shift[0]), 1.0, shift[1], scale[1])
    return Normalisation(shift[0], scale[0], shift[1], scale[1])


def _scale(variance: Vector) -> float:
    return float(np.sqrt(variance.mean())) or 1.0  # a constant side is shifted only


def moments(store: Store, side: str) -> tuple[Vector, Vector]:
    """Return mean and variance [d] of one side over the training blocks, at natural frequencies without position 0."""
    overall = store.statistics["overall"][side]
    if not (store.exclusion and store.exclusion.figures):
        return overall.mean, overall.variance
    strata = [part for part in store.strata.values() if not part.stratum.is_position_0] or [*store.strata.values()]
    blocks = store.record.training_blocks
    rows = len(blocks) * sum(part.stratum.natural_rows for part in strata)
    removed, weights = [], []
    for part in strata:
        numbers = store.outliers[part.stratum.name]
        low, high = np.searchsorted(numbers, [block * part.stratum.rows for block in (blocks.start, blocks.stop)])
        removed.append(read_rows_at(store, part.stratum.name, side, numbers[low:high]))
        weights.append(np.full(high - low, part.stratum.natural_rows / part.stratum.rows))
    return without(overall.mean, overall.variance, rows, np.concatenate(removed), np.concatenate(weights))


def without(mean: Vector, variance: Vector, rows: float, removed: Vector, weights: Vector) -> tuple[Vector, Vector]:
    """Return mean and variance [d] of what is left of `rows` rows when the rows `removed` [n, d] are taken away.

    Row i of `removed` counted `weights[i]` times. The update of Chan, Golub and LeVeque (1983) between two parts,
    solved for one of them.
    """
    gone = float(weights.sum())
    left = rows - gone
    if not gone or left <= 0:
        return mean, variance
    their_mean = weights @ removed / gone
    their_m2 = weights @ np.square(removed - their_mean)
    found = (rows * mean - gone * their_mean) / left
    m2 = rows * variance - their_m2 - np.square(their_mean - found) * (left * gone / rows)
    return found, np.maximum(m2 / left, 0.0)


def read_rows_at(store: Store, stratum: str, side: str, rows: NDArray[np.int64]) -> Vector:
    """Read some rows of an array as numbers [n, d]. Raises `CorruptData` as `Store.check_norms`."""
    array: RowArray = getattr(store.strata[stratum], side)
    out = array.room(len(rows))
    for low in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[low : low + _ROWS_AT_ONCE].tolist()
        array.gather([(row, row + 1) for row in part], out[low:])
    found = decode(out).astype(np.float64)
    store.check_norms(stratum, side, rows, np.linalg.norm(found, axis=1))
    return found
