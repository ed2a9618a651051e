"""Pairs of latents that may be one thing twice, found in five ways. Pure.

Legend: F latents, O d_out, C pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from train.duplicates.co_activation import measure, most_correlated
from train.duplicates.directions import Pairs, close_pairs
from train.model.blas import Blas
from train.model.sparse_latents import SparseLatents

COSINE, CORRELATION, JACCARD, SUBSET = 0.5, 0.3, 0.3, 0.8
"""Above one of these, pairs are looked at. A subset is the share of one's rows on which the other is active, too."""
_PARTNERS = 16
"""Of each latent, that correlate with it most; by Jaccard index and subset, those among them are found."""


class Candidates(NamedTuple):
    """Pairs, and by what each was found."""

    pairs: Pairs
    found: dict[str, Tensor]
    """[C] bool each"""


def candidates(
    W_dec: Tensor,  # [F, O] unit rows
    W_enc: Tensor,  # [F, D] unit rows
    active: SparseLatents,  # on CPU
    judged: Tensor,  # [n] int64, rising, the latents that are looked at
    least_together: int,
    library: Blas,
) -> Candidates:
    """List all pairs of `judged` latents that are alike in one of the ways of `Candidates.found`.

    `decoder` and `encoder` by cosine; `correlation`, `jaccard` and `subset` by the rows on which they are active, of
    pairs that are active together on at least `least_together` of them.
    """
    d_sae = len(W_dec)
    there = judged.to(W_dec.device)
    decoder = close_pairs(W_dec, there, COSINE, library)[0].cpu()
    encoder = close_pairs(W_enc, there, COSINE, library)[0].cpu()
    together = _together(active, judged, least_together)
    measured = measure(active, together)
    counts = torch.bincount(active.latents, minlength=d_sae)
    fewer = torch.minimum(counts[together.first], counts[together.second])
    ways = {
        "decoder": decoder,
        "encoder": encoder,
        "correlation": together.kept(measured.correlation > CORRELATION),
        "jaccard": together.kept(measured.jaccard > JACCARD),
        "subset": together.kept(measured.rows > SUBSET * fewer),
    }
    keys = {name: pairs.first * d_sae + pairs.second for name, pairs in ways.items()}
    every = torch.unique(torch.cat(list(keys.values())))
    found = {name: torch.isin(every, key) for name, key in keys.items()}
    return Candidates(Pairs(every // d_sae, every % d_sae), found)


def _together(active: SparseLatents, judged: Tensor, least_together: int) -> Pairs:
    """Return each judged latent with those that it correlates with most, each pair once."""
    partners = most_correlated(active, least_together, _PARTNERS)[0]
    first, place = (partners >= 0).nonzero(as_tuple=True)
    second = partners[first, place]
    both = torch.isin(first, judged) & torch.isin(second, judged)
    key = torch.unique(torch.minimum(first, second)[both] * len(partners) + torch.maximum(first, second)[both])
    return Pairs(key // len(partners), key % len(partners))
