"""Moments and norm histograms of rows, gathered block by block and merged in order of block number.

Differences to a first mean within a block, and the pairwise update of Chan, Golub and LeVeque (1983) between blocks,
so a dimension whose mean is a thousand times its deviation keeps its variance.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BINS_PER_OCTAVE = 64
_LOW, _HIGH = -32, 96
BINS = (_HIGH - _LOW) * BINS_PER_OCTAVE
OUTLIER_RATIO = 10.0
"""Rows over this many times the overall median norm are outliers; as in dictionary_learning and SAEDashboard."""
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99, 0.999)
_VALUES_AT_ONCE = 2**18
_LONG = 100.0
"""Times the median squared norm."""


class RowParts(Protocol):
    """Rows [n, d] that are taken part by part: an array, or what makes one of each part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and dimensions."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def __getitem__(self, part: slice, /) -> NDArray[Any]:
        """Return some rows, as they are stored or as numbers."""


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
        """Return the norm below which `share` of the rows lie, within 1/128 octave (geometric centre of its bin)."""
        total = np.cumsum(self.norms)
        if not total[-1]:
            return 0.0
        bin_ = int(np.searchsorted(total, share * total[-1]))
        return float(2.0 ** (_LOW + (min(bin_, BINS - 1) + 0.5) / BINS_PER_OCTAVE))

    def rows_above(self, norm: float) -> float:
        """Return the number of rows in bins above the one of `norm`."""
        return float(self.norms[norm_bin(norm) + 1 :].sum())

    def scaled(self, weight: float) -> "Moments":
        """Return the same distribution, each row counted `weight` times."""
        return Moments(rows=self.rows * weight, mean=self.mean, m2=self.m2 * weight, norms=self.norms * weight)


def decode(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Return the numbers that stored rows stand for, as a copy; uint16 are the bits of bfloat16."""
    if stored.dtype != np.uint16:
        return np.array(stored, np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def row_norms(stored: NDArray[Any]) -> NDArray[np.float64]:  # [n]
    """Return the Euclidean norms of stored rows [n, d]."""
    values = decode(stored)
    return np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))


def moments_of(rows: RowParts) -> Moments:
    """Return the moments of the numbers that the stored `rows` [n, d] stand for; n may be 0.

    Sums are in float32 over some hundred rows, of differences to the first ones' mean, and in float64 beyond, and
    where one of these rows is many times as long as the others.
    """
    n, d = rows.shape
    step = min(1024, max(256, _VALUES_AT_ONCE // d))
    shift = decode(rows[:step]).sum(axis=0) / np.float32(max(1, min(n, step)))
    first, second, squares = np.zeros(d), np.zeros(d), np.empty(n)
    for low in range(0, n, step):
        values = decode(rows[low : low + step])
        norms2 = squares[low : low + step] = np.einsum("nd,nd->n", values, values)
        if norms2.max() > _LONG * np.median(norms2):  # in float32 a few enormous rows would hide the others
            values = values.astype(np.float64)
        values -= shift
        first += values.sum(axis=0)
        second += np.einsum("nd,nd->d", values, values)
    return moments_from_sums(shift, first, second, squares)


def moments_from_sums(
    shift: NDArray[np.floating], first: NDArray[np.float64], second: NDArray[np.float64], squares: NDArray[np.float64]
) -> Moments:
    """Return the moments of rows [n, d] from sums [d] of their differences to `shift` [d], and of the squares of these.

    `squares` [n] are the rows' squared norms.
    """
    n = len(squares)
    mean = first / max(n, 1)
    m2 = np.maximum(second - n * np.square(mean), 0.0)
    norms = np.bincount(_bin(np.sqrt(squares)), minlength=BINS).astype(np.float64)
    return Moments(rows=float(n), mean=shift + mean, m2=m2, norms=norms)


def merge(parts: list[Moments]) -> Moments:
    """Return the moments of all parts' rows together, merged in the order given. `parts` is not empty."""
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


def norm_bin(norm: float) -> int:
    """Return the histogram's bin of a norm."""
    return int(_bin(np.array([norm]))[0])


def bin_end(number: int) -> float:
    """Return the norm at which a bin of the histogram ends; the last one has no end."""
    return float(2.0 ** (_LOW + (number + 1) / BINS_PER_OCTAVE)) if number < BINS - 1 else np.inf


def _bin(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    exponent = np.log2(np.clip(norms, 2.0**_LOW, 2.0**_HIGH))
    return np.clip(((exponent - _LOW) * BINS_PER_OCTAVE).astype(np.int64), 0, BINS - 1)
