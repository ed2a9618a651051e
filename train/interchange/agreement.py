"""Is an exported transcoder the same function as the one that it was made from? Both read the same held-out rows.

Legend: B rows, F latents, O d_out; latents are 0 where they are not active.
"""

import torch
from torch import Tensor

from shared.config import Config
from train.data.batches import StoreRows
from train.evaluation.evaluate import Part, Sums, add_sums, natural_sums, natural_weights
from train.interchange.plain_transcoder import PlainTranscoder
from train.model.transcoder import Transcoder

LARGEST_ERROR, LARGEST_CHANGE = 1e-5, 1e-3
"""Of the same function: a row's error over its norm, and the change of l0 over l0."""


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


@torch.no_grad()
def agreement(transcoder: Transcoder, exported: PlainTranscoder, rows: StoreRows) -> Agreement:
    """Run both on all report rows without outliers and position 0, at natural frequencies.

    An export of a prefix is compared with that prefix.
    """
    weights, count, active, differing, largest = natural_weights(rows.store), 0, 0, 0, 0.0
    sums: tuple[dict[str, Sums], dict[str, Sums]] = ({}, {})
    for whole in rows.chunks(rows.store.record.report_blocks, transcoder.W_enc.device):
        chunk = whole.ordinary
        if not weights[chunk.stratum] or not len(chunk.source):
            continue
        ours = _ours(transcoder, chunk.source, exported.d_sae)
        theirs = _theirs(exported, transcoder.over_rms(chunk.source))
        for into, (latents, y) in zip(sums, (ours, theirs), strict=True):
            add_sums(into, chunk.stratum, Sums.of(chunk.target, y.unsqueeze(1), (latents != 0).sum().reshape(1)))
        differ = ((ours[0] != 0) != (theirs[0] != 0)).sum(1)
        norms = ours[1].norm(dim=1).clamp_min(torch.finfo(ours[1].dtype).tiny)
        errors = (ours[1] - theirs[1]).norm(dim=1) / norms
        largest = max(largest, float(errors.where(differ == 0, 0.0).max()))
        count += len(differ)
        active += int((ours[0] != 0).sum())
        differing += int(differ.sum())
    parts = [natural_sums(one, rows.store).part(0) for one in sums]
    return Agreement(
        rows=count, largest_error=largest, differing=differing / max(active, 1), ours=parts[0], exported=parts[1]
    )


def _ours(transcoder: Transcoder, x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the first `size` latents [B, size] and the prediction [B, O] that they give."""
    latents = transcoder.encode(x, dense=True)
    return latents[:, :size], transcoder.decode(latents, x, None if size == transcoder.d_sae else size)


def _theirs(exported: PlainTranscoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents [B, F] and the prediction [B, O]."""
    latents = exported.encode(x)
    return latents, exported.decode(latents, x)
