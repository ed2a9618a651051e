"""The rows of one array of a store, as memory maps of its shard files. No torch here."""

import ctypes
import mmap
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import numpy as np
from numpy.typing import NDArray

from shared.errors import CorruptData
from shared.store.arrays import ArraySpec
from shared.store.checks import remedy
from shared.store.packed import LocalFolder

Rows = NDArray[Any]
RowRun = tuple[int, int]
"""Neighbouring rows of an array, a half-open range."""
Span = tuple[int, int, int]
"""A shard file, and the first row and past the last row there."""
MOST_MAPS = 2**15
"""Shard files that a process maps at once, of all its stores. Linux refuses more than 65,530 maps of any kind."""
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class RowArray(ABC):
    """The rows of one array of the store, as they are read."""

    def __init__(self, spec: ArraySpec, blocks: int) -> None:
        self.spec = spec
        """As they are stored."""
        self.rows = blocks * spec.rows_per_block
        self.dtype = np.dtype(spec.dtype)
        """As they are read."""
        self._rows_per_shard, self._row_bytes = spec.rows_per_shard, spec.row_bytes  # both take a search

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return self.dtype.itemsize * (self.spec.width or 1)

    def room(self, rows: int) -> Rows:
        """Return memory for so many rows."""
        return np.empty(rows if self.spec.width is None else (rows, self.spec.width), self.dtype)

    def shard(self, number: int) -> Rows:
        """Return the rows of one shard file, a copy."""
        out = self.room(self._rows_per_shard)
        self.read(number * self._rows_per_shard, (number + 1) * self._rows_per_shard, out)
        return out

    def read(self, start: int, stop: int, out: Rows) -> None:
        """Copy rows `start:stop` into the first rows of `out`; they may lie in several shard files."""
        self.gather([(start, stop)], out)

    @abstractmethod
    def gather(self, runs: Sequence[RowRun], out: Rows) -> None:
        """Copy `runs` one after the other into the first rows of `out`."""

    @abstractmethod
    def will_need(self, runs: Sequence[RowRun]) -> None:
        """Ask for `runs` to be read ahead. Raises nothing: reading does."""

    def as_stored(self, row: int, values: Rows) -> Rows:
        """Return what would be read at `row` if its `values` [d], as they were captured, were stored there."""
        return values

    def _spans(self, runs: Sequence[RowRun]) -> list[Span]:
        """List the parts of `runs`, in their order."""
        size, found = self._rows_per_shard, []
        for start, stop in runs:
            while start < stop:
                number, low = divmod(start, size)
                high = min(size, low + stop - start)
                found.append((number, low, high))
                start += high - low
        return found


class MappedArray(RowArray):
    """One array of the store as memory maps, one per shard file, opened at first use; the oldest go for new ones.

    Maps are private and advised `MADV_RANDOM`, so that a run of rows is read and nothing beside it. Those of a packed
    store are of files in a local folder, into which rows are decoded before they are read. Several threads may read.

    Reading raises `CorruptData` when a shard file became shorter than its rows, or a packed chunk does not decode.
    """

    def __init__(self, root: Path, spec: ArraySpec, blocks: int, local: LocalFolder | None = None) -> None:
        super().__init__(spec, blocks)
        self._folder, self._local = local.folder if local else root, local
        self._maps: dict[int, tuple[Rows, int]] = {}  # with their addresses

    _mapped: deque[tuple["ReferenceType[MappedArray]", int]] = deque()
    """Shards of all arrays in the order in which they were mapped"""

    def shard(self, number: int) -> Rows:
        """Return the rows of one shard file, a read-only view."""
        return self._rows(number, 0, self._rows_per_shard)

    def gather(self, runs: Sequence[RowRun], out: Rows) -> None:
        """Copy `runs` one after the other into the first rows of `out`; the copies leave other threads the GIL."""
        if not self._local:
            parts = [self._map(number)[0][low:high] for number, low, high in self._spans(runs)]
            if parts:  # one call: half the time where runs are short
                np.concatenate(parts, out=out[: sum(map(len, parts))])
            return
        filled = 0
        for number, low, high in self._spans(runs):  # one by one: a shard takes disk space as long as a part is held
            out[filled : filled + high - low] = self._rows(number, low, high)[low:high]
            filled += high - low

    def will_need(self, runs: Sequence[RowRun]) -> None:
        """Ask the kernel to read `runs` ahead; does nothing for a packed store. Raises nothing: reading does."""
        if self._local:
            return
        with suppress(CorruptData, OSError):
            for number, low, high in self._spans(runs):
                first = low * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                mapped = self._map(number)  # held, so that it stays mapped meanwhile
                # Not by mmap's own method: that holds the GIL while the kernel works.
                _madvise(mapped[1] + first, high * self._row_bytes - first, mmap.MADV_WILLNEED)

    def _rows(self, number: int, low: int, high: int) -> Rows:
        """Return a shard of which rows `low:high` can be read."""
        if not self._local:
            return self._map(number)[0]
        with self._local.lock:  # a shard is not evicted before it is mapped
            self._local.decode(self.spec, number, low, high, lambda: self._maps.pop(number, None))
            return self._map(number)[0]

    def _map(self, number: int) -> tuple[Rows, int]:
        if found := self._maps.get(number):
            return found
        path = self._folder / self.spec.shard_path(number)
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) < self.spec.payload_bytes:
                raise CorruptData(
                    f"{path}: {size:,} bytes, its rows take {self.spec.payload_bytes:,}; {remedy(self.spec, number)}"
                )
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapped, dtype=self.dtype, count=self.spec.payload_bytes // self.dtype.itemsize)
        rows = rows if self.spec.width is None else rows.reshape(-1, self.spec.width)
        self._maps[number] = found = rows, rows.ctypes.data
        self._mapped.append((ref(self), number))
        while len(self._mapped) > MOST_MAPS:
            array, oldest = self._mapped.popleft()
            if there := array():
                there._maps.pop(oldest, None)  # unmapped once nobody reads it any more
        return found
