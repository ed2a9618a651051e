"""Selection in Triton kernels: the largest of a whole batch, or of every row, exactly, without waiting for the device.

Floats are in the order of their bits, so the n-th largest is found digit by digit from histograms. Those of a batch are
read once: what is above a guess of the threshold is kept apart, row by row, and searched. Where the guess was too high,
or let too many through, the same kernels search the whole rows: a number on the device tells them, and the host never
knows. Parameters have no annotation but `tl.constexpr`, as in `triton_kernels`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_sums import Every, row_at

_ROOM = 4
"""Pairs that there is room for apart, over those that are selected."""
_ROW, _READ, _COUNTED = 256, 1024, 4096
"""What a program looks at in turn: of what was kept of its row, of a whole row, and of what was kept of all."""
_TOP, _LOW = tl.constexpr(2048), tl.constexpr(1024)
"""Values of the first digit of a positive float32, 11 bits, and of the two after it, 10 bits each."""


def batch_topk(pre_acts: Tensor, n: int, guess: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Find the `n` largest of `pre_acts` [B, F]: rows, latents and values [n], starts [B + 1], and the smallest one.

    In row order; of several equal to the smallest the first are kept. Where fewer than `n` are positive, pairs of value
    0 fill up, and the smallest is that of the positive ones, or 0.
    """
    (rows, width), device = pre_acts.shape, pre_acts.device
    digits, room = (2 if pre_acts.dtype == torch.bfloat16 else 3), _ROOM * n
    counts = torch.zeros(1 + _TOP + 2 * _LOW, dtype=torch.int32, device=device)
    used, counts = counts[:1], counts[1:]
    places = torch.empty(2, rows, dtype=torch.int32, device=device)
    found, values = torch.empty(room, dtype=torch.int32, device=device), pre_acts.new_empty(room)
    apart = (pre_acts, found, values, *places, used)
    least = torch.empty(2, dtype=torch.float32, device=device)
    launch(_keep, (rows,), *apart, guess, least, room, width, BLOCK=_READ, num_warps=4)
    sizes = (room, n, width)
    programs, cells = triton.cdiv(room, _COUNTED), pre_acts.numel()
    for digit in range(digits):
        searched = (pre_acts, values, used, counts, room, n, cells)
        launch(_histogram, (programs,), *searched, DIGIT=digit, BLOCK=_COUNTED, num_warps=8)
    nth = torch.empty(2, dtype=torch.int32, device=device)
    launch(_find, (1,), counts, nth, n, DIGITS=digits, BLOCK=_ROW, num_warps=4)
    of_row = torch.empty(2, rows, dtype=torch.int32, device=device)
    launch(_count, (rows,), *apart, nth, *of_row, least, *sizes, BLOCK=_ROW, num_warps=4)
    starts = torch.empty(rows + 1, dtype=torch.int64, device=device)
    kept = (*torch.empty(2, n, dtype=torch.int64, device=device), pre_acts.new_empty(n), starts)
    tensors = (*apart, nth, *of_row, least, *kept, guess)
    launch(_compact, (rows,), *tensors, *sizes, rows, BLOCK=_ROW, num_warps=4)
    return kept, least[1]


def row_topk(
    pre_acts: Tensor,
    k: int,
    among: Tensor | None,
    each: int = 1,
    every: Every | None = None,
    count: int | None = None,
) -> tuple[Tensor, ...]:
    """Find the `k` largest of every row of `pre_acts`: what `batch_topk` finds of a batch.

    Of the latents `among`, one for every `each` of them, rounded up: the first of the others follow up to `k`, with
    values of 0. They must be enough. `every`: of so many-th rows alone, which are `count` and are numbered from 0.
    """
    width, rows = pre_acts.shape[1], len(pre_acts) if count is None else count
    pairs = torch.empty(2, rows * k, dtype=torch.int64, device=pre_acts.device)
    starts = torch.empty(rows + 1, dtype=torch.int64, device=pre_acts.device)
    kept = (*pairs, pre_acts.new_empty(rows * k), starts)
    mask = pre_acts if among is None else among.view(torch.uint8)
    sizes = (pre_acts.stride(0), width, k, each)
    first = (starts, 1) if every is None else (every.number, every.step)
    kinds = {"AMONG": among is not None, "EVERY": every is not None}
    launch(_row_topk, (rows,), pre_acts, mask, *first, *kept, *sizes, **kinds, BLOCK=_READ, num_warps=4)
    return kept


@triton.jit
def _key(values):
    """Return positive values as integers of the same order; 0 for all others."""
    values = values.to(tl.float32)
    return tl.where(values > 0, values.to(tl.int32, bitcast=True), 0)


@triton.jit
def _keep(pre_acts, found, values, places, counts, used, guess, least, room, width, BLOCK: tl.constexpr):
    """Keep apart what is above the guess in a row, as long as there is room; `used` counts all of it."""
    row = tl.program_id(0).to(tl.int64)
    floor = tl.maximum(tl.load(guess).to(tl.float32), 0.0)
    if row == 0:
        tl.store(least, float("inf"))
    above = tl.zeros([BLOCK], tl.int32)
    for low in range(0, width, BLOCK):
        latent = low + tl.arange(0, BLOCK)
        value = tl.load(pre_acts + row * width + latent, mask=latent < width, other=0.0).to(tl.float32)
        above += (value > floor).to(tl.int32)
    count = tl.sum(above, 0)
    at = tl.atomic_add(used, count, sem="relaxed")
    tl.store(places + row, at)
    tl.store(counts + row, count)
    if at + count <= room:
        for low in range(0, width, BLOCK):
            latent = low + tl.arange(0, BLOCK)
            value = tl.load(pre_acts + row * width + latent, mask=latent < width, other=0.0)
            kept = value.to(tl.float32) > floor
            one = kept.to(tl.int32)
            place = at + tl.cumsum(one, 0) - one
            tl.store(found + place, latent, mask=kept)
            tl.store(values + place, value, mask=kept)
            at += tl.sum(one, 0)


@triton.jit
def _view(places, counts, used, room, n, width, row):
    """Return whether whole rows are searched, where the row begins, and how long it is."""
    total = tl.load(used)
    whole = (total < n) | (total > room)
    begin = tl.where(whole, row * width, tl.load(places + row).to(tl.int64))
    return whole, begin, tl.where(whole, width, tl.load(counts + row))


@triton.jit
def _load(pre_acts, values, whole, begin, i, length):
    """Return values of a row, of the matrix or of what was kept apart."""
    of_matrix = tl.load(pre_acts + begin + i, mask=i < tl.where(whole, length, 0), other=0.0)
    return tl.where(whole, of_matrix, tl.load(values + begin + i, mask=i < tl.where(whole, 0, length), other=0.0))


@triton.jit
def _pick(counts, wanted, BINS: tl.constexpr):
    """Return the digit of the `wanted`-th largest, -1 where there are fewer; and how many are wanted of those."""
    bins = tl.arange(0, BINS)
    found = tl.load(counts + bins)
    at_least = tl.cumsum(found, 0, reverse=True)
    digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    return digit, wanted - tl.sum(tl.where(bins > digit, found, 0), 0)


@triton.jit
def _digits(counts, n, DIGITS: tl.constexpr):
    """Return the first digits of the `n`-th largest, how many are wanted of those, and whether `n` are positive."""
    digit, wanted = _pick(counts, n, _TOP)
    enough = digit >= 0
    start = tl.maximum(digit, 0)
    if DIGITS > 1:
        digit, wanted = _pick(counts + _TOP, wanted, _LOW)
        start = start * _LOW + tl.maximum(digit, 0)
    if DIGITS > 2:
        digit, wanted = _pick(counts + _TOP + _LOW, wanted, _LOW)
        start = start * _LOW + tl.maximum(digit, 0)
    return start, wanted, enough


@triton.jit
def _histogram(pre_acts, values, used, counts, room, n, cells, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Count how many have each value of a digit, of those with the digits before it; programs take turns."""
    BINS: tl.constexpr = _TOP if DIGIT == 0 else _LOW
    SHIFT: tl.constexpr = 20 - 10 * DIGIT
    BEFORE: tl.constexpr = 0 if DIGIT == 0 else _TOP + (DIGIT - 1) * _LOW
    kept = tl.load(used)
    whole = (kept < n) | (kept > room)
    size = tl.where(whole, cells, kept).to(tl.int64)
    total = tl.zeros([BINS], tl.int32)
    if DIGIT > 0:
        start, _, _ = _digits(counts, n, DIGIT)
    for low in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        key = _key(_load(pre_acts, values, whole, low, tl.arange(0, BLOCK), size - low))
        counted = key > 0
        if DIGIT > 0:
            counted = counted & (key >> (SHIFT + 10) == start)
        total += tl.histogram((key >> SHIFT) & (BINS - 1), BINS, mask=counted)
    tl.atomic_add(counts + BEFORE + tl.arange(0, BINS), total, mask=total > 0, sem="relaxed")


@triton.jit
def _find(counts, nth, n, DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the bits of the `n`-th largest, and how many equal to it are wanted; 0, 0 where fewer are positive."""
    start, wanted, enough = _digits(counts, n, DIGITS)
    if DIGITS == 2:  # of bfloat16 the last 16 bits are 0
        start = start * _LOW
    tl.store(nth, tl.where(enough, start, 0))
    tl.store(nth + 1, tl.where(enough, wanted, 0))


@triton.jit
def _count(
    pre_acts,
    found,
    values,
    places,
    sizes,
    used,
    nth,
    more,
    equal,
    least,
    room,
    n,
    width,
    BLOCK: tl.constexpr,
):
    """Count how many of a row are above the n-th largest, and how many are equal."""
    row = tl.program_id(0).to(tl.int64)
    whole, begin, length = _view(places, sizes, used, room, n, width, row)
    bits = tl.load(nth)
    above_it = tl.zeros([BLOCK], tl.int32)
    at_it = tl.zeros([BLOCK], tl.int32)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    for low in range(0, length, BLOCK):
        i = low + tl.arange(0, BLOCK)
        value = _load(pre_acts, values, whole, begin, i, length).to(tl.float32)
        key = _key(value)
        above_it += (key > bits).to(tl.int32)
        at_it += ((key == bits) & (key > 0)).to(tl.int32)
        smallest = tl.minimum(smallest, tl.where(value > 0, value, float("inf")))
    tl.store(more + row, tl.sum(above_it, 0))
    tl.store(equal + row, tl.sum(at_it, 0))
    if bits == 0:  # all that are positive are selected
        tl.atomic_min(least, tl.min(smallest, 0), sem="relaxed")


@triton.jit
def _compact(
    pre_acts,
    found,
    values,
    places,
    sizes,
    used,
    nth,
    more,
    equal,
    least,
    rows,
    latents,
    kept_values,
    starts,
    guess,
    room,
    n,
    width,
    height,
    BLOCK: tl.constexpr,
):
    """Write a row's pairs above the n-th largest, and the first of those equal, behind those of the rows before."""
    row = tl.program_id(0).to(tl.int64)
    whole, begin, length = _view(places, sizes, used, room, n, width, row)
    bits, ties = tl.load(nth), tl.load(nth + 1)
    above_it = tl.zeros([BLOCK], tl.int32)
    at_it = tl.zeros([BLOCK], tl.int32)
    for low in range(0, tl.program_id(0), BLOCK):
        i = low + tl.arange(0, BLOCK)
        above_it += tl.load(more + i, mask=i < row, other=0)
        at_it += tl.load(equal + i, mask=i < row, other=0)
    before = tl.minimum(tl.sum(at_it, 0), ties)
    left, at = ties - before, tl.sum(above_it, 0) + before
    tl.store(starts + row, at.to(tl.int64))
    for low in range(0, length, BLOCK):
        i = low + tl.arange(0, BLOCK)
        value = _load(pre_acts, values, whole, begin, i, length)
        latent = tl.where(whole, i, tl.load(found + begin + i, mask=i < tl.where(whole, 0, length), other=0))
        key = _key(value)
        tie = ((key == bits) & (key > 0)).to(tl.int32)
        kept = (key > bits) | ((tie > 0) & (tl.cumsum(tie, 0) <= left))
        one = kept.to(tl.int32)
        place = at + tl.cumsum(one, 0) - one
        tl.store(rows + place, tl.zeros([BLOCK], tl.int64) + row, mask=kept)
        tl.store(latents + place, latent.to(tl.int64), mask=kept)
        tl.store(kept_values + place, value, mask=kept)
        at += tl.sum(one, 0)
        left -= tl.sum(tie, 0)
    if row == height - 1:
        tl.store(starts + height, n)
        for low in range(at, n, BLOCK):
            place = low + tl.arange(0, BLOCK)
            tl.store(rows + place, tl.zeros([BLOCK], tl.int64) + row, mask=place < n)
            tl.store(latents + place, tl.zeros([BLOCK], tl.int64) + width - 1, mask=place < n)
            tl.store(kept_values + place, tl.zeros([BLOCK], tl.float32), mask=place < n)
    if row == 0:
        smallest = tl.load(least)
        smallest = tl.where(smallest == float("inf"), 0.0, smallest)
        smallest = tl.where(bits > 0, bits.to(tl.float32, bitcast=True), smallest)
        tl.store(least + 1, smallest)
        tl.store(guess, (0.95 * smallest).to(guess.dtype.element_ty))


@triton.jit
def _order(values):
    """Return values as integers from 1 up, of the same order."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483649


@triton.jit
def _row_topk(
    pre_acts,
    among,
    number,
    every,
    rows,
    latents,
    values,
    starts,
    step,
    width,
    k,
    each,
    AMONG: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the largest of a row, digit by digit, 11 bits at a time."""
    row = tl.program_id(0).to(tl.int64)
    begin = row_at(row, number, every, EVERY) * step
    others = tl.full([], 0, tl.int32)
    if AMONG:
        some = tl.full([], 0, tl.int32)
        for low in range(0, width, BLOCK):
            latent = low + tl.arange(0, BLOCK)
            some += tl.sum(tl.load(among + latent, mask=latent < width, other=0).to(tl.int32), 0)
        others = k - tl.minimum(k, (some + each - 1) // each)
    start, wanted = tl.full([], 0, tl.int64), tl.full([], k, tl.int32) - others
    if wanted > 0:
        for digit in tl.static_range(3):
            shift = 22 - 11 * digit
            total = tl.zeros([_TOP], tl.int32)
            for low in range(0, width, BLOCK):
                latent = low + tl.arange(0, BLOCK)
                inside = latent < width
                order = _order(tl.load(pre_acts + begin + latent, mask=inside, other=0.0))
                if AMONG:
                    order = tl.where(tl.load(among + latent, mask=inside, other=0) > 0, order, 0)
                counted = inside & (order >> (shift + 11) == start)
                total += tl.histogram(((order >> shift) & (_TOP - 1)).to(tl.int32), _TOP, mask=counted)
            bins = tl.arange(0, _TOP)
            at_least = tl.cumsum(total, 0, reverse=True)
            found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
            wanted -= tl.sum(tl.where(bins > found, total, 0), 0)
            start = start * _TOP + found
    at = row * k
    tl.store(starts + row, at)
    tl.store(starts + row + 1, at + k)  # the same as the next row does
    for low in range(0, width, BLOCK):
        latent = low + tl.arange(0, BLOCK)
        inside = latent < width
        value = tl.load(pre_acts + begin + latent, mask=inside, other=0.0)
        order = _order(value)
        listed = inside
        if AMONG:
            listed = tl.load(among + latent, mask=inside, other=0) > 0
        tie = (listed & (order == start)).to(tl.int32)
        kept = (listed & (order > start)) | ((tie > 0) & (tl.cumsum(tie, 0) <= wanted))
        if AMONG:
            value = tl.where(listed, value, 0.0)
            other = (inside & ~listed).to(tl.int32)
            kept |= (other > 0) & (tl.cumsum(other, 0) <= others)
            others -= tl.sum(other, 0)
        one = kept.to(tl.int32)
        place = at + tl.cumsum(one, 0) - one
        tl.store(rows + place, tl.zeros([BLOCK], tl.int64) + row, mask=kept)
        tl.store(latents + place, latent.to(tl.int64), mask=kept)
        tl.store(values + place, value, mask=kept)
        at += tl.sum(one, 0)
        wanted -= tl.sum(tie, 0)
