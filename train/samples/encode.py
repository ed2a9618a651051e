"""One pass over whole sequences of a store: every latent's activations at their tokens, in compact form.

Legend: S sequences, T context, F latents, N active pairs of a token and a latent, R rows.
A place is a token of the S sequences: (sequence - first sequence) * T + offset.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.console.progress import Progress
from shared.errors import Stopped
from shared.store.mapped_array import RowArray
from shared.store.store import Store
from train.data.batches import StoreRows
from train.data.read_ahead import Extent, RowChecks, read_ahead
from train.data.staging import sent
from train.model.transcoder import Transcoder
from train.samples import context_loops
from train.samples.context_loops import NOT_STORED

Array = NDArray[Any]

MOST_PAIRS = 2**26
"""Of a token and a latent that are held: 8 bytes each, and 8 more while they are grouped, so 1 GiB. As many as a
million rows have with 64 latents active on each; where more are, fewer sequences are looked at."""
MOST_PLACES = 2**26
"""Tokens of the sequences, 9 bytes each: as many as a million rows have in a store that keeps a 64th of them."""


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Whole sequences, and what the latents are at those of their tokens that are stored."""

    first: int
    """The row of the store's `tokens` that is the first sequence."""
    tokens: Array
    """[S, T] int32"""
    documents: Array
    """[S, T] int32"""
    apart: bool
    """Whether documents are kept apart, so that positions restart with each."""
    strata: tuple[str, ...]
    stratum: Array
    """[S * T] uint8, of each token; `NOT_STORED` for one without a row"""
    starts: Array
    """[F + 1] int64: where each latent's pairs begin"""
    places: Array
    """[N] int32, rising for each latent"""
    values: Array
    """[N] float32"""

    @property
    def rows(self) -> Array:
        """[P] rows of each stratum that were looked at."""
        return np.bincount(self.stratum, minlength=NOT_STORED + 1)[: len(self.strata)]

    @property
    def d_sae(self) -> int:
        """How many latents there are."""
        return len(self.starts) - 1

    @cached_property
    def known(self) -> tuple[Array, Array]:
        """Tokens at position 0 that have a stored row, rising, and the first place of each."""
        tokens, firsts = np.unique(self.tokens.ravel()[self._at_0], return_index=True)
        return tokens, self._at_0[firsts]

    @cached_property
    def repeats(self) -> Array:
        """[S * T] bool: rows of position 0 after the first of their token. No other decides them: they are the same."""
        repeats = np.zeros(len(self.stratum), bool)
        repeats[self._at_0] = True
        repeats[self.known[1]] = False
        return repeats

    @cached_property
    def _at_0(self) -> Array:
        """Places of stored rows that the model sees at position 0: at a window's start, or that of one apart."""
        starts = np.zeros(self.documents.shape, bool)
        starts[:, 0] = True
        if self.apart:
            starts[:, 1:] = np.diff(self.documents, axis=1) != 0
        return np.flatnonzero(starts.ravel() & (self.stratum != NOT_STORED))


class _Rows(NamedTuple):
    """Rows and their pairs, one row after the other."""

    places: Array
    """[R] int32"""
    strata: Array
    """[R] uint8"""
    counts: Array
    """[R] int64, pairs of each"""
    latents: Array
    """[N] int32"""
    values: Array
    """[N] float32"""

    def of(self, kept: Array) -> "_Rows":
        """Return those that are `kept`, [R] bool."""
        pairs = np.repeat(kept, self.counts)
        return _Rows(self.places[kept], self.strata[kept], self.counts[kept], self.latents[pairs], self.values[pairs])


_NO_ROWS = _Rows(*(np.zeros(0, kind) for kind in (np.int32, np.uint8, np.int64, np.int32, np.float32)))


@torch.no_grad()
def encode(
    transcoder: Transcoder,
    rows: StoreRows,
    blocks: range,
    threshold: Tensor,
    most_rows: int,
    stop: Sequence[object] = (),
) -> Activations:
    """Encode the first sequences of `blocks` that have `most_rows` stored rows in all, whole ones and at least one.

    Latents are active above `threshold` [F], the rule of inference. Windows are shuffled over the store, so the first
    are as good as any. Raises `Stopped` when `stop` is filled meanwhile.
    """
    store = rows.store
    context, per_block = store.request.context_size, store.request.block_sequences
    sequences, total = _extent(store, blocks, most_rows)
    found: list[_Rows] = []
    done = pairs = 0
    with Progress("samples", total, "rows") as progress:
        encoder = _Encoder(transcoder, rows, threshold, progress, stop)
        for block in blocks[: -(-sequences // per_block)]:
            wanted = min(per_block, sequences - done)
            part, got = encoder.block(block, done, wanted, MOST_PAIRS - pairs)
            found.append(part)
            done, pairs = done + got, pairs + len(part.latents)
            if got < wanted:
                break
    first = blocks.start * per_block
    tokens, documents = (np.empty((done, context), np.int32) for _ in range(2))
    store.tokens.read(first, first + done, tokens)
    store.documents.read(first, first + done, documents)
    stratum = np.full(done * context, NOT_STORED, np.uint8)
    for part in found:
        stratum[part.places] = part.strata
    apart = store.request.documents == "apart"
    starts, places, values = _by_latent(found, transcoder.d_sae)
    return Activations(
        first=first,
        tokens=tokens,
        documents=documents,
        apart=apart,
        strata=tuple(store.strata),
        stratum=stratum,
        starts=starts,
        places=places,
        values=values,
    )


def _extent(store: Store, blocks: range, most_rows: int) -> tuple[int, int]:
    """Return how many sequences have `most_rows` stored rows at most, but one at least; and how many rows they have."""
    strata, per_block = store.strata.values(), store.request.block_sequences
    in_block = sum(s.stratum.rows for s in strata)
    whole = min(most_rows // in_block, len(blocks))
    sequences, rows = whole * per_block, whole * in_block
    if whole < len(blocks):
        counts = np.zeros(per_block, np.int64)
        for s in strata:
            numbers = _marks(s.sequence, s.stratum.rows, blocks[whole]) - blocks[whole] * per_block
            counts += np.bincount(numbers, minlength=per_block)
        more = int(np.searchsorted(counts.cumsum(), most_rows - rows, side="right"))
        more = more if whole else max(more, 1)
        sequences, rows = sequences + more, rows + int(counts[:more].sum())
    return min(sequences, max(1, MOST_PLACES // store.request.context_size)), rows


def _marks(array: RowArray, rows: int, block: int) -> Array:
    """Read the part of a block, with `rows` rows, of an array of integers."""
    out = array.room(rows)
    array.read(block * rows, (block + 1) * rows, out)
    return out.astype(np.int64)


class _Chunk(NamedTuple):
    """Neighbouring stored rows of a block's stratum."""

    extent: Extent
    stratum: int
    places: Array
    """[n] int64"""
    ordinary: Array
    """[n] bool, rows that are no outliers"""


class _Encoder:
    """Encodes one block after the other."""

    def __init__(
        self,
        transcoder: Transcoder,
        rows: StoreRows,
        threshold: Tensor,
        progress: Progress,
        stop: Sequence[object],
    ) -> None:
        self._transcoder, self._store, self._threshold = transcoder, rows.store, threshold
        self._device = transcoder.W_enc.device
        self._chunk_rows, self._source, self._progress, self._stop = rows.chunk_rows, rows.source, progress, stop
        self._rows = 0

    def block(self, block: int, done: int, sequences: int, most_pairs: int) -> tuple[_Rows, int]:
        """Return the rows of the first `sequences` of a block, each once, and how many sequences these are.

        `done` sequences lie before the block. `sequences` is halved as often as it takes for `most_pairs`; the very
        first is kept in any case.
        """
        context = self._store.request.context_size
        found, least = [_NO_ROWS], 0 if done else 1
        within = (done + sequences) * context  # places of more sequences than that are not read
        chunks = [one for index in range(len(self._store.strata)) for one in self._chunks(block, index, done, within)]
        read = read_ahead(self._store, [self._source], [chunk.extent for chunk in chunks], self._device)
        checks = RowChecks(self._store, self._device)
        for chunk, (rows,) in zip(chunks, read, strict=True):
            if self._stop:
                raise Stopped("stopped while sampling")
            checks.add(chunk.extent, self._source, rows)
            wanted = np.flatnonzero((chunk.places < (done + sequences) * context) & chunk.ordinary)
            if not len(wanted):
                continue
            found.append(self._encoded(chunk, rows, wanted))
            while sequences > least and sum(len(part.latents) for part in found) > most_pairs:
                sequences //= 2
                found = [part.of(part.places < (done + sequences) * context) for part in found]
        checks.settle()
        whole = _Rows(*map(np.concatenate, zip(*found, strict=True)))
        once = np.zeros(len(whole.places), bool)
        once[np.unique(whole.places, return_index=True)[1]] = True
        return whole if once.all() else whole.of(once), sequences

    def _chunks(self, block: int, index: int, done: int, within: int) -> Iterator[_Chunk]:
        """Yield the chunks of one stratum of a block that have a row to look at, at a place below `within`."""
        name, stratum = list(self._store.strata.items())[index]
        rows, per_block = stratum.stratum.rows, self._store.request.block_sequences
        numbers, offsets = (_marks(marks, rows, block) for marks in (stratum.sequence, stratum.offset))
        places = (numbers - block * per_block + done) * self._store.request.context_size + offsets
        ordinary = np.ones(rows, bool)
        ordinary[outliers_of(self._store, name, block, rows)] = False
        for low in range(0, rows, self._chunk_rows):
            part = slice(low, min(low + self._chunk_rows, rows))
            if ((places[part] < within) & ordinary[part]).any():
                extent = Extent(name, block * rows + part.start, block * rows + part.stop)
                yield _Chunk(extent, index, places[part], ordinary[part])

    def _encoded(self, chunk: _Chunk, rows: Tensor, wanted: Array) -> _Rows:
        """Encode the `wanted` rows of a chunk."""
        model = self._transcoder
        if len(wanted) < len(rows):
            rows = rows[sent(torch.from_numpy(wanted), self._device)]
        active = model.select_above(model.pre_acts(model.normalised_source(rows)), self._threshold).cpu()
        self._rows += len(wanted)
        self._progress.update(self._rows)
        return _Rows(
            chunk.places[wanted].astype(np.int32),
            np.full(len(wanted), chunk.stratum, np.uint8),
            active.starts.diff().numpy(),
            active.latents.numpy().astype(np.int32),
            active.values.numpy(),
        )


def outliers_of(store: Store, stratum: str, block: int, rows: int) -> Array:
    """Return the outliers of a block, counted from its first of `rows` rows of the stratum.

    Their contexts are not shown.
    """
    found = store.outliers[stratum]
    low, high = np.searchsorted(found, [block * rows, (block + 1) * rows])
    return found[low:high] - block * rows


def _by_latent(found: list[_Rows], d_sae: int) -> tuple[Array, Array, Array]:
    """Return starts [F + 1], places [N] and values [N] of the pairs, grouped by latent; takes `found` to pieces."""
    counts = sum(np.bincount(part.latents, minlength=d_sae) for part in found)
    starts = np.concatenate([[0], np.cumsum(counts)])
    ends, places, values = starts[:-1].copy(), np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    while found:
        part = found.pop(0)
        pairs = np.concatenate([[0], np.cumsum(part.counts)])
        context_loops.scatter(
            np.argsort(part.places), part.places, pairs, part.latents, part.values, ends, places, values
        )
    return starts, places, values
