"""A store's batches as a torch data set, for trainers that are not this project's."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import get_rank, get_world_size, is_available, is_initialized
from torch.utils.data import IterableDataset, get_worker_info

from shared.errors import UserError
from shared.store.mapped_array import RowArray
from shared.store.reader import RowReader, RowsConfig
from shared.store.store import Local, Store
from train.data.batches import Side
from train.data.staging import typed

_SIDES: tuple[Side, Side] = ("source", "target")
_ROUNDING = 1 + 1e-5
"""How far a norm that is summed in float32 can be above the exact one; what is over it is summed in float64."""


class RowTags(NamedTuple):
    """Where each row of a batch comes from."""

    stratum: Tensor
    """[B] int64, a number in `StoreDataset.strata`"""
    position: Tensor
    """[B] int64, as the model counted"""
    sequence: Tensor
    """[B] int64, row of the store's `tokens`"""
    offset: Tensor
    """[B] int64, column of the store's `tokens`"""


class TaggedRows(NamedTuple):
    """The rows of a step, those of one stratum side by side."""

    source: Tensor
    """[B, d_in], as stored: not normalised"""
    target: Tensor
    """[B, d_out]"""
    tags: RowTags


class StoreDataset(IterableDataset[TaggedRows]):
    """Yields whole batches of a store, in the order in which a run of the same `seed` trains on them.

    Give it to a `DataLoader` with `batch_size=None`. Workers take turns with the batches, so that their order does not
    depend on how many there are. So do the processes of torch.distributed: of R processes, process r gets the steps r,
    r + R, r + 2R and so on. Of every stratum each row is read once, over all workers and processes, before any is read
    again. Rows of held-out blocks are left out, and outliers and position 0 as in training.

    `strata` has the names of the store's strata, which tags number.
    """

    def __init__(
        self,
        store: Store | Path | str,
        *,
        rows: RowsConfig | None = None,
        seed: int = 0,
        first: int = 0,
        steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        blocks: range | None = None,
        local: Local | None = None,
    ) -> None:
        """Check the store, and fix which rows are drawn: a store that is extended later does not change them.

        `rows` says which ones a batch has; by default 1,024 at natural frequencies, without outliers. `first` is the
        step to begin with and `steps` how many follow, over all processes; none: without end. To resume, give the
        number of steps that all processes together have taken. Rows of another `dtype` than the store's are converted;
        those of the store's own are copied once, out of the mapped files. `blocks` takes others than those to train on,
        for example `store.record.report_blocks`. `local` as in `Store.open`.

        Raises `UserError` when there is no finished store or `rows` does not fit it, and `CorruptData` as
        `Store.check_shards`. Iterating raises `CorruptData` as `Store.check_norms`.
        """
        opened = store if isinstance(store, Store) else Store.open(store, local)
        self._path, self._local = opened.place, local
        self._config = (rows or RowsConfig()).resolve(opened.request.block_sequences)
        self._blocks = self._config.training_blocks(opened) if blocks is None else blocks
        if not 0 <= self._blocks.start < self._blocks.stop <= opened.record.blocks or self._blocks.step != 1:
            raise UserError(f"blocks are {self._blocks}, and the store has blocks 0 to {opened.record.blocks - 1}")
        if first < 0 or (steps is not None and steps < 0):
            raise UserError(f"first is {first} and steps is {steps}: neither can be negative")
        self._exclusion = self._config.exclusion(opened, figures=True)
        self._seed, self._first, self._steps, self._dtype = seed, first, steps, dtype
        self._process: tuple[int, int] | None = None
        opened.check_shards(self._blocks)
        reader = self._reader(opened)
        self.strata = tuple(opened.strata)
        self.steps_per_epoch = max(reader.steps_per_epoch().values())
        """Steps, over all processes, in which every row that is drawn has been read at least once."""

    def __iter__(self) -> Iterator[TaggedRows]:
        """Yield this worker's and this process's batches; the store is in use until the last one."""
        process, processes = self._process or _process()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self._steps is not None and self._steps % processes:
            raise UserError(f"{self._steps:,} steps cannot be shared evenly by {processes} processes; give a multiple")
        start, stride = self._first + process + processes * number, processes * workers
        store = Store.open(self._path, self._local)
        batches = _Batches(self._reader(store), self._dtype)
        with store.reading():
            for step in (
                count(start, stride) if self._steps is None else range(start, self._first + self._steps, stride)
            ):
                batches.reader.will_need(step + stride)
                yield batches.batch(step)

    def __getstate__(self) -> dict[str, Any]:
        """Tell a worker that is not forked which process it works for."""
        return {**self.__dict__, "_process": self._process or _process()}

    def _reader(self, store: Store) -> RowReader:
        return RowReader(store.excluding(self._exclusion), self._blocks, self._config, self._seed)


def _process() -> tuple[int, int]:
    """Return this process's number and how many there are."""
    return (get_rank(), get_world_size()) if is_available() and is_initialized() else (0, 1)


class _Batches:
    """Reads batches, each into memory of its own."""

    def __init__(self, reader: RowReader, dtype: torch.dtype) -> None:
        self.reader, self._dtype = reader, dtype
        self._longest = {side: reader.longest_norms(side) * _ROUNDING for side in _SIDES}
        counts = torch.tensor(reader.counts)
        self._stratum = torch.arange(len(counts)).repeat_interleave(counts)

    def batch(self, step: int) -> TaggedRows:
        """Return the rows of `step`. Raises `CorruptData` as `Store.check_norms`."""
        source, target = (self._rows(step, side) for side in _SIDES)
        marks = (self._read(step, name).astype(np.int64) for name in ("position", "sequence", "offset"))
        return TaggedRows(source, target, RowTags(self._stratum.clone(), *map(torch.from_numpy, marks)))

    def _rows(self, step: int, side: Side) -> Tensor:
        rows = typed(torch.from_numpy(self._read(step, side)))
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).numpy()
        if not (norms <= self._longest[side]).all():
            exact = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).numpy()
            self.reader.check_norms(step, side, exact)
        return rows.to(self._dtype)

    def _read(self, step: int, name: str) -> NDArray[Any]:
        array: RowArray = getattr(next(iter(self.reader.store.strata.values())), name)
        return self.reader.read(step, name, array.room(len(self._stratum)))
