"""The operations as they are written, with autograd over dense tensors: slow, and the reference of the others.

Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

import torch
from torch import Tensor

from train.model.kernels.plain import above, batch_topk, row_topk, weighted
from train.model.sparse_latents import SparseLatents

__all__ = ["above", "batch_topk", "encode", "prefix_loss", "row_topk"]


def encode(
    x: Tensor,  # [B, D]
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    active: SparseLatents,
) -> Tensor:  # [N]
    """As `plain.encode`, from the whole product."""
    return (x @ W_enc + b_enc)[active.rows, active.latents]


def prefix_loss(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]
    y: Tensor,  # [B, O]
    active: SparseLatents,
    segment: Tensor,  # [F]
    prefixes: int,
    weight: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor]:  # [], [B, P], [B, O]
    """As `plain.prefix_loss`, with one product for every prefix."""
    latents = values.new_zeros(len(y), len(W_dec)).index_put((active.rows, active.latents), values, accumulate=True)
    parts = [latents * (segment <= p) @ W_dec + base for p in range(prefixes)]
    errors = torch.stack([(part - y).square().sum(dim=1) for part in parts], dim=1)
    return weighted(errors, weight), errors.detach(), (y - parts[-1]).detach()
