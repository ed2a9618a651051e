"""Decoder rows that point the same way: found by a scan of all or of random chunks, penalised pair by pair. Pure.

A scan costs a product of decoder rows with each other; a penalty costs its pairs alone.
Legend: F latents, O d_out, N pairs.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.duplicates import pair_loops
from train.model import blas
from train.model.blas import Blas

_LEAST_NORM = 1e-12
"""Shorter rows than that have no direction: their cosines are below 1."""


class Pairs(NamedTuple):
    """Pairs of latents, the first of each before the second."""

    first: Tensor
    """[N] int64"""
    second: Tensor
    """[N] int64"""

    def kept(self, wanted: Tensor) -> "Pairs":
        """Return the pairs that `wanted` [N] names, as bools or by their numbers."""
        return Pairs(self.first[wanted], self.second[wanted])

    def free_of(self, latents: Tensor) -> Tensor:  # [N] bool
        """Tell which pairs hold none of `latents` [n] int64."""
        return ~torch.isin(torch.stack(list(self)), latents).any(0)

    def joined(self, other: "Pairs") -> "Pairs":
        """Return these pairs, and those of `other` behind them."""
        return Pairs(torch.cat([self.first, other.first]), torch.cat([self.second, other.second]))

    def cpu(self) -> "Pairs":
        """Return the same on CPU."""
        return Pairs(self.first.cpu(), self.second.cpu())


def connected(pairs: Pairs) -> list[list[int]]:
    """Group the latents that pairs connect, directly or through others; the largest group first, latents rising."""
    parent: dict[int, int] = {}

    def root(latent: int) -> int:
        while parent.setdefault(latent, latent) != latent:
            parent[latent] = latent = parent[parent[latent]]
        return latent

    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        parent[root(second)] = root(first)
    found: dict[int, list[int]] = {}
    for latent in sorted(parent):
        found.setdefault(root(latent), []).append(latent)
    return sorted(found.values(), key=lambda latents: (-len(latents), latents))


def close_pairs(
    W_dec: Tensor,  # [F, O] unit rows
    latents: Tensor,  # [n] int64, rising
    floor: float,
    library: Blas,
    block: int = 256,
) -> tuple[Pairs, Tensor]:  # cosines [N]
    """List all pairs of `latents` whose decoder rows have a cosine above `floor`, and the cosines.

    Blocks of rows are compared with those after them, so that no [n, n] is made and each cosine is computed once.
    """
    rows = W_dec.detach()[latents]
    first, second, cosines = [latents[:0]], [latents[:0]], [rows.new_zeros(0)]
    for low in range(0, len(rows), block):
        part = rows[low : low + block]
        i, j, above = _above(blas.product(library, part, rows[low:].T), floor)
        first.append(latents[low + i])
        second.append(latents[low + j])
        cosines.append(above)
    return Pairs(torch.cat(first), torch.cat(second)), torch.cat(cosines)


def nearest_cosines(
    W_dec: Tensor,  # [F, O] unit rows
    latents: Tensor,  # [n] int64
    library: Blas,
    block: int = 1024,
) -> Tensor:  # [n]
    """Return the largest cosine of each of `latents` with another of them; -1 for one alone."""
    rows = W_dec.detach()[latents]
    nearest = []
    for low in range(0, len(rows), block):
        found = blas.product(library, rows[low : low + block], rows.T)
        found[torch.arange(len(found)), torch.arange(low, low + len(found))] = -1
        nearest.append(found.amax(1))
    return torch.cat(nearest) if nearest else rows.new_zeros(0)


@torch.no_grad()
def nearest_directions(
    W_dec: Tensor,  # [F, O] unit rows
    live: Tensor,  # [n] int64
    most: int,
    library: Blas,
    block: int = 1024,
) -> tuple[Tensor, Tensor]:  # [F, M] each, on CPU
    """Return the others with the largest cosines to each of `live`, falling, and these cosines.

    Latents are -1 where there are no more, and for those that are not live.
    """
    latents = torch.full((len(W_dec), most), -1)
    cosines = torch.zeros(len(W_dec), most)
    rows, taken = W_dec.detach()[live.to(W_dec.device)], min(most, len(live) - 1)
    for low in range(0, len(rows) if taken > 0 else 0, block):
        found = blas.product(library, rows[low : low + block], rows.T)
        found[torch.arange(len(found)), torch.arange(low, low + len(found))] = -torch.inf
        largest = found.topk(taken)
        latents[live[low : low + block], :taken] = live[largest.indices.cpu()]
        cosines[live[low : low + block], :taken] = largest.values.float().clamp(-1, 1).cpu()
    return latents, cosines


def _above(
    products: Tensor,  # [R, n]
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [N] each
    """Return rows, columns and values of what lies above the diagonal and is above `floor`."""
    if products.device.type != "cpu":
        rows, columns = torch.triu(products, 1).gt(floor).nonzero(as_tuple=True)
        return rows, columns, products[rows, columns]
    counts = torch.empty(len(products), dtype=torch.int64)
    pair_loops.count_above(products.numpy(), floor, counts.numpy())
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows, columns = starts.new_empty(2, int(starts[-1]))
    values = products.new_empty(len(rows))
    pair_loops.list_above(products.numpy(), floor, *(t.numpy() for t in (starts, rows, columns, values)))
    return rows, columns, values


def effective_number(
    close: Pairs,
    latents: Tensor,  # [n] int64
    d_sae: int,
) -> float:
    """Sum 1 / (neighbours, itself included) over `latents`, by pairs of neighbours."""
    neighbours = torch.bincount(torch.cat(close), minlength=d_sae)[latents]
    return float((1 / (1 + neighbours.double())).sum())


def steps_between_scans(
    W_enc: Tensor,  # [D, F]
    W_dec: Tensor,  # [F, O]
    rows: int,
    cost_share: float,
) -> int:
    """Return the steps between scans of all decoder rows, for these to cost a share of a step's product on `rows` rows.

    Costs are counted in operations: F * F * O, each cosine being computed once, and 2 * B * D * F. So the result is
    the same on every machine.
    """
    return math.ceil(W_dec.numel() / (cost_share * 2 * rows * W_enc.shape[0]))


def chunk(
    live: Tensor,  # [n] int64
    size: int,
    generator: torch.Generator,
) -> Tensor:  # [min(size, n)] int64, rising
    """Draw a random chunk of the live latents (OrtSAE, arXiv 2509.22033)."""
    return live[torch.randperm(len(live), generator=generator)[:size].to(live.device)].sort().values


def nearest(
    pairs: Pairs,
    cosines: Tensor,  # [N]
    d_sae: int,
) -> Tensor:  # [N]
    """Count for how many of its two latents a pair is the closest of all: 0, 1 or 2."""
    best = cosines.new_full((d_sae,), -torch.inf)
    for side in pairs:
        best.scatter_reduce_(0, side, cosines, "amax")
    return torch.stack([cosines == best[side] for side in pairs]).sum(0).to(cosines.dtype)


def direction_loss(
    W_dec: Tensor,  # [F, O]
    pairs: Pairs,
    margins: Tensor,  # [N]
    weights: Tensor | float = 1.0,  # [N]
    unit: bool = True,
) -> Tensor:  # []
    """Sum over pairs the weighted squared excess of the cosine over its margin; the gradient reaches both rows.

    The gradient is added to `W_dec.grad`: so it comes from `backward`, and not from `torch.autograd.grad`. Of `unit`
    rows it is that of the product of two rows: its part along a row is the optimizer's to drop.
    """
    return ((_Cosines.apply(W_dec, *pairs, unit) - margins).relu().square() * weights).sum()


class _Cosines(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_dec: Tensor, first: Tensor, second: Tensor, unit: bool) -> Tensor:
        ctx.W_dec, ctx.unit = W_dec, unit
        found = _dots(W_dec.detach(), first, second)
        if unit:
            ctx.save_for_backward(first, second)
            return found
        sizes = [_dots(W_dec.detach(), side, side).sqrt().clamp_min(_LEAST_NORM) for side in (first, second)]
        found = found / sizes[0] / sizes[1]
        ctx.save_for_backward(first, second, found, *sizes)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        (first, second, *rest), (grad,), W_dec = ctx.saved_tensors, grads, ctx.W_dec
        if W_dec.grad is None:
            W_dec.grad = torch.zeros_like(W_dec)
        if ctx.unit:
            _add_partners(W_dec, first, second, grad)
        else:  # d cosine / d row = (the other's direction - cosine * its own) / its norm
            cosines, one, other = rest
            _add_partners(W_dec, first, second, grad / one / other)
            for side, size in ((first, one), (second, other)):  # its own row comes in twice
                _add_partners(W_dec, side, side, -0.5 * grad * cosines / size / size)
        return (None,) * 4


def _dots(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:  # [N]
    if rows.device.type != "cpu":
        return torch.linalg.vecdot(rows[first], rows[second])
    found = rows.new_zeros(len(first))
    pair_loops.dots(*(t.numpy() for t in (rows, first, second, found)))
    return found


def _add_partners(W_dec: Tensor, first: Tensor, second: Tensor, weights: Tensor) -> None:
    """Add to the gradient of each latent of a pair the row of the other, `weights` [N] times."""
    rows, grad = W_dec.detach(), W_dec.grad
    assert grad is not None
    if rows.device.type == "cpu":
        sides = (t.numpy() for t in (rows, first, second, weights.contiguous()))
        pair_loops.add_partners(*sides, torch.get_num_threads(), grad.numpy())
    else:
        for one, other in ((first, second), (second, first)):
            grad.index_put_((one,), weights.unsqueeze(1) * rows[other], accumulate=True)  # repeats in one order
