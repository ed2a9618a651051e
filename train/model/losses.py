"""The terms of the loss. Pure: tensors in, scalars out; all on normalised targets, so 1 is the targets' variance.

Legend: B rows, O d_out, F latents, N pairs.
"""

import torch
from pydantic import Field
from torch import Tensor

from shared.config import Config
from shared.errors import warn


class AuxKConfig(Config):
    """The auxiliary loss that brings dead latents back (Gao et al. 2024, A.2)."""

    coefficient: float = Field(1 / 32, ge=0)
    """Weight of the term in the loss; 0 switches it off."""
    k: int = Field(64, ge=1)
    """Maximum number of dead latents that predict the residual of a row."""
    dead_per_active: int = Field(16, ge=1)
    """How many latents must be dead for each one that predicts the residual of a row. While fewer than this are dead,
    one does, and the term weighs less in proportion."""
    row_stride: int = Field(4, ge=1)
    """The term uses one row in this many of a batch; which ones changes from step to step."""
    dead_after_tokens: int | None = Field(None, ge=1)
    """A latent is dead if it has not been active for this many rows; none: use `dead_after_share`."""
    dead_after_share: float = Field(0.05, gt=0, le=1)
    """The same as a share of the run's rows, at most 10 million rows; used if `dead_after_tokens` is not set."""

    def dead_after(self, run_rows: int) -> int:
        """Return the rows without firing after which a latent of a run of `run_rows` rows is dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, round(self.dead_after_share * run_rows)))

    def active(self, dead: Tensor) -> int:
        """Return how many of the `dead` latents [F] predict the residual of a row: 0 if none is dead."""
        return min(self.k, -(-int(dead.sum()) // self.dead_per_active))

    def rows_at(self, step: int | Tensor, rows: int) -> slice | Tensor:
        """Return which rows of a batch of `rows` take part in `step`.

        As their numbers [rows / row_stride] where `step` is a number on a device, which nobody here knows.
        """
        if isinstance(step, int):
            return slice(step % self.row_stride, None, self.row_stride)
        return torch.arange(0, rows, self.row_stride, device=step.device) + step % self.row_stride

    def resolve(self, d_sae: int, run_rows: int) -> "AuxKConfig":
        """Return the same with at most as many latents as there are. Warns of that, and where none can ever be dead."""
        if not self.coefficient:
            return self
        if self.dead_after(run_rows) >= run_rows:
            warn(
                f"auxk.dead_after_tokens = {self.dead_after(run_rows):,} is no less than the {run_rows:,} rows of the "
                "run: no latent is ever dead, so auxk does nothing"
            )
        most = -(-d_sae // self.dead_per_active)  # with all of them dead
        return self.model_copy(update={"k": min(at_most("auxk.k", self.k, d_sae), most)})


def at_most(name: str, value: int, d_sae: int) -> int:
    """Return a number of latents, at most `d_sae`; warns where that is less than was asked for."""
    if value > d_sae:
        warn(f"{name} = {value:,} is more than d_sae = {d_sae:,}: {d_sae:,} is taken")
    return min(value, d_sae)


def matryoshka_weight(rows: int, prefixes: int, d_out: int) -> float:
    """Return what a squared error weighs in the loss.

    The loss is the mean squared error per value over rows and prefixes: every prefix is in it (Bussmann et al. 2025).
    """
    return 1 / (rows * prefixes * d_out)


def auxk_weight(
    residual: Tensor,  # [B, O] target - reconstruction, detached
    dead: Tensor,  # [F] bool
    dead_per_active: int,
) -> Tensor:  # []
    """Return what a squared error of predicting the residual from dead latents weighs in the auxiliary loss.

    The loss is that error relative to the residual. With fewer dead latents than `dead_per_active`, it is scaled down
    in proportion, much as in sparsify and SAELens: a few latents cannot predict the residual, and would take large
    steps in vain. It is 0 when no latent is dead.
    """
    share = (dead.sum(dtype=residual.dtype) / dead_per_active).clamp_max(1)
    return share / residual.square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
