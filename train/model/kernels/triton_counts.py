"""What a step adds to a run's counters and to its sums of metrics, in Triton kernels.

Parameters of kernels have no annotation but `tl.constexpr`, as in `triton_kernels`.
Legend: B rows, O d_out, F latents, P prefixes, S strata, T terms of the loss.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.model.kernels.triton_launch import launch
from train.model.kernels.triton_sums import grouped
from train.model.sparse_latents import SparseLatents

_LATENTS, _PAIRS, _ADDED = 128, 16, 1024
"""Latents of a program that counts, pairs of each that it looks at in turn, and numbers of a program that adds."""
_TERMS = 8
"""Terms of a loss that `_add_batch` takes."""


def count_fired(
    active: SparseLatents,
    since: Tensor,  # [F] int64
    dead: Tensor,  # [F] bool
    dead_after: int,
    smallest: Tensor,  # []
    threshold: Tensor,  # []
    decay: float,
) -> None:
    """As `Counters.update`: rows since each latent fired, which are dead, and the threshold that follows `smallest`."""
    sizes = (len(active.starts) - 1, active.d_sae, dead_after)
    tensors = (*grouped(active), active.values, since, dead.view(torch.uint8), smallest, threshold)
    grid = (triton.cdiv(active.d_sae, _LATENTS),)
    launch(_count_fired, grid, *tensors, *sizes, decay, PAIRS=_PAIRS, BLOCK=_LATENTS, num_warps=4)


def add_batch(
    sums: Tensor,  # [S * (O + P + 2) + 2 + T] float64
    target: Tensor,  # [S, O] float32, of the batch
    figures: Tensor,  # [S, P + 2], of the batch
    grad_norm: Tensor,  # []
    terms: Sequence[Tensor],  # T of []
    first_bad: Tensor,  # [] int64
    number: Tensor,  # [] int64
) -> None:
    """Add a batch to the sums of `Window`, which lie so: targets, errors, active latents, squares, steps, norm, terms.

    `first_bad` becomes the smaller of itself and `number` where a term or the norm is not finite.
    """
    (strata, width), prefixes = target.shape, figures.shape[1] - 2
    ends = (strata * width, strata * (width + prefixes), strata * (width + prefixes + 2))
    assert len(terms) <= _TERMS
    given = (sums, target, figures, grad_norm, first_bad, number, *terms, *[grad_norm] * (_TERMS - len(terms)))
    sizes = (*ends, strata, prefixes, len(terms))
    launch(_add_batch, (triton.cdiv(len(sums), _ADDED),), *given, *sizes, BLOCK=_ADDED, num_warps=4)


@triton.jit
def _count_fired(
    order,
    starts,
    values,
    since,
    dead,
    smallest,
    threshold,
    rows,
    latents,
    dead_after,
    decay,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    latent = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = latent < latents
    begin, end = tl.load(starts + latent, mask=inside, other=0), tl.load(starts + latent + 1, mask=inside, other=0)
    fired = tl.zeros([BLOCK], tl.int32)
    for low in range(0, tl.max(end - begin, 0), PAIRS):
        i = begin[:, None] + low + tl.arange(0, PAIRS)[None, :]
        here = i < end[:, None]
        value = tl.load(values + tl.load(order + i, mask=here, other=0), mask=here, other=0.0)
        fired |= tl.max((value > 0).to(tl.int32), 1)
    before = tl.load(since + latent, mask=inside, other=0)
    after = tl.where(fired > 0, 0, before + rows)
    tl.store(since + latent, after, mask=inside)
    tl.store(dead + latent, (after >= dead_after).to(tl.uint8), mask=inside)
    if tl.program_id(0) == 0:
        old, now = tl.load(threshold), tl.load(smallest)
        tl.store(threshold, tl.where(old == 0, now, decay * old + (1 - decay) * now))


@triton.jit
def _nth(term, n, number):
    """Return a number where `term` is its place, and else 0."""
    return tl.where(term == n, tl.load(number), 0.0)


@triton.jit
def _add_batch(
    sums,
    target,
    figures,
    grad_norm,
    first_bad,
    number,
    term_0,
    term_1,
    term_2,
    term_3,
    term_4,
    term_5,
    term_6,
    term_7,
    errors_at,
    active_at,
    steps_at,
    strata,
    prefixes,
    count,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = tl.load(target + i, mask=i < errors_at, other=0.0).to(tl.float64)
    of_error = i - errors_at
    at = (of_error // prefixes) * (prefixes + 2) + of_error % prefixes
    added += tl.load(figures + at, mask=(i >= errors_at) & (i < active_at), other=0.0)
    other = i - active_at  # of every stratum active latents, and then squares
    at = (other % strata) * (prefixes + 2) + prefixes + other // strata
    added += tl.load(figures + at, mask=(i >= active_at) & (i < steps_at), other=0.0)
    added += tl.where(i == steps_at, 1.0, 0.0)
    norm = tl.load(grad_norm)
    added += tl.where(i == steps_at + 1, norm, 0.0)
    term = i - steps_at - 2
    is_term = (term >= 0) & (term < count)
    loss = _nth(term, 0, term_0) + _nth(term, 1, term_1) + _nth(term, 2, term_2) + _nth(term, 3, term_3)
    loss += _nth(term, 4, term_4) + _nth(term, 5, term_5) + _nth(term, 6, term_6) + _nth(term, 7, term_7)
    loss = tl.where(is_term, loss, 0.0)
    added += loss
    known = is_term | (i < steps_at + 2)
    tl.store(sums + i, tl.load(sums + i, mask=known, other=0.0) + added, mask=known)
    wrong = tl.where(is_term | (i == steps_at + 1), (tl.abs(loss + norm) < float("inf")).to(tl.int32) == 0, False)
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.atomic_min(first_bad, tl.load(number), sem="relaxed")
