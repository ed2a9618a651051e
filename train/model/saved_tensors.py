"""Take tensors out of a checkpoint: each must have the shape and type that is expected."""

from collections.abc import Mapping

import torch
from torch import Tensor


def fitting(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Return a loaded tensor that is as `like`.

    Raises `ValueError` with its name when it is missing or of another kind.
    """
    if name not in tensors:
        raise ValueError(f"tensor {name!r} is missing")
    tensor = tensors[name]
    if tensor.shape != like.shape or tensor.dtype != like.dtype:
        raise ValueError(
            f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected {like.dtype} {list(like.shape)}"
        )
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise ValueError(f"tensor {name!r} holds NaN or infinity")
    return tensor


def numbers(tensors: Mapping[str, Tensor], name: str, below: int, count: int | None = None) -> Tensor:
    """Return a loaded list of numbers from 0 to `below` - 1, int64 [count]; as many as there are, without `count`.

    Raises `ValueError` with its name otherwise.
    """
    size = count if count is not None else tensors[name].numel() if name in tensors else 0
    found = fitting(tensors, name, torch.empty(size, dtype=torch.int64))
    if size and not 0 <= int(found.min()) <= int(found.max()) < below:
        raise ValueError(f"tensor {name!r} holds {int(found.min())} to {int(found.max())}, expected 0 to {below - 1}")
    return found
