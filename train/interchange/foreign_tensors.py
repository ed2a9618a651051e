"""Tensors of files that other libraries wrote: each is there, has the shape that the others imply, and is finite."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from shared.errors import CorruptData, UserError
from train.model.checkpoint import load_state


class ForeignTensors:
    """The tensors of one file, taken out in float32 by name."""

    def __init__(self, path: Path) -> None:
        """Read a safetensors or an .npz file. Raises `UserError` when it is missing, `CorruptData` when damaged."""
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        self.path = path
        self._tensors: Mapping[str, Tensor] = _read_npz(path) if path.suffix == ".npz" else load_state(path)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises `UserError` when it is missing."""
        return tuple(self._find(name).shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """Return a tensor of that shape in float32. Raises `UserError` when it is missing or of another kind."""
        tensor = self._find(name)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{self.path}: tensor {name!r} is {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point():
            raise UserError(f"{self.path}: tensor {name!r} is {tensor.dtype}, expected floating point")
        if not tensor.isfinite().all():
            raise CorruptData(f"{self.path}: tensor {name!r} holds NaN or infinity")
        return tensor.float()

    def matrix(self, name: str) -> tuple[int, int]:
        """Return the shape of a matrix. Raises `UserError` when it is missing or not a matrix."""
        shape = self.shape(name)
        if len(shape) != 2:
            raise UserError(f"{self.path}: tensor {name!r} is {list(shape)}, expected a matrix")
        return shape[0], shape[1]

    def per_latent(self, name: str, d_sae: int) -> Tensor:
        """Return numbers [F], of one for each latent or one for all of them. Raises `UserError`."""
        shape = self.shape(name)
        return self.take(name, *(shape if shape in ((), (1,)) else (d_sae,))).expand(d_sae).contiguous()

    def _find(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UserError(f"{self.path}: no tensor {name!r}; it has {', '.join(sorted(self._tensors))}")
        return self._tensors[name]


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, BadZipFile, zlib.error) as error:
        raise CorruptData(f"{path}: not a readable .npz file of arrays ({error})") from error
