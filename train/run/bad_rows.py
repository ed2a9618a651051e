"""Rows that are damaged and losses that are not finite: noted on the device, and told when it is waited for anyway."""

from pathlib import Path

import torch
from torch import Tensor

from shared.errors import CorruptData, ProjectError
from train.data.batches import Batch, BatchReader, Side
from train.run.metrics import LOWER_LR

_NEVER = 2**62
"""No step."""


class BadRows:
    """The first step of a run whose rows or loss are bad."""

    def __init__(self, reader: BatchReader, source: Side, path: Path, device: torch.device) -> None:
        self._reader, self._path = reader, path
        self._sides: tuple[Side, Side] = source, "target"
        self.first = torch.tensor(_NEVER, device=device)
        """[] int64, that step; also written by the kernel that prepares rows."""
        self.longest = [torch.from_numpy(reader.longest_norms(side)).to(device) for side in self._sides]
        """[B] the norms that no row of the store is above, of source and target."""

    def note(self, loss: Tensor, batch: Batch, step: int | Tensor) -> None:
        """Note the first step whose loss or source is not finite, or with a row that is longer than any of the store.

        Such a source need not show in the loss: no comparison selects a NaN.
        """
        good = torch.isfinite(loss) & torch.isfinite(batch.source.sum())
        for rows, longest in zip((batch.source, batch.target), self.longest, strict=True):
            good &= (torch.linalg.vector_norm(rows, dim=1) <= longest).all()
        self.first.copy_(torch.where(good, self.first, self.first.clamp_max(step)))

    def refuse(self) -> None:
        """Raise `ProjectError` if any step so far had a bad row or loss. Waits for the device."""
        if (step := int(self.first)) < _NEVER:
            raise ProjectError(
                f"a row is damaged, or the loss is not finite at step {step + 1} of {self._path} (rows "
                f"{self._reader.describe(step)}); nothing was published since; {self._why(step)}"
            )

    def _why(self, step: int) -> str:
        """Name the damaged row of `step`; where all are sound, tell what else to do."""
        batch = self._reader.batch(step)
        for side, rows in zip(self._sides, (batch.source, batch.target), strict=True):
            norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).cpu().numpy()
            try:
                self._reader.check_norms(step, side, norms)
            except CorruptData as error:
                return str(error)
        return f"all its rows are sound: {LOWER_LR}"
