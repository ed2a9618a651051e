"""A dense trainer with this project's mathematics, as one would write it for a GPU: the stand-in for other trainers.

Products and pre-activations in bfloat16, weights, errors and Adam in float32, every tensor [B, F] whole, gradients by
autograd, and `torch.compile` around the loss and around what is done to decoder rows. Selection is by the smallest of
the batch's largest, so pairs that are equal to it all take part. Legend as in `gpu_setup`.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from train.model.losses import AuxKConfig
from train.model.transcoder import Transcoder

Compile = Callable[[Any], Any]


class DenseTrainer:
    """Matryoshka BatchTopK with aux-k, and its update."""

    def __init__(
        self, start: Transcoder, k: int, auxk: AuxKConfig, compiled: Compile, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Take the first weights of `start`. `dtype`: of products and of what they make."""
        self._k, self._auxk, self._dtype, self._prefixes = k, auxk, dtype, start.prefixes
        weights = (start.W_enc, start.b_enc, start.W_dec, start.b_dec)
        self.parameters = [nn.Parameter(one.detach().clone(memory_format=torch.contiguous_format)) for one in weights]
        self._adam = torch.optim.Adam(self.parameters, lr=3e-4, fused=True)
        self._loss = compiled(self.loss)
        self._remove_parallel, self._normalise = compiled(_remove_parallel), compiled(_normalise)

    def step(self, x: Tensor, y: Tensor, dead: Tensor) -> None:
        """Make one step on normalised rows."""
        self._adam.zero_grad(set_to_none=True)
        self._loss(x, y, dead).backward()
        W_dec = self.parameters[2]
        self._remove_parallel(W_dec.detach(), W_dec.grad)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adam.step()
        self._normalise(W_dec.detach())

    def loss(self, x: Tensor, y: Tensor, dead: Tensor) -> Tensor:
        """Compute the loss of one batch: the mean over prefixes, and aux-k."""
        x, W_enc, b_enc, W_dec, b_dec = (one.to(self._dtype) for one in (x, *self.parameters))
        pre_acts = x @ W_enc + b_enc
        positive = pre_acts.relu()
        least = positive.detach().flatten().topk(self._k * len(x), sorted=False).values.min()
        latents = torch.where(positive >= least, positive, 0.0)
        whole, errors = b_dec, []
        for low, high in pairwise((0, *self._prefixes)):
            whole = whole + latents[:, low:high] @ W_dec[low:high]
            errors.append((whole - y).float().square().mean())
        rows = slice(None, None, self._auxk.row_stride)
        residual = (y - whole).detach()[rows].float()
        again = self._auxk_loss(pre_acts[rows], W_dec, residual, dead)
        return torch.stack(errors).mean() + self._auxk.coefficient * again

    def _auxk_loss(self, pre_acts: Tensor, W_dec: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """As `reference.auxk_term`."""
        values, latents = pre_acts.masked_fill(~dead, -torch.inf).topk(self._auxk.k, dim=1)
        each = self._auxk.dead_per_active
        active = torch.arange(self._auxk.k, device=dead.device) < (dead.sum() + each - 1) // each
        values = values.where(active, 0.0)
        predicted = torch.zeros_like(pre_acts).scatter(1, latents, values) @ W_dec
        return (predicted.float() - residual).square().sum() / residual.square().sum()


def _remove_parallel(W_dec: Tensor, grad: Tensor) -> None:
    grad.sub_(W_dec * (grad * W_dec).sum(dim=1, keepdim=True))


def _normalise(W_dec: Tensor) -> None:
    W_dec.div_(W_dec.norm(dim=1, keepdim=True))
