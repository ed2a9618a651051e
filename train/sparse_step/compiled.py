"""The operations on CPU, on compiled loops.

Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.sparse_step import fused, loops
from train.sparsity import Active

_PARTS = 64
"""Of a batch's rows, searched side by side."""


def batch_topk(
    pre_acts: Tensor,  # [B, F]
    n: int,
    guess: Tensor,  # scalar
) -> tuple[Active, Tensor]:
    """As `plain.batch_topk`, but for pairs that are not active, which are left out.

    Candidates above `guess` are compacted first, and when they are too few the search starts again from 0. Of several
    equal to the smallest the first in row order are kept.
    """
    floors = (float(guess), 0.0) if guess > 0 else (0.0,)
    for floor in floors:
        found = _Found(pre_acts, pre_acts.new_full((pre_acts.shape[1],), floor))
        if found.count >= n:
            return found.largest(n)
    return found.largest(found.count)


def row_topk(
    pre_acts: Tensor,  # [B, F]
    k: int,
    among: Tensor | None = None,  # [F] bool
) -> Active:
    """As `plain.row_topk`, but no others follow when the latents `among` are fewer than `k`."""
    width = pre_acts.shape[1]
    looked_at = torch.arange(width) if among is None else torch.from_numpy(among.numpy().nonzero()[0])
    wanted, searched = min(k, len(looked_at)), _searched(pre_acts)
    latents = torch.empty(len(pre_acts), wanted, dtype=torch.int64)
    values = searched.new_empty(latents.shape)
    if wanted:
        loops.largest_of_rows(*map(_array, (searched, looked_at)), _PARTS, *map(_array, (latents, values)))
    starts = torch.arange(len(pre_acts) + 1) * wanted
    rows = torch.arange(len(pre_acts)).repeat_interleave(wanted)
    return Active(rows, latents.view(-1), values.view(-1).to(pre_acts.dtype), starts, width)


def above(
    pre_acts: Tensor,  # [B, F]
    thresholds: Tensor,  # [F]
) -> Active:
    """As `plain.above`."""
    found = _Found(pre_acts, thresholds.to(pre_acts.dtype).expand(pre_acts.shape[1]).contiguous())
    return found.largest(found.count)[0]


def encode(
    x: Tensor,  # [B, D] without gradient
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    active: Active,
) -> Tensor:  # [N]
    """As `plain.encode`."""
    return fused.encode(_Arrays(), x, W_enc, b_enc, active)


def prefix_loss(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]
    y: Tensor,  # [B, O]
    active: Active,
    segment: Tensor,  # [F]
    prefixes: int,
    weight: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [B, P], [B, O]
    """As `plain.prefix_loss`."""
    return fused.prefix_loss(_Arrays(), values, W_dec, base, y, active, segment, prefixes, weight)


class _Found:
    """What lies above a floor, in as many parts as were searched."""

    def __init__(self, pre_acts: Tensor, floors: Tensor) -> None:
        rows, self._width = pre_acts.shape
        parts = min(_PARTS, max(rows, 1))
        searched = _array(_searched(pre_acts))
        self._rows, self._size, self._dtype = rows, -(-rows // parts) * self._width, pre_acts.dtype
        self._counts = np.empty(parts, np.int64)
        self._flat = np.empty(rows * self._width, np.int64)  # pages that are not written to take no room
        self._values = np.empty(len(self._flat), searched.dtype)
        loops.find_above(searched, _array(_searched(floors)), self._counts, self._flat, self._values)
        self.count = int(self._counts.sum())

    def largest(self, n: int) -> tuple[Active, Tensor]:
        """The `n` largest, and the smallest of them; 0 for none."""
        least = np.partition(np.concatenate(self._parts()), self.count - n)[self.count - n] if n else 0.0
        rows, latents, starts = (torch.empty(size, dtype=torch.int64) for size in (n, n, self._rows + 1))
        kept = torch.from_numpy(np.empty(n, self._values.dtype))
        places = (rows, latents, kept, starts)
        found = (self._flat, self._values, self._counts, self._size, self._width)
        loops.keep_pairs(*found, self._values.dtype.type(least), *map(_array, places))
        return Active(rows, latents, kept.to(self._dtype), starts, self._width), kept.new_tensor(least)

    def _parts(self) -> list[Any]:
        counts = self._counts.tolist()
        return [self._values[i * self._size : i * self._size + count] for i, count in enumerate(counts)]


class _Arrays:
    """`fused.Loops` on the memory of CPU tensors."""

    def products(self, active: Active, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        out = left.new_empty(len(active.rows))
        loops.products(*map(_array, (active.rows, active.latents, left, right, bias, out)))
        return out

    def prefix_loss(
        self,
        values: Tensor,
        active: Active,
        segment: Tensor,
        W_dec: Tensor,
        base: Tensor,
        y: Tensor,
        weight: Tensor | float,
        prefixes: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        errors, meet = y.new_empty(len(y), prefixes), y.new_empty(len(y), prefixes, y.shape[1])
        left, grad = torch.empty_like(y), torch.empty_like(values)
        tensors = (values, active.latents, active.starts, segment, W_dec, base, y)
        loops.prefix_loss(*map(_array, tensors), float(weight), *map(_array, (meet, errors, left, grad)))
        return errors, left, meet, grad

    def sums_by_latent(
        self, active: Active, weights: Tensor, rows: Tensor, table: Tensor, out: Tensor, alone: Tensor, add: bool
    ) -> None:
        order, starts = active.by_latent
        loops.sums_by_latent(*map(_array, (order, starts, weights, rows, table, out, alone)), add)


def _searched(pre_acts: Tensor) -> Tensor:
    """In a type that the loops have."""
    return pre_acts.float() if pre_acts.dtype == torch.bfloat16 else pre_acts


def _array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()
