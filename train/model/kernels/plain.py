"""The operations in torch's own kernels, on any device; on CUDA, nothing but `above` waits for the device.

Sums over pairs run as `embedding_bag` over pairs sorted by what they are summed into, which is deterministic and many
times faster than `index_add`; the gradient of the values is a sampled dense-dense product.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from train.model.kernels.base import Groups, SparseOps, weighted
from train.model.sparse_latents import SparseLatents, offsets

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class Plain(SparseOps):
    """Torch alone."""

    def batch_topk(self, pre_acts: Tensor, n: int, guess: Tensor) -> tuple[SparseLatents, Tensor]:
        """As `SparseOps.batch_topk`."""
        flat = pre_acts.view(-1)
        found = flat.topk(min(n, len(flat)), sorted=False).indices.sort().values
        active = _pairs(found, pre_acts)
        return active, smallest_positive(active.values)

    def row_topk(self, pre_acts: Tensor, k: int, among: Tensor | None = None, each: int = 1) -> SparseLatents:
        """As `SparseOps.row_topk`."""
        k = min(k, pre_acts.shape[1])
        if among is None:
            found = pre_acts.topk(k, dim=1, sorted=False).indices
        else:  # how many are among them is not waited for: those too many are replaced by the first others
            found = pre_acts.masked_fill(~among, -torch.inf).topk(k, dim=1).indices
            rank = torch.arange(k, device=found.device) - (among.sum() + each - 1) // each
            others = among.sort(stable=True).indices[:k]
            found = found.where(rank < 0, others[rank.clamp_min(0)])
        latents = found.sort(dim=1).values
        rows = torch.arange(len(pre_acts), device=pre_acts.device).unsqueeze(1).expand_as(latents)
        return SparseLatents.of(
            rows.flatten().contiguous(), latents.flatten(), pre_acts.gather(1, latents).flatten(), pre_acts.shape
        )

    def above(self, pre_acts: Tensor, thresholds: Tensor) -> SparseLatents:
        """As `SparseOps.above`."""
        return _pairs((pre_acts > thresholds).view(-1).nonzero().squeeze(1), pre_acts)

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, *, again: bool = False) -> Tensor:
        """As `SparseOps.encode`."""
        return _Encode.apply(x, W_enc, b_enc, active, again)

    def prefix_loss(
        self, values: Tensor, W_dec: Tensor, base: Tensor, y: Tensor, active: SparseLatents, groups: Groups
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `SparseOps.prefix_loss`."""
        reconstructions = decode_prefixes(values, W_dec, active, groups.of_latent, groups.prefixes) + base.unsqueeze(1)
        errors = (reconstructions - y.unsqueeze(1)).square().sum(dim=2)
        return weighted(errors, groups.weight), errors.detach(), (y - reconstructions[:, -1]).detach()


def decode_prefixes(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    active: SparseLatents,
    group: Tensor,  # [F]
    groups: int,
) -> Tensor:  # [B, P, O]
    """Return the reconstruction of every prefix without bias, for the price of one.

    Each group of each row is a row of its own in one sparse product; running sums over groups give the prefixes, and
    the backward's suffix sums their gradients.
    """
    rows = len(active.starts) - 1
    target = active.rows * groups + group[active.latents]
    parts = _SparseDecode.apply(values, W_dec, active, target, rows * groups)
    return parts.view(rows, groups, W_dec.shape[1]).cumsum(dim=1)


def smallest_positive(values: Tensor) -> Tensor:
    """Return the smallest value above 0, or 0."""
    if not len(values):
        return values.new_zeros(())
    least = values.masked_fill(values <= 0, torch.inf).min()
    return least.where(least.isfinite(), 0.0)


def _pairs(flat: Tensor, pre_acts: Tensor) -> SparseLatents:
    width = pre_acts.shape[1]
    return SparseLatents.of(flat // width, flat % width, pre_acts.view(-1)[flat], pre_acts.shape)


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, active: SparseLatents, again: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.active = active
        if active.values.dtype == x.dtype and not again:
            return active.values.clone()
        return _sampled_product(x, W_enc.T, active.starts, active.latents) + b_enc[active.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        order, starts = ctx.active.by_latent
        W_enc = _bag(ctx.active.rows[order], x, starts, grad[order])
        b_enc = torch.segment_reduce(grad[order], "sum", offsets=starts, initial=0)
        return None, W_enc.T, b_enc, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, active: SparseLatents, group: Tensor, groups: int) -> Tensor:
        starts = offsets(group, groups)
        ctx.save_for_backward(values, W_dec, group, starts)
        ctx.active = active
        return _bag(active.latents, W_dec, starts, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (values, W_dec, group, starts), (grad,) = ctx.saved_tensors, grads
        grad = grad.contiguous()
        grad_values = _sampled_product(grad, W_dec, starts, ctx.active.latents)
        order, by_latent = ctx.active.by_latent
        return grad_values, _bag(group[order], grad, by_latent, values[order]), None, None, None


def _bag(
    index: Tensor,  # [N] rows of `table`
    table: Tensor,  # [T, d]
    starts: Tensor,  # [G + 1]
    weights: Tensor,  # [N]
) -> Tensor:  # [G, d]
    """Return, for every group of consecutive pairs, the weighted sum of the table's rows."""
    return embedding_bag(
        index, table.detach(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _sampled_product(
    left: Tensor,  # [G, O]
    right: Tensor,  # [F, O]
    starts: Tensor,  # [G + 1]
    columns: Tensor,  # [N]
) -> Tensor:  # [N]
    """Compute <left[g], right[column]> for every pair, without the dense product."""
    zeros = torch.zeros(len(columns), dtype=left.dtype, device=left.device)
    pattern = torch.sparse_csr_tensor(
        starts, columns, zeros, size=(left.shape[0], right.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
