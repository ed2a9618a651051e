"""When a run merges redundant latents, and how many it has merged: state that a resumed run continues from."""

import time

import torch
from torch import Tensor

from train.data.batches import StoreRows
from train.model.saved_tensors import fitting
from train.model.transcoder import Transcoder
from train.redundancy.merge_latents import merge_latents
from train.run.cadences import merge_steps
from train.run.settings import RunConfig


class Merging:
    """The merges of a run."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._settings = config, config.settings.diversity.merge
        self._steps: list[int] = []
        """Of the merges so far"""
        self._freed: list[int] = []
        """Latents that each has started anew"""
        self.seconds = 0.0
        """That merges have taken since the process began."""

    def due(self, done: int) -> bool:
        """Tell whether latents are merged after `done` steps: as shares of the run's length at that step."""
        return done in merge_steps(self._settings.at, self._config.length_at(done - 1))

    def merge(self, transcoder: Transcoder, rows: StoreRows, done: int) -> tuple[Tensor, int]:
        """Merge, in place; returns the latents that have other weights, int64 [n], and how many of them start anew."""
        began = time.monotonic()
        blocks, seed = self._config.training_blocks, self._config.settings.seed
        found = merge_latents(transcoder, rows, blocks, self._settings, seed, done)
        self._steps, self._freed = [*self._steps, done], [*self._freed, len(found.freed)]
        self.seconds += time.monotonic() - began
        changed = torch.tensor([*found.kept, *found.freed], dtype=torch.int64).to(transcoder.W_dec.device)
        return changed, len(found.freed)

    def row(self) -> dict[str, dict[str, int]]:
        """Return what a row of the metrics says: how many latents were merged into others, by step; nothing before."""
        made = {str(step): freed for step, freed in zip(self._steps, self._freed, strict=True)}
        return {"merged": made} if made else {}

    def timing(self) -> dict[str, float]:
        """Return the seconds that merges have taken in this process, where there were some."""
        return {"merge_seconds": self.seconds} if self.seconds else {}

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint; none for a run that never merges."""
        if not self._settings.at:
            return {}
        return {"merging.merged": torch.tensor([self._steps, self._freed], dtype=torch.int64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        if self._settings.at:
            count = tensors["merging.merged"].numel() // 2
            like = torch.empty(2, count, dtype=torch.int64)
            self._steps, self._freed = fitting(tensors, "merging.merged", like).tolist()
