"""The rows of a step on their way from the memory maps to tensors."""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.store.layout import StorageType
from shared.store.mapped_array import MappedArray
from shared.store.reader import AHEAD, RowReader, RowsConfig
from shared.store.store import Store

_TORCH: dict[StorageType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

Side = Literal["source", "target"]


def source_width(store: Store, source: Side) -> int:
    """Return `d_in` of a transcoder that reads this side of the store's pairs."""
    return store.record.d_in if source == "source" else store.record.d_out


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

    `source` is the side of the pairs that is read as source; `target` is read once and is both. Inside `with reader:` a
    thread reads the next `AHEAD` batches while one is used: the same rows, and what goes wrong with the rows of a step
    is raised when that step asks for them. The thread has ended when the block is left.
    """

    def __init__(
        self,
        store: Store,
        blocks: range,
        config: RowsConfig,
        seed: int,
        device: torch.device,
        source: Side = "source",
    ) -> None:
        super().__init__(store, blocks, config, seed, _sides(source))
        first = next(iter(store.strata.values()))
        arrays = [getattr(first, side) for side in self.arrays]
        self._stages = [_Stage(config.batch_rows, arrays, device) for _ in range(AHEAD + 1)]
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[int, Future[_Stage]] = {}
        self._filled = -2
        self.waited = 0.0
        """Seconds that callers of `batch` waited for it."""

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool
        pool, self._pool, self._ahead = self._pool, None, {}
        pool.shutdown(cancel_futures=True)

    def natural_weights(self) -> Tensor:
        """Return how often each row of a batch counts at natural frequencies: [B] float32, 1 on average."""
        natural = torch.tensor(self.natural_rows)
        counts = torch.tensor(self.counts)
        weights = torch.where(counts > 0, natural / counts, 0.0).repeat_interleave(counts)
        return weights / weights.mean()

    def batch(self, step: int) -> Batch:
        """Return the rows of `step`, counted from 0. Raises what reading them raised."""
        began = time.monotonic()
        rows = self._stage(step).to_float(self.store.request.storage)
        self.waited += time.monotonic() - began
        return Batch(rows[0], rows[-1], self.slices())

    def _stage(self, step: int) -> "_Stage":
        if not self._pool:
            return self._fill(step)
        if step not in self._ahead:  # the first one, or out of turn: what was read ahead is of no use
            for other in self._ahead.values():
                other.cancel()
            self._ahead = {}
        for wanted in range(step, step + AHEAD + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self._fill, wanted)
        return self._ahead.pop(step).result()

    def _fill(self, step: int) -> "_Stage":
        """Read `step` into its place in the ring, which was used up when the step after it was asked for."""
        stage = self._stages[step % len(self._stages)]
        for later in range(step + AHEAD if step == self._filled + 1 else step, step + AHEAD + 1):
            self.will_need(later)
        self._filled = step
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
    reader = BatchReader(view, blocks, config, seed, torch.device(device), source)

    def read() -> Iterator[Batch]:
        with opened.reading(), reader:
            for step in range(first, first + steps):
                yield reader.batch(step)

    return read()


class _Stage:
    """Rows as stored, of one step, on the host; in pinned memory for CUDA, copied on a stream of its own."""

    def __init__(self, rows: int, arrays: Sequence[MappedArray], device: torch.device) -> None:
        self._rows, self._device = [_staging(rows, array, device) for array in arrays], device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None

    def to_fill(self) -> list[NDArray[Any]]:
        """Return the buffers, once the last copy out of them is done."""
        if self._copied:
            self._copied.synchronize()
        return [rows.numpy() for rows in self._rows]

    def to_float(self, storage: StorageType) -> list[Tensor]:
        """Return the rows as float32 on the device; the device's other work neither waits nor is waited for."""
        if not self._stream or not self._copied:
            return [to_float(rows, storage, self._device) for rows in self._rows]
        with torch.cuda.stream(self._stream):
            copies = [rows.to(self._device, non_blocking=True) for rows in self._rows]
            self._copied.record()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for copy in copies:
            copy.record_stream(current)  # its memory is not given away before `current` has read it
        return [to_float(copy, storage, self._device) for copy in copies]


class RowChunk(NamedTuple):
    """Neighbouring rows of one stratum of held-out blocks."""

    stratum: str
    source: Tensor
    """[n, d_in] float32"""
    target: Tensor
    """[n, d_out] float32"""
    outliers: Tensor
    """[n] bool, rows that the store's exclusion leaves out of figures"""

    def part(self, wanted: Tensor) -> "RowChunk":
        """Return the rows that are `wanted`, [n] bool."""
        if bool(wanted.all()):
            return self
        return RowChunk(self.stratum, self.source[wanted], self.target[wanted], self.outliers[wanted])

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
        `Store.check_norms`.
        """
        for name, stratum in self.store.strata.items():
            rows = stratum.stratum.rows
            start, stop = blocks.start * rows, blocks.stop * rows
            stop = stop if most is None else min(stop, start + most.get(name, 0))
            for low in range(start, stop, self.chunk_rows):
                high = min(low + self.chunk_rows, stop)
                found = []
                for side in _sides(self.source):
                    array: MappedArray = getattr(stratum, side)
                    array.will_need([(low, min(low + 2 * self.chunk_rows, stop))])  # this chunk and the next
                    found.append(read_rows(array, low, high, self.store.request.storage, device))
                    check_rows(self.store, name, side, low, found[-1])
                yield RowChunk(name, found[0], found[-1], _outliers(self.store, name, low, high, device))


def _outliers(store: Store, stratum: str, low: int, high: int, device: torch.device) -> Tensor:
    """Tell which of the rows `low:high` of a stratum are left out of figures, [n] bool."""
    found = torch.zeros(high - low, dtype=torch.bool)
    if store.exclusion and store.exclusion.figures:
        rows = store.outliers[stratum]
        first, last = np.searchsorted(rows, [low, high])
        found[torch.from_numpy(rows[first:last] - low)] = True
    return found.to(device)


def read_rows(array: MappedArray, low: int, high: int, storage: StorageType, device: torch.device) -> Tensor:
    """Read rows `low:high` of a source or target array, [n, d] float32."""
    out = _staging(high - low, array, torch.device("cpu"))
    array.read(low, high, out.numpy())
    return to_float(out, storage, device)


def check_rows(store: Store, stratum: str, side: Side, first: int, rows: Tensor) -> None:
    """Raise `CorruptData` as `Store.check_norms`; `rows` [n, d] are the stored ones from row `first` on."""
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
    store.check_norms(stratum, side, np.arange(first, first + len(norms)), norms)


def to_float(rows: Tensor, storage: StorageType, device: torch.device) -> Tensor:
    """Convert stored rows to float32 on `device`; bfloat16 arrives as its bits in uint16."""
    typed = rows.view(torch.bfloat16) if storage == "bfloat16" else rows
    assert typed.dtype == _TORCH[storage]
    return typed.to(device).to(torch.float32, copy=True)  # a copy always: buffers are filled again


def _sides(source: Side) -> tuple[Side, ...]:
    """List the sides that are read, the source first and the target last."""
    return ("source", "target") if source == "source" else ("target",)


def _staging(rows: int, array: MappedArray, device: torch.device) -> Tensor:
    kind = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}[array.spec.dtype]
    return torch.empty(rows, array.spec.width or 1, dtype=kind, pin_memory=device.type == "cuda")
