"""What a latent's label is made from and scored on: its contexts, and places where it is silent.

The contexts are those of the run's samples. Half of them, of the top and of every bin, are shown for the label; the
other half is what it is scored on, so that no score is of what the label was made from.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from shared.errors import UserError
from shared.keyed import hash_integers, permutation
from train.explain.questions import Excerpt
from train.interchange.sampled import Sampled
from train.samples.encode import Activations
from train.samples.token_text import pieces

Array = NDArray[Any]

LEAST = 4
"""Contexts that a latent must have: two to show, two to score on."""
_TRIES = 20
"""Windows that are drawn for each that is wanted, at most."""


class LatentExcerpts(NamedTuple):
    """One latent's."""

    latent: int
    shown: list[Excerpt]
    """For the label, the strongest first."""
    active: list[Excerpt]
    """To score on."""
    silent: list[Excerpt]
    """As many, in which it is not active on any stored row."""


class Excerpts:
    """Takes the excerpts of single latents from a run's samples."""

    def __init__(self, found: Sampled, tokenizer: Path, seed: int) -> None:
        """`tokenizer` is the store's file of it; the same `seed` draws the same silent windows.

        Raises `UserError` when the samples have no text.
        """
        if not tokenizer.is_file() or found.contexts["text"].null_count:
            raise UserError(f"{tokenizer} is not there, and without it no context has a text to ask about")
        self._activations, self._seed = found.activations, seed
        known = np.unique(found.activations.tokens).tolist()
        self._text = dict(zip(known, pieces(tokenizer, known), strict=True))
        self._contexts = found.contexts.select(["latent", "kind", "rank", "activation", "text", "activations"])
        latents = self._contexts["latent"].to_numpy()
        self._bounds = np.searchsorted(latents, np.arange(found.record.d_sae + 1))
        self._context = int(pc.max(pc.list_value_length(self._contexts["text"])).as_py() or 1)

    def latents(self) -> Array:
        """Return the latents that have contexts enough, rising."""
        return np.flatnonzero(np.diff(self._bounds) >= LEAST)

    def of(self, latent: int) -> LatentExcerpts:
        """Return what is shown of `latent` and what it is scored on."""
        low, high = int(self._bounds[latent]), int(self._bounds[latent + 1])
        rows = self._contexts.slice(low, high - low).to_pylist()
        found = [
            Excerpt(row["text"], [max(value or 0.0, 0.0) for value in row["activations"]])
            for row in sorted(rows, key=lambda row: -row["activation"])
        ]
        shown, active = found[::2], found[1::2]
        return LatentExcerpts(latent, shown, active, self._silent(latent, len(active)))

    def _silent(self, latent: int, count: int) -> list[Excerpt]:
        """Draw windows in whose tokens `latent` has no activation; fewer where it is active almost everywhere."""
        windows = silent_windows(self._activations, latent, self._context, count, self._seed)
        return [Excerpt([self._text[token] for token in one.tolist()], [0.0] * len(one)) for one in windows]


def silent_windows(found: Activations, latent: int, context: int, count: int, seed: int) -> Iterator[Array]:
    """Yield up to `count` windows of `context` tokens in which `latent` is active on no row, drawn by a keyed hash.

    A window ends where its document ends, when documents are kept apart. Rows that are not stored count as silent.
    """
    sequences, length = found.tokens.shape
    context = min(context, length)
    places = found.places[found.starts[latent] : found.starts[latent + 1]]
    draws = hash_integers(np.arange(count * _TRIES), seed, "silent windows", latent)
    yielded = 0
    for draw in draws:
        sequence, offset = (
            int(draw % np.uint64(sequences)),
            int((draw >> np.uint64(32)) % np.uint64(length - context + 1)),
        )
        stop = offset + context
        if found.apart:
            documents = found.documents[sequence, offset:stop]
            stop = offset + int((documents == documents[0]).sum())
        low, high = np.searchsorted(places, [sequence * length + offset, sequence * length + stop])
        if low == high and stop - offset > context // 2:
            yield found.tokens[sequence, offset:stop]
            yielded += 1
            if yielded == count:
                return


def wrong_marks(excerpts: Sequence[Excerpt], count: int, *key: int | str) -> list[list[bool]]:
    """Mark `count` tokens of each excerpt at random by a keyed hash: what fuzzing must tell from the right ones."""
    marks = []
    for number, excerpt in enumerate(excerpts):
        order = permutation(len(excerpt.text), *key, number)
        chosen = set(order[:count].tolist())
        marks.append([place in chosen for place in range(len(excerpt.text))])
    return marks
