"""A block's activations as the rows of each stratum, and their statistics. Pure: takes and returns arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.keyed import permutation
from shared.layout import StoreRequest
from shared.statistics import BINS, Moments, merge, moments_of
from shared.strata import Stratum

Array = NDArray[Any]
Activations = dict[str, Array]
"""Rows [S, T, width] as stored, by hook."""
SIDES = ("source", "target")
_ROWS_AT_ONCE = 8192


def stratum_places(request: StoreRequest, stratum: Stratum, block: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which rows of a block a stratum keeps, in stored order: (sequence within the block, position), [rows] each.

    The permutation is over the stratum's natural rows, of which the first `stratum.rows` are kept.
    """
    order = permutation(stratum.natural_rows, "rows", request.seed, block, stratum.start)[: stratum.rows]
    return order // stratum.width, stratum.start + order % stratum.width


def stratum_arrays(
    request: StoreRequest, stratum: Stratum, block: int, source: Array, target: Array
) -> dict[str, Array]:
    """The four arrays of one stratum of a block, by name; `source` and `target` are [S, T, width] as stored."""
    sequence, position = stratum_places(request, stratum, block)
    return {
        "source": source[sequence, position],
        "target": target[sequence, position],
        "position": position.astype(np.uint16),
        "sequence": (sequence + block * request.block_sequences).astype(np.uint32),
    }


def decode(stored: Array) -> NDArray[np.float32]:
    """The numbers that stored rows stand for; uint16 are the bits of bfloat16."""
    if stored.dtype != np.uint16:
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def stored_moments(rows: Array) -> Moments:
    """Moments of stored rows [n, width], n above 0, as they will be read: after rounding to the storage type."""
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    return merge([moments_of(decode(rows[i : i + _ROWS_AT_ONCE])) for i in starts])


def pack_moments(moments: Mapping[str, Moments]) -> dict[str, Array]:
    """Tensors to save for moments by name; the norms' histogram, nearly all zeros, as its bins that are not."""
    tensors: dict[str, Array] = {}
    for name, value in moments.items():
        bins = np.flatnonzero(value.norms)
        tensors |= {f"{name}/mean": value.mean, f"{name}/m2": value.m2, f"{name}/rows": np.array([value.rows])}
        tensors |= {f"{name}/bins": bins.astype(np.int32), f"{name}/counts": value.norms[bins]}
    return tensors


def unpack_moments(tensors: Mapping[str, Array], name: str) -> Moments:
    """The moments saved under `name`."""
    norms = np.zeros(BINS)
    norms[tensors[f"{name}/bins"]] = tensors[f"{name}/counts"]
    rows = float(tensors[f"{name}/rows"][0])
    return Moments(rows=rows, mean=tensors[f"{name}/mean"], m2=tensors[f"{name}/m2"], norms=norms)
