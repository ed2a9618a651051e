"""Rows of activations that somebody else wrote: several files that are read as one array. No pickle is read."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.bounds import MAX_WIDTH
from shared.errors import UserError

_FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Part(NamedTuple):
    """An array of one file, or of a part of one."""

    path: Path
    what: str
    """What it is called in the file; empty where the file is the array."""
    values: NDArray[Any]
    """[n, d] or [s, T, d]; bfloat16 as its bits"""
    dtype: str
    first: int = 0
    """Rows of the file before this part's."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.path}: {self.what}" if self.what else f"{self.path}"


class Side:
    """The sources, or the targets: the parts' rows one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Raise `UserError` when a part holds no rows of numbers, or others than the first part's."""
        self.parts = parts
        for part in parts:
            _check(part, parts[0])
        self._flat = [part.values.reshape(-1, part.values.shape[-1]) for part in parts]
        self._ends = list(accumulate(len(rows) for rows in self._flat))
        self.rows, self.width = self._ends[-1], parts[0].values.shape[-1]
        self.dtype = parts[0].dtype
        self.context_size = parts[0].values.shape[1] if parts[0].values.ndim == 3 else None
        """Tokens of a sequence, where arrays have a dimension for that."""

    def read(self, low: int, high: int) -> Tensor:
        """Return rows `low:high`, [n, d] in the files' type."""
        found = []
        while low < high:
            number, row = self._find(low)
            taken = min(high - low, len(self._flat[number]) - row)
            found.append(np.array(self._flat[number][row : row + taken]))
            low += taken
        rows = torch.from_numpy(np.concatenate(found))
        return rows.view(torch.bfloat16) if self.dtype == "bfloat16" else rows

    def place(self, row: int) -> str:
        """Tell in which file a row lies, and which of its rows it is."""
        number, inner = self._find(row)
        part = self.parts[number]
        inner += part.first
        where = f"row {inner}"
        if self.context_size:
            where = f"sequence {inner // self.context_size}, position {inner % self.context_size}"
        return f"{part.name}: {where}"

    def _find(self, row: int) -> tuple[int, int]:
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)


def _check(part: Part, first: Part) -> None:
    shape = list(part.values.shape)
    if part.dtype not in _FLOATS:
        raise UserError(f"{part.name} is of type {part.dtype}, expected {', '.join(_FLOATS)}")
    if len(shape) not in (2, 3) or not all(shape) or shape[-1] > MAX_WIDTH:
        raise UserError(f"{part.name} has the shape {shape}, expected [rows, d] or [sequences, tokens, d]")
    if (wrong := (part.dtype, shape[1:])) != (wanted := (first.dtype, list(first.values.shape[1:]))):
        raise UserError(f"{part.name} has rows of {wrong[0]} {wrong[1]}, and {first.name} of {wanted[0]} {wanted[1]}")


def token_ids(parts: Sequence[Part]) -> NDArray[np.int32]:
    """Return the parts' token ids one after the other, [n] or [s, T]. Raises `UserError` on what cannot be some."""
    for part in parts:
        shape, values = list(part.values.shape), part.values
        if values.dtype.kind not in "iu" or len(shape) not in (1, 2) or shape[1:] != list(parts[0].values.shape[1:]):
            raise UserError(f"{part.name} is {values.dtype} {shape}, expected integers [rows] or [sequences, tokens]")
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**31:
            raise UserError(f"{part.name} holds {int(values.min())} to {int(values.max())}, expected ids from 0 on")
    return np.concatenate([part.values for part in parts]).astype(np.int32)


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Sort by name, numbers in names by their value: `rows-2` comes before `rows-10`."""
    return sorted(paths, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])
