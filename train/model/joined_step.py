"""The loss of a step whose kernels are Triton's and whose k is fixed: reconstruction and aux-k, which terms may join.

The same as in `Transcoder.step`, in few operations: rows of aux-k are picked where they are read, and so nothing is
copied for it. Legend: B rows, D d_in, O d_out, F latents, N pairs.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from train.model.kernels.base import Groups
from train.model.losses import AuxKConfig
from train.model.sparse_latents import SparseLatents

if TYPE_CHECKING:
    from train.model.kernels.triton_step import Joined
    from train.model.transcoder import Transcoder


class JoinedLosses(NamedTuple):
    """What a step computes."""

    terms: dict[str, Tensor]
    """Each with a graph of its own"""
    values: Tensor
    """[N] with gradient"""
    joined: "Joined"


def joined_losses(
    model: "Transcoder",
    x: Tensor,  # [B, D] normalised
    y: Tensor,  # [B, O] normalised
    pre_acts: Tensor,  # [B, F]
    active: SparseLatents,
    groups: Groups,
    dead: Tensor,  # [F] bool
    auxk: AuxKConfig,
    step: int,
    number: Tensor | None,  # [] int64, the step on the device
) -> JoinedLosses:
    """Compute both terms; as `Transcoder.step`."""
    from train.model.kernels import triton_select, triton_step, triton_sums  # not there without CUDA

    weights, norms, auxk_of = (model.W_enc, model.b_enc, model.W_dec), model.gradient_norms, None
    if auxk.coefficient:
        if number is None:
            number = torch.full((), step, dtype=torch.int64, device=x.device)
        every = triton_sums.Every(auxk.row_stride, number)
        auxk_of = triton_step.AuxK(dead, every, auxk.coefficient, auxk.dead_per_active, y.new_empty(()))
    plan = triton_step.Plan(groups, model.tf32, norms, model.has_unit_decoder, auxk=auxk_of)
    loss, values, left, joined = triton_step.pairs_loss(x, *weights, model.linear_part(x), y, active, plan)
    terms = {"reconstruction": loss}
    if auxk_of:
        rows = len(range(step % auxk.row_stride, len(x), auxk.row_stride))
        of_row, latents, found, starts = triton_select.row_topk(
            pre_acts, min(auxk.k, model.d_sae), dead, auxk.dead_per_active, auxk_of.every, rows
        )
        one = Groups(model.group, 1, auxk_of.weight, (model.d_sae,))
        plan = triton_step.Plan(one, model.tf32, norms, model.has_unit_decoder, dead, auxk_of.every)
        others = SparseLatents(of_row, latents, found, starts, model.d_sae)
        terms["auxk"] = triton_step.pairs_loss(x, *weights, model.nothing, left, others, plan)[0]
    return JoinedLosses(terms, values, joined)
