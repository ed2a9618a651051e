"""The text that contexts are from: what the browser searches, and shows when a longer context is asked for. Pure.

Many contexts lie in few sequences, so each sequence is kept once, and of a context where it lies.

Legend: S sequences, T context, n contexts, K sequences that are kept.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared.store.store import Store
from train.samples.parquet import SamplesRecord

Array = NDArray[Any]

MOST_TOKENS = 2**22
"""Of all sequences together: some 10 MB. Those with the most contexts are kept."""


class ContextText(NamedTuple):
    """Sequences, and where contexts lie in them."""

    tokens: Array
    """[K, T] int32"""
    breaks: list[list[int]]
    """[K] the columns at which another document begins"""
    sequence: Array
    """[n] int64: which of the K sequences; -1: it is not kept"""
    first: Array
    """[n] int64: the column of a context's first token"""


def context_text(store: Store, record: SamplesRecord, table: pa.Table, peaks: Array) -> ContextText:
    """Read the sequences of the contexts in `table`, of which `peaks` [n] are the columns of their peaks."""
    context = store.request.context_size
    first, count = record.first_sequence, record.sequences
    which = table["sequence"].to_numpy() - first
    held = np.bincount(which, minlength=count)
    order = np.argsort(-held, kind="stable")[: max(1, MOST_TOKENS // context)]
    kept = np.sort(order[held[order] > 0])
    tokens, documents = (np.empty((count, context), np.int32) for _ in range(2))
    store.tokens.read(first, first + count, tokens)
    store.documents.read(first, first + count, documents)
    place = np.full(count, -1, np.int64)
    place[kept] = np.arange(len(kept))
    return ContextText(
        tokens=tokens[kept],
        breaks=[(np.flatnonzero(np.diff(one)) + 1).tolist() for one in documents[kept]],
        sequence=place[which],
        first=table["offset"].to_numpy() - peaks,
    )
