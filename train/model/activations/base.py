"""What an activation decides: which latents of a row are active, with which values, and what training is charged.

A new kind is a file beside this one and a line in `train.model.activations`.
Legend: B rows, F latents, N pairs.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Self

from pydantic import Field
from torch import Tensor

from shared.config import Config
from train.model.kernels.base import SparseOps
from train.model.kernels.plain import smallest_positive
from train.model.schedule import warmup_steps
from train.model.sizes import check_k, k_at_start
from train.model.sparse_latents import SparseLatents


class ActivationBase(Config, ABC):
    """The settings of one kind, and what follows from them.

    It holds no state: thresholds [F] are a parameter of the transcoder, and 0 where none are learned.
    """

    penalty_name: ClassVar[str | None] = None
    """The name of its own term in the loss, if it has one."""
    needs_unit_decoder: ClassVar[bool] = False
    """Whether its penalty is on latent values, so that decoder rows must have norm 1."""

    @abstractmethod
    def resolve(self, steps: int) -> Self:
        """Return the same with numbers, for a run of so many steps. Raises `UserError` when they do not fit."""

    def check(self, d_sae: int) -> None:
        """Raise `UserError` when a transcoder of `d_sae` latents cannot have it."""

    @property
    def expected_l0(self) -> float | None:
        """The active latents per row that it asks for; none where that is what comes of training."""
        return None

    def expected_l0_at(self, step: int) -> float | None:
        """Return the active latents per row that `step`, counted from 0, asks for; none as for `expected_l0`."""
        return self.expected_l0

    def pairs_of_step(self, step: int, rows: int) -> int | None:
        """Return how many pairs `step` selects from a whole batch of `rows`, which a guarded search can do.

        None where it selects row by row, or by thresholds.
        """
        return None

    def most_active(self, d_sae: int) -> int:
        """Return the most active latents per row of a step, on average over its batch."""
        return d_sae

    def initial_thresholds(self, d_sae: int) -> Tensor | None:
        """Return the thresholds [F] that training starts from; none where none are learned."""
        return None

    @property
    def learns_thresholds(self) -> bool:
        """Whether each latent has a threshold that is trained."""
        return self.initial_thresholds(1) is not None

    @abstractmethod
    def select(
        self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, step: int, guess: Tensor
    ) -> tuple[SparseLatents, Tensor]:
        """Select the pairs of `pre_acts` [B, F] that take part in the training step `step`.

        Returns them, and the smallest of their positive pre-activations, or 0. `guess`: as in `SparseOps.batch_topk`.
        """

    @abstractmethod
    def select_final(self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, guess: Tensor) -> SparseLatents:
        """Select the pairs that are active by the training rule after all warm-ups."""

    def values(self, gathered: Tensor, thresholds: Tensor, active: SparseLatents) -> Tensor:
        """Return latent values [N] from the pre-activations `gathered` [N] of the selected pairs."""
        return gathered.relu()

    def penalty(
        self, gathered: Tensor, values: Tensor, thresholds: Tensor, active: SparseLatents, rows: int, step: int
    ) -> dict[str, Tensor]:
        """Return its own term of the loss by `penalty_name`; empty where it has none."""
        return {}


class FixedK(ActivationBase):
    """An activation with a fixed number of active latents."""

    k: int = Field(32, ge=1)
    """Active latents per row."""
    k_start: int | str | None = None
    """Active latents per row at step 0, or a multiple of k, such as `3x`; none: `k`."""
    k_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which k moves linearly from `k_start` to `k`; none: use `k_warmup_share`."""
    k_warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; used if `k_warmup_steps` is not set."""

    def resolve(self, steps: int) -> Self:
        """As `ActivationBase.resolve`."""
        start, warmup = k_at_start(self.k, self.k_start, self.k_warmup_steps, self.k_warmup_share, steps)
        return self.model_copy(update={"k_warmup_steps": warmup, "k_start": start})

    def check(self, d_sae: int) -> None:
        """Raise `UserError` when k is more than there are latents."""
        assert not isinstance(self.k_start, str), "resolve the activation first"
        check_k(self.k, self.k_start, d_sae)

    @property
    def expected_l0(self) -> float | None:
        """The active latents per row that it asks for: k."""
        return float(self.k)

    def expected_l0_at(self, step: int) -> float | None:
        """As `ActivationBase.expected_l0_at`: k on its way from `k_start`."""
        return float(self.k_at(max(step, 0)))

    def most_active(self, d_sae: int) -> int:
        """Return the largest k of any step."""
        return max(self.k, self.k_at(0))

    def k_at(self, step: int) -> int:
        """Return the active latents per row at `step`."""
        if self.k_start is None or step >= (warmup := self.k_warmup_steps or 0):
            return self.k
        assert isinstance(self.k_start, int), "resolve the configuration first"
        return round(self.k_start + (self.k - self.k_start) * step / warmup)


class Penalised(ActivationBase):
    """An activation whose number of active latents comes of a penalty."""

    penalty_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the penalty rises linearly to its weight; none: use `penalty_warmup_share`."""
    penalty_warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; used if `penalty_warmup_steps` is not set."""

    def resolve(self, steps: int) -> Self:
        """As `ActivationBase.resolve`."""
        warmup = warmup_steps("activation.penalty_warmup", self.penalty_warmup_steps, self.penalty_warmup_share, steps)
        return self.model_copy(update={"penalty_warmup_steps": warmup})

    def ramp(self, step: int) -> float:
        """Return the share of the penalty's weight at `step`."""
        return min(1.0, (step + 1) / ((self.penalty_warmup_steps or 0) + 1))

    def select_final(self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, guess: Tensor) -> SparseLatents:
        """As `ActivationBase.select_final`: what is above the thresholds."""
        return ops.above(pre_acts, thresholds)


def with_smallest(active: SparseLatents) -> tuple[SparseLatents, Tensor]:
    """Return the pairs with the smallest of their positive pre-activations."""
    return active, smallest_positive(active.values)
