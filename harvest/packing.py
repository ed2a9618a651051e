"""Documents to token windows. Pure: takes and returns arrays.

The documents' tokens, each followed by the separator, form one stream, which is cut into payloads of
`context_size - 1` tokens; BOS is put before each when a block is made. The first documents fill the held-out windows,
and the rest of the document that straddles their end is dropped, so that none is on both sides.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.layout import PackingCounts

Ids = NDArray[np.int32]


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

    held_out: Ids
    """[windows, payload], for the first segment; no more than asked, fewer when the text ended."""
    windows: int
    """Training windows found, of those wanted."""
    documents: int
    held_out_documents: int
    empty_documents: int
    tokens: int
    """Tokens of the documents read, separators included."""

    def counts(self, kept: int, payload: int) -> PackingCounts:
        """The record, when `kept` of the training windows are stored."""
        held_out = self.held_out.size
        return PackingCounts(
            documents=self.documents,
            held_out_documents=self.held_out_documents,
            empty_documents=self.empty_documents,
            tokens_read=self.tokens,
            tokens_kept=kept * payload,
            tokens_held_out=held_out,
            tokens_left_over=self.tokens - kept * payload - held_out,
        )


class TokenStream:
    """Joins documents and cuts windows, reading no document before it is needed."""

    def __init__(self, documents: Iterable[Ids], separator: int | None, payload: int) -> None:
        self._documents, self._payload = iter(documents), payload
        self._end = np.array([] if separator is None else [separator], np.int32)
        self.rest = np.zeros(0, np.int32)
        """Tokens read and not yet cut; all of one document once a window has been cut."""
        self.documents = self.empty = self.tokens = 0

    def windows(self, count: int) -> Iterator[Ids]:
        """Yield payloads [n, payload], `count` in all, or fewer when the text ends."""
        while count > 0:
            whole = min(count, len(self.rest) // self._payload)
            if whole:
                ready, self.rest = np.split(self.rest, [whole * self._payload])
                count -= whole
                yield ready.reshape(whole, self._payload)
            elif not self._read():
                return

    def drop_rest(self) -> None:
        """Leave out what is read and not yet cut."""
        self.rest = self.rest[:0]

    def _read(self) -> bool:
        for document in self._documents:
            if document.size:
                self.rest = np.concatenate([self.rest, document, self._end])
                self.documents += 1
                self.tokens += document.size + self._end.size
                return True
            self.empty += 1
        return False


def pack(stream: TokenStream, payload: int, quota: Quota, keep: Callable[[Ids], None]) -> Packed:
    """Cut the windows of one segment; training payloads go to `keep` in order of the text.

    A later segment (`skipped` above 0) starts where the one before it ended, and counts from there.
    """
    held_out = np.concatenate([np.zeros((0, payload), np.int32), *stream.windows(quota.held_out)])
    stream.drop_rest()
    held_out_documents = stream.documents
    skipped = sum(len(part) for part in stream.windows(quota.skipped))
    start = _Start(stream) if skipped else None
    found = 0
    for part in stream.windows(quota.wanted):
        keep(part)
        found += len(part)
    return Packed(
        held_out=held_out[:0] if start else held_out,
        windows=found,
        documents=stream.documents - (start.documents if start else 0),
        held_out_documents=0 if start else held_out_documents,
        empty_documents=stream.empty - (start.empty if start else 0),
        tokens=stream.tokens - (start.tokens if start else 0),
    )


class _Start:
    """Where a later segment starts: what was used up before it; the document it starts within is its own."""

    def __init__(self, stream: TokenStream) -> None:
        self.documents = stream.documents - (1 if stream.rest.size else 0)
        self.empty = stream.empty
        self.tokens = stream.tokens - stream.rest.size
