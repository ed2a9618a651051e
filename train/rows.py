"""The rows of a step on their way from the memory maps to tensors."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from shared.layout import StorageType
from shared.reader import AHEAD, RowReader, RowsConfig
from shared.store import MappedArray, Store

_TORCH: dict[StorageType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

Side = Literal["source", "target"]


def source_width(store: Store, source: Side) -> int:
    """`d_in` of a transcoder that reads this side of the store's pairs."""
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

    `source` is the side of the pairs that is read as source; `target` is read once and is both.
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
        first, self._device = next(iter(store.strata.values())), device
        self._staging = {side: _staging(config.batch_rows, getattr(first, side), device) for side in self.arrays}

    def batch(self, step: int) -> Batch:
        """The rows of `step`, counted from 0."""
        self.will_need(step + AHEAD)
        rows = []
        for side, staging in self._staging.items():
            self.read(step, side, staging.numpy())
            rows.append(to_float(staging, self.store.request.storage, self._device))
        return Batch(rows[0], rows[-1], self.slices())


class HeldOutChunk(NamedTuple):
    """Neighbouring rows of one stratum of held-out blocks."""

    stratum: str
    source: Tensor
    """[n, d_in] float32"""
    target: Tensor
    """[n, d_out] float32"""


def held_out_rows(
    store: Store, blocks: range, chunk_rows: int, device: torch.device, source: Side = "source"
) -> Iterator[HeldOutChunk]:
    """All rows of `blocks`, stratum by stratum, in chunks of at most `chunk_rows`; `source` as in `BatchReader`."""
    for name, stratum in store.strata.items():
        rows = stratum.stratum.rows
        for low in range(blocks.start * rows, blocks.stop * rows, chunk_rows):
            high = min(low + chunk_rows, blocks.stop * rows)
            found = []
            for side in _sides(source):
                array: MappedArray = getattr(stratum, side)
                out = _staging(high - low, array, torch.device("cpu"))
                array.read(low, high, out.numpy())
                found.append(to_float(out, store.request.storage, device))
            yield HeldOutChunk(name, found[0], found[-1])


def to_float(rows: Tensor, storage: StorageType, device: torch.device) -> Tensor:
    """Stored rows as float32 on `device`; bfloat16 arrives as its bits in uint16."""
    typed = rows.view(torch.bfloat16) if storage == "bfloat16" else rows
    assert typed.dtype == _TORCH[storage]
    return typed.to(device).to(torch.float32, copy=True)  # waits: the staging buffer is filled again at once


def _sides(source: Side) -> tuple[Side, ...]:
    """What is read, the source first and the target last."""
    return ("source", "target") if source == "source" else ("target",)


def _staging(rows: int, array: MappedArray, device: torch.device) -> Tensor:
    kind = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}[array.spec.dtype]
    return torch.empty(rows, array.spec.width or 1, dtype=kind, pin_memory=device.type == "cuda")
