"""A store's training rows kept on a device, where the rows of a step are a gather.

Legend: R rows of the pinned blocks, those of one stratum side by side; B rows of a batch; d width of a side.
"""

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.console.progress import Progress
from shared.store.mapped_array import RowArray
from shared.store.reader import RowReader
from shared.store.store import StratumRows
from train.data.staging import staging, type_of, typed

_CHUNK_BYTES = 2**26
"""Of rows that one thread reads and copies at a time."""


class _Part(NamedTuple):
    """Neighbouring rows of an array, and their place among the resident ones."""

    array: RowArray
    first: int
    stop: int
    side: int
    place: int


class ResidentRows:
    """The rows of the blocks of a reader, on a device once they are loaded; strata that no batch has are left out."""

    def __init__(self, reader: RowReader, device: torch.device) -> None:
        self._device, self._sides = device, reader.arrays
        self._parts, self._shifts, self.rows = list[_Part](), dict[str, int](), 0
        """By stratum, what is added to the number of a row for its place among the resident ones."""
        for stratum, count in zip(reader.store.strata.values(), reader.counts, strict=True):
            first, stop = (edge * stratum.stratum.rows for edge in (reader.blocks.start, reader.blocks.stop))
            if count:
                self._shifts[stratum.stratum.name] = self.rows - first
                self._parts += self._chunks(stratum, first, stop)
                self.rows += stop - first
        self.tables: list[Tensor] = []
        """[R, d] of each side, once they are loaded"""

    def _chunks(self, stratum: StratumRows, first: int, stop: int) -> Iterable[_Part]:
        for number, side in enumerate(self._sides):
            array: RowArray = getattr(stratum, side)
            rows = max(1, _CHUNK_BYTES // array.row_bytes)
            for low in range(first, stop, rows):
                yield _Part(array, low, min(low + rows, stop), number, self.rows + low - first)

    @property
    def bytes(self) -> int:
        """Of all rows on the device."""
        return sum((part.stop - part.first) * part.array.row_bytes for part in self._parts)

    def load(self, pool: Executor) -> None:
        """Copy all rows to the device. Raises what reading them raises, and `torch.OutOfMemoryError`."""
        arrays = {part.side: part.array for part in self._parts}
        self.tables = [
            torch.empty(self.rows, array.spec.width or 1, dtype=type_of(array), device=self._device)
            for _, array in sorted(arrays.items())
        ]
        done = 0
        with Progress("rows to the device", self.bytes, "bytes") as progress:
            for copied in pool.map(self._copy, self._parts):
                done += copied
                progress.update(done)

    def drop(self) -> None:
        """Give the memory back."""
        self.tables = []

    def _copy(self, part: _Part) -> int:
        """Copy neighbouring rows through memory that is pinned for CUDA; returns their bytes."""
        rows = staging(part.stop - part.first, part.array, self._device)
        part.array.will_need([(part.first, part.stop)])
        part.array.read(part.first, part.stop, rows.numpy())
        place = slice(part.place, part.place + len(rows))
        self.tables[part.side][place].copy_(typed(rows), non_blocking=True)
        return rows.nbytes

    def find(self, runs: Iterable[tuple[StratumRows, int, int, int]], out: NDArray[Any]) -> None:
        """Fill `out` [B] int64 with the places of the rows of a step, by its `RowReader.runs`."""
        for stratum, low, high, at in runs:
            shift = self._shifts[stratum.stratum.name]
            out[at : at + high - low] = range(low + shift, high + shift)

    def gather(self, places: Tensor) -> list[Tensor]:
        """Return the rows, as they are read, at `places` [B] on the device: [B, d] of each side."""
        return [table.index_select(0, places) for table in self.tables]
