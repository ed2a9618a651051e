"""What a trained transcoder or autoencoder does on held-out rows, measured alike for every trainer.

What a trainer hands over is one affine map, a rule for which latents are active, and another affine map. Three rules
are looked at: the trainer's own threshold, if it has one; the threshold at which these very rows have k active latents
on average, so that no trainer gains by being less sparse; and the k largest latents of every row. Dead latents and
pairs of latents that say the same are counted under the second.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from train.compare.measure import LEAST_TOGETHER
from train.duplicates.co_activation import correlated_pairs
from train.duplicates.directions import close_pairs
from train.model.sparse_latents import SparseLatents

CORRELATION, COSINE = 0.8, 0.9
"""Above these a pair of latents says the same."""


class Weights(NamedTuple):
    """A map of normalised rows: latents are the pre-activations that a rule keeps, never those below 0."""

    W_enc: Tensor
    """[D, F]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, O]"""
    b_dec: Tensor
    """[O]"""
    threshold: float | None = None
    """Of the trainer's own rule of inference; none: it takes the k largest of every row."""
    W_skip: Tensor | None = None
    """[D, O] of a linear map beside the latents"""

    def pre_acts(self, x: Tensor) -> Tensor:
        """[B, F]"""
        return x @ self.W_enc + self.b_enc

    def base(self, x: Tensor) -> Tensor:
        """[O] or [B, O]: what is predicted where no latent is active."""
        return self.b_dec if self.W_skip is None else x @ self.W_skip + self.b_dec


class Rows(NamedTuple):
    """Normalised held-out rows of one stratum."""

    source: Tensor
    """[B, D]"""
    target: Tensor
    """[B, O]"""
    weight: float
    """How often each counts at natural frequencies."""


class Part(NamedTuple):
    """Figures under one rule."""

    fvu: float
    l0: float
    """Active latents per row."""


class Judged(NamedTuple):
    """Figures of one trained map."""

    own: Part | None
    """Under its own threshold"""
    equal: Part
    """Under the threshold of k active latents per row on average"""
    per_row: Part
    """Of the k largest latents of every row"""
    dead: float
    """The share of latents that are active on no row under the second rule."""
    correlated: int
    """Pairs of latents whose activations correlate above `CORRELATION`, those not active as 0"""
    parallel: int
    """Pairs of latents that are not dead whose decoder rows have a cosine above `COSINE`"""


@torch.no_grad()
def judge(weights: Weights, rows: list[Rows], k: int) -> Judged:
    """Measure; a map that is not finite explains nothing."""
    if not all(part.isfinite().all() for part in weights[:4]):
        return Judged(None, Part(math.inf, 0.0), Part(math.inf, 0.0), 1.0, 0, 0)
    equal = threshold_at(weights, rows, k)
    rules: dict[str, Callable[[Tensor], Tensor]] = {
        "equal": lambda pre_acts: pre_acts > equal,
        "per_row": lambda pre_acts: largest(pre_acts, k),
    }
    if (own := weights.threshold) is not None:
        rules["own"] = lambda pre_acts: pre_acts > own
    sums = {name: _Sums(weights) for name in rules}
    thinned, fired = [], torch.zeros_like(weights.b_enc, dtype=torch.bool)
    most = max(part.weight for part in rows)
    for part in rows:
        pre_acts = weights.pre_acts(part.source)
        for name, rule in rules.items():
            row, latent = rule(pre_acts).nonzero(as_tuple=True)
            active = SparseLatents.of(row, latent, pre_acts[row, latent], pre_acts.shape)
            sums[name].add(part, active)
            if name == "equal":
                fired[latent] = True
                few = round(part.weight / most * len(pre_acts))  # rows are in random order: a random part of them
                thinned.append(active.slice(slice(0, few)))
    parts = {name: found.part() for name, found in sums.items()}
    levels = correlated_pairs(SparseLatents.joined(thinned), LEAST_TOGETHER, partners=1, levels=(CORRELATION,))[1]
    unit = weights.W_dec / weights.W_dec.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    close = close_pairs(unit, fired.nonzero().squeeze(1), COSINE, "torch")[1]
    return Judged(
        own=parts.get("own"),
        equal=parts["equal"],
        per_row=parts["per_row"],
        dead=1 - float(fired.double().mean()),
        correlated=levels[CORRELATION],
        parallel=len(close),
    )


def threshold_at(weights: Weights, rows: list[Rows], k: int) -> float:
    """The threshold above which the rows, at natural frequencies, have k latents on average."""
    kept, counts, floor, total = [], [], 0.0, 0.0
    for part in rows:
        pre_acts = weights.pre_acts(part.source).relu().view(-1)
        top = pre_acts.topk(min(8 * k * len(part.source), pre_acts.numel()), sorted=False).values
        floor = max(floor, float(top.min()))
        kept.append(top)
        counts.append(torch.full_like(top, part.weight, dtype=torch.float64))
        total += part.weight * len(part.source)
    values, order = torch.cat(kept).sort(descending=True)
    place = int(torch.searchsorted(torch.cat(counts)[order].cumsum(0), k * total, right=True))
    found = float(values[place]) if place < len(values) else 0.0
    assert found >= floor, "some rows have more than 8 k latents above the threshold"
    return found


def largest(
    pre_acts: Tensor,  # [B, F]
    k: int,
) -> Tensor:  # [B, F] bool
    """Which are the k largest of their row, and above 0."""
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, pre_acts.topk(k, dim=1).indices, True) & (
        pre_acts > 0
    )


class _Sums:
    """Squared error over squared distance from the mean, and active latents per row, at natural frequencies."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._errors = self._squares = self._active = self._n = 0.0
        self._sum = torch.zeros_like(weights.b_dec, dtype=torch.float64)

    def add(self, part: Rows, active: SparseLatents) -> None:
        """Count rows with these latents."""
        found = embedding_bag(
            active.latents,
            self._weights.W_dec,
            active.starts,
            mode="sum",
            per_sample_weights=active.values,
            include_last_offset=True,
        )
        error = part.target - found - self._weights.base(part.source)
        self._errors += part.weight * float(error.double().square().sum())
        self._squares += part.weight * float(part.target.double().square().sum())
        self._active += part.weight * len(active.rows)
        self._sum += part.weight * part.target.double().sum(0)
        self._n += part.weight * len(part.target)

    def part(self) -> Part:
        """The figures of all rows so far."""
        total = self._squares - float(self._sum.square().sum()) / self._n
        return Part(self._errors / total, self._active / self._n)
