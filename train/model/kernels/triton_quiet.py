"""The loss of latents that are active on rows which training leaves out, in a Triton kernel, joined to a step's loss.

It reads the encoder once. What each latent's gradient gets of these rows is written with that of the step.
Legend: n rows there are, Q that are looked at, D d_in, F latents.
"""

import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_step import Joined
from train.model.kernels.triton_sums import Extra

_LATENTS, _ROWS, _COLUMNS = 8, 4, 128
"""Latents of a program, and the rows and columns that it looks at in turn."""


def quiet_loss(
    joined: Joined,
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    rows: Tensor,  # [n, D]
    times: Tensor,  # [n, 1]
    number: Tensor,  # [] int64
    looked_at: int,
    factor: float,
) -> Tensor:  # []
    """Sum `factor` times the positive pre-activations of some rows, of which the bias counts `times`.

    They are `looked_at` rows from row `number * looked_at` on, modulo n. The gradient goes with that of the loss that
    the term is `joined` to.
    """
    matrix, latents = W_enc.detach().T, len(b_enc)
    slopes, terms = matrix.new_empty(latents, looked_at), matrix.new_empty(latents)
    tensors, sizes = (rows, times, number, matrix, b_enc.detach(), slopes, terms), (len(rows), latents, len(W_enc))
    kinds = {"ROWS": looked_at, "PART": _ROWS, "LATENTS": _LATENTS, "BLOCK": _COLUMNS, "num_warps": 4}
    launch(_quiet, (triton.cdiv(latents, _LATENTS),), *tensors, factor, *sizes, **kinds)
    joined.extra.append(Extra(slopes, rows, times, number))
    return terms.sum()


@triton.jit
def _quiet(
    rows,
    times,
    number,
    W_enc,
    b_enc,
    slopes,
    terms,
    factor,
    count,
    latents,
    width,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    LATENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what each latent adds to the loss, and what it gets of every row."""
    latent = tl.program_id(0).to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    here = latent < latents
    bias, total = tl.load(b_enc + latent, mask=here, other=0.0), tl.zeros([LATENTS], W_enc.dtype.element_ty)
    for low in range(0, ROWS, PART):
        n = low + tl.arange(0, PART)
        place = (tl.load(number) * ROWS + n) % count
        value = bias[:, None] * tl.load(times + place)[None, :]
        for start in range(0, width, BLOCK):
            o = start + tl.arange(0, BLOCK)
            inside = (o < width)[None, :]
            weight = tl.load(W_enc + latent[:, None] * width + o[None, :], mask=here[:, None] & inside, other=0.0)
            row = tl.load(rows + place[:, None] * width + o[None, :], mask=inside, other=0.0)
            value += tl.sum(weight[:, None, :] * row[None, :, :], 2)
        wanted = here[:, None] & (n < ROWS)[None, :]
        is_active = wanted & (value > 0)
        total += tl.sum(tl.where(is_active, value, 0.0), 1)
        tl.store(slopes + latent[:, None] * ROWS + n[None, :], tl.where(is_active, factor, 0.0), mask=wanted)
    tl.store(terms + latent, factor * total, mask=here)
