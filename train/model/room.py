"""Room for large arrays that live for a moment: mappings of their own, which are used again when their array is gone.

On the heap the room of an aligned array that is gone is too small for the next one once something small was kept beside
it. So evaluations took as much as the pre-activations of all their rows, and each thread of a sweep had its own.
"""

import mmap
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LEAST_BYTES = 2**20
"""Of an array that has a mapping of its own."""
_free: dict[int, list[mmap.mmap]] = {}
"""Mappings that no array uses, by size."""


def array(size: int, kind: Any) -> NDArray[Any]:
    """Return an array [size] of any values. Pages that nobody has written to take no memory."""
    wanted = size * np.dtype(kind).itemsize
    if wanted < LEAST_BYTES:
        return np.empty(size, kind)
    rounded = 1 << (wanted - 1).bit_length()
    free = _free.setdefault(rounded, [])
    try:
        mapping = free.pop()  # in one operation, as is `append`: other threads take and give, too
    except IndexError:
        mapping = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapping, np.uint8, wanted)  # it lives as long as any view of it
    weakref.finalize(whole, free.append, mapping).atexit = False
    return whole.view(kind)


def matrix(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return a tensor [rows, columns] of any values, of the type and on the device of `like`."""
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    kind = {4: np.float32, 8: np.float64}.get(like.element_size(), np.uint16)
    return torch.from_numpy(array(rows * columns, kind)).view(like.dtype).view(rows, columns)
