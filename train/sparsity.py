"""Selection: from dense pre-activations to the (row, latent) pairs that stay. Pure.

The dense [B, d_sae] tensor goes in and does not come out: everything later costs the number of active pairs.
Legend: B rows, F latents, N active pairs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from train.sparse_step import loops

_PARTS = 64
"""Of a batch's pre-activations, searched side by side on CPU."""


@dataclass(frozen=True)
class Active:
    """Which latents stay on which rows: N pairs, rows rising, latents rising within a row."""

    rows: Tensor
    """[N] int64"""
    latents: Tensor
    """[N] int64"""
    d_sae: int

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The pairs grouped by latent: their order [N], and where each latent's begin [d_sae + 1]."""
        if self.latents.device.type == "cpu":
            order, starts = torch.empty_like(self.latents), torch.empty(self.d_sae + 1, dtype=torch.int64)
            loops.group(self.latents.numpy(), order.numpy(), starts.numpy())
            return order, starts
        return self.latents.argsort(stable=True), offsets(self.latents, self.d_sae)

    def where(self, kept: Tensor) -> "Active":
        """The pairs that the mask [N] keeps."""
        return Active(self.rows[kept], self.latents[kept], self.d_sae)


def offsets(groups: Tensor, count: int) -> Tensor:
    """Where each of `count` groups begins when pairs are sorted by `groups` [N]; [count + 1], int64."""
    ends = torch.zeros(count + 1, dtype=torch.int64, device=groups.device)
    torch.cumsum(torch.bincount(groups, minlength=count), 0, out=ends[1:])
    return ends


def batch_topk(
    pre_acts: Tensor,  # [B, F]
    n: int,
    guess: float,
) -> tuple[Active, Tensor]:
    """The `n` largest positive pre-activations of the whole batch (BatchTopK, Bussmann et al. 2024), and the smallest.

    `guess`, somewhat below the threshold of the step before, only saves time: candidates above it are compacted first,
    and when they are too few the search starts again from 0. Ties at the threshold go to the first in row order, so
    the number of pairs is exactly `n` whenever that many are positive.
    """
    flat = pre_acts.view(-1)
    for floor in (guess, 0.0) if guess > 0 else (0.0,):
        candidates = _flat_above(flat, floor)
        if len(candidates) >= n:
            values = flat[candidates]
            smallest = values.topk(n, sorted=False).values.min()
            return _pairs(_first_n(candidates, values, smallest, n), pre_acts.shape[1]), smallest
    smallest = flat[candidates].min() if len(candidates) else flat.new_zeros(())
    return _pairs(candidates, pre_acts.shape[1]), smallest


def topk(
    pre_acts: Tensor,  # [B, F]
    k: int,
) -> Active:
    """The `k` largest positive pre-activations of every row (Gao et al. 2024)."""
    values, latents = pre_acts.topk(min(k, pre_acts.shape[1]), dim=1, sorted=False)
    latents, order = latents.sort(dim=1)
    return _where(values.gather(1, order) > 0, latents, pre_acts.shape[1])


def above(
    pre_acts: Tensor,  # [B, F]
    threshold: Tensor,  # [F] or scalar
) -> Active:
    """Every pre-activation strictly above its latent's threshold."""
    return _pairs(_flat_true((pre_acts > threshold).view(-1)), pre_acts.shape[1])


def dead_topk(
    pre_acts: Tensor,  # [B, F]
    dead: Tensor,  # [n] int64, rising
    k: int,
) -> Active:
    """The `k` largest pre-activations among the `dead` latents of every row, negative ones too.

    Taken before the ReLU: a dead latent is dead because its pre-activations are negative, and must get a gradient.
    """
    k = min(k, len(dead))
    if pre_acts.device.type == "cpu":
        columns = torch.zeros(len(pre_acts), k, dtype=torch.int64)
        loops.largest_of_rows(pre_acts.numpy(), dead.numpy(), columns.numpy())
    else:
        columns = pre_acts.index_select(1, dead).topk(k, dim=1, sorted=False).indices.sort(dim=1).values
    return _where(torch.ones_like(columns, dtype=torch.bool), dead[columns], pre_acts.shape[1])


def _first_n(candidates: Tensor, values: Tensor, smallest: Tensor, n: int) -> Tensor:
    kept = values >= smallest
    surplus = int(kept.sum()) - n
    if surplus:
        ties = (values == smallest).nonzero().squeeze(1)
        kept[ties[len(ties) - surplus :]] = False
    return candidates[kept]


def _where(kept: Tensor, latents: Tensor, d_sae: int) -> Active:
    rows, columns = kept.nonzero(as_tuple=True)
    return Active(rows, latents[rows, columns], d_sae)


def _pairs(flat: Tensor, d_sae: int) -> Active:
    return Active(flat // d_sae, flat % d_sae, d_sae)


def _flat_above(flat: Tensor, floor: float) -> Tensor:
    """Where `flat` is above `floor`, rising."""
    if flat.device.type != "cpu":
        return (flat > floor).nonzero().squeeze(1)
    values, counts = flat.numpy(), np.empty(_PARTS, np.int64)
    found = np.empty(len(values), np.int64)  # pages that are not written to take no room
    loops.find_above(values, values.dtype.type(floor), counts, found)
    size = -(-len(values) // _PARTS)
    return torch.from_numpy(np.concatenate([found[i * size : i * size + n] for i, n in enumerate(counts.tolist())]))


def _flat_true(mask: Tensor) -> Tensor:
    if mask.device.type == "cpu":  # numpy's search takes a quarter of the time of torch's
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().squeeze(1)
