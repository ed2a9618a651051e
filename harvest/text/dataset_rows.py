"""Rows of local files and of hub data sets: their first rows, and all of them in a given order."""

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from harvest.hub import explain
from shared.errors import UserError
from shared.keyed import permutation

Row = dict[str, Any]
_HEAD = 100
_BATCH = 64


class Rows(Protocol):
    """A table of rows."""

    def head(self) -> list[Row]:
        """Return some rows from the start, to see the columns by."""
        ...

    def shuffled(self, seed: int) -> Iterator[Row]:
        """Yield all rows, permuted by `seed`."""
        ...

    def as_read(self) -> Iterator[Row]:
        """Yield all rows in their own order."""
        ...


class LineRows:
    """A row per line of text files: a JSON object (.jsonl), or the line itself as column `text` (.txt).

    Bytes that are no UTF-8 become U+FFFD. Lines are found by an index of offsets, so any order needs little memory.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def head(self) -> list[Row]:
        """Return the first rows of the first file that has any."""
        return list(islice(self.as_read(), _HEAD))

    def as_read(self) -> Iterator[Row]:
        """Yield rows file after file, line after line."""
        for path in self._files:
            with open(path, "rb") as lines:
                yield from (_parse(path, number, line) for number, line in enumerate(lines, 1) if _is_row(path, line))

    def shuffled(self, seed: int) -> Iterator[Row]:
        """Yield the lines of all files in one permutation."""
        places = [(path, *place) for path in self._files for place in _index(path)]
        opened = {path: open(path, "rb") for path in self._files}  # noqa: SIM115
        try:
            for place in permutation(len(places), "documents", seed):
                path, number, offset = places[place]
                opened[path].seek(offset)
                yield _parse(path, number, opened[path].readline())
        finally:
            for file in opened.values():
                file.close()


class DatasetRows:
    """Rows of a data set that the `datasets` library loads."""

    def __init__(self, name: str, load: Callable[[bool], Any]) -> None:
        self._name, self._load = name, load
        """`load(streaming)` gives the data set."""

    def head(self) -> list[Row]:
        """Return the first rows, by streaming."""
        return list(islice(self.as_read(), _HEAD))

    def as_read(self) -> Iterator[Row]:
        """Yield rows as they are streamed."""
        yield from self._guard(lambda: iter(self._load(True)))

    def shuffled(self, seed: int) -> Iterator[Row]:
        """Yield rows by index, in batches; downloads or converts the whole data set first."""
        yield from self._guard(lambda: _batches(self._load(False), seed))

    def _guard(self, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
        """Yield the rows; a data set that fails to load or to be read is an error, never an empty one."""
        try:
            yield from rows()
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


def parquet_rows(files: Sequence[Path]) -> DatasetRows:
    """Return the rows of local parquet files."""

    def load(streaming: bool) -> Any:
        from datasets import disable_progress_bars, load_dataset

        disable_progress_bars()
        paths = [str(path) for path in files]
        return load_dataset("parquet", data_files=paths, split="train", streaming=streaming)

    return DatasetRows(", ".join(path.name for path in files), load)


def _batches(table: Any, seed: int) -> Iterator[Row]:
    order = permutation(len(table), "documents", seed)
    for start in range(0, len(order), _BATCH):
        columns = table[order[start : start + _BATCH].tolist()]
        names = list(columns)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))


def _index(path: Path) -> list[tuple[int, int]]:
    """List the line number and offset of every row of `path`."""
    numbers, offsets, offset = array("q"), array("q"), 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if _is_row(path, line):
                numbers.append(number)
                offsets.append(offset)
            offset += len(line)
    return list(zip(numbers, offsets, strict=True))


def _is_row(path: Path, line: bytes) -> bool:
    # A blank line of text is an empty document, which is counted; between JSON rows it is nothing.
    return path.suffix == ".txt" or bool(line.strip())


def _parse(path: Path, number: int, line: bytes) -> Row:
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    if path.suffix == ".txt":
        return {"text": text}
    try:
        row = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
    return row
