"""Is an exported transcoder the same function as the one that it was made from? Both read the same held-out rows.

Legend: B rows, F latents, O d_out.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shared.config import Config
from train.data.batches import StoreRows
from train.evaluation.evaluate import Part, Sums, add_sums, natural_sums, natural_weights
from train.interchange.plain_transcoder import PlainTranscoder
from train.model.transcoder import Transcoder

LARGEST_ERROR, LARGEST_CHANGE = 1e-5, 1e-3
"""Of the same function: a row's error over its norm, and the change of l0 over l0."""
Map = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From source rows [B, D] to latents [B, F], 0 where they are not active, and predicted target rows [B, O]."""


class Agreement(Config):
    """A run's transcoder and its export, on the report rows without outliers and position 0."""

    rows: int
    largest_error: float
    """Of a row where the same latents are active: |ours - theirs| / |ours|."""
    differing: float
    """Latents that are active in one of them alone, over those active in ours."""
    ours: Part
    exported: Part

    @property
    def is_same(self) -> bool:
        """Whether both are one function, up to rounding."""
        change = abs(self.exported.l0 - self.ours.l0)
        return self.largest_error <= LARGEST_ERROR and change <= LARGEST_CHANGE * max(self.ours.l0, 1.0)


def agreement(transcoder: Transcoder, exported: PlainTranscoder, rows: StoreRows) -> Agreement:
    """Run both on all report rows; an export of a prefix is compared with that prefix."""
    size = exported.d_sae

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = transcoder.encode(x, dense=True)
        return latents[:, :size], transcoder.decode(latents, x, None if size == transcoder.d_sae else size)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = exported.encode(x)
        return latents, exported.decode(latents, x)

    return compare(ours, theirs, rows, transcoder.W_enc.device)


@torch.no_grad()
def compare(ours: Map, theirs: Map, rows: StoreRows, device: torch.device) -> Agreement:
    """Compare two maps on all report rows without outliers and position 0, at natural frequencies."""
    weights, count, active, differing, largest = natural_weights(rows.store), 0, 0, 0, 0.0
    sums: tuple[dict[str, Sums], ...] = ({}, {})
    for whole in rows.chunks(rows.store.record.report_blocks, device):
        chunk = whole.ordinary
        if not weights[chunk.stratum] or not len(chunk.source):
            continue
        found = [one(chunk.source) for one in (ours, theirs)]
        for into, (latents, y) in zip(sums, found, strict=True):
            add_sums(into, chunk.stratum, Sums.of(chunk.target, y.unsqueeze(1), (latents != 0).sum().reshape(1)))
        (latents, y), (latents_exported, y_exported) = found
        differ = ((latents != 0) != (latents_exported != 0)).sum(1)
        errors = (y - y_exported).norm(dim=1) / y.norm(dim=1).clamp_min(torch.finfo(y.dtype).tiny)
        largest = max(largest, float(errors.where(differ == 0, 0.0).max()))
        count += len(y)
        active += int((latents != 0).sum())
        differing += int(differ.sum())
    parts = [natural_sums(one, rows.store).part(0) for one in sums]
    return Agreement(
        rows=count, largest_error=largest, differing=differing / max(active, 1), ours=parts[0], exported=parts[1]
    )
