"""Labels of tokens: of the store's own text, or of a user's file.

Legend: S sequences, T context, L labels. A place is a token of the S sequences, as in `train/samples/encode.py`.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shared.config import brief
from shared.errors import UserError
from shared.files.untrusted import read_file
from shared.store.store import Store
from train.probe.english_labels import english_labels
from train.probe.python_labels import code_share, python_labels
from train.samples.encode import Activations
from train.samples.token_text import pieces

Array = NDArray[Any]

KINDS = ("auto", "python", "english")
MOST_LABELS = 1000
_MOST_FILE_BYTES = 2**30
_CODE_SHARE = 0.2
"""Text of which this share of lines is rarely anything but Python is taken for Python: prose has less than a
hundredth, source that is half docstrings about a half."""
_COLUMNS = {"sequence": pa.types.is_integer, "offset": pa.types.is_integer, "label": pa.types.is_string}


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Which tokens have which labels."""

    kind: str
    """`python`, `english`, or `file <SHA-256>`"""
    names: tuple[str, ...]
    masks: Array
    """[L, S * T] bool, by place"""


class _Segment(NamedTuple):
    """Neighbouring tokens of one sequence and one document."""

    places: slice
    text: str
    ends: Array
    """[n] where each token's text ends"""


def make_labels(kind: str, found: Activations, store: Store) -> Labels:
    """Label the tokens of `found`: `auto`, `python`, `english`, or the path of a Parquet file.

    Its rows are (sequence, offset, label): a row and a column of the store's `tokens`, and text; a token may have
    several labels. Raises `UserError` when the file does not fit the store, or the store has no tokenizer.
    """
    if kind not in KINDS:
        return labels_of_file(Path(kind), found, store)
    tokenizer = store.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        raise UserError(
            f"{store.path} holds no tokenizer.json, so its tokens have no text to label; give labels of your own with "
            "--labels FILE.parquet"
        )
    segments = list(_segments(found, tokenizer))
    if kind == "auto":
        lines = [line for segment in segments for line in segment.text.split("\n")[1:-1]]
        kind = "python" if code_share(lines) >= _CODE_SHARE else "english"
    by_text = python_labels if kind == "python" else english_labels
    masks = _by_characters(by_text, segments, found.tokens.size) | _of_tokens(segments, found.tokens.size)
    masks |= {f"position {name}": found.stratum == i for i, name in enumerate(found.strata)}
    return Labels(kind=kind, names=tuple(masks), masks=np.stack(list(masks.values())))


def labels_of_file(file: Path, found: Activations, store: Store) -> Labels:
    """Read a user's labels. Raises `UserError`."""
    try:
        data = read_file(file, _MOST_FILE_BYTES, follow=True)
        table = pq.read_table(pa.BufferReader(data))
    except FileNotFoundError as error:
        raise UserError(
            f"--labels {file}: no such file; expected one of {', '.join(KINDS)}, or a Parquet file"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"--labels {file}: cannot be read as Parquet: {brief(str(error))}") from error
    shape = (store.record.blocks * store.request.block_sequences, store.request.context_size)
    sequence, offset, label = _checked(table, file, shape)
    known, numbers = np.unique(label, return_inverse=True)
    if len(known) > MOST_LABELS:
        raise UserError(f"--labels {file}: {len(known):,} different labels, expected at most {MOST_LABELS:,}")
    masks = np.zeros((len(known), found.tokens.size), bool)
    within = (sequence >= found.first) & (sequence < found.first + len(found.tokens))
    if not within.any():
        raise UserError(
            f"--labels {file}: labels none of the sequences {found.first} to {found.first + len(found.tokens) - 1}, "
            "which are held out and probed"
        )
    masks[numbers[within], (sequence[within] - found.first) * shape[1] + offset[within]] = True
    return Labels(kind=f"file {hashlib.sha256(data).hexdigest()}", names=tuple(known), masks=masks)


def _checked(table: pa.Table, file: Path, shape: tuple[int, int]) -> tuple[Array, Array, Array]:
    """Return the three columns of a user's table."""
    for name, fits in _COLUMNS.items():
        if name not in table.column_names:
            raise UserError(f"--labels {file}: has no column {name!r}; expected {', '.join(_COLUMNS)}")
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if name == "label" and pa.types.is_large_string(column.type):
            column = pc.cast(column, pa.string())
        if not fits(column.type) or column.null_count:
            expected = "text" if name == "label" else "whole numbers"
            raise UserError(f"--labels {file}: column {name!r} is {column.type} with {column.null_count} nulls, "
                            f"expected {expected} without nulls")  # fmt: skip
        table = table.set_column(table.column_names.index(name), name, column)
    for name, size in zip(("sequence", "offset"), shape, strict=True):
        values = table[name].to_numpy()
        if len(values) and not (values.min() >= 0 and values.max() < size):
            raise UserError(
                f"--labels {file}: {name} goes from {values.min()} to {values.max()}, expected 0 to {size - 1}: rows "
                "and columns of the store's `tokens`"
            )
    names = table["label"].to_numpy(zero_copy_only=False).astype(object)
    if odd := next((one for one in dict.fromkeys(names) if not one.isprintable() or not 0 < len(one) <= 100), None):
        raise UserError(f"--labels {file}: label {brief(odd)}, expected 1 to 100 characters that can be printed")
    return table["sequence"].to_numpy().astype(np.int64), table["offset"].to_numpy().astype(np.int64), names


def _segments(found: Activations, tokenizer: Path) -> Iterator[_Segment]:
    """Yield the text of the sequences, document by document; special tokens have none."""
    known, numbers = np.unique(found.tokens, return_inverse=True)
    added = Tokenizer.from_file(str(tokenizer)).get_added_tokens_decoder()
    special = {token for token, one in added.items() if one.special}
    texts = ["" if token in special else text
             for token, text in zip(known.tolist(), pieces(tokenizer, known.tolist()), strict=True)]  # fmt: skip
    context, documents = found.tokens.shape[1], found.documents.ravel()
    breaks = np.flatnonzero(np.diff(documents) != 0) + 1
    edges = np.unique(np.concatenate([np.arange(0, found.tokens.size + 1, context), breaks]))
    flat = numbers.ravel()
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        parts = [texts[number] for number in flat[low:high]]
        yield _Segment(slice(low, high), "".join(parts), np.cumsum([len(part) for part in parts]))


def _by_characters(label: Callable[[str], dict[str, Array]], segments: list[_Segment], places: int) -> dict[str, Array]:
    """Return masks of tokens: those of which a character has the label that is not blank, or any if all are."""
    masks: dict[str, Array] = {}
    for segment in segments:
        blank = np.array([character.isspace() for character in segment.text], bool)
        starts = np.concatenate([[0], segment.ends])
        inked = np.diff(np.concatenate([[0], np.cumsum(~blank)])[starts])
        counts = ~blank | np.repeat(inked == 0, np.diff(starts))
        for name, characters in label(segment.text).items():
            total = np.concatenate([[0], np.cumsum(characters & counts)])[starts]
            masks.setdefault(name, np.zeros(places, bool))[segment.places] = np.diff(total) > 0
    return masks


def _of_tokens(segments: list[_Segment], places: int) -> dict[str, Array]:
    """Return masks by what a token itself is, and whether the character before it is of a word."""
    names = ("blank", "line break", "has a digit", "capitalised", "capitals", "signs alone", "begins a word",
             "continues a word")  # fmt: skip
    masks = {name: np.zeros(places, bool) for name in names}
    for segment in segments:
        low, at = 0, segment.places.start
        for place, high in enumerate(segment.ends.tolist(), at):
            piece, before = segment.text[low:high], segment.text[low - 1 : low]
            for name in _names_of(piece, before):
                masks[name][place] = True
            low = high
    return masks


def _names_of(piece: str, before: str) -> Iterator[str]:
    bare = piece.strip()
    if not bare:
        yield from ("blank",) if piece else ()
    elif not any(map(str.isalnum, bare)):
        yield "signs alone"
    if "\n" in piece:
        yield "line break"
    if any(map(str.isdigit, bare)):
        yield "has a digit"
    if bare[:1].isupper():
        yield "capitals" if len(bare) > 1 and bare.isupper() else "capitalised"
    if bare[:1].isalnum():
        yield "continues a word" if piece[0] == bare[0] and before.isalnum() else "begins a word"
