"""Rows on their way to a step, in a Triton kernel: found, converted, checked, shifted and scaled, each read once.

Parameters of kernels have no annotation but `tl.constexpr`, as in `triton_kernels`.
Legend: R rows of a table, B rows of a batch, d width of a side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch


def prepared(
    table: Tensor,  # [R, d] as stored
    places: Tensor | None,  # [B] int64
    mean: Tensor,  # [d]
    scale: Tensor,  # []
    longest: Tensor,  # [B] float64
    first_bad: Tensor,  # [] int64
    number: Tensor,  # [] int64
    rms_eps: float | None = None,
) -> Tensor:  # [B, d] float32
    """Return the table's rows at `places`, or all of them, shifted and scaled; as `Transcoder.normalised_source`.

    `first_bad` becomes the smaller of itself and `number` where a row is longer than `longest`, or not finite.
    """
    rows, width = len(table) if places is None else len(places), table.shape[1]
    out = torch.empty(rows, width, dtype=torch.float32, device=table.device)
    where = (out if places is None else places, mean, scale, longest, first_bad, number)
    of = {"FOUND": places is not None, "RMS": rms_eps is not None, "BLOCK": triton.next_power_of_2(width)}
    launch(_prepare, (rows,), table, *where, out, width, rms_eps or 0.0, **of)
    return out


@triton.jit
def _prepare(
    table,
    places,
    mean,
    scale,
    longest,
    first_bad,
    number,
    out,
    width,
    eps,
    FOUND: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, o = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = row
    if FOUND:
        place = tl.load(places + row)
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
