"""Local files of text: which there are, how their bytes are to be read, and their rows as lines.

Bytes that are certainly text in another form are decoded: UTF-16 and UTF-32, and what a name says is compressed. Bytes
that are no text are refused with the file's name. Here every format becomes lines, one per row.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from harvest.digests import require_content
from shared.errors import UserError, cause

Format = Literal["jsonl", "json", "txt", "csv", "tsv", "parquet", "arrow"]
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
FORMATS = ", ".join(_FORMATS)
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_ARCHIVES = {".zip", ".tar", ".tgz", ".xz", ".lzma", ".7z", ".rar", ".lz4", ".br"}
_TABLES = ("parquet", "arrow")
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "zip",
    b"PAR1": "Parquet",
    b"ARROW1\0\0": "Arrow",
    b"%PDF-": "PDF",
}
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # in this order: the mark of UTF-32 starts with that of UTF-16
_HEAD_BYTES, _BUFFER_BYTES = 2**16, 2**20
_MOST_NUL_SHARE = 0.05
_BATCH_ROWS = 256
_OF_A_DATA_SET = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFile:
    """A file of rows."""

    path: Path
    format: Format
    compression: str | None
    encoding: str

    @property
    def seekable(self) -> bool:
        """Whether the lines of `lines` are those of the file as it lies on disk."""
        return self.format in ("jsonl", "txt") and self.compression is None and self.encoding == "utf-8"

    def place(self, number: int) -> str:
        """Name row `number`, counted from 1."""
        return f"{self.path}, {'line' if self.format in ('jsonl', 'txt') else 'row'} {number}"

    def lines(self, columns: Sequence[str] | None = None) -> Iterator[bytes]:
        """Yield a line of UTF-8 for every row: of text, or a JSON object.

        Of tables only `columns` are read, those of them that there are. Raises `UserError` where the first of
        `columns` is not there, or there twice, and when the file is damaged.
        """
        with _explained(self):
            if self.format in _TABLES:
                yield from (_json_line(row) for row in _table_rows(self, columns))
            elif self.format in ("jsonl", "txt"):
                yield from _lines(self)
            else:
                rows = _array(self) if self.format == "json" else _csv_rows(self, columns)
                yield from (_json_line(row) for row in rows)


def is_local(name: str) -> bool:
    """Tell whether a name means a file or a folder: by what it looks like, or because there is one."""
    path = Path(name).expanduser()
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_by_name(path)[0]) or path.exists()


def find_files(paths: Sequence[Path], split: str) -> list[TextFile]:
    """List the files at `paths`, of folders those inside in order of their names. Raises `UserError`.

    `split` chooses from a folder that holds several, as `DatasetDict.save_to_disk` writes it.
    """
    found = [file for path in paths for file in (_in_folder(path, split) if path.is_dir() else [path])]
    if odd := next((path for path in found if path.exists() and not path.is_file()), None):
        raise UserError(f"{odd} is not a regular file, and a text is read more than once; save it as a file")
    if missing := next((path for path in found if not path.exists()), None):
        where = "text file" if _by_name(missing)[0] else "text file or folder"
        link = "; it is a link, and what it leads to is not there" if missing.is_symlink() else ""
        raise UserError(f"no {where} at {missing}{link}")
    if unknown := next((path for path in found if _by_name(path)[0] is None), None):
        packed = _ARCHIVES.intersection(suffix.lower() for suffix in unknown.suffixes)
        raise UserError(
            f"{unknown}: not a kind of text that is read, which are {FORMATS} (of lines also with "
            f"{', '.join(_COMPRESSIONS)} at the end); {'unpack it' if packed else 'convert or rename it'}"
        )
    if len({_by_name(path)[0] for path in found}) > 1:
        raise UserError(f"text files must all be of one kind; got {few(found)}")
    return [_opened(path) for path in found]


def has_splits(path: Path) -> bool:
    """Tell whether a folder holds several splits of a data set."""
    return (path / "dataset_dict.json").is_file()


def _by_name(path: Path) -> tuple[Format | None, str | None]:
    """Return the format and the compression that a file's name tells."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    rest = suffixes[:-1] if compression else suffixes
    return _FORMATS.get(rest[-1]) if rest else None, compression


def _in_folder(folder: Path, split: str) -> list[Path]:
    if has_splits(folder):
        if not (folder / split).is_dir():
            splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
            raise UserError(f"{folder}: no split {split!r}; its splits: {', '.join(splits)} (--set text.split=)")
        folder = folder / split
    if (folder / "state.json").is_file():
        return _saved(folder)
    inside = sorted(path for path in folder.rglob("*") if not path.is_dir() and not _is_aside(path.relative_to(folder)))
    found = [path for path in inside if _by_name(path)[0]]
    if not found:
        raise UserError(f"{folder}: a folder without text files ({FORMATS})")
    if len(kinds := {_by_name(path)[0] for path in found}) > 1:
        raise UserError(
            f"{folder}: a folder of text files of several kinds, {', '.join(sorted(map(str, kinds)))}; pass those that "
            f"are meant, for example {folder}/*{found[0].suffix}"
        )
    return found


def _is_aside(path: Path) -> bool:
    return path.name in _OF_A_DATA_SET or any(part.startswith(".") for part in path.parts)


def _saved(folder: Path) -> list[Path]:
    """Return the files of a data set that `save_to_disk` wrote, in its order; others there are left-over results."""
    try:
        names = [str(item["filename"]) for item in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'state.json'}: not as save_to_disk writes it ({error}); save it again") from error
    if wrong := next((name for name in names if Path(name).name != name), None):
        raise UserError(f"{folder / 'state.json'}: names a file outside of the folder, {wrong!r}")
    return [folder / name for name in names]


def _opened(path: Path) -> TextFile:
    """Find out how a file's bytes are to be read. Raises `UserError` when they are no text."""
    format_, compression = _by_name(path)
    assert format_ is not None
    require_content(path)
    file = TextFile(path=path, format=format_, compression=compression, encoding="utf-8")
    if format_ in _TABLES:
        if compression:
            raise UserError(f"{path}: {format_} files are compressed inside; decompress it")
        return file
    with _explained(file), _stream(file) as stream:
        head = stream.read(_HEAD_BYTES)
    if other := next((name for magic, name in _MAGIC.items() if _starts(head, magic)), None):
        raise UserError(
            f"{path}: holds {other} data, and its name says {format_}; decompress or convert it, or rename it"
        )
    encoding = _encoding(path, head)
    if format_ == "json" and not (text := head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")).startswith("["):
        _refuse_one_object(path, text)
        format_ = "jsonl"
    return TextFile(path=path, format=format_, compression=compression, encoding=encoding)


def _refuse_one_object(path: Path, text: str) -> None:
    """Raise `UserError` when `text` starts an object that goes over several lines, as pretty-printed ones do."""
    first = text.partition("\n")
    if first[1] and first[0].rstrip().endswith(("{", "[", ",")):
        key = re.search(r'"(\w+)"\s*:\s*\[', text)
        taken = f"jq -c '.{key[1]}[]'" if key else "jq -c '.[]'"
        raise UserError(
            f"{path}: one JSON object over several lines, expected an array of rows or an object per line; take its "
            f"rows out: {taken} {path.name} > rows.jsonl"
        )


def _starts(head: bytes, magic: bytes) -> bool:
    """Tell whether data starts with a format's mark; one of letters alone could start a text, which has no NUL."""
    return head.startswith(magic) and (not magic.isalnum() or b"\0" in head)


def _encoding(path: Path, head: bytes) -> str:
    """Return the encoding of a text that starts with `head`. Raises `UserError` when there is none for certain."""
    if marked := next((name for bom, name in _BOMS.items() if head.startswith(bom)), None):
        return marked
    if head.count(b"\0") <= _MOST_NUL_SHARE * len(head):
        return "utf-8"  # a row with a NUL is refused by itself
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        if _is_certain(head, name):
            return name
    raise UserError(f"{path}: holds NUL bytes, so it is not UTF-8 text; convert it to UTF-8")


def _is_certain(head: bytes, encoding: str) -> bool:
    """Tell whether `head` is mostly ASCII in `encoding`."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text and 2 * sum(character.isascii() for character in text) > len(text)


@contextmanager
def _stream(file: TextFile) -> Iterator[BinaryIO]:
    """Open a file's bytes, decompressed."""
    if file.compression is None:
        with open(file.path, "rb") as plain:
            yield plain
    else:
        with pa.input_stream(str(file.path), compression=file.compression) as stream:
            yield io.BufferedReader(stream, _BUFFER_BYTES)


def _lines(file: TextFile) -> Iterator[bytes]:
    with _stream(file) as stream:
        if file.encoding == "utf-8":
            yield from stream
        else:
            yield from (line.encode() for line in io.TextIOWrapper(stream, file.encoding, newline="\n"))


def _array(file: TextFile) -> list[Any]:
    """Return the entries of a file that is one JSON array, all in memory."""
    with _stream(file) as stream:
        return list(json.loads(_text(file, stream).read()))


def _csv_rows(file: TextFile, columns: Sequence[str] | None) -> Iterator[dict[str, str]]:
    """Yield the rows of a table with a line of names."""
    csv.field_size_limit(sys.maxsize)
    with _stream(file) as stream:
        reader = csv.DictReader(_text(file, stream), delimiter="\t" if file.format == "tsv" else ",", strict=True)
        wanted = _present(file, reader.fieldnames or columns or (), columns)
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise UserError(
                    f"{file.place(number)}: expected {len(reader.fieldnames or ())} fields, as the names are"
                )
            if any("\0" in value for value in row.values()):
                raise UserError(f"{file.place(number)}: holds a NUL byte, so it is not text")
            yield {name: row[name] for name in wanted}


def _text(file: TextFile, stream: BinaryIO) -> io.TextIOWrapper:
    # Bytes that are no UTF-8 become lone surrogates, which are replaced, and counted, where text is encoded.
    encoding = "utf-8-sig" if file.encoding == "utf-8" else file.encoding
    errors = "surrogateescape" if file.encoding == "utf-8" else "strict"
    return io.TextIOWrapper(stream, encoding, errors=errors, newline="")


def _table_rows(file: TextFile, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    if file.format == "parquet":
        with pq.ParquetFile(file.path, page_checksum_verification=True) as parquet:
            wanted = _present(file, parquet.schema_arrow.names, columns)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=wanted):
                yield from _batch_rows(batch)
        return
    with pa.memory_map(str(file.path)) as source:
        with open(file.path, "rb") as start:
            by_index = start.read(6) == b"ARROW1"
        reader: Any = pa.ipc.open_file(source) if by_index else pa.ipc.open_stream(source)
        names = reader.schema.names
        wanted = _present(file, names, columns)
        places = [place for place, name in enumerate(names) if name in wanted]
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if by_index else reader
        for batch in batches:
            for low in range(0, len(batch), _BATCH_ROWS):
                yield from _batch_rows(batch.select(places).slice(low, _BATCH_ROWS))


def _present(file: TextFile, names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    if columns and columns[0] not in names:
        raise UserError(f"{file.path}: no column {columns[0]!r}; its columns: {few(names)} (--set text.column=)")
    if columns and names.count(columns[0]) > 1:
        raise UserError(f"{file.path}: {names.count(columns[0])} columns are called {columns[0]!r}; rename all but one")
    return list(names) if columns is None else [name for name in columns if name in names]


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def _values(column: Any) -> list[Any]:
    """Return a column's values; those of a type that Python has no value of (a year 146,000) as the type's name.

    Bytes that are no UTF-8 in a column of text become lone surrogates, as in `_text`.
    """
    try:
        return list(column.to_pylist())
    except (ValueError, ArithmeticError, TypeError, pa.ArrowException):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            return [{"type": str(column.type)}] * len(column)
        found = column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in found]


def _json_line(row: Any) -> bytes:
    """Return a row as a line of JSON."""
    return json.dumps(row, default=_in_json).encode() + b"\n"


def _in_json(value: Any) -> Any:
    """Return bytes that are UTF-8 as text, and for any other value that JSON lacks, an object that names its type."""
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            if "\0" not in (text := value.decode()):
                return text
    return {"type": type(value).__name__}


def few(names: Iterable[object]) -> str:
    """List up to ten names, of each 80 characters at most."""
    listed = [str(name) for name in names]
    shown = ", ".join(name if len(name) <= 80 else f"{name[:80]}..." for name in listed[:10])
    return f"{shown}, ... ({len(listed)} in all)" if len(listed) > 10 else shown


@contextmanager
def _explained(file: TextFile) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names it."""
    try:
        yield
    except (ValueError, OSError, RecursionError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system: no permission, no space
        what = f"{file.compression} data of {file.format}" if file.compression else file.format
        raise UserError(f"{file.path}: not readable as {what} ({type(error).__name__}: {cause(error)})") from error
