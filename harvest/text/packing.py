"""Documents to token windows. Pure: takes and returns arrays.

`joined` documents form one stream, each followed by the separator, which is cut into windows; every window starts with
BOS. Documents kept `apart` each start with BOS of their own, several to a window; one that a window's end cuts goes on
in the next window, with BOS again, as a document of its own to the model. A window is always full.

The first documents fill the held-out windows, and the rest of the document that straddles their end is dropped, so
that none is on both sides.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shared.store.layout import Documents, PackingCounts

Ids = NDArray[np.int32]
_TOGETHER = 64


class Encoded(NamedTuple):
    """The token ids of a document."""

    ids: Ids
    left_out: Mapping[str, int] = {}
    """What of its row is not in them, by the names that `PackingCounts` has for it."""


class Windows(NamedTuple):
    """Token windows and the documents they are made of."""

    tokens: Ids
    """[S, T]"""
    documents: Ids
    """[S, T] number of each token's document, counted from 0; a BOS belongs to the document that follows it"""


def join(parts: Iterable[Windows], context: int) -> Windows:
    """Join all windows of `parts`, which may be none."""
    given = [np.zeros((2, 0, context), np.int32), *(np.stack(part) for part in parts)]
    return Windows(*np.concatenate(given, axis=1))


def model_positions(windows: Windows, documents: Documents) -> NDArray[np.int64]:
    """Return the position the model gives to each token [S, T], counted from the window's or the document's start."""
    offsets = np.broadcast_to(np.arange(windows.tokens.shape[1]), windows.tokens.shape)
    if documents == "joined":
        return offsets
    starts = np.diff(windows.documents, axis=1, prepend=-1) != 0
    return offsets - np.maximum.accumulate(np.where(starts, offsets, 0), axis=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """How many windows to cut, in order of the text."""

    held_out: int
    skipped: int
    """Training windows that earlier segments hold."""
    wanted: int
    """Training windows of this segment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What a segment's text came to."""

    held_out: Windows
    """For the first segment; no more than asked, fewer when the text ended."""
    windows: int
    """Training windows found, of those wanted."""
    documents: int
    held_out_documents: int
    empty_documents: int
    tokens: int
    """Tokens of the documents read, separators included."""
    left_out: Mapping[str, int]
    """What of the rows is in no document, by the names that `PackingCounts` has for it."""
    dropped: int
    """Tokens of the document at the held-out windows' end that are in neither part."""

    def counts(self, kept: int, held_out: int) -> PackingCounts:
        """Return the record, when `kept` and `held_out` tokens, BOS excluded, are in the windows that are stored."""
        return PackingCounts(
            documents=self.documents,
            held_out_documents=self.held_out_documents,
            empty_documents=self.empty_documents,
            tokens_read=self.tokens,
            tokens_kept=kept,
            tokens_held_out=held_out,
            tokens_left_over=self.tokens - kept - held_out,
            **self.left_out,
        )


class TokenStream:
    """Cuts windows of `context` tokens, reading no document before it is needed."""

    def __init__(
        self, documents: Iterable[Encoded], *, bos: int | None, separator: int | None, context: int, kind: Documents
    ) -> None:
        self._documents, self._context = iter(documents), context
        self._end = np.array([] if separator is None else [separator], np.int32)
        self._cutter = (_Joined if kind == "joined" else _Apart)(bos, context)
        self.documents = self.empty = self.tokens = 0
        self.left_out: Counter[str] = Counter()

    @property
    def rest(self) -> int:
        """Tokens read and not yet cut; all of one document once a window has been cut."""
        return self._cutter.rest

    def windows(self, count: int) -> Iterator[Windows]:
        """Yield windows, `count` in all, or fewer when the text ends."""
        while count > 0:
            ready = self._cutter.cut(count)
            if len(ready.tokens):
                count -= len(ready.tokens)
                yield ready
            elif not self._read():
                return

    def drop_rest(self) -> int:
        """Leave out what is read and not yet cut; returns how many tokens that is."""
        rest = self.rest
        self._cutter.drop()
        return rest

    def _read(self) -> bool:
        for document in self._documents:
            self.left_out.update(document.left_out)
            if document.ids.size:
                whole = np.concatenate([document.ids, self._end])
                self._cutter.add(whole, self.documents)
                self.documents += 1
                self.tokens += whole.size
                return True
            self.empty += not document.left_out.get("refused_rows")
        return False


class _Joined:
    """One stream of tokens, cut anywhere; BOS is put before each window."""

    def __init__(self, bos: int | None, context: int) -> None:
        self._bos, self._payload = bos, context - (bos is not None)
        self._waiting = np.zeros((2, 0), np.int32)

    @property
    def rest(self) -> int:
        return self._waiting.shape[1]

    def add(self, tokens: Ids, document: int) -> None:
        self._waiting = np.concatenate([self._waiting, [tokens, np.full_like(tokens, document)]], axis=1)

    def cut(self, most: int) -> Windows:
        whole = min(most, self.rest // self._payload)
        ready, self._waiting = np.split(self._waiting, [whole * self._payload], axis=1)
        tokens, documents = ready.reshape(2, whole, self._payload)
        if self._bos is None:
            return Windows(tokens, documents)
        return Windows(
            np.pad(tokens, ((0, 0), (1, 0)), constant_values=self._bos), np.pad(documents, ((0, 0), (1, 0)), "edge")
        )

    def drop(self) -> None:
        self._waiting = self._waiting[:, :0]


class _Apart:
    """Fills one window after the other; every piece of a document starts with BOS."""

    def __init__(self, bos: int | None, context: int) -> None:
        self._bos = np.array([] if bos is None else [bos], np.int32)
        self._window, self._filled = np.empty((2, context), np.int32), 0
        self._tokens, self._number = np.zeros(0, np.int32), 0

    @property
    def rest(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Ids, document: int) -> None:
        assert not self.rest
        self._tokens, self._number = tokens, document

    def cut(self, most: int) -> Windows:
        ready: list[Windows] = []
        context = self._window.shape[1]
        while self.rest and len(ready) < min(most, _TOGETHER):
            self._put(self._bos)
            taken = min(self.rest, context - self._filled)
            self._put(self._tokens[:taken])
            self._tokens = self._tokens[taken:]
            if self._filled == context:
                ready.append(Windows(*self._window.copy()[:, None]))
                self._filled = 0
        return join(ready, context)

    def drop(self) -> None:
        self._filled, self._tokens = 0, self._tokens[:0]

    def _put(self, tokens: Ids) -> None:
        place = slice(self._filled, self._filled + len(tokens))
        self._window[0, place], self._window[1, place] = tokens, self._number
        self._filled += len(tokens)


def pack(stream: TokenStream, context: int, quota: Quota, keep: Callable[[Windows], None]) -> Packed:
    """Cut the windows of one segment; training windows go to `keep` in order of the text.

    A later segment (`skipped` above 0) starts where the one before it ended, and counts from there.
    """
    held_out = join(stream.windows(quota.held_out), context)
    dropped = stream.drop_rest()
    held_out_documents = stream.documents
    skipped = sum(len(part.tokens) for part in stream.windows(quota.skipped))
    start = _Start(stream) if skipped else None
    found = 0
    for part in stream.windows(quota.wanted):
        keep(part)
        found += len(part.tokens)
    return Packed(
        held_out=Windows(held_out.tokens[:0], held_out.documents[:0]) if start else held_out,
        windows=found,
        documents=stream.documents - (start.documents if start else 0),
        held_out_documents=0 if start else held_out_documents,
        empty_documents=stream.empty - (start.empty if start else 0),
        tokens=stream.tokens - (start.tokens if start else 0),
        left_out=stream.left_out - (start.left_out if start else Counter()),
        dropped=0 if start else dropped,
    )


class _Start:
    """Where a later segment starts: what was used up before it; the document it starts within is its own."""

    def __init__(self, stream: TokenStream) -> None:
        self.documents = stream.documents - (1 if stream.rest else 0)
        self.empty = stream.empty
        self.tokens = stream.tokens - stream.rest
        self.left_out = stream.left_out.copy()
