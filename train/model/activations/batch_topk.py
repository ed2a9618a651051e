"""BatchTopK (Bussmann et al. 2024)."""

from typing import Literal

from torch import Tensor

from train.model.activations.base import FixedK
from train.model.kernels.base import SparseOps
from train.model.sparse_latents import SparseLatents


class BatchTopK(FixedK):
    """The B x k largest activations of a batch of B rows; a threshold at inference."""

    kind: Literal["batchtopk"] = "batchtopk"

    def pairs_of_step(self, step: int, rows: int) -> int:
        """As `ActivationBase.pairs_of_step`."""
        return self.k_at(step) * rows

    def select(
        self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, step: int, guess: Tensor
    ) -> tuple[SparseLatents, Tensor]:
        """As `ActivationBase.select`."""
        return ops.batch_topk(pre_acts, self.pairs_of_step(step, len(pre_acts)), guess)

    def select_final(self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, guess: Tensor) -> SparseLatents:
        """As `ActivationBase.select_final`."""
        return ops.batch_topk(pre_acts, self.k * len(pre_acts), guess)[0].positive()
