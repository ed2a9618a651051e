"""Stored rows on their way to a device: buffers on the host, copies, and their conversion to float32."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.store.layout import StorageType
from shared.store.mapped_array import MappedArray

TORCH: dict[StorageType, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


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


def to_float(rows: Tensor, storage: StorageType, device: torch.device) -> Tensor:
    """Convert stored rows to float32 on `device`; bfloat16 may arrive as its bits in uint16."""
    return to_stored(rows, storage).to(device).to(torch.float32, copy=True)  # a copy always: buffers are filled again


def to_stored(rows: Tensor, storage: StorageType) -> Tensor:
    """Return a view of rows in the type that they are stored in; bfloat16 is read from disk as its bits in uint16."""
    typed = rows.view(torch.bfloat16) if storage == "bfloat16" else rows
    assert typed.dtype == TORCH[storage]
    return typed


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor of the CPU to a device, which is not waited for."""
    if device.type == "cpu":
        return tensor
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def staging(rows: int, array: MappedArray, device: torch.device) -> Tensor:  # [rows, d]
    """Return room on the host for stored rows of an array; pinned where they go to a CUDA device."""
    kind = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}[array.spec.dtype]
    return torch.empty(rows, array.spec.width or 1, dtype=kind, pin_memory=device.type == "cuda")
