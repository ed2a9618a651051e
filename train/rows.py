"""`batch(step)`: which rows of a store a step sees, and their way from the memory maps to tensors.

A pure function of (store, pinned blocks, mixture, seed, step): resuming needs the step alone, and two experiments
with one seed see the same rows in the same order.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from shared.config import Config
from shared.errors import UserError
from shared.keyed import permutation
from shared.layout import StorageType
from shared.store import MappedArray, Store, StratumRows
from shared.strata import Stratum

_TORCH: dict[StorageType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_AHEAD = 2


class RowsConfig(Config):
    """Which rows a batch is made of."""

    batch_rows: int = Field(1024, ge=1)
    """Rows per step."""
    alpha: float = Field(1.0, ge=0)
    """A stratum's share of a batch is proportional to (rows the model computed)^alpha: 1 natural, 0 uniform."""
    max_bos_batch_share: float = Field(1 / 256, ge=0, le=1)
    """Most of a batch that may come from position 0."""
    run_rows: int = Field(64, ge=1)
    """Neighbouring rows that are read together: 64 keep a cold disk as fast as reading in order."""


class Batch(NamedTuple):
    """Rows of a step, those of one stratum side by side."""

    source: Tensor
    """[B, d_in] float32, as stored: not normalised"""
    target: Tensor
    """[B, d_out] float32"""
    strata: dict[str, slice]
    """Where each stratum's rows are; strata without rows are left out"""


def rows_per_stratum(strata: Sequence[Stratum], config: RowsConfig) -> list[int]:
    """Rows of a batch that each stratum gives; they add up to `batch_rows`.

    Proportional to natural_rows^alpha by largest remainder; the stratum that is position 0 alone is capped first.
    Raises `UserError` when the cap leaves no stratum to fill the batch.
    """
    weights = np.array([float(s.natural_rows) ** config.alpha for s in strata])
    counts = _largest_remainder(weights, config.batch_rows)
    bos = next((i for i, s in enumerate(strata) if (s.start, s.stop) == (0, 1)), None)
    cap = int(config.max_bos_batch_share * config.batch_rows)
    if bos is None or counts[bos] <= cap:
        return counts
    if len(strata) == 1 and cap < config.batch_rows:
        raise UserError("the store holds position 0 only; raise rows.max_bos_batch_share to 1 to train on it")
    weights[bos] = 0
    counts = _largest_remainder(weights, config.batch_rows - cap)
    counts[bos] = cap
    return counts


def _largest_remainder(weights: NDArray[np.float64], total: int) -> list[int]:
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return [int(count) for count in counts]


class RowStream:
    """An endless stream over the rows of one stratum: every epoch is a keyed permutation of its runs."""

    def __init__(self, rows: int, run_rows: int, *key: int | str) -> None:
        self.rows = rows
        self._run = min(run_rows, rows)
        self._key = key
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Half-open row ranges that make up positions `start : start + count` of the stream."""
        while count:
            epoch, offset = divmod(start, self.rows)
            low, high = self._run_at(epoch, offset)
            high = min(high, low + count)
            yield low, high
            start, count = start + high - low, count - (high - low)

    def _run_at(self, epoch: int, offset: int) -> tuple[int, int]:
        """The rest of the run in which the epoch's `offset` falls. Only the last run of the rows can be short."""
        order = self._order(epoch)
        full, short = divmod(self.rows, self._run)
        short_slot = int(np.flatnonzero(order == full)[0]) if short else len(order)
        after = offset >= short_slot * self._run + short
        slot, skip = divmod(offset + (self._run - short if after and short else 0), self._run)
        low = int(order[slot]) * self._run
        return low + skip, min(low + self._run, self.rows)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            runs = -(-self.rows // self._run)
            self._epochs = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = permutation(runs, *self._key, epoch)
        return self._epochs[epoch]


class BatchReader:
    """Reads the batches of a store's pinned range of training blocks."""

    def __init__(self, store: Store, blocks: range, config: RowsConfig, seed: int, device: torch.device) -> None:
        self.store, self.blocks, self._device = store, blocks, device
        self._strata = list(store.strata.values())
        self.counts = rows_per_stratum([s.stratum for s in self._strata], config)
        self._streams = [
            RowStream(len(blocks) * s.stratum.rows, config.run_rows, "rows", seed, s.stratum.name) for s in self._strata
        ]
        self._source = _staging(config.batch_rows, self._strata[0].source, device)
        self._target = _staging(config.batch_rows, self._strata[0].target, device)

    def batch(self, step: int) -> Batch:
        """The rows of `step`, counted from 0."""
        for stratum, low, high, _ in self._runs(step + _AHEAD):
            stratum.source.will_need(low, high)
            stratum.target.will_need(low, high)
        for stratum, low, high, at in self._runs(step):
            stratum.source.read(low, high, self._source.numpy()[at : at + high - low])
            stratum.target.read(low, high, self._target.numpy()[at : at + high - low])
        return Batch(
            to_float(self._source, self.store.request.storage, self._device),
            to_float(self._target, self.store.request.storage, self._device),
            self.slices(),
        )

    def slices(self) -> dict[str, slice]:
        """Where each stratum's rows lie in every batch."""
        edges = pairwise(int(edge) for edge in np.cumsum([0, *self.counts]))
        return {
            s.stratum.name: slice(low, high) for s, (low, high) in zip(self._strata, edges, strict=True) if high > low
        }

    def epochs(self, step: int) -> dict[str, float]:
        """How often each stratum's rows have been seen before `step`."""
        return {
            s.stratum.name: step * count / stream.rows
            for s, count, stream in zip(self._strata, self.counts, self._streams, strict=True)
        }

    def describe(self, step: int) -> str:
        """Which rows of the store make up `step`, for an error message."""
        return ", ".join(f"{s.stratum.name} {low}:{high}" for s, low, high, _ in self._runs(step))

    def _runs(self, step: int) -> Iterator[tuple[StratumRows, int, int, int]]:
        """(stratum, first row, past the last row, place in the batch) of every run of `step`."""
        at = 0
        for stratum, stream, count in zip(self._strata, self._streams, self.counts, strict=True):
            base = self.blocks.start * stratum.stratum.rows
            for low, high in stream.runs(step * count, count):
                yield stratum, base + low, base + high, at
                at += high - low


class HeldOutChunk(NamedTuple):
    """Neighbouring rows of one stratum of held-out blocks."""

    stratum: str
    source: Tensor
    """[n, d_in] float32"""
    target: Tensor
    """[n, d_out] float32"""


def held_out_rows(store: Store, blocks: range, chunk_rows: int, device: torch.device) -> Iterator[HeldOutChunk]:
    """All rows of `blocks`, stratum by stratum, in chunks of at most `chunk_rows`."""
    for name, stratum in store.strata.items():
        rows = stratum.stratum.rows
        for low in range(blocks.start * rows, blocks.stop * rows, chunk_rows):
            high = min(low + chunk_rows, blocks.stop * rows)
            sides = []
            for array in (stratum.source, stratum.target):
                out = _staging(high - low, array, torch.device("cpu"))
                array.read(low, high, out.numpy())
                sides.append(to_float(out, store.request.storage, device))
            yield HeldOutChunk(name, *sides)


def to_float(rows: Tensor, storage: StorageType, device: torch.device) -> Tensor:
    """Stored rows as float32 on `device`; bfloat16 arrives as its bits in uint16."""
    typed = rows.view(torch.bfloat16) if storage == "bfloat16" else rows
    assert typed.dtype == _TORCH[storage]
    return typed.to(device).to(torch.float32, copy=True)  # waits: the staging buffer is filled again at once


def _staging(rows: int, array: MappedArray, device: torch.device) -> Tensor:
    kind = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}[array.spec.dtype]
    return torch.empty(rows, array.spec.width or 1, dtype=kind, pin_memory=device.type == "cuda")
