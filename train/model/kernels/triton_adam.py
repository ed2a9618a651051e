"""Adam in two passes over the rows of every parameter, in Triton kernels: norms, then everything else.

The first pass drops the decoder's parallel part and sums squares, a kernel of one program clips, and the second pass
moves the weights, gives decoder rows norm 1 and writes what the next product reads in bfloat16. The learning rate, the
count of steps and the clipping stay on the device. Every sum runs in one order.
"""

import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch

_SUMMED = 8192
"""Squares that the one program of `_clip` sums at once."""


def row_squares(grad: Tensor, rows: Tensor, unit: bool, along: Tensor, squares: Tensor) -> None:
    """Write the sum of squares of each row of `grad` to `squares`; `unit`: without its part along the row of `rows`.

    That part is written to `along`. A last row may be shorter than the others: `grad` and `rows` [n] are cut at it.
    """
    width = _width(grad)
    block = triton.next_power_of_2(width)
    launch(_row_squares, (len(squares),), grad, rows, along, squares, width, grad.numel(), UNIT=unit, BLOCK=block)


def clip(squares: Tensor, limit: float, powers: Tensor, scalars: Tensor) -> None:
    """Write the gradients' norm, their scale under `limit` and Adam's corrections to `scalars` [5], behind the rate.

    `powers` [4] float64: the powers of both betas, of the step before and then of this one, and the betas.
    """
    launch(_clip, (1,), squares, powers, scalars, len(squares), limit, BLOCK=_SUMMED)


def adam(
    rows: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor],
    along: Tensor,
    low: Tensor | None,
    scalars: Tensor,
    *,
    unit: bool,
    times: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Move the rows of a parameter, after `clip`; `low`, where there is one, gets them in its own type."""
    width, (beta1, beta2) = _width(grad), betas
    numbers = (times, beta1, 1 - beta1, beta2, 1 - beta2, eps)
    block, shadow = triton.next_power_of_2(width), along if low is None else low
    tensors = (rows, grad, *moments, along, shadow, scalars)
    of = {"UNIT": unit, "SHADOW": low is not None, "BLOCK": block}
    launch(_adam, (rows_of(grad),), *tensors, width, grad.numel(), *numbers, **of)


def rows_of(tensor: Tensor) -> int:
    """Return the rows that a parameter is cut into: its own, or parts of a vector."""
    return triton.cdiv(tensor.numel(), _width(tensor))


def _width(tensor: Tensor) -> int:
    """Return the numbers of a row, of a parameter as it lies in memory."""
    return 1024 if tensor.dim() == 1 else max(tensor.stride())


@triton.jit
def _row_squares(grad, rows, along, squares, width, size, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * width + o
    inside = (o < width) & (at < size)
    slope = tl.load(grad + at, mask=inside, other=0.0)
    if UNIT:
        weight = tl.load(rows + at, mask=inside, other=0.0)
        part = tl.sum(slope * weight, 0)
        slope -= part * weight
        tl.store(along + row, part)
    tl.store(squares + row, tl.sum(slope * slope, 0))


@triton.jit
def _clip(squares, powers, scalars, count, limit, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
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


@triton.jit
def _adam(
    rows,
    grad,
    first,
    second,
    along,
    shadow,
    scalars,
    width,
    size,
    times,
    keep1,
    take1,
    keep2,
    take2,
    eps,
    UNIT: tl.constexpr,
    SHADOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = row * width + o
    inside = (o < width) & (at < size)
    weight = tl.load(rows + at, mask=inside, other=0.0)
    slope = tl.load(grad + at, mask=inside, other=0.0)
    if UNIT:
        slope -= tl.load(along + row) * weight
    slope *= tl.load(scalars + 2)
    m = keep1 * tl.load(first + at, mask=inside, other=0.0) + take1 * slope
    v = keep2 * tl.load(second + at, mask=inside, other=0.0) + take2 * slope * slope
    tl.store(first + at, m, mask=inside)
    tl.store(second + at, v, mask=inside)
    rate = tl.load(scalars) * times / tl.load(scalars + 3)
    weight -= rate * m / (tl.sqrt(v / tl.load(scalars + 4)) + eps)
    if UNIT:  # a row of 0 has no direction, and stays
        weight /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, weight * weight, 0.0), 0)), 1.1754944e-38)
    tl.store(rows + at, weight, mask=inside)
    if SHADOW:
        tl.store(shadow + at, weight.to(shadow.dtype.element_ty), mask=inside)
