"""TopK (Gao et al. 2024)."""

from typing import Literal

from torch import Tensor

from train.model.activations.base import FixedK, with_smallest
from train.model.kernels.base import SparseOps
from train.model.sparse_latents import SparseLatents


class TopK(FixedK):
    """The k largest of every row."""

    kind: Literal["topk"] = "topk"

    def select(
        self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, step: int, guess: Tensor
    ) -> tuple[SparseLatents, Tensor]:
        """As `ActivationBase.select`."""
        return with_smallest(ops.row_topk(pre_acts, self.k_at(step)))

    def select_final(self, ops: SparseOps, pre_acts: Tensor, thresholds: Tensor, guess: Tensor) -> SparseLatents:
        """As `ActivationBase.select_final`."""
        return ops.row_topk(pre_acts, self.k).positive()
