"""Rows of norm 1: kept so after every step, and gradients without the part that this would undo. In place."""

import torch
from torch import Tensor


@torch.no_grad()
def normalise_rows(rows: Tensor) -> None:
    """Give every one of `rows` [F, O] unit norm; one of 0 stays 0."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))


@torch.no_grad()
def drop_parallel_part(grad: Tensor, rows: Tensor) -> None:
    """Drop the part of the gradient [F, O] of unit `rows` [F, O] that lies along each."""
    grad.addcmul_(rows, (grad * rows).sum(dim=1, keepdim=True), value=-1)
