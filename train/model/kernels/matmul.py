"""The operations by products of whole matrices, each made once: for CUDA, where k is a large share of d_sae.

On CUDA they are in TF32, so that values, reconstructions and gradients have its 10 bits; weights, sums and the loss are
float32. What the sparse forms save in operations, tensor cores make up for while d_sae is small.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from train.model.blas import tf32
from train.model.kernels.base import Groups, has_gradient, weighted
from train.model.kernels.plain import Plain
from train.model.sparse_latents import SparseLatents


class Matmul(Plain):
    """Selects as `Plain`, and computes with whole matrices, whose gradients go straight into `.grad`."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, *, again: bool = False) -> Tensor:
        """As `SparseOps.encode`; values of a product in TF32 are as exact as all others here, and stay."""
        return _Encode.apply(x, W_enc, b_enc, active)

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`."""
        return _PrefixLoss.apply(values, W_dec, base, y, active, groups)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents) -> Tensor:
        ctx.save_for_backward(x)
        ctx.active, ctx.W_enc, ctx.b_enc = active, W_enc, b_enc
        if active.values.dtype == x.dtype:
            return active.values.clone()
        with tf32():
            return torch.addmm(b_enc, x, W_enc)[active.rows, active.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        whole = _dense(grad, ctx.active)
        add = has_gradient(ctx.W_enc)
        with tf32():
            ctx.W_enc.grad.T.addmm_(whole.T, x, beta=int(add))
        if ctx.b_enc.grad is None:
            ctx.b_enc.grad = torch.zeros_like(ctx.b_enc)
        ctx.b_enc.grad += whole.sum(0)
        return (None,) * 4


class _PrefixLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        latents, total, residuals = _dense(values, active), base - y, []
        for low, high in _parts(groups):
            with tf32():
                total = torch.addmm(total, latents[:, low:high], W_dec[low:high])
            residuals.append(total)
        residual = torch.stack(residuals)  # [P, B, O]
        errors = residual.square().sum(2).T
        weight = groups.weight
        times = weight.view(-1, 1, 1) if isinstance(weight, Tensor) and weight.dim() else weight
        meet = (2 * times * residual).flip(0).cumsum(0).flip(0)  # what latents of each group meet
        grad = torch.empty_like(latents)
        for part, (low, high) in zip(meet, _parts(groups), strict=True):
            with tf32():
                torch.mm(part, W_dec[low:high].T, out=grad[:, low:high])
        ctx.save_for_backward(latents, meet, grad[active.rows, active.latents])
        ctx.W_dec, ctx.groups, ctx.every_row = W_dec, groups, len(base) > 1
        left = -total
        ctx.mark_non_differentiable(errors, left)
        return weighted(errors, weight), errors, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (latents, meet, grad), (times, *_) = ctx.saved_tensors, grads
        add, meet = has_gradient(ctx.W_dec), meet * times
        for part, (low, high) in zip(meet, _parts(ctx.groups), strict=True):
            with tf32():
                ctx.W_dec.grad[low:high].addmm_(latents[:, low:high].T, part, beta=int(add))
        grad_base = None
        if ctx.needs_input_grad[2]:
            grad_base = meet[0] if ctx.every_row else meet[0].sum(0, keepdim=True)
        return grad * times, None, grad_base, *(None,) * 3


def _dense(values: Tensor, active: SparseLatents) -> Tensor:
    """Return the values of pairs, each of which comes once, as [B, F]."""
    room = values.new_zeros(len(active.starts) - 1, active.d_sae)
    return room.index_put_((active.rows, active.latents), values.detach())


def _parts(groups: Groups) -> Iterator[tuple[int, int]]:
    """Yield where the latents of each group begin and end."""
    yield from pairwise((0, *groups.sizes))
