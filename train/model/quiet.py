"""Keep latents silent on the rows that training leaves out.

A transcoder that never sees an attention sink is not silent there: a row a hundred times as long as others puts nearly
half of all pre-activations above the threshold, though no latent means anything on it. This term asks of the encoder
that a few such rows activate nothing. They are all but constant, so it costs each latent one direction.

Legend: n rows, D d_in, F d_sae.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from shared.config import Config
from shared.store.store import Store
from train.data.batches import Side
from train.model.normalisation import read_rows_at
from train.model.transcoder import Transcoder

if TYPE_CHECKING:
    from train.model.kernels.triton_step import Joined

PositiveSum = Callable[[Tensor, Tensor], Tensor]
"""As `Transcoder.positive_sum`."""
_KEPT = 128
"""Rows of position 0, and as many outliers: they hardly differ."""


class QuietConfig(Config):
    """Penalty on latents that are active on rows left out of training: outliers, and position 0 if it is left out."""

    weight: float = Field(0.1, ge=0)
    """Weight of the term: 1 is that of an L1 penalty of one unit of activation on a row of the batch; 0 switches it
    off."""
    rows: int = Field(4, ge=1)
    """Left-out rows used in a step; which ones changes from step to step."""

    def resolve(self, store: Store, blocks: range) -> "QuietConfig":
        """Return the same, switched off where no row is left out of training on `blocks`."""
        return self if len(left_out(store, blocks)) else self.model_copy(update={"weight": 0.0})


def left_out(store: Store, blocks: range) -> list[tuple[str, int]]:
    """List rows that training on `blocks` leaves out, as (stratum, row): some of position 0 and some outliers."""
    exclusion, found = store.exclusion, []
    if exclusion is None:
        return []
    for name, part in store.strata.items():
        first, last = blocks.start * part.stratum.rows, blocks.stop * part.stratum.rows
        if exclusion.position_0 and part.stratum.is_position_0:
            found += [(name, row) for row in _spread(np.arange(first, last))]
        elif exclusion.training:
            rows = store.outliers[name]
            found += [(name, row) for row in _spread(rows[(rows >= first) & (rows < last)])]
    return found


def _spread(rows: NDArray[np.int64]) -> list[int]:
    """Return at most `_KEPT` of the rows, evenly."""
    found: list[int] = rows[:: -(-len(rows) // _KEPT) or 1].tolist()
    return found


class Quiet:
    """The term of a run. It holds its rows and no state."""

    def __init__(
        self,
        transcoder: Transcoder,
        config: QuietConfig,
        rows: Tensor,
        batch_rows: int,
        positive_sum: PositiveSum | None = None,
    ) -> None:
        """Take `rows` [n, D], normalised sources that nothing is to be active on.

        `positive_sum`: that of what is trained, where the transcoder itself is not.
        """
        self._transcoder, self._config = transcoder, config
        self._positive_sum = positive_sum or transcoder.positive_sum
        size = (torch.linalg.vector_norm(rows, dim=1, keepdim=True) / rows.shape[1] ** 0.5).clamp_min(1.0)
        self._rows, self._times = rows / size, 1 / size
        self._unit = 2.0 / (batch_rows * transcoder.W_dec.shape[1])

    @classmethod
    def of(
        cls,
        transcoder: Transcoder,
        config: QuietConfig,
        store: Store,
        blocks: range,
        source: Side,
        batch_rows: int,
        positive_sum: PositiveSum | None = None,
    ) -> "Quiet":
        """Read the rows that training on `blocks` of `store` leaves out."""
        places, parts = (left_out(store, blocks) if config.weight else []), []
        for name in store.strata:
            numbers = np.array([row for stratum, row in places if stratum == name], np.int64)
            parts.append(read_rows_at(store, name, source, numbers))
        device = transcoder.W_enc.device
        rows = torch.from_numpy(np.concatenate(parts)).float().to(device)
        return cls(transcoder, config, transcoder.normalised_source(rows), batch_rows, positive_sum)

    def terms(self, step: int | Tensor, joined: "Joined | None" = None) -> dict[str, Tensor]:
        """Return the term at `step`: positive pre-activations on some rows, scaled to the length of an ordinary row.

        `step` may be a number on the device. One that is `joined` to the step's loss has no gradient of its own; `step`
        is on the device then.
        """
        if not self._config.weight or not len(self._rows):
            return {}
        if joined:
            from train.model.kernels import triton_quiet  # not there without CUDA

            assert isinstance(step, Tensor)
            model, factor = self._transcoder, self._config.weight * self._unit
            rows = (self._rows, self._times, step, self._config.rows)
            return {"quiet": triton_quiet.quiet_loss(joined, model.W_enc, model.b_enc, *rows, factor)}
        wanted = (torch.arange(self._config.rows, device=self._rows.device) + step * self._config.rows) % len(
            self._rows
        )
        x, times = self._rows[wanted], self._times[wanted]
        return {"quiet": self._config.weight * self._unit * self._positive_sum(x, times)}
