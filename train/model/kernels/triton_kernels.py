"""The operations in Triton kernels, for CUDA; nothing but `above` waits for the device.

Every sum runs in one order, so results repeat bit for bit. Triton's interpreter runs them on CPU, for the tests.
Parameters of kernels have no annotation but `tl.constexpr`: Triton's compiler, unlike its interpreter, evaluates them
as names inside the kernel, and knows no other.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels import triton_select, triton_sums
from train.model.kernels.base import Groups
from train.model.kernels.fused import Fused
from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_sums import Every, row_at, rows_of_pairs
from train.model.sparse_latents import SparseLatents

_PAIRS, _ON_THE_WAY, _INNER = 8, 8192, 4096
"""Pairs whose rows of a matrix a program reads at once, at most; the numbers that fit into registers; and the columns
of the encoder's rows that are read at once."""


class Triton(Fused):
    """Kernels on CUDA."""

    keeps_guess = True

    def batch_topk(self, pre_acts: Tensor, n: int, guess: Tensor) -> tuple[SparseLatents, Tensor]:
        """As `SparseOps.batch_topk`; of several equal to the smallest the first in row order are kept.

        Where fewer than `n` are positive, pairs of value 0 fill up.
        """
        n = min(n, pre_acts.numel())
        (rows, latents, values, starts), smallest = triton_select.batch_topk(pre_acts, n, guess)
        return SparseLatents(rows, latents, values, starts, pre_acts.shape[1]), smallest

    def row_topk(self, pre_acts: Tensor, k: int, among: Tensor | None = None, each: int = 1) -> SparseLatents:
        """As `SparseOps.row_topk`; others that follow have a value of 0. Where none is `among`, nothing is searched."""
        assert pre_acts.stride(1) == 1
        width = pre_acts.shape[1]
        rows, latents, values, starts = triton_select.row_topk(pre_acts, min(k, width), among, each)
        return SparseLatents(rows, latents, values, starts, width)

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`."""
        return super().prefix_loss(values, W_dec, base, y, active, on_device(groups, y))

    def products(self, active: SparseLatents, left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        """As `Fused.products`."""
        out, width = left.new_empty(len(active.rows)), left.shape[1]
        if len(out):
            sides = (active.rows, active.latents, left, right, bias, out)
            launch(_products, (len(out),), *sides, width, BLOCK=triton.next_power_of_2(width))
        return out

    def errors_and_gradients(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `Fused.errors_and_gradients`."""
        return errors_and_gradients(values, W_dec, base, y, active, groups)

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
        by = None if groups is None else (groups.of_latent, groups.prefixes)
        added = None if alone is None else (alone, True)
        triton_sums.sums_by_latent(active, triton_sums.Sums(weights, table, out, add, added, by, times))


def on_device(groups: Groups, like: Tensor) -> Groups:
    """Return the same with a weight on the device, unlike a number, which would be copied."""
    if isinstance(groups.weight, Tensor):
        return groups
    return groups._replace(weight=torch.full((), groups.weight, dtype=like.dtype, device=like.device))


class Encoder(NamedTuple):
    """What the values of pairs are computed from."""

    x: Tensor
    """[B, D], or every so many-th of these rows are those of the pairs"""
    rows: Tensor
    """[F, D]"""
    bias: Tensor
    """[F]"""
    among: Tensor | None
    """[F] bool: pairs of other latents are 0, and those of these may be negative; none: values below 0 are 0"""


def errors_and_gradients(
    values: Tensor,
    W_dec: Tensor,
    base: Tensor,
    y: Tensor,
    active: SparseLatents,
    groups: Groups,
    *,
    figures: Tensor | None = None,  # [B, P + 2]
    masked: bool = False,
    every: Every | None = None,
    encoder: Encoder | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `Fused.errors_and_gradients`.

    `encoder`: `values` are not known yet, and get what they are. `figures` get the errors, and then the number of a
    row's values above 0 and the squared norm of its row of `y`.
    `masked`: values that are 0 have a gradient of 0. `every`: so many-th row of `y` is one of the pairs' rows.
    """
    rows, width, prefixes = len(active.starts) - 1, y.shape[1], groups.prefixes
    errors = y.new_empty(rows, prefixes) if figures is None else figures
    meet, left = y.new_empty(rows, prefixes, width), y.new_empty(rows, width)
    grad, bounds = torch.empty_like(values), torch.empty(rows, prefixes + 1, dtype=torch.int64, device=y.device)
    assert isinstance(groups.weight, Tensor)
    x, right, bias, among = encoder or (y, W_dec, values, None)
    inner = (x, right, bias, active.latents if among is None else among.view(torch.uint8))
    sides = (values, active.latents, active.starts, groups.of_latent, W_dec, base.contiguous(), y, groups.weight)
    found = (*_rows_of(every, active.starts), bounds, meet, errors, left, grad)
    steps = (width if len(base) > 1 else 0, groups.weight.dim(), errors.shape[1])
    block, inner_block = triton.next_power_of_2(width), min(_INNER, triton.next_power_of_2(x.shape[1]))
    constants = {"PREFIXES": prefixes, "PAIRS": _at_once(block), "BLOCK": block}
    constants |= {"INNER_PAIRS": _at_once(inner_block), "INNER_BLOCK": inner_block}
    constants["INNER_WHOLE"] = inner_block >= x.shape[1]
    kinds = {"FIGURES": figures is not None, "MASKED": masked, "EVERY": every is not None}
    kinds |= {"ENCODE": encoder is not None, "AMONG": among is not None}
    launch(_prefix_loss, (rows,), *sides, *inner, *found, *steps, width, x.shape[1], **kinds, **constants)
    return errors[:, :prefixes], left, meet, grad


def _at_once(block: int) -> int:
    """Return how many pairs' rows of a matrix a program reads at once."""
    return max(1, min(_PAIRS, _ON_THE_WAY // block))


def _rows_of(every: Every | None, numbers: Tensor) -> tuple[Tensor, int]:
    """Return where the first row's number is, and the step to the next; `numbers` stand for what is not read."""
    return (numbers, 1) if every is None else (every.number, every.step)


@triton.jit
def _products(rows, latents, left, right, bias, out, width, BLOCK: tl.constexpr):
    i, d = tl.program_id(0), tl.arange(0, BLOCK)
    row, latent = tl.load(rows + i), tl.load(latents + i)
    one = tl.load(left + row * width + d, mask=d < width, other=0.0)
    other = tl.load(right + latent * width + d, mask=d < width, other=0.0)
    tl.store(out + i, tl.sum(one * other, 0) + tl.load(bias + latent))


@triton.jit
def _encode(
    row, begin, end, values, latents, x, right, bias, among, width,
    AMONG: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the values of a row's pairs; `WHOLE`: rows are read at once."""
    d = tl.arange(0, BLOCK)
    if WHOLE:
        one = tl.load(x + row * width + d, mask=d < width, other=0.0)
    for low in range(begin, end, PAIRS):
        i = low + tl.arange(0, PAIRS)
        latent = tl.load(latents + i, mask=i < end, other=0)
        if WHOLE:
            value = tl.sum(rows_of_pairs(right, latent, i < end, d, d < width, width) * one[None, :], 1)
        else:
            value = tl.zeros([PAIRS], x.dtype.element_ty)
            for start in range(0, width, BLOCK):
                o = start + d
                part = tl.load(x + row * width + o, mask=o < width, other=0.0)
                value += tl.sum(rows_of_pairs(right, latent, i < end, o, o < width, width) * part[None, :], 1)
        value += tl.load(bias + latent, mask=i < end, other=0.0)
        if AMONG:
            value = tl.where(tl.load(among + latent, mask=i < end, other=0) > 0, value, 0.0)
        else:
            value = tl.where(value > 0, value, 0.0)
        tl.store(values + i, value, mask=i < end)


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
    x,
    right,
    bias,
    among,
    number,
    step,
    bounds,
    meet,
    errors,
    left,
    grad,
    base_step,
    weight_step,
    error_step,
    width,
    inner_width,
    FIGURES: tl.constexpr,
    MASKED: tl.constexpr,
    EVERY: tl.constexpr,
    ENCODE: tl.constexpr,
    AMONG: tl.constexpr,
    PREFIXES: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER_WHOLE: tl.constexpr,
    INNER_PAIRS: tl.constexpr,
    INNER_BLOCK: tl.constexpr,
):
    """As `errors_and_gradients`, one row; `bounds` [B, P + 1] are where each of its groups begins."""
    row, o, pair = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, PAIRS)
    inside = o < width
    begin, end, bounds = tl.load(starts + row), tl.load(starts + row + 1), bounds + row * (PREFIXES + 1)
    tl.store(bounds, begin)
    tl.store(bounds + PREFIXES, end)
    if ENCODE:
        _encode(row_at(row, number, step, EVERY), begin, end, values, latents, x, right, bias, among, inner_width,
                AMONG, INNER_WHOLE, INNER_PAIRS, INNER_BLOCK)  # fmt: skip
        tl.debug_barrier()  # values that other threads have written are read below
    for p in range(PREFIXES - 1):
        count = tl.zeros([128], tl.int32)
        for low in range(begin, end, 128):
            i = low + tl.arange(0, 128)
            group = tl.load(groups + tl.load(latents + i, mask=i < end, other=0), mask=i < end, other=PREFIXES)
            count += (group <= p).to(tl.int32)
        tl.store(bounds + p + 1, begin + tl.sum(count, 0))
    total = tl.load(base + row * base_step + o, mask=inside, other=0.0)
    wanted = tl.load(y + row_at(row, number, step, EVERY) * width + o, mask=inside, other=0.0)
    if FIGURES:
        active = tl.zeros([128], tl.int32)
        for low in range(begin, end, 128):
            i = low + tl.arange(0, 128)
            active += (tl.load(values + i, mask=i < end, other=0.0) > 0).to(tl.int32)
        tl.store(errors + row * error_step + PREFIXES, tl.sum(active, 0).to(errors.dtype.element_ty))
        tl.store(errors + row * error_step + PREFIXES + 1, tl.sum(wanted * wanted, 0))
    total -= wanted
    tl.debug_barrier()
    for p in range(PREFIXES):
        last = tl.load(bounds + p + 1)
        for low in range(tl.load(bounds + p), last, PAIRS):
            i = low + pair
            latent = tl.load(latents + i, mask=i < last, other=0)
            value = tl.load(values + i, mask=i < last, other=0.0)
            total += tl.sum(value[:, None] * rows_of_pairs(W_dec, latent, i < last, o, inside, width), 0)
        at = row * PREFIXES + p
        tl.store(meet + at * width + o, total, mask=inside)
        tl.store(errors + row * error_step + p, tl.sum(total * total, 0))
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
            directions = rows_of_pairs(W_dec, latent, i < last, o, inside, width)
            slope = tl.sum(directions * total[None, :], 1)
            if MASKED:
                slope = tl.where(tl.load(values + i, mask=i < last, other=0.0) != 0, slope, 0.0)
            tl.store(grad + i, slope, mask=i < last)
