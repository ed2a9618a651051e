"""ReLU with an L1 penalty (Bricken et al. 2023)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from train.model.activations.base import Penalised, with_smallest
from train.model.kernels.base import SparseOps
from train.model.sparse_latents import SparseLatents


class ReLU(Penalised):
    """A threshold of 0, with an L1 penalty."""

    penalty_name, needs_unit_decoder = "l1", True
    kind: Literal["relu"] = "relu"
    l1_coefficient: float = Field(1e-2, ge=0)
    """Weight of the mean sum of latent values per row."""

    def select(
        self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, step: int, guess: Tensor
    ) -> tuple[SparseLatents, Tensor]:
        """As `ActivationBase.select`."""
        return with_smallest(ops.above(pre_acts, thresholds))

    def penalty(
        self, gathered: Tensor, values: Tensor, thresholds: Tensor, active: SparseLatents, rows: int, step: int
    ) -> dict[str, Tensor]:
        """As `ActivationBase.penalty`."""
        return {"l1": self.l1_coefficient * self.ramp(step) * l1_loss(values, rows)}


def l1_loss(
    values: Tensor,  # [N] of unit-norm decoder rows
    rows: int,
) -> Tensor:  # []
    """Return the mean over rows of the sum of latent values."""
    return values.sum() / rows
