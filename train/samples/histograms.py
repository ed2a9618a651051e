"""Histograms of latents, as SAEDashboard draws them: of activations above 0, and of effects on all logits.

Bars are of equal width from the smallest to the largest value, both included; where all values are the same, the first
bar counts them. Legend: F latents, N active pairs of a token and a latent, n bars, V vocabulary, O d_out, q bin edges.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

BARS = 50
"""Of a histogram, as SAEDashboard has them."""
_BLOCK_VALUES = 2**24
"""Logits that are held at once."""


class Histograms(NamedTuple):
    """One histogram for each latent."""

    heights: Array
    """[F, n] int64"""
    least: Array
    """[F] float64: where the first bar begins"""
    most: Array
    """[F] float64: where the last one ends"""

    @property
    def centres(self) -> Array:
        """[F, n] float64: the middle of each bar."""
        bars = self.heights.shape[1]
        return self.least[:, None] + (self.most - self.least)[:, None] * (np.arange(bars) + 0.5) / bars


class LogitEffects(NamedTuple):
    """What an activation of 1 adds to the logits directly, less the mean over the vocabulary."""

    promoted: Array
    """[F, count] int64, tokens, the strongest first"""
    promoted_effects: Array
    """[F, count] float32"""
    suppressed: Array
    """[F, count] int64"""
    suppressed_effects: Array
    """[F, count] float32"""
    histograms: Histograms


def of_activations(starts: Array, values: Array, bars: int = BARS) -> Histograms:
    """Count the activations `values` [N] of each latent, which are grouped by latent from `starts` [F + 1] on."""
    return Histograms(*_count_activations(starts, values, bars))


def share_in_bins(starts: Array, values: Array, edges: Array, rows: int) -> Array:
    """Return [F, q - 1] the shares of `rows` on which a latent is between two `edges` [F, q], both included."""
    return _count_in_bins(starts, values, edges) / max(rows, 1)


@torch.no_grad()
def of_logits(
    directions: Tensor,  # [F, O]
    vocabulary: Array,  # [V] token ids
    weight: Array,  # [V, O] W_U times the gain of the final norm
    count: int,
    bars: int = BARS,
    update: Callable[[int], None] = lambda done: None,
) -> LogitEffects:
    """Find the `count` tokens that each direction promotes and suppresses most, and count its effects on all tokens.

    Runs on the device of `directions`, a block of latents at a time; `update` is told how many are done.
    """
    W, count = torch.from_numpy(weight).to(directions.device), min(count, len(weight))
    mean = torch.from_numpy(weight.mean(0, dtype=np.float64)).to(W)
    step = max(1, _BLOCK_VALUES // len(W))
    parts = []
    for low in range(0, len(directions), step):
        block = directions[low : low + step]
        parts.append(_logits_of_block(block @ W.T - (block @ mean)[:, None], count, bars))
        update(min(low + step, len(directions)))
    columns, values, least, most, heights = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return LogitEffects(
        *(vocabulary[columns[:, :count]], values[:, :count], vocabulary[columns[:, count:]], values[:, count:]),
        Histograms(heights, least.astype(np.float64), most.astype(np.float64)),
    )


def _logits_of_block(logits: Tensor, count: int, bars: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return columns and values of the largest and then the smallest logits, both ends, and heights [R, n]."""
    largest, smallest = logits.topk(count), logits.topk(count, largest=False)
    least, most = smallest.values[:, 0], largest.values[:, 0]
    width = (most - least)[:, None]
    scale = torch.where(width > 0, bars / width, 0.0)
    bar = logits.sub_(least[:, None]).mul_(scale).long().clamp_(0, bars - 1)
    bar += bars * torch.arange(len(bar), device=bar.device)[:, None]
    heights = torch.bincount(bar.ravel(), minlength=bars * len(bar)).reshape(len(bar), bars)
    columns = torch.cat([largest.indices, smallest.indices], 1)
    return columns, torch.cat([largest.values, smallest.values], 1), least, most, heights


def column(heights: Array) -> pa.Array:
    """Return [F] lists of the heights [F, n] of bars, as a column of a table."""
    ends = np.arange(len(heights) + 1, dtype=np.int32) * heights.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(heights.astype(np.int32).ravel()))


@numba.njit(cache=True)
def _count_activations(starts: Array, values: Array, bars: int) -> tuple[Array, Array, Array]:
    d_sae = len(starts) - 1
    heights, least, most = np.zeros((d_sae, bars), np.int64), np.zeros(d_sae), np.zeros(d_sae)
    for f in range(d_sae):
        own = values[starts[f] : starts[f + 1]]
        if len(own) == 0:
            continue
        least[f], most[f] = own.min(), own.max()
        width = most[f] - least[f]
        scale = bars / width if width > 0 else 0.0
        for value in own:
            heights[f, min(int((value - least[f]) * scale), bars - 1)] += 1
    return heights, least, most


@numba.njit(cache=True)
def _count_in_bins(starts: Array, values: Array, edges: Array) -> Array:
    d_sae = len(starts) - 1
    counts = np.zeros((d_sae, edges.shape[1] - 1), np.int64)
    for f in range(d_sae):
        for value in values[starts[f] : starts[f + 1]]:
            for b in range(counts.shape[1]):
                if edges[f, b] <= value <= edges[f, b + 1]:
                    counts[f, b] += 1
    return counts
