"""Rows of activations that somebody else wrote: several files that are read as one array. No pickle is read."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared.bounds import MAX_WIDTH
from shared.errors import UserError

_TENSORS = {"BF16": ("uint16", "bfloat16"), "F16": ("float16",) * 2, "F32": ("float32",) * 2, "F64": ("float64",) * 2}
_TENSORS |= {"I32": ("int32",) * 2, "I64": ("int64",) * 2, "U16": ("uint16",) * 2, "U32": ("uint32",) * 2}
_MOST_HEADER = 100 * 2**20
_FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class Part(NamedTuple):
    """An array of one file, or of a part of one."""

    path: Path
    what: str
    """What it is called in the file; empty where the file is the array."""
    shape: tuple[int, ...]
    """(n, d) or (s, T, d); of token ids (n,) or (s, T)"""
    dtype: str
    load: Callable[[], NDArray[Any]]
    """Maps the values, bfloat16 as its bits. A map keeps its file open, so no more are held than are read."""
    first: int = 0
    """Rows of the file before this part's."""

    @property
    def rows(self) -> int:
        """Vectors of a part of activations."""
        return int(np.prod(self.shape[:-1]))

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
        self._ends = list(accumulate(part.rows for part in parts))
        self._open: tuple[int, NDArray[Any]] | None = None
        self.rows, self.width = self._ends[-1], parts[0].shape[-1]
        self.dtype = parts[0].dtype
        self.context_size = parts[0].shape[1] if len(parts[0].shape) == 3 else None
        """Tokens of a sequence, where arrays have a dimension for that."""

    def read(self, low: int, high: int) -> Tensor:
        """Return rows `low:high`, [n, d] in the files' type."""
        found = []
        while low < high:
            number, row = self._find(low)
            values = self._values(number)
            found.append(np.array(values[row : row + high - low]))
            low += len(found[-1])
        rows = torch.from_numpy(np.concatenate(found))
        return rows.view(torch.bfloat16) if self.dtype == "bfloat16" else rows

    def place(self, row: int) -> str:
        """Say in which file a row is, and which of its rows it is."""
        number, inner = self._find(row)
        part = self.parts[number]
        inner += part.first
        where = f"row {inner}"
        if self.context_size:
            where = f"sequence {inner // self.context_size}, position {inner % self.context_size}"
        return f"{part.name}: {where}"

    def _values(self, number: int) -> NDArray[Any]:
        """Return a part's rows [n, d]; sequences are read in order of the files, so one part is open at a time."""
        if self._open is None or self._open[0] != number:
            self._open = number, self.parts[number].load().reshape(-1, self.width)
        return self._open[1]

    def _find(self, row: int) -> tuple[int, int]:
        number = bisect_right(self._ends, row)
        return number, row - (self._ends[number - 1] if number else 0)


def _check(part: Part, first: Part) -> None:
    shape = list(part.shape)
    if part.dtype not in _FLOATS:
        raise UserError(f"{part.name} is of type {part.dtype}, expected {', '.join(_FLOATS)}")
    if len(shape) not in (2, 3) or not all(shape) or shape[-1] > MAX_WIDTH:
        raise UserError(f"{part.name} has the shape {shape}, expected [rows, d] or [sequences, tokens, d]")
    if (wrong := (part.dtype, shape[1:])) != (wanted := (first.dtype, list(first.shape[1:]))):
        raise UserError(f"{part.name} has rows of {wrong[0]} {wrong[1]}, and {first.name} of {wanted[0]} {wanted[1]}")


def token_ids(parts: Sequence[Part]) -> NDArray[np.int32]:
    """Return the parts' token ids one after the other, [n] or [s, T]. Raises `UserError` on what cannot be some."""
    found = []
    for part in parts:
        values = part.load()
        if values.dtype.kind not in "iu" or len(part.shape) not in (1, 2) or part.shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"{part.name} is {part.dtype} {list(part.shape)}, expected integers [rows] or [sequences, tokens]"
            )
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**31:
            raise UserError(f"{part.name} holds {int(values.min())} to {int(values.max())}, expected ids from 0 on")
        found.append(values.astype(np.int32))
    return np.concatenate(found)


def in_order(paths: Sequence[Path]) -> list[Path]:
    """Sort by name, numbers in names by their value: `rows-2` comes before `rows-10`."""
    return sorted(paths, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """What the arrays are called, and which of them are meant."""

    source: str | None
    """The start of a file's name, a tensor, a column, or a hook."""
    target: str | None
    tokens: str | None
    layer: int | None = None
    context_size: int | None = None
    """Tokens of a sequence, where the files do not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Activation pairs of some files."""

    names: Names
    source: Side
    target: Side
    token_parts: Sequence[Part]
    tokens: NDArray[np.int32] | None
    """[n] or [s, T]; None without"""
    context_size: int | None = None
    """Tokens of a sequence as the format has it, where arrays are [rows, d]."""
    hooks: tuple[str, str]
    """Of the sources and the targets."""
    has_position_0: bool = True
    """Whether a sequence's first row is the model's position 0."""
    short: int = 0
    """Sequences that are left out, being shorter than the others."""

    @property
    def files(self) -> list[Path]:
        """All files, in the order in which rows are read."""
        parts = [*self.source.parts, *self.target.parts, *self.token_parts]
        return list(dict.fromkeys(part.path for part in parts))


def pairs_of(names: Names, source: list[Part], target: list[Part], tokens: list[Part], **known: Any) -> Pairs:
    """Return the pairs of some parts; the names are the hooks unless others are `known`."""
    ids = token_ids(tokens) if tokens else None
    known = {"hooks": (str(names.source), str(names.target))} | known
    return Pairs(names=names, source=Side(source), target=Side(target), token_parts=tokens, tokens=ids, **known)


def read_tensors(path: Path) -> dict[str, Part]:
    """Open the tensors of a safetensors file; the library has checked sizes and places before."""
    try:
        with safe_open(path, framework="np"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _MOST_HEADER)))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error
    return {
        name: _tensor(path, name, entry, 8 + size)
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _TENSORS and 0 not in entry["shape"] and entry["shape"]
    }


def _tensor(path: Path, name: str, entry: dict[str, Any], start: int) -> Part:
    (stored, dtype), shape = _TENSORS[entry["dtype"]], tuple(entry["shape"])
    offset = start + entry["data_offsets"][0]
    return Part(path, name, shape, dtype, lambda: np.memmap(path, stored, "r", offset=offset, shape=shape))


def tensor_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder in order, or the one file. Raises `UserError` when there are none."""
    files = in_order(list(path.glob("*.safetensors"))) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .safetensors files")
    return files


def named_tensor(found: dict[str, Part], name: str, path: Path, options: str) -> Part:
    """Return a tensor of a file by its name. Raises `UserError` that lists the others."""
    if name not in found:
        raise UserError(f"{path} has no tensor {name}: it has {', '.join(sorted(found)[:8])}{options}")
    return found[name]


def only(paths: Sequence[Path], kind: str, *, file: bool = False) -> Path:
    """Return the one folder, or with `file` the one file, that a format takes. Raises `UserError`."""
    if len(paths) != 1 or not (paths[0].is_dir() or (file and paths[0].is_file())):
        raise UserError(f"format {kind} takes one folder, got {', '.join(map(str, paths))}")
    return paths[0]
