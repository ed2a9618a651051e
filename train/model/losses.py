"""The terms of the loss. Pure: tensors in, scalars out; all on normalised targets, so 1 is the targets' variance.

Legend: B rows, O d_out, F latents, N pairs.
"""

import torch
from pydantic import Field
from torch import Tensor

from shared.config import Config


class AuxKConfig(Config):
    """The auxiliary loss that brings dead latents back (Gao et al. 2024, A.2)."""

    coefficient: float = Field(1 / 32, ge=0)
    """Weight of the term in the loss; 0 switches it off."""
    k: int = Field(64, ge=1)
    """Dead latents per row that predict the residual."""
    row_stride: int = Field(4, ge=1)
    """Every this-many-th row of a batch takes part; which ones changes from step to step."""
    dead_after_tokens: int | None = Field(None, ge=1)
    """A latent is dead when it has not fired for this many rows; none: by `dead_after_share`."""
    dead_after_share: float = Field(0.05, gt=0, le=1)
    """The same as a share of the run's rows, at most 10 million rows; read when `dead_after_tokens` is not set."""

    def dead_after(self, run_rows: int) -> int:
        """Rows without firing after which a latent of a run of `run_rows` rows is dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, round(self.dead_after_share * run_rows)))


def matryoshka_weight(rows: int, prefixes: int, d_out: int) -> float:
    """What a squared error weighs in the loss.

    The loss is the mean squared error per value over rows and prefixes: every prefix is in it (Bussmann et al. 2025).
    """
    return 1 / (rows * prefixes * d_out)


def auxk_weight(
    residual: Tensor,  # [B, O] target - reconstruction, detached
    dead: Tensor,  # [F] bool
) -> Tensor:  # []
    """What a squared error of predicting the residual from dead latents weighs in the auxiliary loss.

    The loss is that error relative to the residual; 0 when no latent is dead.
    """
    return dead.any() / residual.square().sum().clamp_min(torch.finfo(residual.dtype).tiny)


def l1_loss(
    values: Tensor,  # [N] of unit-norm decoder rows
    rows: int,
) -> Tensor:  # []
    """Mean over rows of the sum of latent values."""
    return values.sum() / rows


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
    """`values` where above `threshold`, else 0 (Rajamanoharan et al. 2024, equations 3 and 11)."""
    return _JumpReLU.apply(values, threshold, bandwidth)


def l0_loss(
    values: Tensor,  # [N] pre-activations
    threshold: Tensor,  # [N]
    bandwidth: float,
    rows: int,
) -> Tensor:  # []
    """Mean over rows of the number of active latents, differentiable in the threshold (same paper, equation 9)."""
    return _Step.apply(values, threshold, bandwidth).sum() / rows
