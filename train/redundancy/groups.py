"""Groups of latents in whose place one does nearly all of their work, and the weights of that one.

Legend: R rows, D d_in, O d_out, F latents, C pairs, g latents of a group.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from train.duplicates.co_activation import meetings
from train.duplicates.directions import Pairs
from train.model.transcoder import Transcoder
from train.redundancy.candidates import Candidates, candidates
from train.redundancy.held_rows import Array, HeldRows
from train.redundancy.single_latent import Cost, Group, best_single, lost_by_one

LARGEST_SHARE = 0.1
"""Of what latents explain, that merging them may cost. Planted copies and splits cost less, and planted latents that
mean different things more, even where they are active together on nine rows of ten (docs/anti-duplication.md)."""
LEAST_ROWS = 10
"""On which a latent is active, to be judged."""
PROMISING = 0.5
"""Of what the lesser of a pair explains, that it may lose without regard to the residual, to be looked at closely."""
_SURE = 1.96
_AT_ONCE = 256
"""Latents whose pre-activations on all rows are in memory."""


class Judging(NamedTuple):
    """What pairs and groups are judged by, on CPU."""

    fit: HeldRows
    """On which single latents are fitted"""
    report: HeldRows
    """On which they are judged"""
    W_enc: Tensor
    """[D, F]"""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, O]"""
    threshold: Array
    """[F] float64"""
    explained: Array
    """[F] squared error on the report rows that each latent alone saves"""

    @classmethod
    def of(cls, transcoder: Transcoder, fit: HeldRows, report: HeldRows, threshold: Tensor) -> Self:
        """Return what the latents of `transcoder` are judged by; they are active above `threshold` [F]."""
        W_dec = transcoder.W_dec.detach().cpu()
        return cls(
            fit=fit,
            report=report,
            W_enc=transcoder.W_enc.detach().cpu(),
            b_enc=transcoder.b_enc.detach().cpu(),
            W_dec=W_dec,
            threshold=threshold.cpu().double().numpy(),
            explained=report.explained(W_dec),
        )

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        """[F] int64 each: on how many rows of either kind each latent is active."""
        fit, report = (torch.bincount(one.active.latents, minlength=len(self.b_enc)) for one in (self.fit, self.report))
        return fit, report

    @property
    def judged(self) -> Tensor:
        """[n] int64, rising: the latents that are active on enough rows of both kinds, and of use."""
        useful = torch.from_numpy(self.explained) > 0
        return ((torch.minimum(*self.counts) >= LEAST_ROWS) & useful).nonzero().squeeze(1)

    def group(self, latents: list[int]) -> Group:
        """Return some latents as a group."""
        return Group(latents, self.W_dec[latents], self.threshold[latents])

    def pre_acts(self, latents: list[int]) -> tuple[Array, Array]:
        """Return pre-activations [R, g] on both kinds of rows."""
        W_enc, b_enc = self.W_enc[:, latents], self.b_enc[latents]
        fit, report = ((held.x @ W_enc + b_enc).numpy() for held in (self.fit, self.report))
        return fit, report

    def needed(self, latents: list[int]) -> float:
        """Return what all but the most useful of some latents explain, each alone."""
        found = self.explained[latents]
        return float(found.sum() - found.max())


class Judged(NamedTuple):
    """A group and what one latent in its place costs."""

    latents: list[int]
    cost: Cost
    share: float
    """Of what all but the most useful explain, that it costs"""
    high: float
    """End of the 95 % interval of that"""


def find_groups(
    transcoder: Transcoder, held: Judging, largest_share: float = LARGEST_SHARE, promising: float = PROMISING
) -> tuple[list[Judged], Candidates]:
    """Find groups of latents in whose place one costs at most `largest_share` of what all but one of them explain.

    The largest come first. The second result is the pairs that were looked at. `promising`: what a pair may lose, the
    residual aside, of what its lesser latent explains, to be looked at closely; less is faster, and finds less.
    """
    W_enc = transcoder.W_enc.detach().T
    units = W_enc / W_enc.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_enc.dtype).tiny)
    active, judged = held.report.active, held.judged
    found = candidates(transcoder.unit_decoder(), units, active, judged, LEAST_ROWS, transcoder.blas)
    return _joined(held, _promising(held, found.pairs, promising), largest_share), found


def _promising(held: Judging, pairs: Pairs, most: float) -> list[list[int]]:
    """Return the pairs that one latent with any encoder could stand for, the residual aside: few of all."""
    active, weight = held.report.active, torch.from_numpy(np.sqrt(held.report.weight))
    weighted = active.with_values(active.values * weight[active.rows].float())
    squares = np.bincount(active.latents.numpy(), weighted.values.double().square().numpy(), minlength=len(held.W_dec))
    W_dec, together = held.W_dec.double(), meetings(weighted, pairs)[1].numpy()
    along = torch.linalg.vecdot(*(W_dec[side] for side in pairs)).numpy()
    sides = [side.numpy() for side in pairs]
    lost = lost_by_one(_symmetric(squares, together, sides), _symmetric(W_dec.square().sum(1).numpy(), along, sides))
    lesser = np.minimum(*(held.explained[side] for side in sides))
    kept = torch.from_numpy(lost <= most * lesser)
    return torch.stack(list(pairs), 1)[kept].tolist()


def _symmetric(diagonal: Array, beside: Array, sides: Sequence[Array]) -> Array:  # [C, 2, 2]
    """Return a matrix for each pair of its latents' numbers [F] and the pair's [C]."""
    first, second = (diagonal[side] for side in sides)
    return np.stack([np.stack([first, beside], 1), np.stack([beside, second], 1)], 1)


def _joined(held: Judging, pairs: list[list[int]], largest_share: float) -> list[Judged]:
    """Join redundant pairs, the cheapest first, as long as one latent can stand for all that are joined."""
    redundant = [one for one in _judge_pairs(held, pairs) if one.high <= largest_share]
    group_of: dict[int, Judged] = {}
    for pair in sorted(redundant, key=lambda one: (one.high, one.latents)):
        parts = [group_of[latent].latents if latent in group_of else [latent] for latent in pair.latents]
        if parts[0] == parts[1]:
            continue
        latents = sorted(parts[0] + parts[1])
        joined = pair if len(latents) == 2 else _judge(held, latents, held.pre_acts(latents))
        if joined.high <= largest_share:
            group_of |= dict.fromkeys(latents, joined)
    found = {tuple(one.latents): one for one in group_of.values()}
    return sorted(found.values(), key=lambda one: (-len(one.latents), one.share, one.latents))


def _judge_pairs(held: Judging, pairs: list[list[int]]) -> Iterator[Judged]:
    for low in range(0, len(pairs), _AT_ONCE // 2):
        part = pairs[low : low + _AT_ONCE // 2]
        latents = sorted({latent for pair in part for latent in pair})
        fit, report = held.pre_acts(latents)
        for pair in part:
            columns = np.searchsorted(latents, pair)
            yield _judge(held, pair, (fit[:, columns], report[:, columns]))


def _judge(held: Judging, latents: list[int], pre_acts: tuple[Array, Array]) -> Judged:
    cost = best_single(held.group(latents), held.fit, held.report, pre_acts)
    needed = held.needed(latents)
    return Judged(latents, cost, cost.rise / needed, (cost.rise + _SURE * cost.deviation) / needed)


def by_latent(transcoder: Transcoder) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of the weights: encoder columns [F, D], biases [F], decoder rows [F, O]."""
    return transcoder.W_enc.detach().T, transcoder.b_enc.detach(), transcoder.W_dec.detach()


def silence(transcoder: Transcoder, latents: list[int]) -> None:
    """Give `latents` weights with which none is active on any row."""
    W_enc, b_enc, _ = by_latent(transcoder)
    W_enc[latents], b_enc[latents] = 0.0, -1.0  # below every threshold


def weights_of(transcoder: Transcoder, one: Judged) -> tuple[Tensor, Tensor, Tensor]:
    """Return encoder column [D], bias and decoder row [O] of a group's single latent."""
    W_enc, b_enc, W_dec = (part[one.latents] for part in by_latent(transcoder))
    single = one.cost.single
    encoder, decoder = (torch.from_numpy(part).to(W_dec)[None] for part in (single.encoder, single.decoder))
    return (encoder @ W_enc)[0], (encoder[0] * b_enc).sum() + single.bias, (decoder @ W_dec)[0]


def place(transcoder: Transcoder, kept: list[int], singles: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give the latents `kept` the weights of single latents."""
    for latent, single in zip(kept, singles, strict=True):
        for part, one in zip(by_latent(transcoder), single, strict=True):
            part[latent] = one.to(part)
