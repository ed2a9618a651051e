"""How latents stand to each other: a map of decoder directions, and which later latents refine an early one. Pure.

Legend: F latents, O d_out, n live latents, N active pairs of a row and a latent.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from train.model.sparse_latents import SparseLatents

Array = NDArray[Any]

LEAST_ROWS = 10
"""Active held-out rows that a latent must have for a parent to be looked for."""
LEAST_SHARE = 0.5
"""Of these rows, on which a parent must be active."""
LEAST_LIFT = 3.0
"""How many times as often as on any row: a latent that is active almost everywhere is nobody's parent."""


class Refinements(NamedTuple):
    """The parent of each latent: the latent of an earlier Matryoshka group that it refines."""

    parent: Array
    """[F] int64; -1: none"""
    share: Array
    """[F] float64: share of the latent's active rows on which its parent is active, too"""


def direction_map(W_dec: Array, live: Array) -> tuple[Array, float]:
    """Return the first two principal components [F, 2] of the unit decoder rows `W_dec` [F, O] of `live` latents [n].

    NaN for other latents. The second result is the share of these rows' variance that the two components have. The
    larger end of each axis is positive, so that the same rows give the same map.
    """
    found = np.full((len(W_dec), 2), np.nan)
    if len(live) < 2 or W_dec.shape[1] < 2:
        return found, 0.0
    rows = W_dec[live].astype(np.float64)
    rows -= rows.mean(0)
    variances, axes = np.linalg.eigh(rows.T @ rows)  # rising; of [O, O], where F may be large
    places = rows @ axes[:, :-3:-1]
    places *= np.where(places.max(0) >= -places.min(0), 1.0, -1.0)
    found[live] = places
    return found, float(variances[-2:].sum() / max(variances.sum(), 1e-30))


def refinements(active: SparseLatents, prefixes: Array) -> Refinements:
    """Find the parent of every latent; `prefixes` [F] are the sizes of the smallest prefix that holds each.

    A parent is of an earlier group, and active on at least `LEAST_SHARE` of the latent's rows and `LEAST_LIFT` times as
    often there as elsewhere. Of several, it is the one whose activity correlates most with the latent's (phi).
    """
    order, starts = (part.numpy() for part in active.by_latent)
    rows = active.rows.numpy()[order]
    parent, share = np.full(active.d_sae, -1, np.int64), np.zeros(active.d_sae)
    _find_parents(
        rows, starts, active.latents.numpy(), active.starts.numpy(), prefixes.astype(np.int64),
        LEAST_ROWS, LEAST_SHARE, LEAST_LIFT, parent, share,
    )  # fmt: skip
    return Refinements(parent, share)


@njit(cache=True, nogil=True)
def _find_parents(
    rows: Array,
    by_latent: Array,
    latents: Array,
    by_row: Array,
    prefixes: Array,
    least_rows: int,
    least_share: float,
    least_lift: float,
    parent: Array,
    share: Array,
) -> None:
    """Fill in `parent` and `share` [F]; `rows` [N] of each latent in turn, `latents` [N] of each row."""
    total, d_sae = len(by_row) - 1, len(by_latent) - 1
    together, touched = np.zeros(d_sae, np.int64), np.empty(d_sae, np.int64)
    for f in range(d_sae):
        mine = by_latent[f + 1] - by_latent[f]
        if mine < least_rows:
            continue
        size, best = 0, 0.0
        for row in rows[by_latent[f] : by_latent[f + 1]]:
            for other in latents[by_row[row] : by_row[row + 1]]:
                if prefixes[other] < prefixes[f]:
                    if together[other] == 0:
                        touched[size] = other
                        size += 1
                    together[other] += 1
        for other in touched[:size]:
            both, its = together[other], by_latent[other + 1] - by_latent[other]
            together[other] = 0
            elsewhere = (its - both) / max(total - mine, 1)
            if both < least_share * mine or both < least_lift * elsewhere * mine:
                continue
            scale = np.sqrt(float(mine) * (total - mine) * float(its) * (total - its))
            phi = (float(total) * both - float(mine) * its) / scale if scale > 0 else 0.0
            if phi > best:
                best, parent[f], share[f] = phi, other, both / mine
