"""The strongest contexts of some latents, as text: what a latent can be called by where nobody has named it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from train.samples.parquet import paths, read_contexts

_BEFORE, _AFTER = 6, 3
"""Tokens that are shown around the peak."""


class Strongest(NamedTuple):
    """What a latent's largest activations are on."""

    tokens: list[str]
    """The distinct tokens at the peaks of its strongest contexts, the strongest first."""
    before: str
    """Of the strongest context, the text before the peak."""
    peak: str
    after: str


def strongest(run: Path, step: int, latents: Sequence[int]) -> dict[int, Strongest]:
    """Read the samples of a checkpoint; latents that have none, or whose tokens have no text, are left out.

    Raises `CorruptData` when the file is damaged. Without samples nothing is found.
    """
    file, _ = paths(run, step)
    if not file.is_file():
        return {}
    contexts = read_contexts(file)
    wanted = pc.is_in(contexts["latent"], pa.array(latents, contexts["latent"].type))
    top = pc.equal(contexts["kind"].cast(pa.string()), "top")
    found: dict[int, Strongest] = {}
    for row in contexts.filter(pc.and_(wanted, top)).select(["latent", "peak", "text"]).to_pylist():
        text, at = row["text"], row["peak"]
        if text is None:
            continue
        before, after = "".join(text[max(at - _BEFORE, 0) : at]), "".join(text[at + 1 : at + 1 + _AFTER])
        known = found.setdefault(row["latent"], Strongest([], before, text[at], after))
        if text[at] not in known.tokens:
            known.tokens.append(text[at])
    return found
