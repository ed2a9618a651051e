"""The threshold of BatchTopK over all shards, by counts that are summed in any order.

Legend: V shards, N pairs.
"""

import torch
from torch import Tensor

_LOWER_BITS = 18
"""Of a float32's 31 bits without the sign: with these dropped, the exponent and 5 bits of the fraction are left."""
_BINS = 1 << 31 - _LOWER_BITS


def histogram(values: Tensor) -> Tensor:  # [N], [_BINS] int32
    """Count positive float32 `values` by their upper bits, so in bins of about 3 %."""
    return torch.bincount(values.view(torch.int32) >> _LOWER_BITS, minlength=_BINS).int()


def candidates(counts: Tensor, n: int) -> tuple[Tensor, int]:  # [V, _BINS], [] float32
    """Return the lower edge of the bin with the n-th largest value, and the most values from it upwards in one shard.

    Positive floats rise with their bits taken as an integer. There are `n` values or more in all;
    for n = 0 the edge is NaN, and nothing lies above it.
    """
    from_bin = counts.flip(1).cumsum(1).flip(1)  # [V, bins]: in the bin and all above it
    last = int((from_bin.sum(0) >= n).sum()) - 1
    edge = torch.tensor(last << _LOWER_BITS, dtype=torch.int32, device=counts.device)
    return edge.view(torch.float32), int(from_bin[:, last].max())
