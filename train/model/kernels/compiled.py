"""The operations on CPU, on compiled loops.

Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.model import room
from train.model.kernels import numba_loops
from train.model.kernels.base import Groups
from train.model.kernels.fused import Fused
from train.model.sparse_latents import SparseLatents

_PARTS = 64
"""Of a batch's rows, searched side by side."""


class Compiled(Fused):
    """Loops of `numba_loops` on the memory of CPU tensors."""

    def batch_topk(self, pre_acts: Tensor, n: int, guess: Tensor) -> tuple[SparseLatents, Tensor]:
        """As `SparseOps.batch_topk`, but for pairs that are not active, which are left out.

        Candidates above `guess` are compacted first, and when they are too few the search starts again from 0. Of
        several equal to the smallest the first in row order are kept.
        """
        floors = (float(guess), 0.0) if guess > 0 else (0.0,)
        for floor in floors:
            found = _above(pre_acts, pre_acts.new_full((pre_acts.shape[1],), floor))
            if found.count >= n:
                break
        active, smallest = found.largest(min(n, found.count))
        return active.with_values(active.values.to(pre_acts.dtype)), smallest

    def row_topk(self, pre_acts: Tensor, k: int, among: Tensor | None = None, each: int = 1) -> SparseLatents:
        """As `SparseOps.row_topk`, but no others follow."""
        width = pre_acts.shape[1]
        looked_at = torch.arange(width) if among is None else torch.from_numpy(among.numpy().nonzero()[0])
        wanted, searched = min(k, -(-len(looked_at) // each)), _searched(pre_acts)
        latents = torch.empty(len(pre_acts), wanted, dtype=torch.int64)
        values = searched.new_empty(latents.shape)
        if wanted:
            numba_loops.largest_of_rows(*map(_array, (searched, looked_at)), _PARTS, *map(_array, (latents, values)))
        starts = torch.arange(len(pre_acts) + 1) * wanted
        rows = torch.arange(len(pre_acts)).repeat_interleave(wanted)
        return SparseLatents(rows, latents.view(-1), values.view(-1).to(pre_acts.dtype), starts, width)

    def above(self, pre_acts: Tensor, thresholds: Tensor) -> SparseLatents:
        """As `SparseOps.above`."""
        found = _above(pre_acts, thresholds.to(pre_acts.dtype).expand(pre_acts.shape[1]).contiguous())
        active = found.largest(found.count)[0]
        return active.with_values(active.values.to(pre_acts.dtype))

    def products(self, active: SparseLatents, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        """As `Fused.products`."""
        out = left.new_empty(len(active.rows))
        numba_loops.products(*map(_array, (active.rows, active.latents, left, right, bias, out)))
        return out

    def errors_and_gradients(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Fused.errors_and_gradients`."""
        errors, meet = y.new_empty(len(y), groups.prefixes), y.new_empty(len(y), groups.prefixes, y.shape[1])
        left, grad = torch.empty_like(y), torch.empty_like(values)
        tensors = (values, active.latents, active.starts, groups.of_latent, W_dec, base, y)
        weights = np.broadcast_to(np.asarray(groups.weight, np.float64), groups.prefixes).copy()
        numba_loops.prefix_loss(*map(_array, tensors), weights, *map(_array, (meet, errors, left, grad)))
        return errors, left, meet, grad

    def sums_by_latent(
        self,
        active: SparseLatents,
        weights: Tensor,
        table: Tensor,
        out: Tensor,
        *,
        add: bool,
        alone: Tensor | None = None,
        groups: Groups | None = None,
        times: Tensor | None = None,
    ) -> None:
        """As `Fused.sums_by_latent`."""
        order, starts = active.by_latent
        rows = active.rows
        if groups is not None:
            rows = rows * groups.prefixes + groups.of_latent[active.latents]
        weights = weights if times is None else weights * times
        alone = weights.new_zeros(active.d_sae) if alone is None else alone
        numba_loops.sums_by_latent(*map(_array, (order, starts, weights, rows, table, out, alone)), add)


@dataclass(frozen=True)
class Found:
    """Pairs of a matrix of `shape` [B, F] that a search found, in as many parts as were searched."""

    shape: torch.Size
    counts: Any
    """Of each part"""
    flat: Any
    """Places, rising; those of part i begin at i * size"""
    values: Any
    """Of the same places"""
    size: int

    @property
    def count(self) -> int:
        """Of all parts."""
        return int(self.counts.sum())

    def largest(self, n: int) -> tuple[SparseLatents, Tensor]:
        """Return the `n` largest, and the smallest of them; 0 for none."""
        count, kind = self.count, self.values.dtype.type
        least = np.partition(self.joined(self.values), count - n)[count - n] if n else 0.0
        rows, latents, starts = (torch.empty(size, dtype=torch.int64) for size in (n, n, self.shape[0] + 1))
        kept = torch.from_numpy(np.empty(n, kind))
        found = (self.flat, self.values, self.counts, self.size, self.shape[1], kind(least))
        numba_loops.keep_pairs(*found, *map(_array, (rows, latents, kept, starts)))
        return SparseLatents(rows, latents, kept, starts, self.shape[1]), kept.new_tensor(least)

    def joined(self, values: Any) -> Any:
        """Return `values`, which lie as `flat` does, without the room between parts."""
        counts = self.counts.tolist()
        return np.concatenate([values[i * self.size : i * self.size + count] for i, count in enumerate(counts)])


def parts_of(shape: torch.Size) -> tuple[Any, int]:
    """Return room for the counts of the parts that are searched side by side, and the number of places of each."""
    parts = min(_PARTS, max(shape[0], 1))
    return np.empty(parts, np.int64), -(-shape[0] // parts) * shape[1]


def _above(pre_acts: Tensor, floors: Tensor) -> Found:
    searched = _array(_searched(pre_acts))
    counts, size = parts_of(pre_acts.shape)
    flat, values = room.array(searched.size, np.int64), room.array(searched.size, searched.dtype)
    numba_loops.find_above(searched, _array(_searched(floors)), counts, flat, values)
    return Found(pre_acts.shape, counts, flat, values, size)


def _searched(pre_acts: Tensor) -> Tensor:
    """Return the pre-activations in a type that the loops have."""
    return pre_acts.float() if pre_acts.dtype == torch.bfloat16 else pre_acts


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
