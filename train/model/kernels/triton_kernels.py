"""The operations in Triton kernels, for CUDA; nothing but `above` waits for the device.

Every sum runs in one order, so results repeat bit for bit. Triton's interpreter runs them on CPU, for the tests.
Parameters of kernels have no annotation but `tl.constexpr`: Triton's compiler, unlike its interpreter, evaluates them
as names inside the kernel, and knows no other.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.fused import Fused
from train.model.kernels.plain import smallest_positive
from train.model.kernels.sparse_ops import Groups
from train.model.sparse_latents import SparseLatents, offsets

_DIGITS = ((20, 11), (10, 10), (0, 10))
"""Bits of a positive float32 that one pass of the search decides: how many are below, and how many they are."""
_COUNTED, _BLOCK = 4096, 1024
"""Pre-activations that a program counts at once, and those of a row that one looks at in turn: more of these need more
than the 255 registers that a thread has, and are written to memory (`python -m tests.gpu.compile`)."""
_PER_WARP, _MOST_WARPS = 512, 16
"""Numbers of a block that a warp holds, 16 in each thread, and the most warps of a program."""


class Triton(Fused):
    """Kernels on CUDA."""

    def batch_topk(self, pre_acts: Tensor, n: int, guess: Tensor) -> tuple[SparseLatents, Tensor]:
        """As `SparseOps.batch_topk`; of several equal to the smallest the first in row order are kept.

        Positive floats are in the order of their bits, so the n-th largest is found digit by digit from histograms,
        exactly, and the pairs are compacted row by row behind a running count. Where fewer than `n` are positive, pairs
        of value 0 fill up.
        """
        rows, width = pre_acts.shape
        n = min(n, pre_acts.numel())
        nth, ties = _nth_largest(pre_acts, n)
        more, equal = (torch.empty(rows, dtype=torch.int64, device=pre_acts.device) for _ in range(2))
        _launch(_count, (rows,), pre_acts, nth, more, equal, width, BLOCK=_BLOCK, num_warps=_BLOCK // 256)
        equal = (ties - (equal.cumsum(0) - equal)).clamp_min(0).minimum(equal)
        starts = torch.cat([nth.new_zeros(1), (more + equal).cumsum(0)])
        row, latent = (torch.full((n,), last, device=pre_acts.device) for last in (rows - 1, width - 1))
        values = pre_acts.new_zeros(n)
        _launch(
            _compact,
            (rows,),
            pre_acts,
            nth,
            equal,
            starts,
            row,
            latent,
            values,
            width,
            BLOCK=_BLOCK,
            num_warps=_BLOCK // 256,
        )
        starts = torch.cat([starts[:-1], torch.full_like(starts[:1], n)])
        return SparseLatents(row, latent, values, starts, width), smallest_positive(values)

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`."""
        if not isinstance(groups.weight, Tensor):  # on the device, unlike a copied number
            groups = groups._replace(weight=torch.full((), groups.weight, dtype=y.dtype, device=y.device))
        return super().prefix_loss(values, W_dec, base, y, active, groups)

    def products(self, active: SparseLatents, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        """As `Fused.products`."""
        out, width = left.new_empty(len(active.rows)), left.shape[1]
        if len(out):
            block = triton.next_power_of_2(width)
            _launch(_products, (len(out),), active.rows, active.latents, left, right, bias, out, width, BLOCK=block)
        return out

    def errors_and_gradients(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Fused.errors_and_gradients`."""
        (rows, width), prefixes = y.shape, groups.prefixes
        errors, meet = y.new_empty(rows, prefixes), y.new_empty(rows, prefixes, width)
        left, grad = torch.empty_like(y), torch.empty_like(values)
        starts = offsets(active.rows * prefixes + groups.of_latent[active.latents], rows * prefixes)
        assert isinstance(groups.weight, Tensor)
        weights = groups.weight.expand(prefixes).contiguous()
        sides = (values, active.latents, starts, W_dec, base.contiguous(), y, weights)
        step = width if len(base) > 1 else 0
        block = triton.next_power_of_2(width)
        _launch(_prefix_loss, (rows,), *sides, meet, errors, left, grad, step, width, PREFIXES=prefixes, BLOCK=block)
        return errors, left, meet, grad

    def sums_by_latent(
        self, active: SparseLatents, weights: Tensor, rows: Tensor, table: Tensor, out: Tensor, alone: Tensor, add: bool
    ) -> None:
        """As `Fused.sums_by_latent`."""
        assert out.is_contiguous() and table.is_contiguous()
        order, starts = active.by_latent
        width = out.shape[1]
        block = min(512, triton.next_power_of_2(width))
        grid = (len(out), triton.cdiv(width, block))
        _launch(_sums_by_latent, grid, order, starts, weights, rows, table, out, alone, width, ADD=add, BLOCK=block)


def _nth_largest(pre_acts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the bits of the `n`-th largest, and how many equal to it are among the `n`; 0, 0 if fewer are positive."""
    device, size = pre_acts.device, pre_acts.numel()
    found, wanted = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), n, device=device)
    enough = torch.ones(1, dtype=torch.bool, device=device)
    for shift, bits in _DIGITS:
        counts = torch.zeros(2**bits, dtype=torch.int32, device=device)
        grid = (triton.cdiv(size, _COUNTED),)
        _launch(_histogram, grid, pre_acts, size, found, counts, SHIFT=shift, BINS=2**bits, BITS=bits, BLOCK=_COUNTED)
        at_least = counts.flip(0).cumsum(0).flip(0)  # in this bin and above; falls
        digit = (at_least >= wanted).sum(0, keepdim=True) - 1
        enough &= digit >= 0
        digit = digit.clamp_min(0)
        wanted = wanted - (at_least - counts).gather(0, digit)
        found = found * 2**bits + digit
    return torch.where(enough, found, 0), torch.where(enough, wanted, 0)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: int) -> None:
    """Run a kernel where its tensors are: Triton itself takes the current device, which may be another one."""
    constants = {"num_warps": max(1, min(_MOST_WARPS, constants["BLOCK"] // _PER_WARP))} | constants
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


@triton.jit
def _key(values):
    """Return positive values as integers of the same order; 0 for all others."""
    values = values.to(tl.float32)
    return tl.where(values > 0, values.to(tl.int32, bitcast=True), 0)


@triton.jit
def _histogram(
    pre_acts,
    size,
    above_digit,
    counts,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count how many have each digit, of those whose digits above it are `above_digit`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = _key(tl.load(pre_acts + at, mask=at < size, other=0.0))
    counted = (key > 0) & ((key >> SHIFT >> BITS) == tl.load(above_digit).to(tl.int32))
    found = tl.histogram((key >> SHIFT) & (BINS - 1), BINS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _count(pre_acts, nth, more, equal, width, BLOCK: tl.constexpr):
    """Count how many of a row are above the bits `nth`, and how many are equal."""
    row, bits = tl.program_id(0).to(tl.int64), tl.load(nth).to(tl.int32)
    above_it = tl.zeros([BLOCK], tl.int32)
    at_it = tl.zeros([BLOCK], tl.int32)
    for low in range(0, width, BLOCK):
        latent = low + tl.arange(0, BLOCK)
        key = _key(tl.load(pre_acts + row * width + latent, mask=latent < width, other=0.0))
        above_it += (key > bits).to(tl.int32)
        at_it += ((key == bits) & (key > 0)).to(tl.int32)
    tl.store(more + row, tl.sum(above_it, 0).to(tl.int64))
    tl.store(equal + row, tl.sum(at_it, 0).to(tl.int64))


@triton.jit
def _compact(
    pre_acts,
    nth,
    ties,
    starts,
    rows,
    latents,
    values,
    width,
    BLOCK: tl.constexpr,
):
    """Write a row's pairs above the bits `nth`, and the first `ties` of those equal, from its start on."""
    row, bits = tl.program_id(0).to(tl.int64), tl.load(nth).to(tl.int32)
    left, at = tl.load(ties + row), tl.load(starts + row)
    for low in range(0, width, BLOCK):
        latent = low + tl.arange(0, BLOCK)
        value = tl.load(pre_acts + row * width + latent, mask=latent < width, other=0.0)
        key = _key(value)
        tie = ((key == bits) & (key > 0)).to(tl.int32)
        first = tl.cumsum(tie, 0) <= left
        kept = (key > bits) | ((tie > 0) & first)
        count = kept.to(tl.int32)
        place = at + tl.cumsum(count, 0) - count
        tl.store(rows + place, tl.zeros([BLOCK], tl.int64) + row, mask=kept)
        tl.store(latents + place, latent.to(tl.int64), mask=kept)
        tl.store(values + place, value, mask=kept)
        at += tl.sum(count, 0)
        left -= tl.sum(tie, 0)


@triton.jit
def _products(rows, latents, left, right, bias, out, width, BLOCK: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, BLOCK)
    row, latent = tl.load(rows + i), tl.load(latents + i)
    one = tl.load(left + row * width + d, mask=d < width, other=0.0)
    other = tl.load(right + latent * width + d, mask=d < width, other=0.0)
    tl.store(out + i, tl.sum(one * other, 0) + tl.load(bias + latent))


@triton.jit
def _prefix_loss(
    values,
    latents,
    starts,
    W_dec,
    base,
    y,
    weights,
    meet,
    errors,
    left,
    grad,
    base_step,
    width,
    PREFIXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `Fused.errors_and_gradients`, one row; `starts` [B * P + 1] are those of each row's groups."""
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = o < width
    total = tl.load(base + row * base_step + o, mask=inside, other=0.0)
    total -= tl.load(y + row * width + o, mask=inside, other=0.0)
    for p in range(PREFIXES):
        group = row * PREFIXES + p
        for i in range(tl.load(starts + group), tl.load(starts + group + 1)):
            direction = tl.load(W_dec + tl.load(latents + i) * width + o, mask=inside, other=0.0)
            total += tl.load(values + i) * direction
        tl.store(meet + group * width + o, total, mask=inside)
        tl.store(errors + group, tl.sum(total * total, 0))
    tl.store(left + row * width + o, -total, mask=inside)
    tl.debug_barrier()
    total = total * 0
    for q in range(PREFIXES):
        group = row * PREFIXES + PREFIXES - 1 - q
        twice = 2 * tl.load(weights + PREFIXES - 1 - q)
        total += twice * tl.load(meet + group * width + o, mask=inside, other=0.0)
        tl.store(meet + group * width + o, total, mask=inside)
        for i in range(tl.load(starts + group), tl.load(starts + group + 1)):
            direction = tl.load(W_dec + tl.load(latents + i) * width + o, mask=inside, other=0.0)
            tl.store(grad + i, tl.sum(direction * total, 0))


@triton.jit
def _sums_by_latent(
    order,
    starts,
    weights,
    rows,
    table,
    out,
    alone,
    width,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `Fused.sums_by_latent`, one latent and a part of its columns."""
    latent, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = o < width
    total = tl.zeros([BLOCK], out.dtype.element_ty)
    weight_sum = tl.load(alone + latent)
    if ADD:
        total = tl.load(out + latent * width + o, mask=inside, other=0.0)
    for j in range(tl.load(starts + latent), tl.load(starts + latent + 1)):
        i = tl.load(order + j)
        weight = tl.load(weights + i)
        total += weight * tl.load(table + tl.load(rows + i) * width + o, mask=inside, other=0.0)
        weight_sum += weight
    tl.store(out + latent * width + o, total, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(alone + latent, weight_sum)
