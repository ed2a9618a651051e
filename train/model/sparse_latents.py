"""Which latents are active on which rows: the triples that everything after the selection works on. Pure.

Legend: B rows, F latents, N pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from train.model.kernels import numba_loops


@dataclass(frozen=True)
class SparseLatents:
    """Selected pairs of a row and a latent: rows rising, latents rising within a row.

    A pair whose value is not above 0 is there to fill a fixed number of pairs: it is not active, and with a value of 0
    it may stand beside an active one of the same row and latent.
    """

    rows: Tensor
    """[N] int64"""
    latents: Tensor
    """[N] int64"""
    values: Tensor
    """[N] pre-activations, without gradient"""
    starts: Tensor
    """[B + 1] int64: where each row's pairs begin"""
    d_sae: int

    @classmethod
    def of(cls, rows: Tensor, latents: Tensor, values: Tensor, shape: torch.Size) -> "SparseLatents":
        """Make pairs of pre-activations of a `shape` [B, F]."""
        return cls(rows, latents, values, offsets(rows, shape[0]), shape[1])

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The pairs grouped by latent: their order [N], and where each latent's begin [d_sae + 1]."""
        if self.latents.device.type == "cpu":
            order, starts = torch.empty_like(self.latents), torch.empty(self.d_sae + 1, dtype=torch.int64)
            numba_loops.group(self.latents.numpy(), order.numpy(), starts.numpy())
            return order, starts
        found, order = self.latents.sort(stable=True)
        return order, offsets(found, self.d_sae)

    def with_values(self, values: Tensor) -> "SparseLatents":
        """Return the same pairs with other values [N]."""
        return replace(self, values=values)

    def cpu(self) -> "SparseLatents":
        """Return the same on CPU."""
        return self.fetch()()

    def fetch(self) -> Callable[[], "SparseLatents"]:
        """Begin to copy the pairs to the CPU, into pinned memory; the result waits for the copy and returns it."""
        device = self.rows.device
        if device.type == "cpu":
            return lambda: self
        there = (self.rows, self.latents, self.values, self.starts)
        here = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in there]
        for to, part in zip(here, there, strict=True):
            to.copy_(part, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(device))

        def fetched() -> SparseLatents:
            copied.synchronize()
            rows, latents, values, starts = here
            return SparseLatents(rows, latents, values, starts, self.d_sae)

        return fetched

    def positive(self) -> "SparseLatents":
        """Return the pairs that are active."""
        kept = (self.values > 0).nonzero().squeeze(1)  # how many is waited for once, and not in each of three
        shape = torch.Size((len(self.starts) - 1, self.d_sae))
        return SparseLatents.of(self.rows[kept], self.latents[kept], self.values[kept], shape)

    def of_rows(self, wanted: Tensor) -> "SparseLatents":
        """Return the pairs of the `wanted` rows [B] bool, which are numbered again."""
        kept, number = wanted[self.rows], wanted.cumsum(0) - 1
        shape = torch.Size((int(wanted.sum()), self.d_sae))
        return SparseLatents.of(number[self.rows[kept]], self.latents[kept], self.values[kept], shape)

    @classmethod
    def joined(cls, parts: Sequence["SparseLatents"]) -> "SparseLatents":
        """Join the pairs of at least one part, the rows of each numbered after those of the part before."""
        sizes = [len(part.starts) - 1 for part in parts]
        firsts = accumulate(sizes, initial=0)
        return cls.of(
            torch.cat([part.rows + first for part, first in zip(parts, firsts, strict=False)]),
            torch.cat([part.latents for part in parts]),
            torch.cat([part.values for part in parts]),
            torch.Size((sum(sizes), parts[0].d_sae)),
        )

    def slice(self, rows: slice) -> "SparseLatents":
        """Return the pairs of some rows, which are numbered from 0."""
        low, high = int(self.starts[rows.start]), int(self.starts[rows.stop])
        return SparseLatents(
            self.rows[low:high] - rows.start,
            self.latents[low:high],
            self.values[low:high],
            self.starts[rows.start : rows.stop + 1] - low,
            self.d_sae,
        )


def offsets(groups: Tensor, count: int) -> Tensor:
    """Return where each of `count` groups begins in `groups` [N], which rise; [count + 1], int64."""
    return torch.searchsorted(groups.contiguous(), torch.arange(count + 1, device=groups.device))


def countable(
    active: SparseLatents,
    times: float,
    most: int,
) -> Tensor:  # [B] bool
    """Select every n-th row, so that counting pairs of latents on `times` as many rows meets `most` of them.

    Each pair of two latents on a row is met twice: the cost is the square of a row's active latents.
    """
    meetings = int(int(active.starts.diff().square().sum()) * times)
    return torch.arange(len(active.starts) - 1) % max(1, -(-meetings // most)) == 0
