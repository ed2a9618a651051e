"""The model's values in the type that rows have until they are written, and the check that they are finite."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import ProjectError
from shared.store.row_arrays import FloatType


def to_storage(values: Tensor, storage: FloatType, name: str, first: int) -> Tensor:
    """Return `values` [S, T, width] in a type of floats, on CPU; bfloat16 rounds to nearest even.

    `first` is the block's number of the first window, for the message of the `ProjectError` on values that are not
    finite, or not in the storage type.
    """
    stored = values.to(getattr(torch, storage))
    if not torch.isfinite(stored.sum(dtype=torch.float32)):  # one pass; a sum of finite values may overflow, too
        _check_finite(values, values, name, first, "the value is")
        _check_finite(stored, values, name, first, f"{storage} cannot hold the value")
    return stored.cpu()


def as_tensor(rows: NDArray[np.generic]) -> Tensor:
    """Return stored rows as a tensor over the same memory."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor


def as_array(rows: Tensor) -> NDArray[np.generic]:
    """Return rows in the storage type as they are stored, over the same memory."""
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()


def _check_finite(values: Tensor, shown: Tensor, name: str, first: int, what: str) -> None:
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return
    sequence, position, dimension = torch.nonzero(bad)[0].tolist()
    remedy = (
        "the model's dtype is too narrow, or its weights are damaged"
        if values is shown
        else "choose --set store.storage=bfloat16"
    )
    raise ProjectError(
        f"{name}, sequence {first + sequence} of the block, position {position}: {what} "
        f"{float(shown[sequence, position, dimension]):g}; {remedy}"
    )
