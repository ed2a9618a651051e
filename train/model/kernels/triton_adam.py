"""Adam in one pass over the rows of every parameter, in Triton kernels, after the gradients' norm is known.

Of gradients that `triton_sums` writes the norm is made from what is noted there; others are read for it. A kernel of
one program clips, and the pass drops the gradient's part along decoder rows, moves the weights, gives decoder rows norm
1 and writes what the next product reads in bfloat16. The learning rate, the count of steps and the clipping stay on the
device. Every sum runs in one order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_sums import NormParts

_SUMMED = 8192
"""Squares that the one program of `_clip` sums at once."""
_PER_WARP = 256
"""Numbers of a row for each warp of `_adam` that moves all: with more, registers spill."""
_LATENTS = 128
"""Rows that a program of `_noted_squares` looks at."""


class Moved(NamedTuple):
    """A parameter as it lies in memory, with what moves it."""

    rows: Tensor
    grad: Tensor
    first: Tensor
    second: Tensor
    low: Tensor | None
    """Gets the parameter in its own type"""


def row_squares(grad: Tensor, rows: Tensor, unit: bool, squares: Tensor) -> None:
    """Write the sum of squares of each row of `grad` to `squares`; `unit`: without its part along the row of `rows`.

    A last row may be shorter than the others: `grad` and `rows` [n] are cut at it.
    """
    width = _width(grad)
    block = triton.next_power_of_2(width)
    launch(_row_squares, (len(squares),), grad, rows, squares, width, grad.numel(), UNIT=unit, BLOCK=block)


def noted_squares(noted: Sequence[tuple[NormParts, Tensor]]) -> None:  # [F] each
    """Write the same, to the second of each, from what was noted when the gradient was written; of one or two."""
    (one, _), (other, _) = noted[0], noted[-1]
    latents, sides = one.squares.shape[1], [(*part[:2], out, len(part.squares)) for part, out in (noted[0], noted[-1])]
    of = {"FIRST": one.matrix is not None, "SECOND": other.matrix is not None, "BLOCK": _LATENTS}
    launch(_noted_squares, (triton.cdiv(latents, _LATENTS), len(noted)), *sides[0], *sides[1], latents, **of)


def clip(
    squares: Tensor, b_enc: Tensor, b_dec: Tensor, limit: float, powers: Tensor, count: Tensor, scalars: Tensor
) -> None:
    """Write the gradients' norm, their scale under `limit` and Adam's corrections to `scalars` [5], behind the rate.

    The norm is of all `squares`, and of the gradients of `b_enc` and `b_dec`. `powers` [4] float64: the powers of both
    betas, of the step before and then of this one, and the betas. `count` counts steps.
    """
    sizes = (len(squares), len(b_enc), len(b_dec))
    launch(_clip, (1,), squares, b_enc, b_dec, powers, count, scalars, *sizes, limit, BLOCK=_SUMMED)


def adam(moved: Moved, scalars: Tensor, *, times: float, betas: tuple[float, float], eps: float) -> None:
    """Move a parameter, after `clip`; `times`: its rate over that of `scalars`."""
    width, rows = _width(moved.grad), rows_of(moved.grad)
    tensors, numbers = (*moved[:4], *_with_low(moved), *_with_low(moved), *moved[:4]), _numbers(times, betas, eps)
    of = {"ALL": False, "UNIT": False, "SHADOW": False, "BLOCK": triton.next_power_of_2(width)}
    launch(_adam, (rows, 1), *tensors, scalars, width, width, rows, moved.grad.numel(), *numbers, **of)


def adam_of_all(
    W_dec: Moved,
    b_dec: Moved,
    W_enc: Moved,
    b_enc: Moved,
    scalars: Tensor,
    *,
    unit: bool,
    times: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Move all of a transcoder, in one launch; `unit` and `times` are of `W_dec`, and the encoder alone has a `low`."""
    width, other_width, latents = _width(W_dec.grad), _width(W_enc.grad), rows_of(W_dec.grad)
    tensors = (*W_dec[:4], *_with_low(W_enc), *_with_low(b_enc), *b_dec[:4])
    sizes, numbers = (width, other_width, latents, W_dec.grad.numel()), _numbers(times, betas, eps)
    of = {"ALL": True, "UNIT": unit, "SHADOW": W_enc.low is not None}
    block = triton.next_power_of_2(max(width, other_width))
    warps = max(1, min(16, block // _PER_WARP))
    launch(_adam, (latents + 1, 2), *tensors, scalars, *sizes, *numbers, **of, BLOCK=block, num_warps=warps)


def _numbers(times: float, betas: tuple[float, float], eps: float) -> tuple[float, ...]:
    return times, betas[0], 1 - betas[0], betas[1], 1 - betas[1], eps


def _with_low(one: Moved) -> tuple[Tensor, ...]:
    return *one[:4], one.rows if one.low is None else one.low


def rows_of(tensor: Tensor) -> int:
    """Return the rows that a parameter is cut into: its own, or parts of a vector."""
    return triton.cdiv(tensor.numel(), _width(tensor))


def _width(tensor: Tensor) -> int:
    """Return the numbers of a row, of a parameter as it lies in memory."""
    return 1024 if tensor.dim() == 1 else max(tensor.stride())


@triton.jit
def _row_squares(grad, rows, squares, width, size, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * width + o
    inside = (o < width) & (at < size)
    slope = tl.load(grad + at, mask=inside, other=0.0)
    if UNIT:
        weight = tl.load(rows + at, mask=inside, other=0.0)
        slope -= tl.sum(slope * weight, 0) * weight
    tl.store(squares + row, tl.sum(slope * slope, 0))


@triton.jit
def _row_square(parts, along, squares, count, latents, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Write the squared norm of rows from their parts."""
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total, part = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for one in range(count):
        total += tl.load(parts + one * latents + latent, mask=latent < latents, other=0.0).to(tl.float64)
        if UNIT:
            part += tl.load(along + one * latents + latent, mask=latent < latents, other=0.0).to(tl.float64)
    total = tl.maximum(total - part * part, 0.0)
    tl.store(squares + latent, total.to(squares.dtype.element_ty), mask=latent < latents)


@triton.jit
def _noted_squares(
    parts,
    along,
    squares,
    count,
    other_parts,
    other_along,
    other_squares,
    other_count,
    latents,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _row_square(parts, along, squares, count, latents, FIRST, BLOCK)
    else:
        _row_square(other_parts, other_along, other_squares, other_count, latents, SECOND, BLOCK)


@triton.jit
def _squared(numbers, count, BLOCK: tl.constexpr):
    """Return the squares of some numbers, many of them in one."""
    total = tl.zeros([BLOCK], tl.float64)
    for low in range(0, count, BLOCK):
        i = low + tl.arange(0, BLOCK)
        number = tl.load(numbers + i, mask=i < count, other=0.0).to(tl.float64)
        total += number * number
    return total


@triton.jit
def _clip(squares, b_enc, b_dec, powers, steps, scalars, count, latents, width, limit, BLOCK: tl.constexpr):
    total = _squared(b_enc, latents, BLOCK) + _squared(b_dec, width, BLOCK)
    for low in range(0, count, BLOCK):
        i = low + tl.arange(0, BLOCK)
        total += tl.load(squares + i, mask=i < count, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    tl.store(scalars + 1, norm)
    tl.store(scalars + 2, tl.minimum(limit / (norm + 1e-6), 1.0))
    first, second = tl.load(powers) * tl.load(powers + 2), tl.load(powers + 1) * tl.load(powers + 3)
    tl.store(powers, first)
    tl.store(powers + 1, second)
    tl.store(scalars + 3, (1 - first).to(tl.float32))
    tl.store(scalars + 4, (1 - second).to(tl.float32))
    tl.store(steps, tl.load(steps) + 1)


@triton.jit
def _moves(slope, first, second, at, inside, scalars, times, keep1, take1, keep2, take2, eps):
    """Bring the moments up to date, and return what is taken from the weights."""
    slope *= tl.load(scalars + 2)
    m = keep1 * tl.load(first + at, mask=inside, other=0.0) + take1 * slope
    v = keep2 * tl.load(second + at, mask=inside, other=0.0) + take2 * slope * slope
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    rate = tl.load(scalars) * times / tl.load(scalars + 3)
    return rate * m / (tl.sqrt(v / tl.load(scalars + 4)) + eps)


@triton.jit
def _move_row(
    weight, slope, rows, first, second, at, inside, scalars, times, keep1, take1, keep2, take2, eps, UNIT: tl.constexpr
):
    """Move a row, give it norm 1 where it is to have that, and return it."""
    if UNIT:
        slope -= tl.sum(slope * weight, 0) * weight
    weight -= _moves(slope, first, second, at, inside, scalars, times, keep1, take1, keep2, take2, eps)
    if UNIT:  # a row of 0 has no direction, and stays
        weight /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, weight * weight, 0.0), 0)), 1.1754944e-38)
    tl.store(rows + at, weight, mask=inside)
    return weight


@triton.jit
def _adam(
    rows, grad, first, second,
    other, other_grad, other_first, other_second, other_shadow,
    bias, bias_grad, bias_first, bias_second, bias_shadow,
    last, last_grad, last_first, last_second,
    scalars, width, other_width, count, size, times, keep1, take1, keep2, take2, eps,
    ALL: tl.constexpr, UNIT: tl.constexpr, SHADOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move a row of a parameter; of `ALL`, a row of another one with its bias, or, behind the rows, the last one."""
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if (tl.program_id(1) == 0) & (row < count):
        at = row * width + o
        inside = (o < width) & (at < size)
        weight = tl.load(rows + at, mask=inside, other=0.0)
        slope = tl.load(grad + at, mask=inside, other=0.0)
        _move_row(weight, slope, rows, first, second, at, inside, scalars, times, keep1, take1, keep2, take2, eps, UNIT)
    if ALL:
        if (tl.program_id(1) == 0) & (row == count):
            inside = o < width
            weight = tl.load(last + o, mask=inside, other=0.0)
            slope = tl.load(last_grad + o, mask=inside, other=0.0)
            _move_row(weight, slope, last, last_first, last_second, o, inside, scalars, 1.0, keep1, take1, keep2, take2,
                      eps, False)  # fmt: skip
        if (tl.program_id(1) == 1) & (row < count):
            at, inside = row * other_width + o, o < other_width
            weight = tl.load(other + at, mask=inside, other=0.0)
            slope = tl.load(other_grad + at, mask=inside, other=0.0)
            weight = _move_row(weight, slope, other, other_first, other_second, at, inside, scalars, 1.0, keep1, take1,
                               keep2, take2, eps, False)  # fmt: skip
            one = row + tl.arange(0, 1)
            number, slope = tl.load(bias + one), tl.load(bias_grad + one)
            number -= _moves(slope, bias_first, bias_second, one, one >= 0, scalars, 1.0, keep1, take1, keep2, take2,
                             eps)  # fmt: skip
            tl.store(bias + one, number)
            if SHADOW:
                tl.store(other_shadow + at, weight.to(other_shadow.dtype.element_ty), mask=inside)
                tl.store(bias_shadow + one, number.to(bias_shadow.dtype.element_ty))
