"""A copy of a run's tensors in the host's memory, while training goes on to change them."""

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

_ALIGNED = 64
"""Bytes that the place of each tensor is a multiple of."""


class HostCopies:
    """Copies tensors of a CUDA device into pinned memory on a stream of its own, and those on CPU beside them.

    The device needs no memory for it, and the host waits for nothing: the device's next work does, until its tensors
    are copied. The pinned memory is kept for the next copy, which is written over this one.
    """

    def __init__(self) -> None:
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], object]]:
        """Copy `tensors`; returns the copies by name, and what to call before they are read.

        Raises `RuntimeError` or `MemoryError` where the host has not as much memory.
        """
        there = {name: _dense(tensor.detach()) for name, tensor in tensors.items() if tensor.device.type != "cpu"}
        here = {name: tensor.detach().clone() for name, tensor in tensors.items() if name not in there}
        if not there:
            return here, lambda: None
        copied = self._copy(there, found := self._places(there))
        return {name: (found | here)[name] for name in tensors}, copied.synchronize

    def _copy(self, tensors: dict[str, Tensor], places: dict[str, Tensor]) -> torch.cuda.Event:
        device = next(iter(tensors.values())).device
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        ready, copied = torch.cuda.Event(), torch.cuda.Event()
        ready.record(current)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            for name, tensor in tensors.items():
                places[name].copy_(tensor, non_blocking=True)
            copied.record(stream)
        current.wait_event(copied)  # or a step would change, or give away, what is not copied yet
        return copied

    def _places(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return room for each tensor in one piece of pinned memory: torch rounds each piece up to a power of two."""
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors.values()]
        if sum(sizes) > len(self._pinned):
            self._pinned = torch.empty(0, dtype=torch.uint8)  # given back first
            self._pinned = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        starts = accumulate(sizes, initial=0)
        return {
            name: self._pinned[start : start + tensor.nbytes]
            .view(tensor.dtype)
            .as_strided(tensor.shape, tensor.stride(), start // tensor.element_size())
            for (name, tensor), start in zip(tensors.items(), starts, strict=False)
        }


def _dense(tensor: Tensor) -> Tensor:
    """Return a tensor that fills its memory, in rows or in columns: only such a one is copied as it lies."""
    in_columns = tensor.dim() == 2 and tensor.T.is_contiguous()
    return tensor if in_columns else tensor.contiguous()
