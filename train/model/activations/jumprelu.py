"""JumpReLU (Rajamanoharan et al. 2024)."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from train.model.activations.base import Penalised, with_smallest
from train.model.kernels.base import SparseOps
from train.model.sparse_latents import SparseLatents


class JumpReLU(Penalised):
    """A learned threshold per latent, trained by a straight-through estimator with an L0 penalty."""

    penalty_name = "l0"
    kind: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: float = Field(1e-3, ge=0)
    """Weight of the mean number of active latents per row."""
    bandwidth: float = Field(0.1, gt=0)
    """Width of the estimator's window, in units of the pre-activations."""
    initial_threshold: float = Field(0.5, gt=0)
    """Threshold of every latent at the start, in units of the pre-activations."""

    def initial_thresholds(self, d_sae: int) -> Tensor:
        """As `ActivationBase.initial_thresholds`."""
        return torch.full((d_sae,), self.initial_threshold)

    def select(
        self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, step: int, guess: Tensor
    ) -> tuple[SparseLatents, Tensor]:
        """As `ActivationBase.select`, with pairs up to half a bandwidth below: they move the thresholds."""
        return with_smallest(ops.above(pre_acts, thresholds - self.bandwidth / 2))

    def values(self, gathered: Tensor, thresholds: Tensor, active: SparseLatents) -> Tensor:
        """As `ActivationBase.values`."""
        return jumprelu(gathered, thresholds[active.latents], self.bandwidth)

    def penalty(
        self, gathered: Tensor, values: Tensor, thresholds: Tensor, active: SparseLatents, rows: int, step: int
    ) -> dict[str, Tensor]:
        """As `ActivationBase.penalty`."""
        weight = self.l0_coefficient * self.ramp(step)
        return {"l0": weight * l0_loss(gathered, thresholds[active.latents], self.bandwidth, rows)}


class _Step(torch.autograd.Function):
    """Heaviside step of value - threshold, with a rectangle of width `bandwidth` as its pseudo-derivative."""

    @staticmethod
    def forward(ctx, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return (values > threshold).to(values.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        values, threshold = ctx.saved_tensors
        window = ((values - threshold).abs() < ctx.bandwidth / 2).to(values.dtype)
        return None, -grad * window / ctx.bandwidth, None


class _JumpReLU(torch.autograd.Function):
    """values where above the threshold; straight-through gradient for the threshold."""

    @staticmethod
    def forward(ctx, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return values * (values > threshold)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        values, threshold = ctx.saved_tensors
        window = ((values - threshold).abs() < ctx.bandwidth / 2).to(values.dtype)
        return grad * (values > threshold), -grad * window * threshold / ctx.bandwidth, None


def jumprelu(
    values: Tensor,  # [N] pre-activations
    threshold: Tensor,  # [N] their latents' thresholds
    bandwidth: float,
) -> Tensor:  # [N]
    """Return `values` where above `threshold`, else 0 (Rajamanoharan et al. 2024, equations 3 and 11)."""
    return _JumpReLU.apply(values, threshold, bandwidth)


def l0_loss(
    values: Tensor,  # [N] pre-activations
    threshold: Tensor,  # [N]
    bandwidth: float,
    rows: int,
) -> Tensor:  # []
    """Return the mean number of active latents per row, differentiable in the threshold (same paper, equation 9)."""
    return _Step.apply(values, threshold, bandwidth).sum() / rows
