"""The operations as they are written, with autograd over dense tensors: slow, and the reference of the others."""

import torch
from torch import Tensor

from train.model.kernels.base import Groups, weighted
from train.model.kernels.plain import Plain
from train.model.sparse_latents import SparseLatents


class Dense(Plain):
    """The reference: selects as `Plain`, and computes with whole matrices."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, *, again: bool = False) -> Tensor:
        """As `SparseOps.encode`, from the whole product."""
        return (x @ W_enc + b_enc)[active.rows, active.latents]

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`, with one product for every prefix."""
        latents = values.new_zeros(len(y), len(W_dec)).index_put((active.rows, active.latents), values, accumulate=True)
        parts = [latents * (groups.of_latent <= p) @ W_dec + base for p in range(groups.prefixes)]
        errors = torch.stack([(part - y).square().sum(dim=1) for part in parts], dim=1)
        return weighted(errors, groups.weight), errors.detach(), (y - parts[-1]).detach()
