"""Sums of a table's rows over the pairs of every latent, in Triton kernels: what all gradients of matrices are.

A program sums one latent's pairs, by a part of the columns of one matrix; a launch writes the sums of two matrices.
Those of a latent with many pairs are shared by programs, whose parts are added in order. What is written may have the
rows of partners added, of pairs of latents, and leaves what the gradients' norm is made from, so that nothing reads a
gradient for its norm again.
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


class Extra(NamedTuple):
    """Rows of which every latent gets its own share: `n` of them, from row `number * n` on, modulo all."""

    slopes: Tensor
    """[F, n] how much of each"""
    rows: Tensor
    """[R, d]"""
    times: Tensor
    """[R, 1] what a share of 1 adds to the sum of weights"""
    number: Tensor
    """[] int64"""


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


class Sums(NamedTuple):
    """A matrix of sums: of every latent, the weighted sum of a table's rows over its pairs."""

    weights: Tensor
    """[N] of the pairs"""
    table: Tensor
    """[B, d], or [B * P, d]"""
    out: Tensor
    """[F, d] which gets the sums"""
    add: bool
    """Whether they are added to what it holds, which is else written over"""
    alone: tuple[Tensor, bool] | None = None
    """[F] which gets the sums of weights, and whether they are added"""
    groups: tuple[Tensor, int] | Every | None = None
    """The group [F] of each latent, and how many rows the table has for each of the pairs' rows, one for each group; or
    `Every` so many-th row of the table is one of the pairs' rows"""
    times: Tensor | None = None
    """[] which all weights count"""
    norms: NormParts | None = None
    """Written for each row of `out` that is"""

    @property
    def rows_each(self) -> int:
        """Rows of the table for each of the pairs' rows, or from one of these to the next."""
        return 1 if self.groups is None else self.groups.step if isinstance(self.groups, Every) else self.groups[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a kernel reads and writes; `weights` stand for what there is not."""
        by = self.groups.number if isinstance(self.groups, Every) else (self.groups or (self.weights,))[0]
        alone, times = self.alone[0] if self.alone else self.weights, self.weights if self.times is None else self.times
        return self.weights, by, self.table, self.out, alone, times, self.norms.squares if self.norms else self.weights

    def kinds(self) -> dict[str, int]:
        """Return what a kernel is asked for."""
        return {
            "ADD": self.add,
            "ALONE": 0 if self.alone is None else 1 + self.alone[1],
            "TIMES": self.times is not None,
            "NORMS": 0 if self.norms is None else 1 + (self.norms.matrix is not None),
            "BY": 0 if self.groups is None else 2 if isinstance(self.groups, Every) else 1,
        }


def sums_by_latent(
    active: SparseLatents,
    first: Sums,
    second: Sums | None = None,
    *,
    partners: Partners | None = None,
    extra: Extra | None = None,
    every_row: Tensor | None = None,  # [d]
    most: int | None = None,
) -> None:
    """Write one or two matrices of sums over the same pairs.

    Rows of `partners` are added to the first, and `extra` ones to the second, whose norms have no matrix. `every_row`
    gets the sum of the first table's rows, of each row's first group, `times` as well. `most`: pairs of a latent, if
    that is known; others have a value of 0.
    """
    order, starts = grouped(active)
    other, sides = second or first, 1 + (second is not None)
    assert all(one.out.is_contiguous() and one.table.is_contiguous() for one in (first, other))
    widths = first.out.shape[1], other.out.shape[1]
    block, parts = column_parts(max(widths))
    pairs = (order, starts, active.rows)
    joined = (*grouped(partners.pairs), partners.slopes, partners.pairs.rows) if partners else (*pairs, order)
    noted = first.norms if first.norms and first.norms.matrix is not None else None
    matrix = partners.matrix if partners else noted.matrix if noted else first.table
    along = noted.along if noted else first.table
    tensors = (*pairs, *first.tensors, matrix, along, *joined, *other.tensors, *(extra or [order] * 4))
    sizes = (first.rows_each, other.rows_each, *widths, len(first.out), len(extra.rows) if extra else 1)
    kinds = {"SIDES": sides, "PARTNERS": partners is not None, "EXTRA": extra.slopes.shape[1] if extra else 0}
    kinds |= first.kinds()
    kinds |= {f"OTHER_{name}": kind if second else 0 for name, kind in other.kinds().items()}
    cut = {"LONG": LONG, "PAIRS": _PAIRS, "BLOCK": block, "num_warps": min(4, max(1, block // 64))}
    shared = len(order) > LONG and (most is None or most > LONG)
    grid = (len(first.out), parts, sides)
    launch(_sums_by_latent, grid, *tensors, *sizes, SHARED=shared, **kinds, **cut)
    if not shared and every_row is None:
        return
    slots, of_rows = triton.cdiv(len(order), LONG) if shared else 0, every_row is not None
    room = [first.out.new_empty(slots + of_rows, _PARTS, width) for width in widths[:sides]]
    weights = [first.out.new_empty(slots + of_rows, _PARTS) for _ in room]
    shares = (room[0], weights[0], room[-1], weights[-1], first.out if every_row is None else every_row)
    more, kinds = (*sizes, slots, len(active.starts) - 1, parts), {**kinds, "ROWS": of_rows, "PARTS": _PARTS}
    grid = (slots + of_rows, _PARTS, parts * sides)
    launch(_long_sums, grid, active.latents, *tensors, *shares, *more, **kinds, **cut)
    launch(_add_long_sums, (slots + of_rows, parts, sides), active.latents, *tensors, *shares, *more, **kinds, **cut)


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
def _so_often(total, weight, times, TIMES: tl.constexpr):
    """Return both sums, a number of times."""
    if TIMES:
        total *= tl.load(times)
        weight *= tl.load(times)
    return total, weight


@triton.jit
def _with_extra(
    total, weight, latent, o, slopes, rows, times, number, count, width, EXTRA: tl.constexpr
):  # fmt: skip
    """Return both sums with a latent's share of `EXTRA` of `count` rows."""
    for n in range(EXTRA):
        place = (tl.load(number) * EXTRA + n) % count
        slope = tl.load(slopes + latent * EXTRA + n)
        total += slope * tl.load(rows + place * width + o, mask=o < width, other=0.0)
        weight += slope * tl.load(times + place)
    return total, weight


@triton.jit
def _write_sum(
    total, weight, latent, o, out, alone, squares, matrix, along,
    partner_order, partner_starts, slopes, partners,
    latents, width,
    ADD: tl.constexpr, ALONE: tl.constexpr, PARTNERS: tl.constexpr, NORMS: tl.constexpr,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a latent's sum, or add it to what is there; with the rows of its partners, and what its norm is made of."""
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
    place, here = tl.program_id(1) * latents + latent, tl.program_id(1) * BLOCK < width
    if NORMS > 0:
        tl.store(squares + place, tl.sum(total * total, 0), mask=here)
    if NORMS > 1:
        direction = tl.load(matrix + latent * width + o, mask=o < width, other=0.0)
        tl.store(along + place, tl.sum(total * direction, 0), mask=here)


@triton.jit
def _sums_by_latent(
    order, starts, rows,
    weights, by, table, out, alone, times, squares, matrix, along,
    partner_order, partner_starts, slopes, partners,
    other_weights, other_by, other_table, other_out, other_alone, other_times, other_squares,
    extra_slopes, extra_rows, extra_times, number,
    rows_each, other_rows_each, width, other_width, latents, extras,
    SIDES: tl.constexpr, SHARED: tl.constexpr, PARTNERS: tl.constexpr, EXTRA: tl.constexpr,
    ADD: tl.constexpr, ALONE: tl.constexpr, TIMES: tl.constexpr, NORMS: tl.constexpr, BY: tl.constexpr,
    OTHER_ADD: tl.constexpr, OTHER_ALONE: tl.constexpr, OTHER_TIMES: tl.constexpr, OTHER_NORMS: tl.constexpr,
    OTHER_BY: tl.constexpr,
    LONG: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `sums_by_latent`, one latent of at most `LONG` pairs and a part of its columns, of one of the matrices."""
    latent, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    short = end >= begin
    if SHARED:
        short = end - begin <= LONG
    # Nothing to add leaves a row as it is.
    if (tl.program_id(2) == 0) & short & ((ADD == 0) | PARTNERS | (end > begin)):
        group = _group(by, latent, rows_each, BY)
        total, weight = _weighted_sum(order, weights, rows, table, group, rows_each, begin, end, o, width, PAIRS, BLOCK)
        total, weight = _so_often(total, weight, times, TIMES)
        _write_sum(total, weight, latent, o, out, alone, squares, matrix, along, partner_order, partner_starts, slopes,
                   partners, latents, width, ADD, ALONE, PARTNERS, NORMS, PAIRS, BLOCK)  # fmt: skip
    if SIDES == 2:  # noqa: SIM102 - alone, it leaves out what follows
        if (tl.program_id(2) == 1) & short & ((OTHER_ADD == 0) | (EXTRA > 0) | (end > begin)):
            group = _group(other_by, latent, other_rows_each, OTHER_BY)
            total, weight = _weighted_sum(order, other_weights, rows, other_table, group, other_rows_each, begin, end,
                                          o, other_width, PAIRS, BLOCK)  # fmt: skip
            total, weight = _so_often(total, weight, other_times, OTHER_TIMES)
            total, weight = _with_extra(total, weight, latent, o, extra_slopes, extra_rows, extra_times, number, extras,
                                        other_width, EXTRA)  # fmt: skip
            _write_sum(total, weight, latent, o, other_out, other_alone, other_squares, matrix, along, partner_order,
                       partner_starts, slopes, partners, latents, other_width, OTHER_ADD, OTHER_ALONE, False,
                       OTHER_NORMS, PAIRS, BLOCK)  # fmt: skip


@triton.jit
def _long_latent(latent_of, order, starts, slot, LONG: tl.constexpr):
    """Return the latent of every `LONG`-th pair, where its pairs begin and end, and whether they are more than that.

    A latent with so many has such a pair; only the first of them is its own.
    """
    latent = tl.load(latent_of + tl.load(order + slot * LONG))
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    return latent, begin, end, (end - begin > LONG) & (tl.cdiv(begin, LONG) == slot)


@triton.jit
def _share(
    latent_of, order, starts, rows, weights, by, table, shares, sums, rows_each, width, o,
    LONG: tl.constexpr, PARTS: tl.constexpr, BY: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one of `PARTS` parts of a latent's pairs, where these are more than `LONG`."""
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latent, first, last, is_long = _long_latent(latent_of, order, starts, slot, LONG)
    if is_long:
        size = tl.cdiv(last - first, PARTS)
        begin = first + part * size
        end = tl.minimum(begin + size, last)
        group = _group(by, latent, rows_each, BY)
        total, weight = _weighted_sum(order, weights, rows, table, group, rows_each, begin, end, o, width, PAIRS, BLOCK)
        tl.store(shares + (slot * PARTS + part) * width + o, total, mask=o < width)
        tl.store(sums + slot * PARTS + part, weight)  # the same as the programs of other columns


@triton.jit
def _long_sums(
    latent_of, order, starts, rows,
    weights, by, table, out, alone, times, squares, matrix, along,
    partner_order, partner_starts, slopes, partners,
    other_weights, other_by, other_table, other_out, other_alone, other_times, other_squares,
    extra_slopes, extra_rows, extra_times, number,
    shares, sums, other_shares, other_sums, every_row,
    rows_each, other_rows_each, width, other_width, latents, extras, slots, height, parts,
    SIDES: tl.constexpr, PARTNERS: tl.constexpr, EXTRA: tl.constexpr,
    ADD: tl.constexpr, ALONE: tl.constexpr, TIMES: tl.constexpr, NORMS: tl.constexpr, BY: tl.constexpr,
    OTHER_ADD: tl.constexpr, OTHER_ALONE: tl.constexpr, OTHER_TIMES: tl.constexpr, OTHER_NORMS: tl.constexpr,
    OTHER_BY: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum a part of a latent's pairs, where these are many; or, in the slot behind, of the first table's rows."""
    slot, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o = (tl.program_id(2) % parts) * BLOCK + tl.arange(0, BLOCK)
    if slot < slots:
        if tl.program_id(2) < parts:
            _share(latent_of, order, starts, rows, weights, by, table, shares, sums, rows_each, width, o,
                   LONG, PARTS, BY, PAIRS, BLOCK)  # fmt: skip
        if SIDES == 2:  # noqa: SIM102 - alone, it leaves out what follows
            if tl.program_id(2) >= parts:
                _share(latent_of, order, starts, rows, other_weights, other_by, other_table, other_shares, other_sums,
                       other_rows_each, other_width, o, LONG, PARTS, OTHER_BY, PAIRS, BLOCK)  # fmt: skip
    if ROWS:  # noqa: SIM102 - alone, it leaves out what follows
        if (slot == slots) & (tl.program_id(2) < parts):
            size = tl.cdiv(height, PARTS)
            last, total = tl.minimum((part + 1) * size, height), tl.zeros([BLOCK], table.dtype.element_ty)
            for low in range(part * size, last, PAIRS):
                row = low + tl.arange(0, PAIRS)
                total += tl.sum(rows_of_pairs(table, row.to(tl.int64) * rows_each, row < last, o, o < width, width), 0)
            tl.store(shares + (slot * PARTS + part) * width + o, total, mask=o < width)


@triton.jit
def _sum_of_shares(shares, slot, o, width, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of a sum, in their order."""
    total = tl.zeros([BLOCK], shares.dtype.element_ty)
    for part in range(PARTS):
        total += tl.load(shares + (slot * PARTS + part) * width + o, mask=o < width, other=0.0)
    return total


@triton.jit
def _sum_of_weights(sums, slot, PARTS: tl.constexpr):
    """Add the parts of a sum of weights, in their order."""
    weight = tl.full([], 0.0, sums.dtype.element_ty)
    for part in range(PARTS):
        weight += tl.load(sums + slot * PARTS + part)
    return weight


@triton.jit
def _add_long_sums(
    latent_of, order, starts, rows,
    weights, by, table, out, alone, times, squares, matrix, along,
    partner_order, partner_starts, slopes, partners,
    other_weights, other_by, other_table, other_out, other_alone, other_times, other_squares,
    extra_slopes, extra_rows, extra_times, number,
    shares, sums, other_shares, other_sums, every_row,
    rows_each, other_rows_each, width, other_width, latents, extras, slots, height, parts,
    SIDES: tl.constexpr, PARTNERS: tl.constexpr, EXTRA: tl.constexpr,
    ADD: tl.constexpr, ALONE: tl.constexpr, TIMES: tl.constexpr, NORMS: tl.constexpr, BY: tl.constexpr,
    OTHER_ADD: tl.constexpr, OTHER_ALONE: tl.constexpr, OTHER_TIMES: tl.constexpr, OTHER_NORMS: tl.constexpr,
    OTHER_BY: tl.constexpr,
    ROWS: tl.constexpr, LONG: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums whose parts `_long_sums` has left."""
    slot, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if slot < slots:
        latent, _, _, is_long = _long_latent(latent_of, order, starts, slot, LONG)
        if is_long & (tl.program_id(2) == 0):
            total, weight = _sum_of_shares(shares, slot, o, width, PARTS, BLOCK), _sum_of_weights(sums, slot, PARTS)
            total, weight = _so_often(total, weight, times, TIMES)
            _write_sum(total, weight, latent, o, out, alone, squares, matrix, along, partner_order, partner_starts,
                       slopes, partners, latents, width, ADD, ALONE, PARTNERS, NORMS, PAIRS, BLOCK)  # fmt: skip
        if SIDES == 2:  # noqa: SIM102 - alone, it leaves out what follows
            if is_long & (tl.program_id(2) == 1):
                total = _sum_of_shares(other_shares, slot, o, other_width, PARTS, BLOCK)
                weight = _sum_of_weights(other_sums, slot, PARTS)
                total, weight = _so_often(total, weight, other_times, OTHER_TIMES)
                total, weight = _with_extra(total, weight, latent, o, extra_slopes, extra_rows, extra_times, number,
                                            extras, other_width, EXTRA)  # fmt: skip
                _write_sum(total, weight, latent, o, other_out, other_alone, other_squares, matrix, along,
                           partner_order, partner_starts, slopes, partners, latents, other_width, OTHER_ADD,
                           OTHER_ALONE, False, OTHER_NORMS, PAIRS, BLOCK)  # fmt: skip
    if ROWS:  # noqa: SIM102 - alone, it leaves out what follows
        if (slot == slots) & (tl.program_id(2) == 0):
            total = _sum_of_shares(shares, slot, o, width, PARTS, BLOCK)
            if TIMES:
                total *= tl.load(times)
            tl.store(every_row + o, total, mask=o < width)
