"""Latents that are active together: how much, from active pairs alone, and a loss that parts them. Pure.

Legend: F latents, N pairs of a row and a latent, C pairs of latents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.duplicates import pair_loops
from train.duplicates.directions import Pairs
from train.model.sparse_latents import SparseLatents


class Measures(NamedTuple):
    """How pairs of latents are active together."""

    rows: Tensor
    """[C] int64, on which both are active"""
    correlation: Tensor
    """[C] float64, Pearson's over all rows, those on which a latent is not active as 0; 0 for a constant latent"""
    jaccard: Tensor
    """[C] float64, rows on which both are active by rows on which either is; 0 for none"""


class Correlated(NamedTuple):
    """Pairs of latents that are active together, and what a penalty on them needs."""

    pairs: Pairs
    correlation: Tensor
    """[C] float64"""
    scale: Tensor
    """[C] float64, the product of both latents' standard deviations"""

    @classmethod
    def none(cls) -> "Correlated":
        """Return no pairs."""
        latents, numbers = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        return cls(Pairs(latents, latents), numbers, numbers)

    def without(self, latents: Tensor) -> "Correlated":
        """Return the pairs that hold none of `latents` [n] int64."""
        kept = self.pairs.free_of(latents.cpu())
        return Correlated(self.pairs.kept(kept), self.correlation[kept], self.scale[kept])


def correlated_pairs(
    active: SparseLatents,
    least_together: int,
    partners: int = 8,
    levels: tuple[float, ...] = (0.5, 0.8, 0.9),
) -> tuple[Correlated, dict[float, int]]:
    """List pairs of latents with at least `least_together` rows in common, by falling correlation.

    Of every latent, these are the `partners` largest correlations above 0 with latents after it. The second result is
    how many pairs there are above each level, those that are not listed included. `active` is on CPU and holds active
    pairs alone (`SparseLatents.positive`).
    """
    found, correlation, over, spread = _partners(active, least_together, partners, levels, both=False)
    first, place = np.nonzero(found >= 0)
    falling = np.argsort(-correlation[first, place], kind="stable")
    first, place = first[falling], place[falling]
    second = found[first, place]
    one, other = torch.from_numpy(first), torch.from_numpy(second)
    r, scale = torch.from_numpy(correlation[first, place]), torch.from_numpy(spread[first] * spread[second])
    return Correlated(Pairs(one, other), r, scale), dict(zip(levels, over.sum(0).tolist(), strict=True))


def most_correlated(active: SparseLatents, least_together: int, partners: int) -> tuple[Tensor, Tensor]:  # [F, M] each
    """Return, for every latent, the others with the largest correlations above 0, and these, falling; -1: no more.

    As `correlated_pairs`, but with latents before it, too.
    """
    found, correlation, _, _ = _partners(active, least_together, partners, (), both=True)
    return torch.from_numpy(found), torch.from_numpy(correlation)


def _partners(
    active: SparseLatents, least_together: int, partners: int, levels: tuple[float, ...], both: bool
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return partners, their correlation [F, M], how many are above each level, and each latent's deviation [F]."""
    order, starts = active.by_latent
    shape = (active.d_sae, partners)
    found, correlation, over, spread = (
        np.empty(shape, np.int64),
        np.empty(shape),
        np.empty((active.d_sae, len(levels)), np.int64),
        np.empty(active.d_sae),
    )
    sides = (t.numpy() for t in (active.rows, active.latents, active.values, active.starts, order, starts))
    total, above = len(active.starts) - 1, np.array(levels, np.float64)
    pair_loops.partners(*sides, total, least_together, both, above, over, found, correlation, spread)
    return found, correlation, over, spread


def measure(active: SparseLatents, pairs: Pairs) -> Measures:
    """Compute the measures of any pairs of latents; `active` as for `correlated_pairs`."""
    both, products = meetings(active, pairs)
    total, counts = len(active.starts) - 1, active.by_latent[1].diff()
    mean, spread = moments(active)
    scale = spread[pairs.first] * spread[pairs.second]
    covariance = products / total - mean[pairs.first] * mean[pairs.second]
    either = counts[pairs.first] + counts[pairs.second] - both
    return Measures(both, torch.where(scale > 0, covariance / scale, 0.0), both / either.clamp_min(1).double())


def meetings(active: SparseLatents, pairs: Pairs) -> tuple[Tensor, Tensor]:  # [C] int64 and float64
    """Count the rows on which both latents of each pair are active, and sum the products of their values there."""
    order, starts = active.by_latent
    rows, products = np.empty(len(pairs.first), np.int64), np.empty(len(pairs.first))
    sides = (t.numpy() for t in (*pairs, active.rows, active.values, order, starts))
    pair_loops.meetings(*sides, rows, products)
    return torch.from_numpy(rows), torch.from_numpy(products)


def moments(active: SparseLatents) -> tuple[Tensor, Tensor]:  # [F] float64 each
    """Return mean and standard deviation of every latent over all rows, those on which it is not active as 0."""
    total, values = len(active.starts) - 1, active.values.double()
    nothing = torch.zeros(active.d_sae, dtype=torch.float64)
    mean = nothing.index_add(0, active.latents, values) / total
    square = nothing.index_add(0, active.latents, values.square()) / total
    variance = square - mean.square()
    return mean, torch.where(variance > 1e-12 * square, variance, 0.0).sqrt()  # less is rounding


def position_loss(
    values: Tensor,  # [N] of the latents, with gradient
    active: SparseLatents,
    weights: Tensor,  # [B] how often each row counts; 0 for those of other positions
    excess: Tensor,  # [F]
) -> Tensor:  # []
    """Sum the activation at rows with a weight, of every latent by its `excess`, per row of the batch."""
    return (values * weights[active.rows] * excess[active.latents]).sum() / len(weights)


def mass(
    active: SparseLatents,
    weights: Tensor,  # [B]
) -> Tensor:  # [F]
    """Sum the activation of every latent, rows counting by their weights."""
    weighted = active.values.clamp_min(0) * weights[active.rows]
    if weighted.device.type == "cpu":
        return weighted.new_zeros(active.d_sae).index_add_(0, active.latents, weighted)
    order, starts = active.by_latent  # elsewhere sums of no fixed order
    return torch.segment_reduce(weighted[order], "sum", offsets=starts, initial=0)


def co_activation_loss(
    values: Tensor,  # [N] of the latents, with gradient
    active: SparseLatents,
    pairs: Pairs,
    strength: Tensor,  # [C]
) -> Tensor:  # []
    """Sum over pairs, by their strength, the mean over rows of the product of both latents' values.

    With a strength of 2 (r - margin) / (deviation * deviation), r being that of a sample, its gradient is that of
    the squared excess of r over the margin, where means and deviations are held fixed. The gradient of the batch's own
    correlation would vanish where two latents say exactly the same, and where a rare pair meets on one row alone. At a
    given sum of two values their product is smallest when one of them is 0: so one of two duplicates takes all.
    """
    # Either way a value that is not above 0 has no part and no gradient.
    products = _Products.apply(values, active, pairs) if values.device.type == "cpu" else _dense(values, active, pairs)
    return (strength * products).sum() / (len(active.starts) - 1)


def _dense(values: Tensor, active: SparseLatents, pairs: Pairs) -> Tensor:
    """Compute the same as `_Products`, [C]; by a dense table of latents by rows, whose size the host knows."""
    latents = torch.cat(pairs)
    column = torch.full((active.d_sae,), len(latents), device=latents.device)
    column[latents] = torch.arange(len(latents), device=latents.device)  # of one of the places that a latent has
    room = values.new_zeros(len(latents) + 1, len(active.starts) - 1)
    dense = room.index_put((column[active.latents], active.rows), values.relu(), accumulate=True)
    return torch.linalg.vecdot(*(dense[column[side]] for side in pairs))


class _Products(torch.autograd.Function):
    """Of each pair of latents, the sum over rows of the product of their values, from their own active rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, active: SparseLatents, pairs: Pairs) -> Tensor:
        sides = (*pairs, active.rows, values.detach(), *active.by_latent)
        together, products = np.empty(len(pairs.first), np.int64), np.empty(len(pairs.first))
        pair_loops.meetings(*(t.numpy() for t in sides), together, products)
        ctx.save_for_backward(*sides)
        return torch.from_numpy(products).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        sides = ctx.saved_tensors
        found = torch.zeros_like(sides[3])
        pair_loops.add_product_gradients(*(t.numpy() for t in (*sides, grads[0].contiguous(), found)))
        return found, None, None
