"""The text of a harvest: what identifies it, and its documents in order.

A document is what one row holds: a text, a list of chat messages, or a list of token ids; a row that holds nothing is
passed on as None and counted as empty where windows are packed.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from harvest.digests import file_sha256
from harvest.embedded.corpus import corpus_digest, documents
from harvest.hub import dataset_commit
from harvest.settings import EMBEDDED, TextSettings
from harvest.text.dataset_rows import FileRows, Row, Rows, hub_rows
from harvest.text.local_files import few, find_files, has_splits, is_local
from shared.config import build
from shared.errors import UserError, printable, warn
from shared.keyed import permutation
from shared.store.layout import CorpusIdentity

Kind = Literal["text", "messages", "input_ids"]
Order = Literal["shuffled", "as_read"]
_COMPANIONS = ("attention_mask", "labels", "position_ids", "special_tokens_mask", "token_type_ids")
"""Columns of numbers beside token ids."""
_OF_LISTS = ("messages", "conversations", "conversation", "input_ids")
"""Columns that hold a list, by their names."""
_MOST_JUDGED, _MOST_SEARCHED = 10_000, 1_000_000
"""Rows that are read to see what the columns hold: when one can be chosen already, and when none can."""


class Document(NamedTuple):
    """What a row holds."""

    value: Any
    """A text, a list of messages, a list of token ids, or None."""
    place: str
    """Where it stands, for messages to people."""
    mask: Any = None
    """Of token ids, which count: those where this is not 0; none if all do."""
    replaced: int = 0
    """Characters that became U+FFFD because their bytes are no UTF-8."""
    refusal: str | None = None
    """Why it cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A text that can be read from its start any number of times."""

    identity: CorpusIdentity
    read: Callable[[], Iterator[Document]]
    """Gives all documents in order."""


def open_corpus(settings: TextSettings, separator: str | None, seed: int) -> Corpus:
    """Find the text and identify it; reads no more than that takes. Raises `UserError`."""
    if settings.name == (EMBEDDED,):
        given = ("column", "kind", "streaming", "subset", "split", "revision", "max_refused")
        _refuse(settings, "the embedded text", *given)
        return _embedded(separator, seed)
    if address := next((name for name in settings.name if "://" in name), None):
        raise UserError(f"{address} is an address; download it, and pass the file")
    if len(settings.name) > 1 or is_local(settings.name[0]):
        paths = [Path(name).expanduser() for name in settings.name]
        unused = ("subset", "revision") if any(map(has_splits, paths)) else ("subset", "split", "revision")
        _refuse(settings, "local text files", *unused)
        return _local(settings, paths, separator, seed)
    return _hub(settings, settings.name[0], separator, seed)


def _refuse(settings: TextSettings, what: str, *names: str) -> None:
    """Raise `UserError` when a setting that means nothing for this text was given."""
    for name in names:
        if getattr(settings, name) != TextSettings.model_fields[name].default:
            raise UserError(f"text.{name} = {getattr(settings, name)} has no meaning for {what}; leave it out")


def _embedded(separator: str | None, seed: int) -> Corpus:
    texts = documents()
    identity = CorpusIdentity(
        name=EMBEDDED, digest=corpus_digest(texts), column=None, kind="text", order="shuffled", separator=separator
    )

    def read() -> Iterator[Document]:
        yield from (Document(texts[i].text, EMBEDDED) for i in permutation(len(texts), "documents", seed))

    return Corpus(identity=identity, read=read)


def _local(settings: TextSettings, paths: list[Path], separator: str | None, seed: int) -> Corpus:
    files = find_files(paths, settings.split)
    if odd := next((file.path for file in files if not _is_plain(file.path.name)), None):
        raise UserError(f"{odd}: a store records the names of its text files, and this one is not plain; rename it")
    name = ", ".join(file.path.name for file in files)
    digests = [file_sha256(file.path) for file in files]
    _warn_of_copies([(file.path, digest) for file, digest in zip(files, digests, strict=True)])
    digest = hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()
    return _rows_corpus(settings, name, FileRows(files), digest, separator, seed)


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
    mask = column.replace("input_ids", "attention_mask") if "input_ids" in column else "attention_mask"
    columns = (column, mask) if kind == "input_ids" else (column,)

    def read() -> Iterator[Document]:
        found = rows.as_read(columns) if settings.streaming else rows.shuffled(seed, columns)
        if (first := next(found, None)) is None:
            raise _no_rows(name)
        for row in chain([first], found):
            yield _document(row, *columns)

    return Corpus(identity=identity, read=read)


def _document(row: Row, column: str, mask: str | None = None) -> Document:
    refusal = row.refusal
    if refusal is None and column not in row.values:
        refusal = _no_column(column, list(row.values))
    return Document(row.values.get(column), row.place, row.values.get(mask) if mask else None, row.replaced, refusal)


def _column(settings: TextSettings, name: str, rows: Rows) -> tuple[str, Kind]:
    """Find the column to read and what it holds, by the settings or else by the first rows."""
    if settings.column is not None and settings.kind != "auto":
        return settings.column, settings.kind
    held = _held(settings, name, rows)
    column = _choice(settings, held)
    if column is None or column not in held:
        raise UserError(f"{name}: {_no_column(column or 'text', held)}")
    kind = held[column] if settings.kind == "auto" else settings.kind
    if kind is None:
        raise UserError(f"{name}: column {column!r} holds nothing in all the rows that were read; columns: {few(held)}")
    if kind not in get_args(Kind):
        raise UserError(
            f"{name}: column {column!r} holds no text, chat messages or token ids, but {kind}; columns: {few(held)}"
        )
    return column, kind


def _held(settings: TextSettings, name: str, rows: Rows) -> dict[str, Any]:
    """Return what each column holds, a `Kind` or other words, None where no row that was read holds anything."""
    held: dict[str, Any] = {}
    refused = None
    columns = None if settings.column is None else (settings.column,)
    for row in rows.first(columns):
        refused = refused or (f"{row.place}: {row.refusal}" if row.refusal else None)
        _note(held, row)
    if not held:
        raise UserError(refused) if refused else _no_rows(name)
    if not _is_open(settings, held):
        return held
    for number, row in enumerate(rows.as_read(columns), 1):
        _note(held, row)
        choice = _choice(settings, held)
        most = _MOST_SEARCHED if choice is None or held.get(choice) is None else _MOST_JUDGED
        if number >= most or not _is_open(settings, held):
            break
    return held


def _note(held: dict[str, Any], row: Row) -> None:
    for column, value in row.values.items():
        if held.get(column) is None:
            held[column] = _kind(column, value)


def _is_open(settings: TextSettings, held: Mapping[str, str | None]) -> bool:
    """Tell whether more rows could change which column is chosen, or what it is found to hold."""
    if settings.column is not None:
        return settings.column in held and held[settings.column] is None
    return held.get("text") != "text" and None in held.values()


def _choice(settings: TextSettings, held: Mapping[str, str | None]) -> str | None:
    """Return the column to read: that of the settings, or the default one of those that can be read, or `text`."""
    return settings.column or _default_column(held, settings.kind) or ("text" if "text" in held else None)


def _no_rows(name: str) -> UserError:
    return UserError(f"{name}: no rows; there is no text to harvest")


def _no_column(column: str, known: Mapping[str, str | None] | Iterable[str]) -> str:
    """Say which columns there are, and what each is known to hold."""
    kinds = known if isinstance(known, Mapping) else {}
    told = few(f"{name} ({kinds[name]})" if kinds.get(name) else name for name in known)
    return f"no column {column!r}; its columns: {told} (--set text.column=)"


def _default_column(held: Mapping[str, str | None], wanted: str) -> str | None:
    """Return `text`, or else the only column of a kind that can be read: messages before token ids before text.

    Of several columns of token ids it is `input_ids`, and never one that is known to stand beside another.
    """
    if held.get("text") in get_args(Kind) and wanted in ("auto", "text"):
        return "text"
    for kind in ("messages", "input_ids", "text") if wanted == "auto" else (wanted,):
        columns = [column for column, found in held.items() if found == kind]
        if kind == "input_ids":
            columns = [column for column in columns if column not in _COMPANIONS]
            columns = ["input_ids"] if "input_ids" in columns else columns
        if len(columns) == 1:
            return columns[0]
    return None


def _kind(column: str, value: Any) -> str | None:
    """Return what a value is, a `Kind` or other words; None if it holds nothing."""
    if value is None or value in ("", [], {}):
        return None
    if isinstance(value, str):
        return _kind_of_text(column, value)
    if is_chat(value):
        return "messages"
    if not isinstance(value, list):
        return "an object" if isinstance(value, dict) else type(value).__name__
    types = sorted({type(item).__name__ for item in value})
    return "input_ids" if types == ["int"] else f"a list of {' and '.join(types)}"


def _kind_of_text(column: str, value: str) -> str:
    """Tell a text from a chat as a JSON string, and from a list that some program has written as a string."""
    if column == "text" or value.lstrip()[:1] != "[":  # a column that is called `text` is taken at its word
        return "text"
    if is_chat(parsed(value)):
        return "messages"
    return "a list as a string" if column in _OF_LISTS else "text"


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of messages, with a role each, or with a sender as ShareGPT has it."""
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (
        "role" in value or ("from" in value and bool({"value", "content"} & set(value)))
    )


def parsed(text: str) -> Any:
    """Return what a JSON text says, or None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_plain(name: str) -> bool:
    """Tell whether a name is text without control characters."""
    return printable(name) == name and not set("\t\n") & set(name)


def _warn_of_copies(files: Sequence[tuple[Path, str]]) -> None:
    """Warn where two of the files, given with their digests, are the same: held-out documents are trained on then."""
    known: dict[str, Path] = {}
    for path, digest in files:
        if digest in known:
            warn(f"{path} holds the same as {known[digest]}; its documents can be held out and trained on")
        known.setdefault(digest, path)
