"""Which contexts a latent is shown by: its strongest, and some of every quantile.

A sequence is represented by the token at which the latent is strongest there, and gives one sample at most: neighbours
of a peak say the same again. Position 0 counts once for each token that stands there, since no other token decides its
row: the same value in every sequence would fill the list of a latent that knows BOS.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared.config import Config
from shared.keyed import hash_integers
from train.samples import context_loops
from train.samples.encode import Activations

Array = NDArray[Any]
TOP = -1
"""The bin of the strongest, which are in none."""


class SamplesConfig(Config):
    """Contexts of every latent, collected after the last step; by default at most 25."""

    rows: int = Field(1_000_000, ge=0)
    """Maximum number of stored rows to search for contexts, in whole sequences. 0: no samples are made."""
    top: int = Field(10, ge=1, le=1000)
    """Number of contexts with the largest activations."""
    bins: int = Field(5, ge=0, le=100)
    """Number of quantile bins for the other sequences in which a latent is active. All bins hold equally many
    sequences, so each has some to show. (Bins of equal width, as in some dashboards, are empty if few activations are
    large.) The table of latents has the edges."""
    per_bin: int = Field(3, ge=1, le=1000)
    """Contexts from each bin, drawn by a keyed hash."""
    max_stratum_share: float = Field(0.6, gt=0, le=1)
    """Largest share of the top contexts, and of a bin, that may come from one position stratum, rounded up, while other
    strata have any. 1: no limit."""
    context: int = Field(32, ge=1)
    """Maximum number of tokens in a context; a quarter of them come after the peak."""

    def most_of(self, wanted: int) -> int:
        """Return how many of `wanted` contexts may come from one stratum."""
        return math.ceil(round(self.max_stratum_share * wanted, 9))


class Selection(NamedTuple):
    """Samples by latent: the top first, then the bins from the strongest to the weakest, falling in each."""

    pairs: Array
    """[n] int64, in `Activations.places` and `values`"""
    latents: Array
    """[n] int32"""
    bins: Array
    """[n] int8, rising with the activation; `TOP` for the strongest"""
    ranks: Array
    """[n] int16, from 0 in the top and in each bin"""
    edges: Array
    """[F, bins + 1] float32, rising: activations between bins; NaN where there is nothing in any"""


def select(found: Activations, config: SamplesConfig, seed: int) -> Selection:
    """Choose samples of every latent; `seed` decides which of a bin."""
    d_sae = found.d_sae
    top = np.full((d_sae, config.top), -1, np.int64)
    binned = np.full((d_sae, config.bins, config.per_bin), -1, np.int64)
    edges = np.full((d_sae, config.bins + 1), np.nan, np.float32)
    context_loops.select(
        found.starts, found.places, found.values, found.stratum, found.repeats, found.tokens.shape[1],
        hash_integers(np.arange(d_sae), "samples", seed),
        config.most_of(config.top), config.most_of(config.per_bin), top, binned, edges,
    )  # fmt: skip
    every = np.concatenate([top, binned[:, ::-1].reshape(d_sae, -1)], axis=1)
    bins = np.repeat([TOP, *range(config.bins)[::-1]], [config.top, *[config.per_bin] * config.bins])
    ranks = np.concatenate([np.arange(config.top), *[np.arange(config.per_bin)] * config.bins])
    latents, columns = np.nonzero(every >= 0)
    return Selection(
        pairs=every[latents, columns],
        latents=latents.astype(np.int32),
        bins=bins[columns].astype(np.int8),
        ranks=ranks[columns].astype(np.int16),
        edges=edges if config.bins else edges[:, :0],
    )
