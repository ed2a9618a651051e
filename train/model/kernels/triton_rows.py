"""Rows on their way to a step, in a Triton kernel: found, converted, checked, shifted and scaled, each read once.

Parameters of kernels have no annotation but `tl.constexpr`, as in `triton_kernels`.
Legend: R rows of a table, B rows of a batch, d width of a side.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch


class Stored(NamedTuple):
    """Rows of one side as they are stored, and what is done with them."""

    table: Tensor
    """[R, d]"""
    mean: Tensor
    """[d]"""
    scale: Tensor
    """[]"""
    longest: Tensor
    """[B] float64, the norms that no row is above"""


def prepared(
    source: Stored,
    target: Stored,
    places: Tensor | None,  # [B] int64
    first_bad: Tensor,  # [] int64
    number: Tensor,  # [] int64
    rms_eps: float | None = None,
) -> tuple[Tensor, Tensor]:  # [B, D], [B, O] float32
    """Return the rows of both tables at `places`, or all of them, shifted and scaled; as `Transcoder.normalised`.

    `first_bad` becomes the smaller of itself and `number` where a row is longer than `longest`, or not finite.
    """
    rows = len(source.table) if places is None else len(places)
    widths = source.table.shape[1], target.table.shape[1]
    out, other_out = (torch.empty(rows, d, dtype=torch.float32, device=source.table.device) for d in widths)
    tensors = (out if places is None else places, first_bad, number, *source, out, *target, other_out)
    of = {"FOUND": places is not None, "RMS": rms_eps is not None, "BLOCK": triton.next_power_of_2(max(widths))}
    launch(_prepare, (rows, 2), *tensors, *widths, rms_eps or 0.0, **of)
    return out, other_out


@triton.jit
def _normalise(row, place, o, table, mean, scale, longest, out, first_bad, number, width, eps, RMS: tl.constexpr):
    value = tl.load(table + place * width + o, mask=o < width, other=0.0).to(tl.float32)
    square = tl.sum(value * value, 0)
    if tl.sqrt(square) <= tl.load(longest + row):
        pass
    else:  # so a NaN is, too
        tl.atomic_min(first_bad, tl.load(number), sem="relaxed")
    if RMS:
        value /= tl.sqrt(square / width + eps)
    value = (value - tl.load(mean + o, mask=o < width, other=0.0)) / tl.load(scale)
    tl.store(out + row * width + o, value, mask=o < width)


@triton.jit
def _prepare(
    places, first_bad, number,
    table, mean, scale, longest, out,
    other_table, other_mean, other_scale, other_longest, other_out,
    width, other_width, eps,
    FOUND: tl.constexpr, RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Prepare a row of one side; `RMS` is the source's alone."""
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = row
    if FOUND:
        place = tl.load(places + row)
    if tl.program_id(1) == 0:
        _normalise(row, place, o, table, mean, scale, longest, out, first_bad, number, width, eps, RMS)
    else:
        _normalise(row, place, o, other_table, other_mean, other_scale, other_longest, other_out, first_bad, number,
                   other_width, eps, False)  # fmt: skip
