"""Rows in memory, held-out ones or of training, with what a transcoder leaves of each. All on CPU.

Legend: R rows, D d_in, O d_out, F latents, N active pairs.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.batches import StoreRows
from train.evaluation.evaluate import weighted_rows
from train.model.kernels import numba_loops
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder

Array = NDArray[Any]

_MOST_FLOATS = 2**28
"""Of the rows in memory: 1 GiB."""


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """Rows without position 0 and outliers."""

    x: Tensor
    """[R, D] float32, normalised source"""
    residual: Tensor
    """[R, O] float32, the normalised target less its reconstruction"""
    weight: Array
    """[R] float64, how often each counts at natural frequencies"""
    active: SparseLatents
    total: float
    """The target's squared distance from its mean, summed over rows: a squared error over this is fvu."""

    @cached_property
    def _by_latent(self) -> tuple[Array, Array, Array]:
        order, starts = self.active.by_latent
        return self.active.rows[order].numpy(), self.active.values[order].numpy(), starts.numpy()

    def of_latent(self, latent: int) -> tuple[Array, Array]:
        """Return the rows on which `latent` is active, rising, and its values there."""
        rows, values, starts = self._by_latent
        part = slice(starts[latent], starts[latent + 1])
        return rows[part], values[part]

    def explained(self, W_dec: Tensor) -> Array:  # [F] float64
        """Return by how much the squared error rises when each latent alone is never active; W_dec [F, O] on CPU."""
        along = np.empty(len(self.active.rows), np.float32)
        sides = (self.active.rows, self.active.latents, self.residual, W_dec, torch.zeros(len(W_dec)))
        numba_loops.products(*(side.numpy() for side in sides), along)
        values, squares = self.active.values.double().numpy(), W_dec.double().square().sum(1).numpy()
        latents = self.active.latents.numpy()
        rise = self.weight[self.active.rows.numpy()] * (2 * values * along + values**2 * squares[latents])
        return np.bincount(latents, rise, minlength=len(W_dec))


def rows_in_memory(transcoder: Transcoder) -> int:
    """Return how many rows of either kind, those of fitting and those of judging, are looked at at most."""
    return _MOST_FLOATS // (2 * (transcoder.W_enc.shape[0] + transcoder.W_dec.shape[1]))


@torch.no_grad()
def held_rows(
    transcoder: Transcoder,
    rows: StoreRows,
    blocks: range,
    threshold: Tensor,  # [F]
    most: int,
) -> HeldRows:
    """Encode and reconstruct the rows of `blocks`, at most about `most`, as evaluation does."""
    sources, residuals, weights, active = [], [], [], []
    counted, squares, sums = 0.0, 0.0, torch.zeros(transcoder.W_dec.shape[1], dtype=torch.float64)
    for chunk, weight in weighted_rows(rows, transcoder.W_enc.device, most, blocks):
        x, y = transcoder.normalised(chunk.source, chunk.target)
        found = transcoder.select_above(transcoder.pre_acts(x), threshold)
        sources.append(x.cpu())
        residuals.append((y - transcoder.reconstruct_whole(found.values, found, x)).cpu())
        weights.append(np.full(len(x), weight))
        active.append(found.cpu())
        counted += weight * len(x)
        squares += weight * float(y.double().square().sum())
        sums += weight * y.double().sum(0).cpu()
    return HeldRows(
        x=torch.cat(sources),
        residual=torch.cat(residuals),
        weight=np.concatenate(weights),
        active=SparseLatents.joined(active),
        total=squares - float(sums.square().sum()) / counted,
    )
