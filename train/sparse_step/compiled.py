"""The operations on CPU, on compiled loops.

Gradients of `W_enc`, `b_enc` and `W_dec` are written straight into `.grad` of these parameters, or added to what a term
before has put there: a second term costs its pairs, and no other copy of a matrix is made. So they come from
`backward`, and not from `torch.autograd.grad`.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.sparse_step import loops
from train.sparsity import Active

_PARTS = 64
"""Of a batch's rows, searched side by side."""


def batch_topk(
    pre_acts: Tensor,  # [B, F]
    n: int,
    guess: Tensor,  # scalar
) -> tuple[Active, Tensor]:
    """As `plain.batch_topk`, but for pairs that are not active, which are left out.

    Candidates above `guess` are compacted first, and when they are too few the search starts again from 0. Of several
    equal to the smallest the first in row order are kept.
    """
    floors = (float(guess), 0.0) if guess > 0 else (0.0,)
    for floor in floors:
        found = _Found(pre_acts, pre_acts.new_full((pre_acts.shape[1],), floor))
        if found.count >= n:
            return found.largest(n)
    return found.largest(found.count)


def row_topk(
    pre_acts: Tensor,  # [B, F]
    k: int,
    among: Tensor | None = None,  # [F] bool
) -> Active:
    """As `plain.row_topk`, but no others follow when the latents `among` are fewer than `k`."""
    width = pre_acts.shape[1]
    looked_at = torch.arange(width) if among is None else torch.from_numpy(among.numpy().nonzero()[0])
    wanted, searched = min(k, len(looked_at)), _searched(pre_acts)
    latents = torch.empty(len(pre_acts), wanted, dtype=torch.int64)
    values = searched.new_empty(latents.shape)
    if wanted:
        loops.largest_of_rows(*map(_array, (searched, looked_at)), _PARTS, *map(_array, (latents, values)))
    starts = torch.arange(len(pre_acts) + 1) * wanted
    rows = torch.arange(len(pre_acts)).repeat_interleave(wanted)
    return Active(rows, latents.view(-1), values.view(-1).to(pre_acts.dtype), starts, width)


def above(
    pre_acts: Tensor,  # [B, F]
    thresholds: Tensor,  # [F]
) -> Active:
    """As `plain.above`."""
    found = _Found(pre_acts, thresholds.to(pre_acts.dtype).expand(pre_acts.shape[1]).contiguous())
    return found.largest(found.count)[0]


def encode(
    x: Tensor,  # [B, D] without gradient
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    active: Active,
) -> Tensor:  # [N]
    """As `plain.encode`."""
    return _Encode.apply(x, W_enc, b_enc, active)


def prefix_loss(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]
    y: Tensor,  # [B, O]
    active: Active,
    segment: Tensor,  # [F]
    prefixes: int,
    weight: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [B, P], [B, O]
    """As `plain.prefix_loss`."""
    return _PrefixLoss.apply(values, W_dec, base, y, active, segment, prefixes, float(weight))


class _Found:
    """What lies above a floor, in as many parts as were searched."""

    def __init__(self, pre_acts: Tensor, floors: Tensor) -> None:
        rows, self._width = pre_acts.shape
        parts = min(_PARTS, max(rows, 1))
        searched = _array(_searched(pre_acts))
        self._rows, self._size, self._dtype = rows, -(-rows // parts) * self._width, pre_acts.dtype
        self._counts = np.empty(parts, np.int64)
        self._flat = np.empty(rows * self._width, np.int64)  # pages that are not written to take no room
        self._values = np.empty(len(self._flat), searched.dtype)
        loops.find_above(searched, _array(_searched(floors)), self._counts, self._flat, self._values)
        self.count = int(self._counts.sum())

    def largest(self, n: int) -> tuple[Active, Tensor]:
        """The `n` largest, and the smallest of them; 0 for none."""
        least = np.partition(np.concatenate(self._parts()), self.count - n)[self.count - n] if n else 0.0
        rows, latents, starts = (torch.empty(size, dtype=torch.int64) for size in (n, n, self._rows + 1))
        kept = torch.from_numpy(np.empty(n, self._values.dtype))
        places = (rows, latents, kept, starts)
        found = (self._flat, self._values, self._counts, self._size, self._width)
        loops.keep_pairs(*found, self._values.dtype.type(least), *map(_array, places))
        return Active(rows, latents, kept.to(self._dtype), starts, self._width), kept.new_tensor(least)

    def _parts(self) -> list[Any]:
        counts = self._counts.tolist()
        return [self._values[i * self._size : i * self._size + count] for i, count in enumerate(counts)]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(x)
        ctx.active, ctx.W_enc, ctx.b_enc = active, W_enc, b_enc
        if active.values.dtype == x.dtype:
            return active.values.clone()
        values = x.new_empty(len(active.rows))
        loops.products(*map(_array, (active.rows, active.latents, x, W_enc.T, b_enc, values)))
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        if ctx.b_enc.grad is None:
            ctx.b_enc.grad = torch.zeros_like(ctx.b_enc)
        add = _has_gradient(ctx.W_enc)
        _sums_by_latent(ctx.active, grad, ctx.active.rows, x, ctx.W_enc.grad.T, ctx.b_enc.grad, add=add)
        return (None,) * 4


class _PrefixLoss(torch.autograd.Function):
    """The loss is linear in the errors, so its gradient is made in the forward, row by row, while all is in reach."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        base: Tensor,
        y: Tensor,
        active: Active,
        segment: Tensor,
        prefixes: int,
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        meet = y.new_empty(len(y), prefixes, y.shape[1])  # the gradient that latents of each segment meet
        errors, left, grad = y.new_empty(len(y), prefixes), torch.empty_like(y), torch.empty_like(values)
        tensors = (values, active.latents, active.starts, segment, W_dec, base, y)
        loops.prefix_loss(*map(_array, tensors), weight, *map(_array, (meet, errors, left, grad)))
        ctx.save_for_backward(values, segment, meet, grad)
        ctx.active, ctx.W_dec, ctx.every_row = active, W_dec, len(base) > 1
        ctx.mark_non_differentiable(errors, left)
        return weight * errors.sum(), errors, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, segment, meet, grad), (times, *_) = ctx.saved_tensors, grads
        active, W_dec, (_, prefixes, width) = ctx.active, ctx.W_dec, meet.shape
        add = _has_gradient(W_dec)
        groups, unused = active.rows * prefixes + segment[active.latents], values.new_zeros(active.d_sae)
        _sums_by_latent(active, values * times, groups, meet.view(-1, width), W_dec.grad, unused, add=add)
        grad_base = None
        if ctx.needs_input_grad[2]:
            grad_base = times * (meet[:, 0] if ctx.every_row else meet[:, 0].sum(0, keepdim=True))
        return grad * times, None, grad_base, *(None,) * 5


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


def _searched(pre_acts: Tensor) -> Tensor:
    """In a type that the loops have."""
    return pre_acts.float() if pre_acts.dtype == torch.bfloat16 else pre_acts


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
