"""The rows of a step on their way from the memory maps to tensors."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from shared.store.reader import AHEAD, RowReader, RowsConfig
from shared.store.store import Store
from train.data.read_ahead import Extent, RowChecks, read_ahead
from train.data.resident import ResidentRows
from train.data.staging import Stage, sent, staging, to_float, typed

Side = Literal["source", "target"]
_MOST_ASKED = 8
"""Steps whose rows are asked for at once, so that the first one is not kept waiting."""


class Batch(NamedTuple):
    """Rows of a step, those of one stratum side by side."""

    source: Tensor
    """[B, d_in] float32, as stored: not normalised"""
    target: Tensor
    """[B, d_out] float32"""
    strata: dict[str, slice]
    """Where each stratum's rows are; strata without rows are left out"""


class BatchReader(RowReader):
    """Reads the batches of a store's pinned range of training blocks.

    `source` is the side of the pairs that is read as source; `target` is read once and is both. Inside `with reader:`
    threads, one for the CPU and up to three for CUDA, read the next `AHEAD` batches while one is used: the same rows,
    and what goes wrong with the rows of a step is raised when that step asks for them. The threads have ended when the
    block is left.

    A `resident` reader copies all rows to the device when the block is entered, and a batch is gathered there: the same
    rows again, bit for bit. It reads inside the block alone.
    """

    def __init__(
        self,
        store: Store,
        blocks: range,
        config: RowsConfig,
        seed: int,
        device: torch.device,
        source: Side = "source",
        *,
        resident: bool = False,
        stop: int | None = None,
    ) -> None:
        super().__init__(store, blocks, config, seed, _sides(source))
        self._device, self._resident = device, ResidentRows(self, device) if resident else None
        self._stages = [Stage(self._buffers(config.batch_rows), device) for _ in range(AHEAD + 1)]
        self._threads = min(AHEAD + 1, os.cpu_count() or 1) if device.type == "cuda" else 1
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[Stage]] = {}
        self.stop = stop
        """The step at which reading ends: no rows of later ones are asked for ahead."""
        self._step = -2
        """The step that was read last."""
        self._asked = 0
        """The first step whose rows are not asked for yet."""
        self.waited = 0.0
        """Seconds that callers of `batch` waited for it."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows")
        if self.store.objects:
            self.store.objects.start()
        if self._resident:
            self._resident.load(self._pool)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool
        pool, self._pool, self._ahead = self._pool, None, {}
        pool.shutdown(cancel_futures=True)
        if self.store.objects:
            self.store.objects.stop()
        if self._resident:
            self._resident.drop()

    def natural_weights(self) -> Tensor:
        """Return how often each row of a batch counts at natural frequencies: [B] float32, 1 on average."""
        natural = torch.tensor(self.natural_rows)
        counts = torch.tensor(self.counts)
        weights = torch.where(counts > 0, natural / counts, 0.0).repeat_interleave(counts)
        return weights / weights.mean()

    def batch(self, step: int) -> Batch:
        """Return the rows of `step`, counted from 0. Raises what reading them raised."""
        return self.rows_of(self.fetch(step))

    def fetch(self, step: int) -> list[Tensor]:
        """Return what the device makes the rows of `step` of: their places there, or stored rows of each side.

        Raises what reading them raised.
        """
        began = time.monotonic()
        found = self._stage(step).on_device()
        self.waited += time.monotonic() - began
        return found

    def rows_of(self, found: Sequence[Tensor]) -> Batch:
        """Return the rows that `fetch` has found, by operations of the device alone."""
        stored = self._resident.gather(found[0]) if self._resident else found
        rows = [to_float(one, self._device) for one in stored]
        return Batch(rows[0], rows[-1], self.slices())

    def stored(self, found: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return where the rows that `fetch` has found lie, as stored: a table of each side, and their places there.

        Without places, all rows of the tables are meant.
        """
        if self._resident:
            return self._resident.tables, found[0]
        return [typed(one) for one in found], None

    def _buffers(self, rows: int) -> list[Tensor]:
        """Return room for what a batch needs from the host: its rows, or where they lie among the resident ones."""
        if self._resident:
            return [torch.empty(rows, dtype=torch.int64, pin_memory=self._device.type == "cuda")]
        first = next(iter(self.store.strata.values()))
        return [staging(rows, getattr(first, side), self._device) for side in self.arrays]

    def _stage(self, step: int) -> Stage:
        if not self._pool:
            return self._fill(step, self._to_advise(step))
        if step not in self._ahead:  # the first one, or out of turn: what was read ahead is of no use
            for other in self._ahead.values():
                other.cancel()
            wait(self._ahead.values())  # those that are being read have a place in the ring
            self._ahead = {}
        for wanted in range(step, step + AHEAD + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self._fill, wanted, self._to_advise(wanted))
        return self._ahead.pop(step).result()

    def _to_advise(self, step: int) -> range:
        """Return the steps whose rows the kernel is to be asked for when `step` is read, and was not yet."""
        if self._resident:
            return range(0)
        before, self._step = self._step, step
        first = self._asked if step == before + 1 else step
        end = step + self.ahead + 1 if self.stop is None else min(step + self.ahead + 1, self.stop)
        self._asked = max(first, min(end, first + _MOST_ASKED))
        return range(first, self._asked)

    def _fill(self, step: int, advised: range) -> Stage:
        """Read `step` into its place in the ring, which was used up when the step after it was asked for."""
        stage = self._stages[step % len(self._stages)]
        for later in advised:
            self.will_need(later)
        if self._resident:
            self._resident.find(self.runs(step), stage.to_fill()[0])
            return stage
        for side, rows in zip(self.arrays, stage.to_fill(), strict=True):
            self.read(step, side, rows)
        return stage


def batches(
    store: Store | Path | str,
    steps: int,
    *,
    first: int = 0,
    seed: int = 0,
    rows: RowsConfig | None = None,
    source: Side = "source",
    device: str | torch.device = "cpu",
) -> Iterator[Batch]:
    """Return the batches of `steps` steps, from step `first` on, as a run of that `seed` trains on them.

    Rows are float32, in the LLM's own units. `rows` says which ones a batch has; by default 1,024 at natural
    frequencies, without outliers. `source` is the side of the pairs that is read as source. The store is in use, and a
    thread reads ahead, until the last batch was taken or the iterator is closed. Raises `UserError` when `rows` does
    not fit the store, and `CorruptData` as `Store.check_shards`.
    """
    opened = store if isinstance(store, Store) else Store.open(store)
    config = (rows or RowsConfig()).resolve(opened.request.block_sequences)
    view = opened.excluding(config.exclusion(opened, figures=True))
    blocks = config.training_blocks(opened)
    opened.check_shards(blocks)
    reader = BatchReader(view, blocks, config, seed, torch.device(device), source, stop=first + steps)

    def read() -> Iterator[Batch]:
        with opened.reading(), reader:
            for step in range(first, first + steps):
                yield reader.batch(step)

    return read()


class RowChunk(NamedTuple):
    """Neighbouring rows of one stratum of held-out blocks."""

    stratum: str
    source: Tensor
    """[n, d_in] float32"""
    target: Tensor
    """[n, d_out] float32"""
    outliers: Tensor
    """[n] bool, rows that the store's exclusion leaves out of figures; on CPU"""

    def part(self, wanted: Tensor) -> "RowChunk":
        """Return the rows that are `wanted`, [n] bool on CPU."""
        if bool(wanted.all()):
            return self
        numbers = sent(wanted.nonzero().squeeze(1), self.source.device)
        return RowChunk(self.stratum, self.source[numbers], self.target[numbers], self.outliers[wanted])

    @property
    def ordinary(self) -> "RowChunk":
        """The rows that are no outliers."""
        return self.part(~self.outliers)


@dataclass(frozen=True, slots=True)
class StoreRows:
    """The rows of a store in the order in which they lie there, for evaluation."""

    store: Store
    chunk_rows: int = 1024
    """Most rows of a chunk."""
    source: Side = "source"
    """As in `BatchReader`."""

    def chunks(self, blocks: range, device: torch.device, most: Mapping[str, int] | None = None) -> Iterator[RowChunk]:
        """Yield all rows of `blocks`, stratum by stratum.

        With `most`, the first so many of each stratum that it names, and no others. Raises `CorruptData` as
        `Store.check_norms`; on CUDA after the last of them.
        """
        extents, checks, sides = self._extents(blocks, most), RowChecks(self.store, device), _sides(self.source)
        for extent, found in zip(extents, read_ahead(self.store, sides, extents, device), strict=True):
            for side, rows in zip(sides, found, strict=True):
                checks.add(extent, side, rows)
            yield RowChunk(extent.stratum, found[0], found[-1], _outliers(self.store, extent))
        checks.settle()

    def _extents(self, blocks: range, most: Mapping[str, int] | None) -> list[Extent]:
        found = []
        for name, stratum in self.store.strata.items():
            rows = stratum.stratum.rows
            start, stop = blocks.start * rows, blocks.stop * rows
            stop = stop if most is None else min(stop, start + most.get(name, 0))
            found += [
                Extent(name, low, min(low + self.chunk_rows, stop)) for low in range(start, stop, self.chunk_rows)
            ]
        return found


def _outliers(store: Store, extent: Extent) -> Tensor:
    """Tell which rows of an extent are left out of figures, [n] bool."""
    found = torch.zeros(extent.high - extent.low, dtype=torch.bool)
    if store.exclusion and store.exclusion.figures:
        rows = store.outliers[extent.stratum]
        first, last = np.searchsorted(rows, [extent.low, extent.high])
        found[torch.from_numpy(rows[first:last] - extent.low)] = True
    return found


def _sides(source: Side) -> tuple[Side, ...]:
    """List the sides that are read, the source first and the target last."""
    return ("source", "target") if source == "source" else ("target",)
