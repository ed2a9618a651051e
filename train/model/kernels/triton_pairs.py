"""The losses of pairs of latents in Triton kernels: decoder rows that point the same way, and values on the same rows.

The pairs stay between two scans or reports, so that their order by latent is found once.
Legend: B rows, F latents, O d_out, N pairs of a row and a latent, C pairs of latents.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_step import Joined
from train.model.kernels.triton_sums import Partners, grouped
from train.model.sparse_latents import SparseLatents

_VALUES, _PARTNERS = 32, 8
"""Pairs of a row and a latent that a program looks at, and how many partners of each at once."""


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

    partners: SparseLatents
    """As of `partners`"""
    strength: Tensor
    """[2 C] of each of these"""


def together(first: Tensor, second: Tensor, strength: Tensor, d_sae: int) -> Together:  # [C] each
    """Prepare pairs for `co_activation`."""
    return Together(partners(first, second, d_sae), strength.repeat(2))


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
    values, count = values.detach(), len(values)
    if not (count and len(pairs.strength)):
        return values.new_zeros(())
    terms, others = torch.empty_like(values), (*grouped(pairs.partners), pairs.partners.rows, pairs.strength)
    tensors = (values, active.rows, active.latents, active.starts, *others, joined.slopes, terms)
    sizes = {"PARTNERS": _PARTNERS, "BLOCK": _VALUES, "num_warps": 4}
    launch(_meet, (triton.cdiv(count, _VALUES),), *tensors, count, **sizes)
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
def _value_of(values, latents, at, last, wanted):
    """Return the value at a place among the pairs of a row where that is of the latent wanted, and above 0; else 0."""
    here = (at < last) & (tl.load(latents + at, mask=at < last, other=-1) == wanted)
    return tl.maximum(tl.load(values + at, mask=here, other=0.0), 0.0)


@triton.jit
def _meet(
    values,
    rows,
    latents,
    starts,
    order,
    pair_starts,
    partners,
    strength,
    slopes,
    terms,
    count,
    PARTNERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what every value adds to the loss, half of each product, and add its gradient to the slopes.

    Partners of its latent are searched for among the pairs of its row, whose latents rise.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + i, mask=i < count, other=0.0)
    latent, row = tl.load(latents + i, mask=value > 0, other=0), tl.load(rows + i, mask=value > 0, other=0)
    begin = tl.load(pair_starts + latent, mask=value > 0, other=0).to(tl.int32)
    end = tl.load(pair_starts + latent + 1, mask=value > 0, other=0).to(tl.int32)
    first, last = tl.load(starts + row).to(tl.int32), tl.load(starts + row + 1).to(tl.int32)
    slope = tl.zeros([BLOCK], values.dtype.element_ty)
    for n in range(0, tl.max(end - begin, 0), PARTNERS):
        at = begin[:, None] + n + tl.arange(0, PARTNERS)[None, :]
        open_ = at < end[:, None]
        pair = tl.load(order + at, mask=open_, other=0)
        partner = tl.load(partners + pair, mask=open_, other=-1)
        low, high = tl.zeros_like(at) + first[:, None], tl.where(open_, last[:, None], first[:, None])
        left = tl.max(last - first, 0)
        while left > 0:  # a search by halves, the same steps for all
            middle = (low + high) // 2
            before = tl.load(latents + middle, mask=low < high, other=0) < partner
            low, high = tl.where((low < high) & before, middle + 1, low), tl.where(before, high, middle)
            left = left // 2
        # A pair that fills up may stand before the one that is active.
        other = tl.maximum(_value_of(values, latents, low, last[:, None], partner),
                           _value_of(values, latents, low + 1, last[:, None], partner))  # fmt: skip
        slope += tl.sum(tl.load(strength + pair, mask=open_, other=0.0) * other, 1)
    tl.store(slopes + i, tl.load(slopes + i, mask=i < count, other=0.0) + slope, mask=i < count)
    tl.store(terms + i, 0.5 * value * slope, mask=i < count)
