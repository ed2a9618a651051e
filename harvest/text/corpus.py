"""The text of a harvest: what identifies it, and its documents in order.

A document is what one row holds: a text, a list of chat messages, or a list of token ids; a row that holds nothing is
passed on as None and counted as empty where windows are packed.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harvest.digests import file_sha256
from harvest.embedded.corpus import corpus_digest, documents
from harvest.hub import dataset_commit
from harvest.settings import EMBEDDED, TextSettings
from harvest.text.dataset_rows import LineRows, Row, Rows, hub_rows, parquet_rows
from shared.config import build
from shared.errors import UserError
from shared.keyed import permutation
from shared.store.layout import CorpusIdentity

Kind = Literal["text", "messages", "input_ids"]
Order = Literal["shuffled", "as_read"]
_SUFFIXES = (".jsonl", ".parquet", ".txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A text that can be read from its start any number of times."""

    identity: CorpusIdentity
    read: Callable[[], Iterator[Any]]
    """Documents in order: str, list of messages or list of ids, or None."""


def open_corpus(settings: TextSettings, separator: str | None, seed: int) -> Corpus:
    """Find the text and identify it; reads no more than that takes. Raises `UserError`."""
    if settings.name == (EMBEDDED,):
        _refuse(settings, "the embedded text", "column", "kind", "streaming", "subset", "split", "revision")
        return _embedded(separator, seed)
    files = [Path(name).expanduser() for name in settings.name]
    if len(files) > 1 or files[0].suffix in _SUFFIXES or files[0].exists():
        _refuse(settings, "local text files", "subset", "split", "revision")
        return _local(settings, files, separator, seed)
    return _hub(settings, settings.name[0], separator, seed)


def _refuse(settings: TextSettings, what: str, *names: str) -> None:
    """Raise `UserError` when a setting that means nothing for this text was given."""
    for name in names:
        if getattr(settings, name) != TextSettings.model_fields[name].default:
            raise UserError(f"text.{name} = {getattr(settings, name)} means nothing for {what}; leave it out")


def _embedded(separator: str | None, seed: int) -> Corpus:
    texts = documents()
    identity = CorpusIdentity(
        name=EMBEDDED, digest=corpus_digest(texts), column=None, kind="text", order="shuffled", separator=separator
    )
    return Corpus(identity=identity, read=lambda: (texts[i].text for i in permutation(len(texts), "documents", seed)))


def _local(settings: TextSettings, files: list[Path], separator: str | None, seed: int) -> Corpus:
    suffixes = {path.suffix for path in files}
    if len(suffixes) > 1 or not suffixes <= set(_SUFFIXES):
        raise UserError(f"text files must all be of one kind, {', '.join(_SUFFIXES)}; got {', '.join(map(str, files))}")
    if missing := next((path for path in files if not path.is_file()), None):
        raise UserError(f"no text file at {missing}")
    rows: Rows = parquet_rows(files) if suffixes == {".parquet"} else LineRows(files)
    name = ", ".join(path.name for path in files)
    return _rows_corpus(settings, name, rows, _files_digest(files), separator, seed)


def _hub(settings: TextSettings, name: str, separator: str | None, seed: int) -> Corpus:
    commit = dataset_commit(name, settings.revision)
    digest = hashlib.sha256("\n".join((name, commit, settings.subset or "", settings.split)).encode()).hexdigest()
    rows = hub_rows(name, settings.subset, settings.split, commit)
    place = {"revision": commit, "subset": settings.subset, "split": settings.split}
    return _rows_corpus(settings, name, rows, digest, separator, seed, **place)


def _rows_corpus(
    settings: TextSettings,
    name: str,
    rows: Rows,
    digest: str,
    separator: str | None,
    seed: int,
    **place: str | None,
) -> Corpus:
    column, kind = _column(settings, name, rows)
    order: Order = "as_read" if settings.streaming else "shuffled"
    found = {"digest": digest, "column": column, "kind": kind, "order": order, "separator": separator}
    identity = build(CorpusIdentity, {"name": name, **found, **place}, f"text {name}")

    def read() -> Iterator[Any]:
        head = _head(name, rows)
        if not any(column in row for row in head):
            raise _no_column(name, column, dict.fromkeys(key for row in head for key in row))
        for row in rows.as_read() if settings.streaming else rows.shuffled(seed):
            yield row.get(column)

    return Corpus(identity=identity, read=read)


def _column(settings: TextSettings, name: str, rows: Rows) -> tuple[str, Kind]:
    """Find the column to read and what it holds, by the settings or else by the first rows."""
    if settings.column is not None and settings.kind != "auto":
        return settings.column, settings.kind
    head = _head(name, rows)
    kinds = {column: _kind(head, column) for row in head for column in row}
    column = settings.column or _default_column(kinds, settings.kind)
    if column is None or column not in kinds:
        raise _no_column(name, column or "text", kinds)
    kind = kinds[column] if settings.kind == "auto" else settings.kind
    if kind is None:
        raise UserError(f"{name}: column {column!r} holds no text, chat messages or token ids; columns: {list(kinds)}")
    return column, kind


def _head(name: str, rows: Rows) -> list[Row]:
    if head := rows.head():
        return head
    raise UserError(f"{name}: no rows; there is no text to harvest")


def _no_column(name: str, column: str, known: Iterable[str]) -> UserError:
    return UserError(f"{name}: no column {column!r}; its columns: {', '.join(known)} (--set text.column=)")


def _default_column(kinds: dict[str, Kind | None], wanted: str) -> str | None:
    """Return `text`, or else the only column of a kind that can be read: messages before token ids before text."""
    if kinds.get("text") and wanted in ("auto", "text"):
        return "text"
    for kind in ("messages", "input_ids", "text") if wanted == "auto" else (wanted,):
        columns = [column for column, found in kinds.items() if found == kind]
        if len(columns) == 1:
            return columns[0]
    return None


def _kind(head: list[Row], column: str) -> Kind | None:
    value = next((row[column] for row in head if row.get(column)), None)
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list):
        return None
    if all(isinstance(item, dict) and "role" in item for item in value):
        return "messages"
    return "input_ids" if all(type(item) is int for item in value) else None


def _files_digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()
