"""Latents that are active together: how much, from active pairs alone, and a loss that parts them. Pure.

Legend: F latents, N pairs of a row and a latent, C pairs of latents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.duplicates import loops
from train.duplicates.directions import Pairs
from train.sparsity import Active


class Measures(NamedTuple):
    """How pairs of latents are active together."""

    rows: Tensor
    """[C] int64, on which both are active"""
    correlation: Tensor
    """[C] float64, Pearson's over all rows, those on which a latent is not active as 0; 0 for a constant latent"""
    jaccard: Tensor
    """[C] float64, rows on which both are active by rows on which either is; 0 for none"""


def correlated_pairs(
    active: Active,
    least_together: int,
    partners: int = 8,
    levels: tuple[float, ...] = (0.5, 0.8, 0.9),
) -> tuple[Pairs, Tensor, dict[float, int]]:  # correlation [C] float64
    """Pairs of latents with at least `least_together` rows in common, by falling correlation.

    Of every latent, the `partners` largest correlations above 0 with latents after it, and these; and how many pairs
    there are above each level, those that are not listed included. `active` is on CPU and holds active pairs alone
    (`Active.positive`).
    """
    order, starts = active.by_latent
    shape = (active.d_sae, partners)
    found, correlation, over = (
        np.empty(shape, np.int64),
        np.empty(shape),
        np.empty((active.d_sae, len(levels)), np.int64),
    )
    sides = (t.numpy() for t in (active.rows, active.latents, active.values, active.starts, order, starts))
    total = len(active.starts) - 1
    loops.partners(*sides, total, least_together, np.array(levels), over, found, correlation)
    first, place = np.nonzero(found >= 0)
    falling = np.argsort(-correlation[first, place], kind="stable")
    first, place = first[falling], place[falling]
    pairs = Pairs(*map(torch.from_numpy, (first, found[first, place])))
    return pairs, torch.from_numpy(correlation[first, place]), dict(zip(levels, over.sum(0).tolist(), strict=True))


def measure(active: Active, pairs: Pairs) -> Measures:
    """Of any pairs of latents; `active` as for `correlated_pairs`."""
    order, starts = active.by_latent
    rows, products = np.empty(len(pairs.first), np.int64), np.empty(len(pairs.first))
    sides = (t.numpy() for t in (*pairs, active.rows, active.values, order, starts))
    loops.meetings(*sides, rows, products)
    total, counts = len(active.starts) - 1, starts.diff()
    values, nothing = active.values.double(), torch.zeros(active.d_sae, dtype=torch.float64)
    mean = nothing.index_add(0, active.latents, values) / total
    square = nothing.index_add(0, active.latents, values.square()) / total
    variance = square - mean.square()
    spread = torch.where(variance > 1e-12 * square, variance, 0.0).sqrt()  # less is rounding
    scale = spread[pairs.first] * spread[pairs.second]
    both = torch.from_numpy(rows)
    covariance = torch.from_numpy(products) / total - mean[pairs.first] * mean[pairs.second]
    either = counts[pairs.first] + counts[pairs.second] - both
    return Measures(both, torch.where(scale > 0, covariance / scale, 0.0), both / either.clamp_min(1).double())


def position_loss(
    values: Tensor,  # [N] of the latents, with gradient
    active: Active,
    weights: Tensor,  # [B] how often each row counts; 0 for those of other positions
    excess: Tensor,  # [F]
) -> Tensor:  # []
    """Activation at rows with a weight, of every latent by its `excess`, per row of the batch."""
    return (values * weights[active.rows] * excess[active.latents]).sum() / len(weights)


def mass(
    active: Active,
    weights: Tensor,  # [B]
) -> Tensor:  # [F]
    """Summed activation of every latent, rows counting by their weights."""
    weighted = active.values.clamp_min(0) * weights[active.rows]
    if weighted.device.type == "cpu":
        return weighted.new_zeros(active.d_sae).index_add_(0, active.latents, weighted)
    order, starts = active.by_latent  # elsewhere sums of no fixed order
    return torch.segment_reduce(weighted[order], "sum", offsets=starts, initial=0)


class Columns(NamedTuple):
    """Some pairs of latents, and a column of its own for each of their latents."""

    pairs: Pairs
    column: Tensor
    """[F] int64, `size` for latents of no pair"""
    size: int


def columns_of(pairs: Pairs, d_sae: int) -> Columns:
    """Columns for the latents of `pairs`; waits for the device."""
    latents = torch.unique(torch.cat(pairs))
    column = torch.full((d_sae,), len(latents), device=latents.device)
    column[latents] = torch.arange(len(latents), device=latents.device)
    return Columns(pairs, column, len(latents))


def co_activation_loss(
    values: Tensor,  # [N] of the latents, with gradient
    active: Active,
    columns: Columns,
    margin: float,
) -> Tensor:  # []
    """Sum over pairs of latents of the squared excess of their correlation on these rows over `margin`.

    A latent that is active on none of the rows has no correlation and gets no gradient.
    """
    if values.device.type == "cpu":
        correlation = _Correlations.apply(values, active, columns.pairs)
    else:
        correlation = _dense_correlations(values, active, columns)
    return (correlation - margin).relu().square().sum()


def _dense_correlations(values: Tensor, active: Active, columns: Columns) -> Tensor:
    """[C]; a room of rows by columns needs no size that only the device knows."""
    room = values.new_zeros(columns.size + 1, len(active.starts) - 1)
    dense = room.index_put((columns.column[active.latents], active.rows), values, accumulate=True)[:-1]
    deviation = dense - dense.mean(1, keepdim=True)
    norms = deviation.square().sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    unit = deviation / norms
    return torch.linalg.vecdot(*(unit[columns.column[side]] for side in columns.pairs))


class _Correlations(torch.autograd.Function):
    """The same from the pairs' own active rows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, active: Active, pairs: Pairs) -> Tensor:
        order, starts = active.by_latent
        sides = (*pairs, active.rows, values.detach(), order, starts)
        moments = values.new_empty(len(pairs.first), 5, dtype=torch.float64)
        loops.correlate(*(t.numpy() for t in sides), len(active.starts) - 1, moments.numpy())
        ctx.save_for_backward(*sides, moments)
        ctx.total = len(active.starts) - 1
        return moments[:, 0].to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        *sides, moments = ctx.saved_tensors
        found = torch.zeros_like(sides[3])
        more = (moments, grads[0].contiguous(), found)
        loops.add_correlation_gradients(*(t.numpy() for t in sides), ctx.total, *(t.numpy() for t in more))
        return found, None, None
