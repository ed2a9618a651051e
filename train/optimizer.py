"""Adam on float32 master weights, the learning rate's schedule, and what happens around a step."""

import torch
from pydantic import Field
from torch import Tensor, nn

from shared.config import Config
from train.transcoder import Transcoder


class OptimizerConfig(Config):
    """Adam (Kingma and Ba 2015) with linear warm-up and a linear decay to zero."""

    lr: float = Field(3e-4, gt=0)
    """Learning rate between warm-up and decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises linearly from 0."""
    decay_share: float = Field(0.2, ge=0, le=1)
    """Last share of the run, over which the rate falls linearly to 0."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; none: never."""

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of `step`, counted from 0, in a run of `steps`."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = self.decay_share * steps
        return self.lr * rise * (min(1.0, (steps - step) / decay) if decay else 1.0)


class Optimizer:
    """One step of Adam with clipping before and decoder normalisation after it."""

    def __init__(self, transcoder: Transcoder, config: OptimizerConfig, steps: int) -> None:
        self._transcoder, self._config, self._steps = transcoder, config, steps
        self.adam = torch.optim.Adam(
            transcoder.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )

    def step(self, loss: Tensor, step: int) -> tuple[float, Tensor]:
        """Backward and update. Returns the learning rate and the gradients' norm before clipping."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self._transcoder.remove_parallel_gradient()
        limit = self._config.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._transcoder.parameters(), limit)
        lr = self._config.lr_at(step, self._steps)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self._transcoder.normalise_decoder()  # after the step: what is saved has unit norm
        return lr, norm

    def state(self) -> dict[str, Tensor]:
        """Adam's state by `<parameter>.<name>`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._transcoder.named_parameters()
            for key, value in self.adam.state[parameter].items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        for name, parameter in self._transcoder.named_parameters():
            state = self.adam.state[parameter]
            state["step"] = tensors[f"{name}.step"].to(parameter.device, copy=True)
            for key in ("exp_avg", "exp_avg_sq"):  # as the parameter lies in memory, which a file does not keep
                state[key] = torch.empty_like(parameter).copy_(tensors[f"{name}.{key}"])
