"""The operations in torch's own kernels, on any device.

Sums over pairs run as `embedding_bag` over pairs sorted by what they are summed into, which is deterministic and many
times faster than `index_add`; the gradient of the values is a sampled dense-dense product.
Legend: B rows, D d_in, O d_out, F latents, P prefixes, N active pairs.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from train.losses import squared_errors
from train.sparsity import Active, offsets

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def gather_pre_acts(
    x: Tensor,  # [B, D] without gradient
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    pre_acts: Tensor,  # [B, F], x @ W_enc + b_enc without gradient
    active: Active,
) -> Tensor:  # [N]
    """The pre-activations of the active pairs; their gradient reaches `W_enc` and `b_enc` through the pairs alone."""
    return _GatherPreActs.apply(x, W_enc, b_enc, pre_acts, active)


def decode_prefixes(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    active: Active,
    segment: Tensor,  # [F] int64: the first prefix that holds the latent; rises with the latent
    rows: int,
    prefixes: int,
) -> Tensor:  # [B, P, O]
    """The reconstruction of every prefix without bias, for the price of one.

    Each (row, prefix segment) is a row of its own in one sparse product; running sums over segments give the
    prefixes, and the backward's suffix sums their gradients.
    """
    group = active.rows * prefixes + segment[active.latents]
    segments = _SparseDecode.apply(values, W_dec, active, group, rows * prefixes)
    return segments.view(rows, prefixes, -1).cumsum(dim=1)


def prefix_errors(
    values: Tensor,  # [N]
    W_dec: Tensor,  # [F, O]
    base: Tensor,  # [1, O] or [B, O]: what is added to every reconstruction
    y: Tensor,  # [B, O]
    active: Active,
    segment: Tensor,  # [F]
    prefixes: int,
) -> tuple[Tensor, Tensor]:  # [B, P], [B, O]
    """Squared error of every row under every prefix, and what the last prefix leaves of `y`, without gradient."""
    reconstructions = decode_prefixes(values, W_dec, active, segment, len(y), prefixes) + base.unsqueeze(1)
    return squared_errors(reconstructions, y), (y - reconstructions[:, -1]).detach()


class _GatherPreActs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, pre_acts: Tensor, active: Active) -> Tensor:
        ctx.save_for_backward(x)
        ctx.active = active
        return pre_acts[active.rows, active.latents]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        order, starts = ctx.active.by_latent
        W_enc = _bag(ctx.active.rows[order], x, starts, grad[order])
        b_enc = torch.zeros(ctx.active.d_sae, dtype=grad.dtype, device=grad.device)
        b_enc.index_add_(0, ctx.active.latents, grad)
        return None, W_enc.T, b_enc, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, active: Active, group: Tensor, groups: int) -> Tensor:
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
    """For every group of consecutive pairs, the weighted sum of the table's rows."""
    return embedding_bag(
        index, table.detach(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def _sampled_product(
    left: Tensor,  # [G, O]
    right: Tensor,  # [F, O]
    starts: Tensor,  # [G + 1]
    columns: Tensor,  # [N]
) -> Tensor:  # [N]
    """<left[g], right[column]> for every pair, without the dense product."""
    zeros = torch.zeros(len(columns), dtype=left.dtype, device=left.device)
    pattern = torch.sparse_csr_tensor(
        starts, columns, zeros, size=(left.shape[0], right.shape[0]), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0).values()
