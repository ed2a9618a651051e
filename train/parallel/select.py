"""Selection over all shards: the threshold of BatchTopK and the largest of each row, by exchanges that need no order.

Legend: B rows, V shards, N pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_DIGITS = ((20, 11), (10, 10), (0, 10))
"""Of the bits of a positive float32: how far each digit is shifted, and how many bits it has."""

Total = Callable[[Tensor], Tensor]
"""Sums integers over all processes."""


def nth_largest(values: Tensor, n: int, total: Total) -> Tensor:  # [N], [] float32
    """Return the n-th largest of the positive float32 `values` of all processes, exactly; 0 for n = 0.

    Positive floats rise with their bits taken as an integer, so histograms of three digits find the bits of the result
    one digit after the other, and counts are summed in any order. There are `n` values or more in all.
    """
    keys, found, wanted = values.view(torch.int32).long(), 0, n
    for shift, bits in _DIGITS if n else ():
        digits = (keys[keys >> shift >> bits == found] >> shift) & (2**bits - 1)
        counts = total(torch.bincount(digits, minlength=2**bits))
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1
        wanted -= int(at_least[digit] - counts[digit])
        found = (found << bits) | digit
    return torch.tensor(found, dtype=torch.int32, device=values.device).view(torch.float32)


def largest_of_rows(values: Tensor, k: int) -> Tensor:  # [V, B, n], [V, B, n] bool
    """Tell which `values` are among the k largest of their row over all shards; of equal ones the first by shard.

    What is -inf is not there, and never among them.
    """
    shards, rows, width = values.shape
    flat = values.transpose(0, 1).reshape(rows, shards * width)
    places = flat.sort(dim=1, descending=True, stable=True).indices[:, :k]
    among = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, places, True) & (flat > -torch.inf)
    return among.view(rows, shards, width).transpose(0, 1)
