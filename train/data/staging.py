"""Stored rows on their way to a device: buffers on the host, copies, and their conversion to float32."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.store.mapped_array import RowArray

_READ_AS = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}
"""The types in which rows come from the host, by numpy's names."""


class Stage:
    """What one step needs, on the host; for CUDA in pinned memory, copied on a stream of its own."""

    def __init__(self, buffers: list[Tensor], device: torch.device) -> None:
        self._buffers, self._device = buffers, device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None

    def to_fill(self) -> list[NDArray[Any]]:
        """Return the buffers, once the last copy out of them is done."""
        if self._copied:
            self._copied.synchronize()
        return [buffer.numpy() for buffer in self._buffers]

    def on_device(self, rows: int | None = None) -> list[Tensor]:
        """Return copies of all or the first `rows` on the device, whose other work neither waits nor is waited for.

        On CPU, the buffers themselves.
        """
        filled = [buffer[:rows] for buffer in self._buffers]
        if not self._stream or not self._copied:
            return filled
        with torch.cuda.stream(self._stream):
            copies = [buffer.to(self._device, non_blocking=True) for buffer in filled]
            self._copied.record()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for copy in copies:
            copy.record_stream(current)  # its memory is not given away before `current` has read it
        return copies


def to_float(rows: Tensor, device: torch.device) -> Tensor:
    """Convert rows as they are read to float32 on `device`."""
    return typed(rows).to(device).to(torch.float32, copy=True)  # a copy always: buffers are filled again


def typed(rows: Tensor) -> Tensor:
    """Return a view of rows in the type that they are of: bfloat16 is read from disk as its bits in uint16."""
    return rows.view(torch.bfloat16) if rows.dtype == torch.uint16 else rows


def type_of(array: RowArray) -> torch.dtype:
    """Return the type that the rows of an array are of once they are read."""
    kind = _READ_AS[array.dtype.name]
    return torch.bfloat16 if kind == torch.uint16 else kind


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the CPU to a device, which is not waited for."""
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def staging(rows: int, array: RowArray, device: torch.device) -> Tensor:  # [rows, d]
    """Return room on the host for rows of an array as they are read; pinned where they go to a CUDA device."""
    kind = _READ_AS[array.dtype.name]
    return torch.empty(rows, array.spec.width or 1, dtype=kind, pin_memory=device.type == "cuda")
