"""The files of each format, opened: which arrays are sources, targets and token ids."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from harvest.imports.many_layers import clt_forge, vllm
from harvest.imports.row_files import (
    Names,
    Pairs,
    Part,
    Side,
    in_order,
    named_tensor,
    only,
    pairs_of,
    read_tensors,
    tensor_files,
    token_ids,
)
from shared.errors import CorruptData, UserError
from shared.files.durable import read_json
from shared.store.import_origin import ImportFormat

_TOKEN_IDS = "token_ids"


def open_pairs(paths: Sequence[Path], kind: ImportFormat, names: Names) -> Pairs:
    """Open what is at `paths`. Raises `UserError` when it is not of that format, or the sides do not match."""
    for path in paths:
        if not path.exists():
            raise UserError(f"nothing is at {path}; pass the folder or file to import")
    found = _FORMATS[kind](paths, names)
    source, target = found.source, found.target
    if (source.rows, source.context_size) != (target.rows, target.context_size):
        raise UserError(
            f"{source.parts[0].name}: {_size(source)} of sources, and {_size(target)} of targets in "
            f"{target.parts[0].name}; pairs need as many of both"
        )
    if found.tokens is not None and found.tokens.size != source.rows:
        raise UserError(f"{source.parts[0].name}: {source.rows:,} rows, and {found.tokens.size:,} token ids")
    return found


def _size(side: Side) -> str:
    per = f" in sequences of {side.context_size:,}" if side.context_size else ""
    return f"{side.rows:,} rows{per}"


def _npy(paths: Sequence[Path], names: Names) -> Pairs:
    """Open `source*.npy`, `target*.npy` and, where they are there, `tokens*.npy` of a folder."""
    folder, named = only(paths, "npy"), _plain(names)

    def found(name: str) -> dict[str, Path]:
        paths = in_order([path for path in folder.glob("*.npy") if path.name.startswith(name)])
        return {path.name.removeprefix(name): path for path in paths}

    sides = {name: found(name) for name in (named.source, named.target, named.tokens) if name}
    first = sides[str(named.source)]
    for name, files in sides.items():
        optional = name == named.tokens and names.tokens is None
        if not files and optional:
            continue
        if not files or list(files) != list(first):
            ends = f"; {named.source}*.npy are {', '.join(p.name for p in first.values())}" if first else ""
            raise UserError(
                f"{folder} holds {len(files)} files {name}*.npy, expected one for each of the sources{ends}; "
                "--source, --target and --tokens say how names start"
            )
    parts = {name: [_read_npy(path) for path in files.values()] for name, files in sides.items()}
    for other in (named.target, named.tokens):
        for a, b in zip(parts[str(named.source)], parts[str(other)], strict=False):
            if a.rows != (theirs := _rows(b, other != named.tokens)):
                raise UserError(f"{a.path}: {a.rows:,} rows, and {b.path} is of {theirs:,}; pairs need as many of both")
    return pairs_of(named, parts[str(named.source)], parts[str(named.target)], parts[str(named.tokens)])


def _rows(part: Part, vectors: bool) -> int:
    """Count rows of a part of activations, or of one of token ids."""
    return part.rows if vectors else int(np.prod(part.shape))


def _read_npy(path: Path) -> Part:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a .npy file of numbers ({error})") from error
    if values.ndim > 2 and not values.flags.c_contiguous:
        raise UserError(f"{path}: saved in Fortran order; save numpy.ascontiguousarray of it")
    return Part(path, "", values.shape, values.dtype.name, lambda: np.load(path, mmap_mode="r", allow_pickle=False))


def _safetensors(paths: Sequence[Path], names: Names) -> Pairs:
    """Open the tensors `source`, `target` and, where they are there, `tokens` of a file or of a folder's files."""
    files, named = tensor_files(only(paths, "safetensors", file=True)), _plain(names)
    tensors = [read_tensors(file) for file in files]
    has_tokens = names.tokens is not None or str(named.tokens) in tensors[0]
    parts: list[list[Part]] = []
    for name in (str(named.source), str(named.target), *([str(named.tokens)] if has_tokens else [])):
        options = "; --source, --target and --tokens say what they are called"
        parts.append([named_tensor(found, name, file, options) for file, found in zip(files, tensors, strict=True)])
    for a, *others in zip(*parts, strict=True):
        for number, b in enumerate(others):
            if a.rows != (theirs := _rows(b, number == 0)):
                raise UserError(f"{a.name}: {a.rows:,} rows, and {b.what} is of {theirs:,}; pairs need as many of both")
    return pairs_of(named, parts[0], parts[1], parts[2] if has_tokens else [])


def _saelens(paths: Sequence[Path], names: Names) -> Pairs:
    """Open the columns of SAELens' cached activations: one folder of both hooks, or one for each."""
    if len(paths) > 2:
        raise UserError(f"{len(paths)} folders: expected one, or the source's and the target's")
    first, last = paths[0], paths[-1]
    columns = _read_arrow(first)
    others = columns if last == first else _read_arrow(last)
    source = names.source or _only_hook(columns, first, "--source")
    target = names.target or _only_hook(others, last, "--target")
    for path, found, name in ((first, columns, source), (last, others, target)):
        if name not in found:
            raise UserError(f"{path} has no column {name}: it has {', '.join(sorted(found))}")
    wanted = names.tokens or _TOKEN_IDS
    if names.tokens and names.tokens not in columns:
        raise UserError(f"{first} has no column {names.tokens}: it has {', '.join(sorted(columns))}")
    named = replace(names, source=source, target=target, tokens=wanted)
    pairs = pairs_of(named, columns[source], others[target], columns.get(wanted, []))
    if last != first:
        _check_same_tokens(first, last, pairs.tokens, token_ids(others[wanted]) if wanted in others else None)
    return pairs


def _only_hook(columns: dict[str, list[Part]], path: Path, option: str) -> str:
    hooks = sorted(name for name, parts in columns.items() if len(parts[0].shape) == 3)
    if len(hooks) != 1:
        raise UserError(f"{path} has {len(hooks)} columns of activations ({', '.join(hooks)}): name one by {option}")
    return hooks[0]


def _check_same_tokens(a: Path, b: Path, ours: NDArray[np.int32] | None, theirs: NDArray[np.int32] | None) -> None:
    """Raise `UserError` unless both folders hold activations of the same tokens, as far as they say."""
    if ours is None or theirs is None:
        missing = a if ours is None else b
        raise UserError(f"{missing} has no {_TOKEN_IDS}: whether {a} and {b} are of the same tokens cannot be known")
    if ours.shape != theirs.shape:
        raise UserError(f"{a} is of {list(ours.shape)} tokens, and {b} of {list(theirs.shape)}")
    if len(wrong := np.flatnonzero((ours != theirs).any(axis=1))):
        raise UserError(f"{a} and {b} have different tokens from sequence {wrong[0]} on; cache both hooks on one text")


def _read_arrow(folder: Path) -> dict[str, list[Part]]:
    """Map the columns of a folder that `datasets` saved, by name."""
    state = folder / "state.json"
    if not state.is_file():
        raise UserError(f"{folder} is not a folder saved by `datasets`: it has no state.json")
    try:
        files = [folder / Path(entry["filename"]).name for entry in read_json(state)["_data_files"]]
        assert files
    except (CorruptData, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{state} names no data files ({error})") from error
    found: dict[str, list[Part]] = {}
    for file in files:
        try:
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
                batches = list(stream)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file}: not an Arrow stream, as `datasets` saves them ({error})") from error
        row = 0
        for batch in batches:
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if (values := _values(file, name, column)) is not None:
                    found.setdefault(name, []).append(_arrow_part(file, name, values, row))
            row += len(batch)
    return found


def _arrow_part(file: Path, name: str, values: NDArray[Any], row: int) -> Part:
    first = row * (values.shape[1] if values.ndim == 3 else 1)
    return Part(file, name, values.shape, values.dtype.name, lambda: values, first)


def _values(file: Path, name: str, column: pa.Array) -> NDArray[Any] | None:
    """Return a column of lists [s, T] or of lists of lists [s, T, d] as an array; None for any other."""
    if not len(column):
        return None
    column, shape = getattr(column, "storage", column), [len(column)]
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        inner = column.flatten()
        sizes = column.value_lengths()
        if column.null_count or len(inner) != len(column) * (sizes[0].as_py() or 0) or len(sizes.unique()) != 1:
            raise UserError(f"{file}: {name} has lists of different lengths; sequences must be of one length")
        shape.append(sizes[0].as_py())
        column = inner
    if len(shape) not in (2, 3) or not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        return None
    return column.to_numpy(zero_copy_only=True).reshape(shape)


def _plain(names: Names) -> Names:
    """Return the names that arrays have unless they are given others."""
    return replace(
        names, source=names.source or "source", target=names.target or "target", tokens=names.tokens or "tokens"
    )


_FORMATS = {"npy": _npy, "safetensors": _safetensors, "saelens": _saelens, "vllm": vllm, "clt-forge": clt_forge}
