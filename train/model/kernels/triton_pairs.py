"""The loss of decoder rows that point the same way, in Triton kernels: each pair is read once, and summed by latent.

The pairs stay between two scans, so that their order by latent is found once.
Legend: F latents, O d_out, N pairs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.sparse_ops import sparse_ops
from train.model.kernels.triton_kernels import Triton
from train.model.kernels.triton_launch import launch
from train.model.sparse_latents import SparseLatents


def partners(first: Tensor, second: Tensor, d_sae: int) -> SparseLatents:  # [N] int64 each
    """Return each latent of every pair with the other one as its row: first ones, and then second ones."""
    return SparseLatents(torch.cat([second, first]), torch.cat([first, second]), first.new_zeros(0), first, d_sae)


def pair_loss(
    W_dec: Tensor,  # [F, O] unit rows
    pairs: SparseLatents,  # of `partners`
    group: Tensor,  # [F] int64
    dead: Tensor,  # [F] bool
    margins: tuple[float, float],
    factor: float,
) -> Tensor:  # []
    """Sum twice `factor` times the squared excess of the cosine of every pair of living latents over its margin.

    `margins`: within a group, and between two. The gradient is added to `W_dec.grad`: so it comes from `backward`.
    """
    return _PairLoss.apply(W_dec, pairs, group, dead, margins, factor)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_dec: Tensor,
        pairs: SparseLatents,
        group: Tensor,
        dead: Tensor,
        margins: tuple[float, float],
        factor: float,
    ) -> Tensor:
        count, width = len(pairs.rows) // 2, W_dec.shape[1]
        ctx.W_dec, ctx.pairs = W_dec, pairs
        terms, slopes = W_dec.new_empty(count), W_dec.new_empty(2 * count)
        if count:
            tensors = (W_dec.detach(), pairs.latents, group, dead.view(torch.uint8), terms, slopes)
            block = triton.next_power_of_2(width)
            launch(_excess, (count,), *tensors, count, *margins, factor, width, BLOCK=block)
        ctx.save_for_backward(slopes)
        return terms.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (slopes,), (times,), W_dec = ctx.saved_tensors, grads, ctx.W_dec
        if W_dec.grad is None:
            W_dec.grad = torch.zeros_like(W_dec)
        if len(slopes):
            ops = sparse_ops("triton")
            assert isinstance(ops, Triton)
            ops.sums_by_latent(ctx.pairs, slopes, W_dec.detach(), W_dec.grad, add=True, times=times)
        return (None,) * 6


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
