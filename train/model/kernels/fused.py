"""What `compiled` and `triton_kernels` share: autograd around three loops, which each of them brings.

The loss is linear in the errors, so its gradient is made in the forward, row by row, while all is in reach.
Gradients of `W_enc`, `b_enc` and `W_dec` are written straight into `.grad` of these parameters, or added to what a term
before has put there: a second term costs its pairs, and no other copy of a matrix is made. So they come from
`backward`, and not from `torch.autograd.grad`.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from train.model.kernels.base import Groups, has_gradient, weighted
from train.model.kernels.plain import Plain
from train.model.sparse_latents import SparseLatents


class Fused(Plain, ABC):
    """Autograd around three loops, all on tensors of one device. Selects as `Plain` where it does not say otherwise."""

    @abstractmethod
    def products(
        self,
        active: SparseLatents,
        left: Tensor,  # [B, D]
        right: Tensor,  # [F, D]
        bias: Tensor,  # [F]
    ) -> Tensor:  # [N]
        """Return <left[row], right[latent]> + bias[latent] of every pair."""

    @abstractmethod
    def errors_and_gradients(
        self,
        values: Tensor,  # [N]
        W_dec: Tensor,  # [F, O]
        base: Tensor,  # [1, O] or [B, O]
        y: Tensor,  # [B, O]
        active: SparseLatents,
        groups: Groups,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [B, P], [B, O], [B, P, O], [N]
        """Return errors, what is left of `y`, and gradients of `weight` times all errors.

        With residual[b, p] = base[b] + sum over the row's latents of prefix p of value * W_dec[latent] - y[b]:
        errors[b, p] = |residual[b, p]|^2; left[b] = -residual[b, last]; meet[b, p] = sum over q >= p of
        2 * weight[q] * residual[b, q], which is the gradient that latents of group p meet; and of every pair
        grad[i] = <W_dec[latent], meet[b, group of latent]>.
        """

    @abstractmethod
    def sums_by_latent(
        self,
        active: SparseLatents,
        weights: Tensor,  # [N]
        table: Tensor,  # [B, d], or [B * P, d]
        out: Tensor,  # [F, d]
        *,
        add: bool,
        alone: Tensor | None = None,  # [F]
        groups: Groups | None = None,
        times: Tensor | None = None,  # scalar
    ) -> None:
        """Write, for every latent, the weighted sum of the table's rows over its pairs; add that of weights to `alone`.

        `add`: added to what `out` holds, which is else written over. `groups`: the table has a row for each of a row's
        groups, and a latent's is that of its own. All weights count `times`.
        """

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, *, again: bool = False) -> Tensor:
        """As `SparseOps.encode`."""
        return _Encode.apply(self, x, W_enc, b_enc, active, again)

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`."""
        return _PrefixLoss.apply(self, values, W_dec, base, y, active, groups)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loops: Fused, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, again: bool
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.loops, ctx.active, ctx.W_enc, ctx.b_enc = loops, active, W_enc, b_enc
        if active.values.dtype == x.dtype and not again:
            return active.values.clone()
        return loops.products(active, x, W_enc.T, b_enc)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,), active = ctx.saved_tensors, grads, ctx.active
        if ctx.b_enc.grad is None:
            ctx.b_enc.grad = torch.zeros_like(ctx.b_enc)
        add = has_gradient(ctx.W_enc)
        ctx.loops.sums_by_latent(active, grad.contiguous(), x, ctx.W_enc.grad.T, add=add, alone=ctx.b_enc.grad)
        return (None,) * 6


class _PrefixLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        loops: Fused,
        values: Tensor,
        W_dec: Tensor,
        base: Tensor,
        y: Tensor,
        active: SparseLatents,
        groups: Groups,
    ) -> tuple[Tensor, Tensor, Tensor]:
        errors, left, meet, grad = loops.errors_and_gradients(values, W_dec, base, y, active, groups)
        ctx.save_for_backward(values, meet, grad)
        ctx.loops, ctx.active, ctx.W_dec, ctx.groups, ctx.every_row = loops, active, W_dec, groups, len(base) > 1
        ctx.mark_non_differentiable(errors, left)
        return weighted(errors, groups.weight), errors, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, meet, grad), (times, *_), W_dec = ctx.saved_tensors, grads, ctx.W_dec
        add, table = has_gradient(W_dec), meet.flatten(0, 1)
        ctx.loops.sums_by_latent(ctx.active, values, table, W_dec.grad, add=add, groups=ctx.groups, times=times)
        grad_base = None
        if ctx.needs_input_grad[3]:
            grad_base = times * (meet[:, 0] if ctx.every_row else meet[:, 0].sum(0, keepdim=True))
        return None, grad * times, None, grad_base, *(None,) * 3
