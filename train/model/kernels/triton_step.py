"""The loss of a step from selected pairs in Triton kernels, and both matrices' gradients, with what is joined to it.

As `Fused.encode` and `prefix_loss`, for values that are positive pre-activations: with nothing in between, and terms of
other modules whose gradients go the same way. A loss of pairs of latents leaves what it adds to decoder rows, and one
of the latents' values adds to the slopes of these; both are then written once, with the gradients of the loss.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.base import Groups, has_gradient
from train.model.kernels.triton_kernels import Encoder, errors_and_gradients, on_device
from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_sums import Every, Extra, NormParts, Partners, Sums, norm_parts, sums_by_latent
from train.model.sparse_latents import SparseLatents

_SUMMED = 8192
"""Numbers that the one program of `_weigh` sums at once."""


class Noted(NamedTuple):
    """What a gradient's norm is made from, and the gradient that it was noted of."""

    gradient: Tensor
    version: int
    parts: NormParts

    def holds_for(self, gradient: Tensor | None) -> bool:
        """Tell whether nothing but kernels that note has written to the gradient since."""
        return gradient is self.gradient and gradient._version == self.version


@dataclass
class Joined:
    """What a loss and the terms that are joined to it hand to each other."""

    figures: Tensor
    """[B, P + 2] of each row: the squared error of every prefix, how many latents are active, and the squared norm of
    the target"""
    active: SparseLatents
    """The pairs, with their values"""
    slopes: Tensor
    """[N] the loss's gradient by values, to which other terms may add theirs before its backward"""
    partners: list[Partners] = field(default_factory=list)
    """At most one: rows that are added to the decoder's gradient"""
    extra: list[Extra] = field(default_factory=list)
    """At most one: rows that are added to the encoder's gradient"""


class AuxK(NamedTuple):
    """What an auxiliary loss of the errors asks of the loss itself: its weight, as of `losses.auxk_weight`."""

    dead: Tensor
    """[F] bool"""
    every: Every
    """Which rows take part"""
    coefficient: float
    dead_per_active: int
    """While fewer latents than this are dead, the term weighs less in proportion."""
    weight: Tensor
    """[] where the coefficient over the squared errors of these rows under the last prefix is written; 0: none dead"""


@dataclass(frozen=True)
class Plan:
    """How a loss is computed."""

    groups: Groups
    again: bool
    """Whether values are computed again, as in `SparseOps.encode`"""
    norms: dict[str, Noted]
    """Of `W_enc` and `W_dec`, by name"""
    unit: bool
    """Whether decoder rows have norm 1"""
    among: Tensor | None = None
    """[F] bool: values of other latents count as 0, and those of these may be negative; none: values are positive"""
    every: Every | None = None
    """Which rows of `x` and `y` the pairs' rows are, if not all"""
    auxk: AuxK | None = None


def pairs_loss(
    x: Tensor,  # [B, D]
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]
    y: Tensor,  # [B, O]
    active: SparseLatents,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Joined]:  # [], [N], [B, O]
    """Return the weighted squared error of all rows under all prefixes, the pairs' values, and `y` less the last ones.

    Gradients reach the parameters and `base`, and the values have one, too. The last result is for terms to join.
    """
    plan = replace(plan, groups=on_device(plan.groups, y))
    joined: list[Joined] = []
    loss, values, left = _PairsLoss.apply(x, W_enc, b_enc, W_dec, base, y, active, plan, joined)
    return loss, values, left, joined[0]


def _weighed(figures: Tensor, weight: Tensor, auxk: AuxK | None) -> Tensor:
    """Return the sum of all errors, weighted by prefix; and write what one weighs in the auxiliary loss."""
    out, prefixes, tiny = figures.new_empty(()), figures.shape[1] - 2, torch.finfo(figures.dtype).tiny
    sizes = (len(figures), prefixes, weight.dim())
    if auxk is None:
        launch(_weigh, (1,), figures, weight, out, figures, figures, out, *sizes, 0, 1, 0.0, 1, tiny,
               AUXK=False, BLOCK=_SUMMED)  # fmt: skip
        return out
    dead, every = auxk.dead.view(torch.uint8), auxk.every
    launch(_weigh, (1,), figures, weight, out, dead, every.number, auxk.weight, *sizes, len(dead), every.step,
           auxk.coefficient, auxk.dead_per_active, tiny, AUXK=True, BLOCK=_SUMMED)  # fmt: skip
    return out


class _PairsLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        base: Tensor,
        y: Tensor,
        active: SparseLatents,
        plan: Plan,
        joined: list[Joined],
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, encoder = active.values, None
        if plan.again or values.dtype != x.dtype:
            values, encoder = x.new_empty(len(active.rows)), Encoder(x, W_enc.T, b_enc, plan.among)
        else:
            values = values.relu() if plan.among is None else values.where(plan.among[active.latents], 0.0)
        groups, weight = plan.groups, plan.groups.weight
        assert isinstance(weight, Tensor)
        figures = y.new_empty(len(active.starts) - 1, groups.prefixes + 2)
        _, left, meet, slopes = errors_and_gradients(
            values, W_dec, base, y, active, groups, figures=figures, masked=True, every=plan.every, encoder=encoder
        )
        joined.append(Joined(figures, active.with_values(values.detach()), slopes))
        ctx.save_for_backward(x, values, meet)
        ctx.joined, ctx.plan, ctx.parameters = joined[0], plan, (W_enc, b_enc, W_dec)
        ctx.every_row = len(base) > 1
        ctx.mark_non_differentiable(left)
        ctx.set_materialize_grads(False)
        return _weighed(figures, weight, plan.auxk), values, left

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, values, meet), (times, by_values, *_) = ctx.saved_tensors, grads
        (W_enc, b_enc, W_dec), plan, joined = ctx.parameters, ctx.plan, ctx.joined
        active = joined.active
        assert times is not None
        of_slopes: Tensor | None = times
        slopes = joined.slopes
        if by_values is not None:  # of terms that autograd has brought here
            slopes, of_slopes = slopes * times + by_values.where(values != 0, 0.0), None
        add, groups = has_gradient(W_dec), plan.groups
        decoder = Sums(
            values,
            meet.flatten(0, 1),
            W_dec.grad,
            add,
            groups=(groups.of_latent, groups.prefixes) if groups.prefixes > 1 else None,
            times=times,
            norms=_noted(plan.norms, "W_dec", W_dec.grad, W_dec.grad, W_dec.detach() if plan.unit else None, add),
        )
        add, add_bias = has_gradient(W_enc), has_gradient(b_enc)
        encoder = Sums(
            slopes,
            x,
            W_enc.grad.T,
            add,
            alone=(b_enc.grad, add_bias),
            groups=plan.every,
            times=of_slopes,
            norms=_noted(plan.norms, "W_enc", W_enc.grad, W_enc.grad.T, None, add),
        )
        wanted = ctx.needs_input_grad[4]
        grad_base = meet.new_empty(1, meet.shape[2]) if wanted and not ctx.every_row else None
        sums_by_latent(
            active,
            decoder,
            encoder,
            partners=joined.partners[0] if joined.partners else None,
            extra=joined.extra[0] if joined.extra else None,
            every_row=grad_base,
            most=len(active.starts) - 1,
        )
        if wanted and ctx.every_row:
            grad_base = times * meet[:, 0]
        return *(None,) * 4, grad_base, *(None,) * 4


def _noted(
    norms: dict[str, Noted], name: str, gradient: Tensor, rows: Tensor, matrix: Tensor | None, add: bool
) -> NormParts | None:
    """Return where to note what the norm of a gradient is made from; none where that is not known of all its rows."""
    if not add:
        norms[name] = Noted(gradient, gradient._version, norm_parts(rows, matrix))
    return norms[name].parts if name in norms and norms[name].holds_for(gradient) else None


@triton.jit
def _weigh(
    figures,
    weights,
    out,
    dead,
    number,
    auxk_weight,
    rows,
    prefixes,
    weight_step,
    latents,
    every,
    coefficient,
    dead_per_active,
    tiny,
    AUXK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the weighted sum of all errors, and what an error weighs in the auxiliary loss."""
    total = tl.zeros([BLOCK], figures.dtype.element_ty)
    residual = tl.zeros([BLOCK], figures.dtype.element_ty)
    first = tl.load(number) % every if AUXK else 0
    for low in range(0, rows * prefixes, BLOCK):
        i = low + tl.arange(0, BLOCK)
        row, p = i // prefixes, i % prefixes
        inside = i < rows * prefixes
        error = tl.load(figures + row.to(tl.int64) * (prefixes + 2) + p, mask=inside, other=0.0)
        total += error * tl.load(weights + p * weight_step, mask=inside, other=0.0)
        if AUXK:
            residual += tl.where((p == prefixes - 1) & (row % every == first), error, 0.0)
    tl.store(out, tl.sum(total, 0))
    if AUXK:
        count = tl.zeros([BLOCK], tl.int32)
        for low in range(0, latents, BLOCK):
            latent = low + tl.arange(0, BLOCK)
            count += tl.load(dead + latent, mask=latent < latents, other=0).to(tl.int32)
        weight = coefficient / tl.maximum(tl.sum(residual, 0), tiny)
        tl.store(auxk_weight, weight * tl.minimum(tl.sum(count, 0), dead_per_active) / dead_per_active)
