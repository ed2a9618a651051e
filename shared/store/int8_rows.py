"""Rows as int8 with two scales: one for each row, one for each dimension of a block.

    row[j] = values[j] * row_scale * unit[j] + mean[j]

`mean` and `unit` are the mean and the deviation of dimension j over the rows of one stratum of a block, without its
long rows. So a dimension that is a thousand times as large as others takes no bits from them, and neither does a row of
enormous norm from other rows. A row's scale is its largest value in units, over 127: nothing is cut. Everything is in
float32, without fused operations: the same bits on every processor.

Legend: n rows, d dimensions, b blocks.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from shared.store.statistics import decode, merge, moments_of, row_norms

LARGEST = 127
LONG = 4.0
"""Rows over this many times the median norm of their stratum in a block count for no unit."""
LEAST_UNIT = 1e-3
"""Of the median deviation: the unit of a dimension that hardly varies, or not at all."""
_ROUNDING = 1e-6
"""Of a dimension's mean: below it float32 keeps no differences."""
_ROWS_AT_ONCE = 1024
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Rows:
    """The rows of a stratum of a block, one side. Sliced, it gives the numbers that its rows stand for, float32."""

    values: NDArray[np.int8]
    """[n, d]"""
    row_scale: Floats
    """[n]"""
    mean: Floats
    """[d]"""
    unit: Floats
    """[d]"""
    errors: NDArray[np.float64]
    """[n] squared distance of each row from what it was."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and dimensions."""
        return self.values.shape[0], self.values.shape[1]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    def where(self, chosen: NDArray[np.bool_]) -> "Int8Rows":
        """Return those rows that are `chosen` [n]."""
        some = {name: getattr(self, name)[chosen] for name in ("values", "row_scale", "errors")}
        return Int8Rows(mean=self.mean, unit=self.unit, **some)

    def __getitem__(self, part: slice) -> Floats:
        """Return the numbers of some rows."""
        values = self.values[part]
        found = np.empty(values.shape, np.float32)
        blocks = np.zeros(len(values), np.int64)
        scales, units = self.row_scale[part, None], np.stack([self.mean, self.unit])
        decode_rows(values, scales, units, blocks, 0, 0, found)
        return found


def encode(stored: NDArray[Any]) -> Int8Rows:
    """Return rows [n, d] of one stratum of a block as int8; uint16 are the bits of bfloat16.

    A row that float32 cannot hold in these units has a scale that is not finite.
    """
    mean, unit = units(stored)
    return encode_with(stored, mean, unit)


def encode_with(stored: NDArray[Any], mean: Floats, unit: Floats) -> Int8Rows:
    """Return rows [n, d] as int8 in given units [d]."""
    n, d = stored.shape
    found = Int8Rows(
        values=np.empty((n, d), np.int8),
        row_scale=np.empty(n, np.float32),
        mean=mean,
        unit=unit,
        errors=np.empty(n, np.float64),
    )
    for low in range(0, n, _ROWS_AT_ONCE):
        part = slice(low, low + _ROWS_AT_ONCE)
        rows = decode(stored[part])
        _encode(rows, mean, unit, found.values[part], found.row_scale[part], found.errors[part])
    return found


def units(stored: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return mean and unit [d] of rows [n, d]: their deviation without long rows, and never 0."""
    parts = [slice(low, low + _ROWS_AT_ONCE) for low in range(0, len(stored), _ROWS_AT_ONCE)]
    norms = np.concatenate([row_norms(stored[part]) for part in parts])
    ordinary = norms <= LONG * np.median(norms)
    moments = merge([moments_of(stored[part][ordinary[part]]) for part in parts])
    deviation = np.sqrt(moments.variance)
    least = np.maximum(LEAST_UNIT * np.median(deviation), _ROUNDING * np.abs(moments.mean))
    unit = np.maximum(deviation, least).astype(np.float32)
    return moments.mean.astype(np.float32), np.where(unit > 0, unit, np.float32(1))  # all rows can be one and the same


@njit(cache=True, nogil=True, error_model="numpy")
def decode_rows(
    values: NDArray[np.int8],
    row_scale: Floats,
    units: Floats,
    blocks: NDArray[np.int64],
    side: int,
    first: int,
    out: Floats,
) -> None:
    """Fill `out` [n, d] with the numbers that `values` [n, d] stand for.

    Row scales are in column `side` of `row_scale` [n, ...]. `units` [2 * b, ...] has the mean of block i in row 2 * i
    and its unit in the next one, those of these values from column `first` on; `blocks` [n] says which i is each row's.
    """
    for i in range(len(values)):
        scale, d = row_scale[i, side], values.shape[1]
        row, into = values[i], out[i]
        mean, unit = units[2 * blocks[i], first : first + d], units[2 * blocks[i] + 1, first : first + d]
        for j in range(d):
            into[j] = np.float32(row[j]) * scale * unit[j] + mean[j]


@njit(cache=True, nogil=True, error_model="numpy")
def _encode(
    rows: Floats,
    mean: Floats,
    unit: Floats,
    values: NDArray[np.int8],
    row_scale: Floats,
    errors: NDArray[np.float64],
) -> None:
    inverse_unit = np.float32(1) / unit
    in_units = np.empty(rows.shape[1], np.float32)
    for i in range(len(rows)):
        for j in range(rows.shape[1]):
            in_units[j] = (rows[i, j] - mean[j]) * inverse_unit[j]
        scale = row_scale[i] = _largest(in_units) / np.float32(LARGEST)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for j in range(rows.shape[1]):
            value = np.rint(in_units[j] * inverse)
            values[i, j] = np.int8(min(max(value, np.float32(-LARGEST)), np.float32(LARGEST)))
        errors[i] = _squared_error(rows[i], values[i], scale, mean, unit)


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _largest(row: Floats) -> np.float32:
    """Return the largest absolute value of a row [d]."""
    found = np.float32(0)
    for j in range(len(row)):
        found = max(found, abs(row[j]))
    return found


@njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc"})
def _squared_error(row: Floats, values: NDArray[np.int8], scale: np.float32, mean: Floats, unit: Floats) -> float:
    """Return the squared distance of what `values` [d] stand for from the `row` [d]."""
    found = 0.0
    for j in range(len(row)):
        left = np.float64(np.float32(values[j]) * scale * unit[j] + mean[j] - row[j])
        found += left * left
    return found
