"""The operations on CPU, on compiled loops.

Gradients of `W_enc`, `b_enc` and `W_dec` are written straight into `.grad` of these parameters, or added to what a term
before has put there: a second term costs its pairs, and no other copy of a matrix is made. So they come from
`backward`, and not from `torch.autograd.grad`.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N active pairs.
"""

from typing import Any

import torch
from torch import Tensor

from train.sparse_step import loops
from train.sparsity import Active, offsets


def gather_pre_acts(
    x: Tensor,  # [B, D] without gradient
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    pre_acts: Tensor,  # [B, F], x @ W_enc + b_enc without gradient
    active: Active,
) -> Tensor:  # [N]
    """As `plain.gather_pre_acts`."""
    return _GatherPreActs.apply(x, W_enc, b_enc, pre_acts, active)


def prefix_errors(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]
    y: Tensor,  # [B, O]
    active: Active,
    segment: Tensor,  # [F]
    prefixes: int,
) -> tuple[Tensor, Tensor]:  # [B, P], [B, O]
    """As `plain.prefix_errors`."""
    return _PrefixErrors.apply(values, W_dec, base, y, active, segment, prefixes)


class _GatherPreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, pre_acts: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(x)
        ctx.active, ctx.W_enc, ctx.b_enc = active, W_enc, b_enc
        return pre_acts[active.rows, active.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        if ctx.b_enc.grad is None:
            ctx.b_enc.grad = torch.zeros_like(ctx.b_enc)
        add = _has_gradient(ctx.W_enc)
        _sums_by_latent(ctx.active, grad, ctx.active.rows, x, ctx.W_enc.grad.T, ctx.b_enc.grad, add=add)
        return (None,) * 5


class _PrefixErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: Active, segment: Tensor, prefixes: int
    ) -> tuple[Tensor, Tensor]:
        starts = offsets(active.rows, len(y))
        residual = y.new_empty(len(y), prefixes, y.shape[1])
        errors = y.new_empty(len(y), prefixes)
        loops.residuals(*map(_array, (values, active.latents, starts, segment, W_dec, base, y, residual)))
        loops.squares(_array(residual.view(-1, y.shape[1])), _array(errors.view(-1)))
        ctx.save_for_backward(values, segment, starts, residual)
        ctx.active, ctx.W_dec, ctx.every_row = active, W_dec, len(base) > 1
        left = -residual[:, -1]
        ctx.mark_non_differentiable(left)
        return errors, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, segment, starts, residual), (grad, _) = ctx.saved_tensors, grads
        active, W_dec, (_, prefixes, width) = ctx.active, ctx.W_dec, residual.shape
        meet = torch.empty_like(residual)  # [B, P, O]: the gradient that latents of each segment meet
        loops.suffix_sums(_array(residual), _array(grad.contiguous()), _array(meet))
        grad_values = torch.empty_like(values)
        loops.products(*map(_array, (active.latents, starts, segment, W_dec, meet, grad_values)))
        add = _has_gradient(W_dec)
        groups, unused = active.rows * prefixes + segment[active.latents], values.new_zeros(active.d_sae)
        _sums_by_latent(active, values, groups, meet.view(-1, width), W_dec.grad, unused, add=add)
        grad_base = None
        if ctx.needs_input_grad[2]:
            grad_base = meet[:, 0] if ctx.every_row else meet[:, 0].sum(0, keepdim=True)
        return grad_values, None, grad_base, None, None, None, None


def _sums_by_latent(
    active: Active,
    weights: Tensor,  # [N]
    rows: Tensor,  # [N] rows of `table`
    table: Tensor,  # [T, d]
    out: Tensor,  # [F, d]
    alone: Tensor,  # [F]
    *,
    add: bool,
) -> None:
    """For every latent, the weighted sum of the table's rows over its pairs; that of their weights is added to `alone`.

    `add`: added to what `out` holds, which is else written over.
    """
    order, starts = active.by_latent
    loops.sums_by_latent(*map(_array, (order, starts, weights.contiguous(), rows, table, out, alone)), add)


def _has_gradient(parameter: Tensor) -> bool:
    """Whether a term before has left a gradient to add to; makes room for one, not cleared, if not."""
    if parameter.grad is not None:
        return True
    parameter.grad = torch.empty_like(parameter)
    return False


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
