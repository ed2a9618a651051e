"""The operations in Triton kernels, for CUDA; nothing but `above` waits for the device.

Every sum runs in one order, so results repeat bit for bit. Triton's interpreter runs them on CPU, for the tests.
Parameters of kernels have no annotation but `tl.constexpr`: Triton's compiler, unlike its interpreter, evaluates them
as names inside the kernel, and knows no other.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels import triton_select
from train.model.kernels.fused import Fused
from train.model.kernels.sparse_ops import Groups
from train.model.kernels.triton_launch import launch
from train.model.sparse_latents import SparseLatents

_PAIRS, _ON_THE_WAY = 8, 8192
"""Pairs whose rows of a matrix a program reads at once, at most, and the numbers that fit into registers."""
_LONG, _PARTS = 512, 8
"""Pairs of a latent above which its sum is shared by programs, and by how many."""


class Triton(Fused):
    """Kernels on CUDA."""

    def batch_topk(self, pre_acts: Tensor, n: int, guess: Tensor) -> tuple[SparseLatents, Tensor]:
        """As `SparseOps.batch_topk`; of several equal to the smallest the first in row order are kept.

        Where fewer than `n` are positive, pairs of value 0 fill up.
        """
        n = min(n, pre_acts.numel())
        (rows, latents, values, starts), smallest = triton_select.batch_topk(pre_acts, n, guess)
        return SparseLatents(rows, latents, values, starts, pre_acts.shape[1]), smallest

    def row_topk(self, pre_acts: Tensor, k: int, among: Tensor | None = None) -> SparseLatents:
        """As `SparseOps.row_topk`; others that follow have a value of 0. Where none is `among`, nothing is searched."""
        assert pre_acts.stride(1) == 1
        width = pre_acts.shape[1]
        rows, latents, values, starts = triton_select.row_topk(pre_acts, min(k, width), among)
        return SparseLatents(rows, latents, values, starts, width)

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
            launch(_products, (len(out),), active.rows, active.latents, left, right, bias, out, width, BLOCK=block)
        return out

    def errors_and_gradients(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Fused.errors_and_gradients`."""
        (rows, width), prefixes = y.shape, groups.prefixes
        errors, meet = y.new_empty(rows, prefixes), y.new_empty(rows, prefixes, width)
        left, grad = torch.empty_like(y), torch.empty_like(values)
        assert isinstance(groups.weight, Tensor)
        bounds = torch.empty(rows, prefixes + 1, dtype=torch.int64, device=y.device)
        sides = (values, active.latents, active.starts, groups.of_latent, W_dec, base.contiguous(), y, groups.weight)
        steps = (width if len(base) > 1 else 0, groups.weight.dim())
        found = (bounds, meet, errors, left, grad)
        block = triton.next_power_of_2(width)
        constants = {"PREFIXES": prefixes, "PAIRS": max(1, min(_PAIRS, _ON_THE_WAY // block)), "BLOCK": block}
        launch(_prefix_loss, (rows,), *sides, *found, *steps, width, **constants)
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
        assert out.is_contiguous() and table.is_contiguous()
        order, starts = active.by_latent
        (latents, width), slots = out.shape, triton.cdiv(len(order), _LONG)
        block = min(256, triton.next_power_of_2(width))
        parts = triton.cdiv(width, block)
        of_latent, prefixes = (active.latents, 1) if groups is None else (groups.of_latent, groups.prefixes)
        sides = (order, starts, weights, active.rows, of_latent, table)
        total = (out, weights if alone is None else alone, weights if times is None else times)
        asked = {"ADD": add, "ALONE": alone is not None, "TIMES": times is not None, "LONG": _LONG}
        sums = {"GROUPED": groups is not None, "PAIRS": _PAIRS, "BLOCK": block, "num_warps": 4}
        launch(_sums_by_latent, (latents, parts), *sides, *total, prefixes, width, **asked, **sums)
        if len(order) > _LONG:
            shares = (out.new_empty(slots, _PARTS, width), out.new_empty(slots, _PARTS))
            shared = {"LONG": _LONG, "PARTS": _PARTS}
            places = (active.latents, *sides)
            launch(_long_sums, (slots, _PARTS, parts), *places, *shares, prefixes, width, **shared, **sums)
            asked |= {"PARTS": _PARTS, "BLOCK": block, "num_warps": 4}
            launch(_add_long_sums, (slots, parts), active.latents, order, starts, *shares, *total, width, **asked)


@triton.jit
def _products(rows, latents, left, right, bias, out, width, BLOCK: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, BLOCK)
    row, latent = tl.load(rows + i), tl.load(latents + i)
    one = tl.load(left + row * width + d, mask=d < width, other=0.0)
    other = tl.load(right + latent * width + d, mask=d < width, other=0.0)
    tl.store(out + i, tl.sum(one * other, 0) + tl.load(bias + latent))


@triton.jit
def _rows_of_pairs(table, at, here, o, inside, width):
    """Return rows of a matrix, of as many pairs as `at` and `here` name."""
    return tl.load(table + at[:, None] * width + o[None, :], mask=here[:, None] & inside[None, :], other=0.0)


@triton.jit
def _prefix_loss(
    values,
    latents,
    starts,
    groups,
    W_dec,
    base,
    y,
    weights,
    bounds,
    meet,
    errors,
    left,
    grad,
    base_step,
    weight_step,
    width,
    PREFIXES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `Fused.errors_and_gradients`, one row; `bounds` [B, P + 1] are where each of its groups begins."""
    row, o, pair = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, PAIRS)
    inside = o < width
    begin, end, bounds = tl.load(starts + row), tl.load(starts + row + 1), bounds + row * (PREFIXES + 1)
    tl.store(bounds, begin)
    for p in range(PREFIXES):
        count = tl.zeros([128], tl.int32)
        for low in range(begin, end, 128):
            i = low + tl.arange(0, 128)
            group = tl.load(groups + tl.load(latents + i, mask=i < end, other=0), mask=i < end, other=PREFIXES)
            count += (group <= p).to(tl.int32)
        tl.store(bounds + p + 1, begin + tl.sum(count, 0))
    total = tl.load(base + row * base_step + o, mask=inside, other=0.0)
    total -= tl.load(y + row * width + o, mask=inside, other=0.0)
    tl.debug_barrier()
    for p in range(PREFIXES):
        last = tl.load(bounds + p + 1)
        for low in range(tl.load(bounds + p), last, PAIRS):
            i = low + pair
            latent = tl.load(latents + i, mask=i < last, other=0)
            value = tl.load(values + i, mask=i < last, other=0.0)
            total += tl.sum(value[:, None] * _rows_of_pairs(W_dec, latent, i < last, o, inside, width), 0)
        at = row * PREFIXES + p
        tl.store(meet + at * width + o, total, mask=inside)
        tl.store(errors + at, tl.sum(total * total, 0))
    tl.store(left + row * width + o, -total, mask=inside)
    tl.debug_barrier()
    total = total * 0
    for q in range(PREFIXES):
        p = PREFIXES - 1 - q
        at, last = row * PREFIXES + p, tl.load(bounds + p + 1)
        twice = 2 * tl.load(weights + p * weight_step)
        total += twice * tl.load(meet + at * width + o, mask=inside, other=0.0)
        tl.store(meet + at * width + o, total, mask=inside)
        for low in range(tl.load(bounds + p), last, PAIRS):
            i = low + pair
            latent = tl.load(latents + i, mask=i < last, other=0)
            directions = _rows_of_pairs(W_dec, latent, i < last, o, inside, width)
            tl.store(grad + i, tl.sum(directions * total[None, :], 1), mask=i < last)


@triton.jit
def _weighted_sum(
    order,
    weights,
    rows,
    table,
    group,
    prefixes,
    begin,
    end,
    o,
    width,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the weighted sum of the table's rows over some pairs of a latent, and that of the weights."""
    total = tl.zeros([BLOCK], table.dtype.element_ty)
    alone = tl.zeros([PAIRS], table.dtype.element_ty)
    for low in range(begin, end, PAIRS):
        j = low + tl.arange(0, PAIRS)
        i = tl.load(order + j, mask=j < end, other=0)
        weight = tl.load(weights + i, mask=j < end, other=0.0)
        row = tl.load(rows + i, mask=j < end, other=0) * prefixes + group
        total += tl.sum(weight[:, None] * _rows_of_pairs(table, row, j < end, o, o < width, width), 0)
        alone += weight
    return total, tl.sum(alone, 0)


@triton.jit
def _write_sum(
    total,
    weight,
    latent,
    o,
    out,
    alone,
    times,
    width,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
):
    """Write a latent's sum, or add it to what is there."""
    if TIMES:
        total *= tl.load(times)
        weight *= tl.load(times)
    if ADD:
        total += tl.load(out + latent * width + o, mask=o < width, other=0.0)
    tl.store(out + latent * width + o, total, mask=o < width)
    if ALONE:
        tl.store(alone + latent, tl.load(alone + latent) + weight, mask=tl.program_id(1) == 0)


@triton.jit
def _sums_by_latent(
    order,
    starts,
    weights,
    rows,
    groups,
    table,
    out,
    alone,
    times,
    prefixes,
    width,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
    LONG: tl.constexpr,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `Fused.sums_by_latent`, one latent of at most `LONG` pairs and a part of its columns."""
    latent, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    if (end - begin <= LONG) & ((ADD == 0) | (end > begin)):  # nothing to add leaves the row as it is
        group = tl.load(groups + latent) if GROUPED else 0
        total, weight = _weighted_sum(order, weights, rows, table, group, prefixes, begin, end, o, width, PAIRS, BLOCK)
        _write_sum(total, weight, latent, o, out, alone, times, width, ADD, ALONE, TIMES)


@triton.jit
def _long_latent(latents, order, starts, slot, LONG: tl.constexpr):
    """Return the latent of every `LONG`-th pair, where its pairs begin and end, and whether they are more than that.

    A latent with so many has such a pair; only the first of them is its own.
    """
    latent = tl.load(latents + tl.load(order + slot * LONG))
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    return latent, begin, end, (end - begin > LONG) & (tl.cdiv(begin, LONG) == slot)


@triton.jit
def _long_sums(
    latents,
    order,
    starts,
    weights,
    rows,
    groups,
    table,
    shares,
    sums,
    prefixes,
    width,
    LONG: tl.constexpr,
    PARTS: tl.constexpr,
    GROUPED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one of `PARTS` parts of a latent's pairs, where these are more than `LONG`."""
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    latent, first, last, is_long = _long_latent(latents, order, starts, slot, LONG)
    if is_long:
        size = tl.cdiv(last - first, PARTS)
        begin = first + part * size
        end = tl.minimum(begin + size, last)
        group = tl.load(groups + latent) if GROUPED else 0
        total, weight = _weighted_sum(order, weights, rows, table, group, prefixes, begin, end, o, width, PAIRS, BLOCK)
        tl.store(shares + (slot * PARTS + part) * width + o, total, mask=o < width)
        if tl.program_id(2) == 0:
            tl.store(sums + slot * PARTS + part, weight)


@triton.jit
def _add_long_sums(
    latents,
    order,
    starts,
    shares,
    sums,
    out,
    alone,
    times,
    width,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
    LONG: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a latent, in their order."""
    slot, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent, _, _, is_long = _long_latent(latents, order, starts, slot, LONG)
    if is_long:
        total, weight = tl.zeros([BLOCK], out.dtype.element_ty), tl.full([], 0.0, out.dtype.element_ty)
        for part in range(PARTS):
            total += tl.load(shares + (slot * PARTS + part) * width + o, mask=o < width, other=0.0)
            weight += tl.load(sums + slot * PARTS + part)
        _write_sum(total, weight, latent, o, out, alone, times, width, ADD, ALONE, TIMES)
