"""The kinds of activation: which latents of a row are active, and the settings of each."""

from typing import Annotated, Literal, Self

from pydantic import Field

from shared.config import Config
from shared.errors import UserError
from train.model.schedule import warmup_steps


class WarmedK(Config):
    """An activation with a fixed number of active latents."""

    k: int = Field(32, ge=1)
    """Active latents per row."""
    k_start: int | str | None = None
    """Active latents per row at step 0, or a multiple of k, such as `3x`; none: `k`."""
    k_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which `k_start` moves linearly to `k`; none: by `k_warmup_share`."""
    k_warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; read when `k_warmup_steps` is not set."""

    def resolve(self, steps: int) -> Self:
        """Return the same with numbers, for a run of so many steps. Raises `UserError` when they do not fit."""
        warmup = warmup_steps("activation.k_warmup", self.k_warmup_steps, self.k_warmup_share, steps)
        start = None if self.k_start is None else multiple("activation.k_start", self.k_start, self.k, "3x")
        return self.model_copy(update={"k_warmup_steps": warmup, "k_start": start})

    @property
    def largest_k(self) -> int:
        """The most active latents per row, at any step."""
        return max(self.k, self.k_at(0))

    def k_at(self, step: int) -> int:
        """Active latents per row at `step`."""
        if self.k_start is None or step >= (warmup := self.k_warmup_steps or 0):
            return self.k
        assert isinstance(self.k_start, int), "resolve the configuration first"
        return round(self.k_start + (self.k - self.k_start) * step / warmup)


class BatchTopK(WarmedK):
    """The k x B largest of a batch; a threshold at inference."""

    kind: Literal["batchtopk"] = "batchtopk"


class TopK(WarmedK):
    """The k largest of every row."""

    kind: Literal["topk"] = "topk"


class JumpReLU(Config):
    """A learned threshold per latent, trained by a straight-through estimator with an L0 penalty."""

    kind: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: float = Field(1e-3, ge=0)
    """Weight of the mean number of active latents per row."""
    bandwidth: float = Field(0.1, gt=0)
    """Width of the estimator's window, in units of the pre-activations."""
    initial_threshold: float = Field(0.5, gt=0)
    """Threshold of every latent at the start, in units of the pre-activations."""
    penalty_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the penalty rises linearly to its weight; none: by `penalty_warmup_share`."""
    penalty_warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; read when `penalty_warmup_steps` is not set."""

    def resolve(self, steps: int) -> Self:
        """Return the same with a number of warm-up steps. Raises `UserError` when the run has fewer."""
        warmup = warmup_steps("activation.penalty_warmup", self.penalty_warmup_steps, self.penalty_warmup_share, steps)
        return self.model_copy(update={"penalty_warmup_steps": warmup})


class ReLU(Config):
    """No threshold but 0, with an L1 penalty."""

    kind: Literal["relu"] = "relu"
    l1_coefficient: float = Field(1e-2, ge=0)
    """Weight of the mean sum of latent values per row."""
    penalty_warmup_steps: int | None = Field(None, ge=0)
    """Steps over which the penalty rises linearly to its weight; none: by `penalty_warmup_share`."""
    penalty_warmup_share: float = Field(0.0, ge=0, le=1)
    """The same as a share of the run; read when `penalty_warmup_steps` is not set."""

    def resolve(self, steps: int) -> Self:
        """Return the same with a number of warm-up steps. Raises `UserError` when the run has fewer."""
        warmup = warmup_steps("activation.penalty_warmup", self.penalty_warmup_steps, self.penalty_warmup_share, steps)
        return self.model_copy(update={"penalty_warmup_steps": warmup})


def multiple(name: str, value: int | str, unit: int, example: str) -> int:
    """Return a number that is given as such, or as a multiple of `unit`. Raises `UserError` when it is neither."""
    text = str(value)
    number = text.removesuffix("x")
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"{name} must be a positive number or a multiple such as {example}, got {text}")
    return int(number) * (unit if text.endswith("x") else 1)


Activation = Annotated[BatchTopK | TopK | JumpReLU | ReLU, Field(discriminator="kind")]
