"""The loss as plainly as its formula: dense, one matrix product per prefix, gradients by autograd."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def top_of_batch(pre_acts: Tensor, n: int) -> Tensor:
    """Mask [B, F] of the n largest positive entries of the whole batch."""
    mask = torch.zeros_like(pre_acts, dtype=torch.bool)
    for flat in pre_acts.flatten().argsort(descending=True, stable=True)[:n].tolist():
        row, latent = divmod(flat, pre_acts.shape[1])
        mask[row, latent] = pre_acts[row, latent] > 0
    return mask


def top_of_rows(pre_acts: Tensor, k: int) -> Tensor:
    """Mask [B, F] of the k largest positive entries of every row."""
    mask = torch.zeros_like(pre_acts, dtype=torch.bool)
    for row in range(len(pre_acts)):
        for latent in pre_acts[row].argsort(descending=True, stable=True)[:k].tolist():
            mask[row, latent] = pre_acts[row, latent] > 0
    return mask


def reconstructions(
    latents: Tensor, W_dec: Tensor, b_dec: Tensor, prefixes: Sequence[int], linear: Tensor | float = 0.0
) -> list[Tensor]:
    """One dense decode [B, O] per prefix."""
    return [latents[:, :p] @ W_dec[:p] + b_dec + linear for p in prefixes]


def prefix_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of one prefix."""
    return ((reconstruction - target) ** 2).mean()


def auxk_term(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, residual: Tensor, dead: Tensor, k: int, dead_per_active: int
) -> Tensor:
    """Dead latents' largest pre-activations, negative ones too, predict the residual, which is a constant here.

    On each row one for every `dead_per_active` dead latents, at most `k`. The term grows with the dead latents until
    there are `dead_per_active`.
    """
    k = min(k, math.ceil(len(dead) / dead_per_active))
    residual = residual.detach()
    pre_acts = x @ W_enc[:, dead] + b_enc[dead]
    chosen = torch.zeros_like(pre_acts)
    for row in range(len(x)):
        chosen[row, pre_acts[row].argsort(descending=True)[:k]] = 1
    predicted = (pre_acts * chosen) @ W_dec[dead]
    return min(len(dead) / dead_per_active, 1) * ((predicted - residual) ** 2).sum() / (residual**2).sum()


def fvu(target: Tensor, reconstruction: Tensor) -> float:
    """Squared error over squared distance from the per-dimension mean."""
    return float(((target - reconstruction) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())
