"""How a dictionary is cut into virtual shards: latents are dealt in turn, so that each has its share of every prefix.

Shard v of V holds the latents v, v + V, v + 2V, ... Pure.
Legend: F latents, V shards, D d_in, O d_out.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from shared.config import Config

PER_LATENT = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}
"""Tensors with an entry for each latent, and the dimension of their latents; Adam's moments of them are alike."""


class ParallelConfig(Config):
    """How processes share the training of one dictionary."""

    shards: Literal[1, 2, 4, 8, 16, 32, 64] = 1
    """Number of virtual shards of the dictionary; it must divide d_sae; 1: not cut. With more, `torchrun` can share the
    run among any number of processes that divides it, each with one thread. All sums over latents are made by shard and
    added in a fixed order, so the weights are the same, bit for bit, for any number of processes."""


def latents_of(shard: int, shards: int, d_sae: int) -> Tensor:
    """Return the latents of a shard, int64 [F / V]."""
    return torch.arange(shard, d_sae, shards)


def deal(tensors: Mapping[str, Tensor], shards: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Cut tensors by latent: what has no latents, and by shard the parts of what has."""
    cut = {name: dim for name, tensor in tensors.items() if (dim := _dimension(name, tensor)) is not None}
    rest = {name: tensor for name, tensor in tensors.items() if name not in cut}
    return rest, [{name: part(tensors[name], dim, v, shards) for name, dim in cut.items()} for v in range(shards)]


def join(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put together what `deal` has cut. Raises `ValueError` where parts are not of one kind."""
    found = {}
    for name, first in parts[0].items():
        dim = _dimension(name, first)
        like = {(tuple(one[name].shape), one[name].dtype) if name in one else None for one in parts}
        if dim is None or len(like) > 1:
            raise ValueError(f"tensor {name!r} does not fit together")
        found[name] = woven(torch.stack([one[name].movedim(dim, 0) for one in parts])).movedim(0, dim)
    return found


def part(tensor: Tensor, dim: int, shard: int, shards: int) -> Tensor:
    """Return the entries of a shard's latents, which lie along `dim`; no copy."""
    return tensor[(slice(None),) * dim + (slice(shard, None, shards),)]


def woven(parts: Tensor) -> Tensor:  # [V, F / V, ...] -> [F, ...]
    """Return the rows of all shards in order of latents."""
    return parts.transpose(0, 1).flatten(0, 1)


def _dimension(name: str, tensor: Tensor) -> int | None:
    return PER_LATENT.get(name.split(".")[0]) if tensor.dim() else None
