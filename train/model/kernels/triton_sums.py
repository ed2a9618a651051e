"""Sums of a table's rows over the pairs of every latent, in Triton kernels: what all gradients of matrices are.

A program sums one latent's pairs, by a part of the columns. Those of a latent with many pairs are shared by programs,
whose parts are added in order. What is written may have the rows of partners added, of pairs of latents, and leaves
what the gradients' norm is made from, so that nothing reads a gradient for its norm again.
Parameters of kernels have no annotation but `tl.constexpr`, as in `triton_kernels`.
Legend: B rows, F latents, N pairs, d columns, C pairs of latents, K parts of the columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.sparse_latents import SparseLatents

LONG, _PARTS = 512, 8
"""Pairs of a latent above which its sum is shared by programs, and by how many."""
_PAIRS, _BLOCK, _SEARCHED = 8, 256, 256
"""Rows of a table that a program reads at once, columns of its part, and latents whose pairs it looks for."""


class Every(NamedTuple):
    """Every so many-th row of a batch, which ones the device knows."""

    step: int
    number: Tensor
    """[] int64; the first row is this modulo `step`"""


class Partners(NamedTuple):
    """Rows of a matrix that are added to those of other latents."""

    pairs: SparseLatents
    """As of `triton_pairs.partners`"""
    slopes: Tensor
    """[2 C] how much of each"""
    matrix: Tensor
    """[F, d]"""


class NormParts(NamedTuple):
    """What the norm of a gradient [F, d] is made from: of each of its rows, by parts of the columns."""

    squares: Tensor
    """[K, F] sums of squares"""
    along: Tensor
    """[K, F] products with the rows of `matrix`; not written where there is none"""
    matrix: Tensor | None
    """[F, d] rows of norm 1, whose part in the gradient does not count"""


def column_parts(width: int) -> tuple[int, int]:
    """Return the columns of a part, and how many parts a row of `width` has."""
    block = min(_BLOCK, triton.next_power_of_2(width))
    return block, triton.cdiv(width, block)


def norm_parts(gradient: Tensor, matrix: Tensor | None) -> NormParts:
    """Make room for what is noted of a `gradient` [F, d]."""
    room = gradient.new_empty(2, column_parts(gradient.shape[1])[1], len(gradient))
    return NormParts(room[0], room[1], matrix)


def grouped(active: SparseLatents) -> tuple[Tensor, Tensor]:  # [N], [F + 1]
    """Return `active.by_latent`, where it is not known yet by a sort and one kernel; it is known from then on."""
    if "by_latent" not in vars(active):
        found, order = active.latents.sort(stable=True)
        starts = torch.empty(active.d_sae + 1, dtype=torch.int64, device=found.device)
        grid = (triton.cdiv(len(starts), _SEARCHED),)
        launch(_starts, grid, found, starts, len(found), len(starts), BLOCK=_SEARCHED)
        vars(active)["by_latent"] = order, starts  # where its cached property keeps it
    return active.by_latent


def sums_by_latent(
    active: SparseLatents,
    weights: Tensor,  # [N]
    table: Tensor,  # [B, d], or [B * P, d]
    out: Tensor,  # [F, d]
    *,
    add: bool,
    alone: tuple[Tensor, bool] | None = None,  # [F]
    groups: tuple[Tensor, int] | Every | None = None,  # [F]
    times: Tensor | None = None,  # scalar
    partners: Partners | None = None,
    norms: NormParts | None = None,
    most: int | None = None,
) -> None:
    """Write, for every latent, the weighted sum of the table's rows over its pairs, or `add` it to what `out` holds.

    `alone` gets the sums of weights, which are added to what it holds, or not. `groups`: the group of each latent, and
    how many rows the table has for each of the pairs' rows, one for each group; or `Every` so many-th row of the table
    is one of the pairs' rows. All weights count `times`. `partners`: rows that are added as well. `norms` are written
    for each row of `out` that is. `most`: pairs of a latent, if that is known; others have a value of 0.
    """
    assert out.is_contiguous() and table.is_contiguous()
    (latents, width), (order, starts) = out.shape, grouped(active)
    block, parts = column_parts(width)
    by = groups.number if isinstance(groups, Every) else weights if groups is None else groups[0]
    rows_each = 1 if groups is None else groups.step if isinstance(groups, Every) else groups[1]
    sides = (order, starts, weights, active.rows, by, table)
    others = (*grouped(partners.pairs), partners.slopes, partners.pairs.rows) if partners else sides[:4]
    matrix = partners.matrix if partners else table if norms is None or norms.matrix is None else norms.matrix
    noted = (matrix, *((weights, weights) if norms is None else norms[:2]))
    total = (out, weights if alone is None else alone[0], weights if times is None else times, *others, *noted)
    kind = 0 if groups is None else 2 if isinstance(groups, Every) else 1
    sums = {"BY": kind, "PAIRS": _PAIRS, "BLOCK": block, "num_warps": 4}
    asked = {
        "ADD": add,
        "ALONE": 0 if alone is None else 1 + alone[1],
        "TIMES": times is not None,
        "PARTNERS": partners is not None,
        "NORMS": 0 if norms is None else 1 + (norms.matrix is not None),
        "LONG": LONG,
    }
    shared = len(order) > LONG and (most is None or most > LONG)
    launch(_sums_by_latent, (latents, parts), *sides, *total, rows_each, latents, width, SHARED=shared, **asked, **sums)
    if shared:
        slots, places = triton.cdiv(len(order), LONG), (active.latents, *sides)
        shares = (out.new_empty(slots, _PARTS, width), out.new_empty(slots, _PARTS))
        cut = {"LONG": LONG, "PARTS": _PARTS}
        launch(_long_sums, (slots, _PARTS, parts), *places, *shares, rows_each, width, **cut, **sums)
        ends = {"PARTS": _PARTS, "PAIRS": _PAIRS, "BLOCK": block, "num_warps": 4}
        found = (active.latents, order, starts, *shares)
        launch(_add_long_sums, (slots, parts), *found, *total, latents, width, **asked, **ends)


@triton.jit
def _starts(found, starts, count, latents, BLOCK: tl.constexpr):
    """Write where the pairs of each latent begin in `found`, which rises: how many are of latents before it."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low, high = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + count
    left = count
    while left > 0:  # a search by halves, the same steps for all
        middle = (low + high) // 2
        open_ = low < high
        before = tl.load(found + middle, mask=open_, other=0) < latent
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (before == 0), middle, high)
        left = left // 2
    tl.store(starts + latent, low.to(tl.int64), mask=latent < latents)


@triton.jit
def row_at(row, number, step, EVERY: tl.constexpr):
    """Return which row of a batch the pairs' `row` is."""
    if EVERY:
        row = row * step + tl.load(number) % step
    return row


@triton.jit
def rows_of_pairs(table, at, here, o, inside, width):
    """Return rows of a matrix, of as many pairs as `at` and `here` name."""
    return tl.load(table + at[:, None] * width + o[None, :], mask=here[:, None] & inside[None, :], other=0.0)


@triton.jit
def _weighted_sum(
    order,
    weights,
    rows,
    table,
    group,
    rows_each,
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
        row = tl.load(rows + i, mask=j < end, other=0) * rows_each + group
        total += tl.sum(weight[:, None] * rows_of_pairs(table, row, j < end, o, o < width, width), 0)
        alone += weight
    return total, tl.sum(alone, 0)


@triton.jit
def _group(by, latent, rows_each, BY: tl.constexpr):
    """Return which of the table's rows for a row is a latent's."""
    group = tl.full([], 0, tl.int64)
    if BY == 1:
        group = tl.load(by + latent)
    if BY == 2:
        group = tl.load(by) % rows_each
    return group


@triton.jit
def _write_sum(
    total,
    weight,
    latent,
    o,
    out,
    alone,
    times,
    partner_order,
    partner_starts,
    slopes,
    partners,
    matrix,
    squares,
    along,
    latents,
    width,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
    PARTNERS: tl.constexpr,
    NORMS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write a latent's sum, or add it to what is there; with the rows of its partners, and what its norm is made of."""
    if TIMES:
        total *= tl.load(times)
        weight *= tl.load(times)
    if PARTNERS:
        begin, end = tl.load(partner_starts + latent), tl.load(partner_starts + latent + 1)
        more, _ = _weighted_sum(partner_order, slopes, partners, matrix, 0, 1, begin, end, o, width, PAIRS, BLOCK)
        total += more
    if ADD:
        total += tl.load(out + latent * width + o, mask=o < width, other=0.0)
    tl.store(out + latent * width + o, total, mask=o < width)
    if ALONE == 1:
        tl.store(alone + latent, weight, mask=tl.program_id(1) == 0)
    if ALONE == 2:
        tl.store(alone + latent, tl.load(alone + latent) + weight, mask=tl.program_id(1) == 0)
    place = tl.program_id(1) * latents + latent
    if NORMS > 0:
        tl.store(squares + place, tl.sum(total * total, 0))
    if NORMS > 1:
        direction = tl.load(matrix + latent * width + o, mask=o < width, other=0.0)
        tl.store(along + place, tl.sum(total * direction, 0))


@triton.jit
def _sums_by_latent(
    order,
    starts,
    weights,
    rows,
    by,
    table,
    out,
    alone,
    times,
    partner_order,
    partner_starts,
    slopes,
    partners,
    matrix,
    squares,
    along,
    rows_each,
    latents,
    width,
    SHARED: tl.constexpr,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
    PARTNERS: tl.constexpr,
    NORMS: tl.constexpr,
    LONG: tl.constexpr,
    BY: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `sums_by_latent`, one latent of at most `LONG` pairs and a part of its columns."""
    latent, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    short = end >= begin
    if SHARED:
        short = end - begin <= LONG
    if short & ((ADD == 0) | PARTNERS | (end > begin)):  # nothing to add leaves the row as it is
        group = _group(by, latent, rows_each, BY)
        total, weight = _weighted_sum(order, weights, rows, table, group, rows_each, begin, end, o, width, PAIRS, BLOCK)
        _write_sum(total, weight, latent, o, out, alone, times, partner_order, partner_starts, slopes, partners, matrix,
                   squares, along, latents, width, ADD, ALONE, TIMES, PARTNERS, NORMS, PAIRS, BLOCK)  # fmt: skip


@triton.jit
def _long_latent(latent_of, order, starts, slot, LONG: tl.constexpr):
    """Return the latent of every `LONG`-th pair, where its pairs begin and end, and whether they are more than that.

    A latent with so many has such a pair; only the first of them is its own.
    """
    latent = tl.load(latent_of + tl.load(order + slot * LONG))
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    return latent, begin, end, (end - begin > LONG) & (tl.cdiv(begin, LONG) == slot)


@triton.jit
def _long_sums(
    latent_of,
    order,
    starts,
    weights,
    rows,
    by,
    table,
    shares,
    sums,
    rows_each,
    width,
    LONG: tl.constexpr,
    PARTS: tl.constexpr,
    BY: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum one of `PARTS` parts of a latent's pairs, where these are more than `LONG`."""
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    latent, first, last, is_long = _long_latent(latent_of, order, starts, slot, LONG)
    if is_long:
        size = tl.cdiv(last - first, PARTS)
        begin = first + part * size
        end = tl.minimum(begin + size, last)
        group = _group(by, latent, rows_each, BY)
        total, weight = _weighted_sum(order, weights, rows, table, group, rows_each, begin, end, o, width, PAIRS, BLOCK)
        tl.store(shares + (slot * PARTS + part) * width + o, total, mask=o < width)
        if tl.program_id(2) == 0:
            tl.store(sums + slot * PARTS + part, weight)


@triton.jit
def _add_long_sums(
    latent_of,
    order,
    starts,
    shares,
    sums,
    out,
    alone,
    times,
    partner_order,
    partner_starts,
    slopes,
    partners,
    matrix,
    squares,
    along,
    latents,
    width,
    ADD: tl.constexpr,
    ALONE: tl.constexpr,
    TIMES: tl.constexpr,
    PARTNERS: tl.constexpr,
    NORMS: tl.constexpr,
    LONG: tl.constexpr,
    PARTS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the parts of a latent, in their order."""
    slot, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent, _, _, is_long = _long_latent(latent_of, order, starts, slot, LONG)
    if is_long:
        total, weight = tl.zeros([BLOCK], out.dtype.element_ty), tl.full([], 0.0, out.dtype.element_ty)
        for part in range(PARTS):
            total += tl.load(shares + (slot * PARTS + part) * width + o, mask=o < width, other=0.0)
            weight += tl.load(sums + slot * PARTS + part)
        _write_sum(total, weight, latent, o, out, alone, times, partner_order, partner_starts, slopes, partners, matrix,
                   squares, along, latents, width, ADD, ALONE, TIMES, PARTNERS, NORMS, PAIRS, BLOCK)  # fmt: skip
