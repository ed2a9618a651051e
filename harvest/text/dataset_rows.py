"""Rows of local files and of hub data sets: the first of them, and all in a given order."""

import errno
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from typing import Any, BinaryIO, NamedTuple, Protocol

from harvest.hub import explain
from harvest.text.local_files import TextFile
from shared.errors import DiskFull, UserError
from shared.keyed import permutation

_FIRST, _FIRST_FILES = 100, 100
_BATCH = 64
_OPEN_FILES = 64


class Row(NamedTuple):
    """One row."""

    place: str
    """File and line, or data set and row."""
    values: dict[str, Any]
    """By column."""
    replaced: int = 0
    """Characters that became U+FFFD because their bytes are no UTF-8."""
    refusal: str | None = None
    """Why it cannot be read; it has no values then."""


class Rows(Protocol):
    """A table of rows."""

    def first(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield some rows from the start of every file, or of many, to see what columns hold; `columns` as below."""
        ...

    def shuffled(self, seed: int, columns: Sequence[str]) -> Iterator[Row]:
        """Yield all rows, permuted by `seed`; with `columns`, of which the first must be there, and maybe others."""
        ...

    def as_read(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield all rows in their own order, with `columns` likewise, or with all columns."""
        ...


class FileRows:
    """Rows of local files, a line each.

    Bytes that are no UTF-8 become U+FFFD. Lines are found by an index of offsets, so any order needs little memory;
    files whose rows are no lines on disk are first copied as lines into a temporary file.
    """

    def __init__(self, files: Sequence[TextFile]) -> None:
        self._files = files

    def first(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the first rows of the first files."""
        for file in self._files[:_FIRST_FILES]:
            yield from islice(_rows(file, columns), _FIRST)

    def as_read(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield rows file after file, line after line."""
        for file in self._files:
            yield from _rows(file, columns)

    def shuffled(self, seed: int, columns: Sequence[str]) -> Iterator[Row]:
        """Yield the rows of all files in one permutation."""
        with _OpenFiles() as opened, TemporaryFile() as copied:
            which, numbers, offsets = array("l"), array("q"), array("q")
            for i, file in enumerate(self._files):
                for number, offset in _index(file) if file.seekable else _copy(file, columns, copied):
                    which.append(i)
                    numbers.append(number)
                    offsets.append(offset)
            for row in permutation(len(which), "documents", seed):
                file = self._files[which[row]]
                source = opened.get(file.path) if file.seekable else copied
                source.seek(offsets[row])
                yield _parse(file, numbers[row], source.readline())


class _OpenFiles:
    """Files that are read here and there; only the last few that were used are open."""

    def __init__(self) -> None:
        self._open: dict[Path, BinaryIO] = {}

    def get(self, path: Path) -> BinaryIO:
        """Return the file at `path`."""
        file = self._open.pop(path, None) or open(path, "rb")  # noqa: SIM115
        self._open[path] = file
        if len(self._open) > _OPEN_FILES:
            self._open.pop(next(iter(self._open))).close()
        return file

    def __enter__(self) -> "_OpenFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()


class DatasetRows:
    """Rows of a data set that the `datasets` library loads."""

    def __init__(self, name: str, load: Callable[[bool], Any]) -> None:
        self._name, self._load = name, load
        """`load(streaming)` gives the data set."""

    def first(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield the first rows, by streaming."""
        yield from islice(self.as_read(columns), _FIRST)

    def as_read(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Yield rows as they are streamed."""
        yield from self._guard(lambda: enumerate(self._load(True)))

    def shuffled(self, seed: int, columns: Sequence[str]) -> Iterator[Row]:
        """Yield rows by index, in batches; downloads or converts the whole data set first."""
        yield from self._guard(lambda: _batches(self._load(False), seed, columns))

    def _guard(self, rows: Callable[[], Iterator[tuple[int, dict[str, Any]]]]) -> Iterator[Row]:
        """Yield the rows; a data set that fails to load or to be read is an error, never an empty one."""
        try:
            for number, values in rows():
                yield Row(f"{self._name}, row {number}", values)
        except (GeneratorExit, UserError):
            raise
        except Exception as error:
            cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
            raise UserError(explain("data set", self._name, cause)) from error


def hub_rows(name: str, subset: str | None, split: str, commit: str) -> DatasetRows:
    """Return the rows of a split of a hub data set."""

    def load(streaming: bool) -> Any:
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        return load_dataset(name, subset, split=split, revision=commit, streaming=streaming)

    return DatasetRows(name, load)


def _batches(table: Any, seed: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    if columns[0] in table.column_names:  # if not, each row says so, with the columns there are
        table = table.select_columns([name for name in columns if name in table.column_names])
    order = permutation(len(table), "documents", seed)
    for start in range(0, len(order), _BATCH):
        numbers = order[start : start + _BATCH].tolist()
        batch = table[numbers]
        names = list(batch)
        rows = (dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True))
        yield from zip(numbers, rows, strict=True)


def _rows(file: TextFile, columns: Sequence[str] | None) -> Iterator[Row]:
    lines = enumerate(file.lines(columns), 1)
    yield from (_parse(file, number, line) for number, line in lines if _is_row(file, line))


def _index(file: TextFile) -> Iterator[tuple[int, int]]:
    """Yield the line number and offset of every row."""
    offset = 0
    for number, line in enumerate(file.lines(), 1):
        if _is_row(file, line):
            yield number, offset
        offset += len(line)


def _copy(file: TextFile, columns: Sequence[str], to: BinaryIO) -> Iterator[tuple[int, int]]:
    """Append the lines of every row `to` a file; yields their numbers, and their offsets there. Raises `DiskFull`."""
    for number, line in enumerate(file.lines(columns), 1):
        if _is_row(file, line):
            yield number, to.tell()
            with _room_for(file):
                to.write(line if line.endswith(b"\n") else line + b"\n")
    with _room_for(file):
        to.flush()


@contextmanager
def _room_for(file: TextFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFull(
            f"{gettempdir()}: no room for the rows of {file.path}, which are copied there to be shuffled; set TMPDIR "
            "to a larger disk, or take them in their own order with --set text.streaming=true"
        ) from error


def _is_row(file: TextFile, line: bytes) -> bool:
    # A blank line of text is an empty document, which is counted; between JSON rows it is nothing.
    return file.format == "txt" or bool(line.strip())


def _parse(file: TextFile, number: int, line: bytes) -> Row:
    place, text, replaced = file.place(number), *_decode(line)
    if "\0" in text:
        return Row(place, {}, refusal="holds a NUL byte, so it is not text")
    if number == 1:
        text = text.removeprefix("\ufeff")
    if file.format == "txt":
        return Row(place, {"text": text}, replaced)
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        return Row(place, {}, refusal=f"not valid JSON ({error})")
    if not isinstance(row, dict):
        return Row(place, {}, refusal=f"expected a JSON object, got {type(row).__name__}")
    return Row(place, row, replaced)


def _decode(line: bytes) -> tuple[str, int]:
    """Return a line as text without its end, and how many characters in it are no UTF-8 and became U+FFFD."""
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    if "\ufffd" not in text:
        return text, 0
    return text, text.count("\ufffd") - line.count("\ufffd".encode())
