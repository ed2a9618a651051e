"""BatchTopK on CPU by a product in bfloat16, with the pairs and the values that float32 gives, bit for bit.

What float32 gives: the value of a pair is what `numba_loops.products` computes; selected are the n largest above 0 of
all pairs, of equal ones the first. They are found without computing all:

1. A product in bfloat16 gives every pair an upper bound of its value (`Near`; proved in docs/decisions/011).
2. The values of n pairs are computed, those that are largest by the product. The least of them is not above the n-th
   largest of all pairs.
3. So are those of the pairs whose bound reaches that least value. All others are below it.

No step is taken on a bound that fails: values that are computed are compared with theirs, and the first one above it
sends this search and all later ones to a product in float32, whose rounding is bounded in the same way.
Legend: B rows, D d_in, F latents, N pairs.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.model import blas, room
from train.model.kernels import compiled, numba_loops
from train.model.sparse_latents import SparseLatents

_FINER, _COARSER = 2.0**-24, 2.0**-23
"""Of float32: the unit roundoff of rounding to nearest, and of rounding in any direction."""
_BFLOAT16 = 2.0**-8
"""The unit roundoff of bfloat16."""
_SLACK = 2.0**-20
"""Relative: more than the few float32 roundings with which a bound itself is computed."""
_TINY = 2.0**-90
"""Absolute: more than all that is lost where numbers below 2^-126 are taken as 0."""
_HUGE = 2.0**60
"""A norm from which on products might overflow: nothing is ruled out."""


class Near(NamedTuple):
    """A product that is near the pre-activations, and what says how far above it they can be."""

    product: Tensor
    """[B, F] without bias, bfloat16 or float32"""
    bias: Tensor
    """[F]"""
    rows: Any
    """[2, B] float32; these and the next as in `numba_loops.find_reaching`"""
    columns: Any
    """[3, F] float32"""
    relative: float


class Guarded:
    """The search of a run, and what it has taken since the process began."""

    def __init__(self) -> None:
        self._guess, self._trusted = 0.0, True
        self._selected = self._computed = self._again = self._fallbacks = 0

    def batch_topk(
        self,
        library: blas.Blas,
        x: Tensor,  # [B, D]
        W_enc: Tensor,  # [D, F]
        b_enc: Tensor,  # [F]
        n: int,
        whole: bool,
    ) -> tuple[SparseLatents, Tensor, Tensor | None]:
        """As `Compiled.batch_topk`, and the pre-activations [B, F] in float32 where they are wanted `whole`.

        These come from a product in float32, which then is what is searched, with the same result.
        """
        pre_acts, found = None, None
        if self._trusted and not whole:
            found = self._search(in_bfloat16(x, W_enc, b_enc), x, W_enc, n)
            self._trusted = found.held
        if found is None or not found.held:
            self._fallbacks += not whole
            near = in_float32(library, x, W_enc, b_enc)
            found = self._search(near, x, W_enc, n)
            pre_acts = near.product.add_(b_enc.detach()) if whole else None
        active, smallest = found.largest(n)
        self._selected, self._computed = self._selected + len(active.rows), self._computed + found.computed
        return active, smallest, pre_acts

    def figures(self) -> dict[str, float]:
        """Return what the search has taken: all but the first figure are 0 as long as all goes well."""
        return {
            "search_computed": self._computed / max(self._selected, 1),
            "search_again": self._again,
            "search_fallbacks": self._fallbacks,
        }

    def _search(self, near: Near, x: Tensor, W_enc: Tensor, n: int) -> "_Candidates":
        """Return candidates that hold the values of all pairs that can be among the `n` largest.

        Bounds are compared with a guess first, somewhat below the least value that the step before searched down to,
        and once more when that was too high.
        """
        floor = self._guess
        found = _Candidates(near, x, W_enc, floor)
        least = found.least(n)
        if floor and least < floor:
            self._again += 1
            floor = max(least, 0.0)
            found = _Candidates(near, x, W_enc, floor)
            least = found.least(n)
        self._guess = 0.95 * max(least, 0.0)
        found.compute(~(found.upper < max(least, floor)))
        return found


def row_topk(
    library: blas.Blas,
    x: Tensor,  # [B, D]
    W_enc: Tensor,  # [D, F]
    b_enc: Tensor,  # [F]
    k: int,
    among: Tensor,  # [F] bool
) -> SparseLatents:
    """As `Compiled.row_topk`, by a product in float32 with the latents `among` alone."""
    latents = among.nonzero().squeeze(1)
    pre_acts = blas.addmm(library, b_enc.detach()[latents], x, W_enc.detach().T[latents].T)
    found = compiled.Compiled().row_topk(pre_acts, k)
    return replace(found, latents=latents[found.latents], d_sae=len(among))


def in_bfloat16(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Near:
    """Compute the product of both sides rounded to bfloat16, rounded again."""
    one, other = _rounded(x), _rounded(W_enc.T)
    return _near(one.low @ other.low.T, b_enc, one, other, _BFLOAT16)


def in_float32(library: blas.Blas, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Near:
    """Compute the product of both sides as they are."""
    one, other = (side._replace(lost=np.zeros_like(side.lost)) for side in (_rounded(x), _rounded(W_enc.T)))
    return _near(blas.product(library, x, W_enc), b_enc, one, other, 0.0)


class _Rounded(NamedTuple):
    """Rows [N, D] in bfloat16, the norms of the rows as they were, and the norms of what rounding took from them."""

    low: Tensor
    norms: NDArray[np.float64]
    lost: NDArray[np.float64]


def _rounded(rows: Tensor) -> _Rounded:
    array = rows.detach().contiguous().numpy()
    bits, (norms, lost) = np.empty(array.shape, np.uint16), np.empty((2, len(array)))
    numba_loops.round_rows(array, array.view(np.uint32), bits, norms, lost)
    return _Rounded(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), norms, lost)


def _near(product: Tensor, b_enc: Tensor, x: _Rounded, W: _Rounded, relative: float) -> Near:
    """Bound |value - product - b| by relative |product| + |x_lost| |W| + |x_low| |W_lost| + roundings of both sums."""
    bias = b_enc.detach()
    gamma = sum(terms * unit / (1 - terms * unit) for terms in [x.low.shape[1] + 8] for unit in (_FINER, _COARSER))
    rows = np.stack([x.norms + x.lost, x.lost])
    columns = np.stack([W.lost + gamma * (W.norms + W.lost), W.norms, (gamma + _SLACK) * np.abs(bias.numpy())])
    return Near(product, bias, _no_less(rows), _no_less(columns), relative + _SLACK)


def _no_less(numbers: NDArray[np.float64]) -> Any:
    """Return float32 numbers that are not below `numbers`."""
    return np.where(numbers < _HUGE, numbers * (1 + _SLACK) + _TINY, np.inf).astype(np.float32)


class _Candidates:
    """Pairs whose bound reaches a floor, in order, and the values of those that were computed."""

    def __init__(self, near: Near, x: Tensor, W_enc: Tensor, floor: float) -> None:
        self._sides = x.detach().numpy(), W_enc.detach().T.numpy(), near.bias.numpy()
        self._shape = near.product.shape
        counts, size = compiled.parts_of(self._shape)
        kinds = (np.int64, np.float32, np.float32)
        flat, middle, upper = (room.array(near.product.numel(), kind) for kind in kinds)
        how = (near.rows, near.columns, np.float32(near.relative), np.float32(floor))
        numba_loops.find_reaching(_bits(near.product), near.bias.numpy(), *how, counts, flat, middle, upper)
        found = compiled.Found(self._shape, counts, flat, middle, size)
        self._flat, self._middle, self.upper = (found.joined(part) for part in (flat, middle, upper))
        self._middle[np.isnan(self._middle)] = -np.inf
        self._values = np.full_like(self._middle, -np.inf)
        self.computed, self.held = 0, True
        """How many values, and whether each was below its bound."""

    def least(self, n: int) -> float:
        """Return the least value of `n` pairs or more, those largest by the product; -inf where fewer are here."""
        if len(self._flat) < n:
            return -np.inf
        wanted = self._middle >= np.partition(self._middle, len(self._flat) - n)[len(self._flat) - n]
        self.compute(wanted)
        return float(self._values[wanted].min())

    def compute(self, wanted: NDArray[np.bool_]) -> None:
        """Compute the values of the `wanted` pairs that are missing. One that is NaN is never selected: it is -inf."""
        places = np.flatnonzero(wanted & (self._values == -np.inf))
        rows = self._flat[places] // self._shape[1]
        values = np.empty(len(places), np.float32)
        numba_loops.products(rows, self._flat[places] - rows * self._shape[1], *self._sides, values)
        self.held &= not (values > self.upper[places]).any()
        self._values[places] = np.where(np.isnan(values), -np.inf, values)
        self.computed += len(places)

    def largest(self, n: int) -> tuple[SparseLatents, Tensor]:
        """As `Compiled.batch_topk`."""
        found = compiled.Found(self._shape, np.array([len(self._flat)]), self._flat, self._values, len(self._flat))
        return found.largest(min(n, int((self._values > 0).sum())))


def _bits(product: Tensor) -> Any:
    """Return the product as `numba_loops.find_reaching` reads it."""
    return product.view(torch.int16).numpy().view(np.uint16) if product.dtype == torch.bfloat16 else product.numpy()
