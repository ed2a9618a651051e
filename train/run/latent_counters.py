"""Training state beside the weights: when each latent last fired, and the running threshold."""

import torch
from torch import Tensor

from train.model.saved_tensors import fitting
from train.model.step_output import StepOutput

_THRESHOLD_DECAY = 0.99


class Counters:
    """Rows since each latent fired, and a running threshold: training state that evaluation does not touch."""

    def __init__(self, d_sae: int, dead_after: int, device: torch.device) -> None:
        """Start from zero. A latent is dead when it has not fired for `dead_after` rows."""
        self._dead_after = dead_after
        self.rows_since_fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.threshold = torch.zeros((), dtype=torch.float32, device=device)
        self._dead = torch.zeros(d_sae, dtype=torch.bool, device=device)
        """What `dead` returns, brought up to date where counters are: a recorded step reads it in its place."""

    def update(self, step: StepOutput) -> None:
        """Count one step."""
        if step.joined:
            from train.model.kernels import triton_counts  # not there without CUDA

            counters = (self.rows_since_fired, self._dead, self._dead_after)
            triton_counts.count_fired(step.active, *counters, step.threshold, self.threshold, _THRESHOLD_DECAY)
            return
        self.rows_since_fired += len(step.target)
        since = torch.where(step.active.values > 0, 0, torch.iinfo(torch.int64).max)
        self.rows_since_fired.scatter_reduce_(0, step.active.latents, since, "amin")
        fresh = self.threshold == 0
        decay = torch.where(fresh, 0.0, _THRESHOLD_DECAY)
        self.threshold.copy_(decay * self.threshold + (1 - decay) * step.threshold)
        self._find_dead()

    def start_anew(self, latents: Tensor) -> None:
        """Count from 0 for `latents` [n] int64."""
        self.rows_since_fired[latents] = 0
        self._find_dead()

    def dead(self) -> Tensor:
        """Return which latents [F] are dead, bool; what is returned follows the counters."""
        return self._dead

    def _find_dead(self) -> None:
        torch.ge(self.rows_since_fired, self._dead_after, out=self._dead)

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {"rows_since_fired": self.rows_since_fired, "running_threshold": self.threshold}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        self.rows_since_fired.copy_(fitting(tensors, "rows_since_fired", self.rows_since_fired))
        self.threshold.copy_(fitting(tensors, "running_threshold", self.threshold))
        self._find_dead()
