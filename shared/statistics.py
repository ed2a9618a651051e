"""Moments and norm histograms of rows, gathered block by block and merged in order of block number.

Two passes within a block and the pairwise update of Chan, Golub and LeVeque (1983) between blocks, in float64, so a
dimension whose mean is a thousand times its deviation keeps its variance.
"""

from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 64
_LOW, _HIGH = -32, 96
BINS = (_HIGH - _LOW) * BINS_PER_OCTAVE
OUTLIER_RATIO = 10.0
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
_CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Weighted rows: count, mean and summed squared deviation per dimension, histogram of Euclidean norms."""

    rows: float
    mean: NDArray[np.float64]
    """[d]"""
    m2: NDArray[np.float64]
    """[d] sum over rows of (x - mean)^2"""
    norms: NDArray[np.float64]
    """[BINS] rows per bin of log2(norm); zero norms fall into the first bin"""

    @property
    def variance(self) -> NDArray[np.float64]:
        """[d] population variance."""
        return self.m2 / max(self.rows, 1.0)

    @property
    def mean_squared_norm(self) -> float:
        """Mean over rows of the squared norm."""
        return float(np.square(self.mean).sum() + self.variance.sum())

    @property
    def mean_to_deviation(self) -> float:
        """Norm of the mean over the root of the summed variance; 0 for no rows, a large finite number for constants."""
        deviation = float(np.sqrt(self.variance.sum()))
        return float(np.linalg.norm(self.mean)) / max(deviation, 1e-30) if self.rows else 0.0

    def norm_quantile(self, share: float) -> float:
        """The norm below which `share` of the rows lie, within 1/128 octave (geometric centre of its bin)."""
        total = np.cumsum(self.norms)
        if not total[-1]:
            return 0.0
        bin_ = int(np.searchsorted(total, share * total[-1]))
        return float(2.0 ** (_LOW + (min(bin_, BINS - 1) + 0.5) / BINS_PER_OCTAVE))

    def rows_above(self, norm: float) -> float:
        """Rows in bins above the one of `norm`."""
        return float(self.norms[_bin(np.array([norm]))[0] + 1 :].sum())

    def scaled(self, weight: float) -> "Moments":
        """The same distribution, each row counted `weight` times."""
        return Moments(rows=self.rows * weight, mean=self.mean, m2=self.m2 * weight, norms=self.norms * weight)


def moments_of(rows: NDArray[np.float32]) -> Moments:
    """Moments of `rows` [n, d]; n may be 0."""
    n, d = rows.shape
    chunks = [rows[i : i + _CHUNK].astype(np.float64) for i in range(0, n, _CHUNK)]
    mean = sum((chunk.sum(axis=0) for chunk in chunks), np.zeros(d)) / max(n, 1)
    m2 = sum((np.square(chunk - mean).sum(axis=0) for chunk in chunks), np.zeros(d))
    norms = np.concatenate([np.sqrt(np.square(chunk).sum(axis=1)) for chunk in chunks] or [np.zeros(0)])
    return Moments(rows=float(n), mean=mean, m2=m2, norms=np.bincount(_bin(norms), minlength=BINS).astype(np.float64))


def merge(parts: list[Moments]) -> Moments:
    """The moments of all parts' rows together, merged in the order given. `parts` is not empty."""
    return reduce(_merge, parts)


def _merge(a: Moments, b: Moments) -> Moments:
    rows = a.rows + b.rows
    if not rows:
        return a
    shift = b.mean - a.mean
    return Moments(
        rows=rows,
        mean=a.mean + shift * (b.rows / rows),
        m2=a.m2 + b.m2 + np.square(shift) * (a.rows * b.rows / rows),
        norms=a.norms + b.norms,
    )


def _bin(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    exponent = np.log2(np.maximum(norms, 2.0**_LOW))
    return np.clip(((exponent - _LOW) * BINS_PER_OCTAVE).astype(np.int64), 0, BINS - 1)
