"""One side's int8 rows of a stratum, read as the float32 numbers that they stand for. No torch here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shared.store.mapped_array import RowArray, RowRun, Rows

if TYPE_CHECKING:
    from shared.store.int8_rows import Int8Rows


class ScaledArray(RowArray):
    """The rows of three arrays: the int8 `values`, each row's scale, and each block's means and units.

    `side` is the column of the row's scale, and `first` the side's first column of means and units. Rows are turned
    into numbers as they are gathered, by one call that leaves other threads the GIL.
    """

    def __init__(
        self, values: RowArray, row_scale: RowArray, block_units: RowArray, blocks: int, side: int, first: int
    ) -> None:
        super().__init__(values.spec, blocks)
        self.dtype = np.dtype(np.float32)
        self._parts, self._side, self._first = (values, row_scale, block_units), side, first

    def gather(self, runs: Sequence[RowRun], out: Rows) -> None:
        """Fill the first rows of `out` with the numbers of `runs`, one after the other."""
        from shared.store.int8_rows import decode_rows  # numba: most of what opens a store reads no rows

        if out.dtype != self.dtype:
            raise ValueError(f"{self.spec.path} is read as {self.dtype}, got room for {out.dtype}; use its `room`")
        values, row_scale, _ = self._parts
        rows = sum(stop - start for start, stop in runs)
        found, scales = values.room(rows), row_scale.room(rows)
        values.gather(runs, found)
        row_scale.gather(runs, scales)
        units, blocks = self._units(runs)
        decode_rows(found, scales, units, blocks, self._side, self._first, out[:rows])

    def will_need(self, runs: Sequence[RowRun]) -> None:
        """Ask for `runs` to be read ahead, and for their scales. Raises nothing: reading does."""
        values, row_scale, block_units = self._parts
        values.will_need(runs)
        row_scale.will_need(runs)
        size = self.spec.rows_per_block
        blocks = {block for start, stop in runs for block in range(start // size, -(-stop // size))}
        block_units.will_need([(2 * block, 2 * block + 2) for block in blocks])

    def as_stored(self, row: int, values: Rows) -> Rows:
        """Return what would be read at `row` if its `values` [d], as they were captured, were stored there."""
        from shared.store.int8_rows import encode_with

        units = self._units([(row, row + 1)])[0][:, self._first : self._first + len(values)]
        found: Int8Rows = encode_with(values[None], units[0].copy(), units[1].copy())
        return found[:][0]

    def _units(self, runs: Sequence[RowRun]) -> tuple[Rows, Rows]:
        """Return means and units [2 * b, columns] of the blocks of `runs`, and which of the b blocks each row is of."""
        edges = np.array(runs, np.int64).reshape(-1, 2)
        counts = edges[:, 1] - edges[:, 0]
        rows = np.repeat(edges[:, 1] - np.cumsum(counts), counts) + np.arange(counts.sum())
        blocks, numbers = np.unique(rows // self.spec.rows_per_block, return_inverse=True)
        units = self._parts[2].room(2 * len(blocks))
        self._parts[2].gather([(2 * block, 2 * block + 2) for block in blocks.tolist()], units)
        return units, numbers
