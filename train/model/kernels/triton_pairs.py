"""The losses of pairs of latents in Triton kernels: decoder rows that point the same way, and values on the same rows.

The pairs stay between two scans or reports, so that their order by latent is found once; sums over them are the sums by
latent of the step's own pairs.
Legend: B rows, F latents, O d_out, N pairs of a row and a latent, C pairs of latents.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_step import Joined
from train.model.kernels.triton_sums import Partners, Sums, sums_by_latent
from train.model.sparse_latents import SparseLatents

_BLOCK = 1024
"""Pairs of a row and a latent that a program looks at."""


def partners(first: Tensor, second: Tensor, d_sae: int) -> SparseLatents:  # [C] int64 each
    """Return each latent of every pair with the other one as its row: first ones, and then second ones."""
    return SparseLatents(torch.cat([second, first]), torch.cat([first, second]), first.new_zeros(0), first, d_sae)


def pair_loss(
    joined: Joined,
    W_dec: Tensor,  # [F, O] unit rows
    pairs: SparseLatents,  # of `partners`
    group: Tensor,  # [F] int64
    dead: Tensor,  # [F] bool
    margins: tuple[float, float],
    factor: float,
) -> Tensor:  # []
    """Sum twice `factor` times the squared excess of the cosine of every pair of living latents over its margin.

    `margins`: within a group, and between two. The gradient goes with that of the loss that the term is `joined` to.
    """
    matrix, count, width = W_dec.detach(), len(pairs.rows) // 2, W_dec.shape[1]
    terms, slopes = matrix.new_empty(count), matrix.new_empty(2 * count)
    if count:
        tensors = (matrix, pairs.latents, group, dead.view(torch.uint8), terms, slopes)
        launch(_excess, (count,), *tensors, count, *margins, factor, width, BLOCK=triton.next_power_of_2(width))
        joined.partners.append(Partners(pairs, slopes, matrix))
    return terms.sum()


class Together(NamedTuple):
    """Pairs of latents whose values are not to be large on the same rows."""

    column: Tensor
    """[F] int64: the place of a latent among those of pairs, or -1"""
    partners: SparseLatents
    """As of `partners`, by their places"""
    strength: Tensor
    """[2 C] of each of these"""


def together(first: Tensor, second: Tensor, strength: Tensor, d_sae: int) -> Together:  # [C] each
    """Prepare pairs for `co_activation`."""
    latents = torch.cat([first, second])
    places = torch.arange(len(latents), device=latents.device)
    column = torch.full((d_sae,), -1, device=latents.device)
    column[latents] = places  # any of those that a latent has
    pairs = partners(column[first], column[second], len(latents))
    return Together(column, pairs, strength.repeat(2))


def co_activation(
    joined: Joined,
    values: Tensor,  # [N]
    active: SparseLatents,
    pairs: Together,
) -> Tensor:  # []
    """Sum over pairs of latents, by their strength, the sum over rows of the product of both latents' values.

    A value that is not above 0 has no part and no gradient. The gradient is added to that of the loss that the term is
    `joined` to.
    """
    values, count, (rows, places) = values.detach(), len(values), (len(active.starts) - 1, len(pairs.strength))
    if not (count and places):
        return values.new_zeros(())
    dense, grid, terms = values.new_zeros(places, rows), (triton.cdiv(count, _BLOCK),), torch.empty_like(values)
    at = (active.rows, active.latents, pairs.column)
    launch(_spread, grid, values, *at, dense, count, rows, BLOCK=_BLOCK)
    sums = torch.empty_like(dense)
    sums_by_latent(pairs.partners, Sums(pairs.strength, dense, sums, False), most=1)  # a few: programs share none
    launch(_collect, grid, values, *at, sums, joined.slopes, terms, count, rows, BLOCK=_BLOCK)
    return terms.sum()


@triton.jit
def _excess(
    rows, latents, groups, dead, terms, slopes, count, margin, cross_margin, factor, width, BLOCK: tl.constexpr
):
    """Write what a pair adds to the loss, and what each of its rows gets of the other."""
    i, o = tl.program_id(0), tl.arange(0, BLOCK)
    first, second = tl.load(latents + i), tl.load(latents + count + i)
    one = tl.load(rows + first * width + o, mask=o < width, other=0.0)
    other = tl.load(rows + second * width + o, mask=o < width, other=0.0)
    limit = tl.where(tl.load(groups + first) == tl.load(groups + second), margin, cross_margin)
    excess = tl.maximum(tl.sum(one * other, 0) - limit, 0.0)
    lost = tl.load(dead + first) + tl.load(dead + second)
    weight = tl.where(lost > 0, 0.0, 2 * factor)
    slope = 2 * weight * excess
    tl.store(terms + i, weight * excess * excess)
    tl.store(slopes + i, slope)
    tl.store(slopes + count + i, slope)


@triton.jit
def _place(rows, latents, columns, count, width, BLOCK: tl.constexpr):
    """Return the numbers of pairs of a row and a latent, and where in a table of columns by rows they are, or -1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    latent = tl.load(latents + i, mask=i < count, other=0)
    column = tl.load(columns + latent, mask=i < count, other=-1)
    row = tl.load(rows + i, mask=i < count, other=0)
    return i, tl.where(column < 0, -1, column * width + row)


@triton.jit
def _spread(values, rows, latents, columns, dense, count, width, BLOCK: tl.constexpr):
    """Write the values of latents that are in pairs into a table; no place is written twice."""
    i, at = _place(rows, latents, columns, count, width, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    tl.store(dense + at, value, mask=(at >= 0) & (value > 0))


@triton.jit
def _collect(values, rows, latents, columns, sums, slopes, terms, count, width, BLOCK: tl.constexpr):
    """Write what every value adds to the loss, half of each product, and add its gradient to the slopes."""
    i, at = _place(rows, latents, columns, count, width, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    slope = tl.load(sums + at, mask=(at >= 0) & (value > 0), other=0.0)
    tl.store(slopes + i, tl.load(slopes + i, mask=i < count, other=0.0) + slope, mask=i < count)
    tl.store(terms + i, 0.5 * value * slope, mask=i < count)
