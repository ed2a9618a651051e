"""Finds redundant latents: groups of which one latent does nearly the work of all, on held-out rows.

Legend: R rows, D d_in, O d_out, F latents, C pairs, g latents of a group.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.data.batches import StoreRows
from train.duplicates.co_activation import meetings
from train.duplicates.directions import Pairs
from train.evaluation.evaluate import Part, calibration_blocks, evaluate_whole, threshold_at
from train.model.transcoder import Transcoder
from train.redundancy.candidates import Candidates, candidates
from train.redundancy.held_rows import Array, HeldRows, held_rows
from train.redundancy.redundancy_record import Found, Merged, Redundancy, RedundantGroup
from train.redundancy.single_latent import Cost, Group, best_single, lost_by_one

LARGEST_SHARE = 0.1
"""Of what latents explain, that merging them may cost. Planted copies and splits cost less, and planted latents that
mean different things more, even where they are active together on nine rows of ten (docs/anti-duplication.md)."""
LEAST_ROWS = 10
"""On which a latent is active, to be judged."""
_PROMISING = 0.5
"""Of what the lesser of a pair explains, that it may lose without regard to the residual, to be looked at closely."""
_SURE = 1.96
_MOST_FLOATS = 2**28
"""Of the rows in memory: 1 GiB."""
_AT_ONCE = 256
"""Latents whose pre-activations on all rows are in memory."""


class _Held(NamedTuple):
    """What pairs and groups are judged by, on CPU."""

    fit: HeldRows
    report: HeldRows
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

    def group(self, latents: list[int]) -> Group:
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


class _Judged(NamedTuple):
    """A group and what one latent in its place costs."""

    latents: list[int]
    cost: Cost
    share: float
    """Of what all but the most useful explain, that it costs"""
    high: float
    """End of the 95 % interval of that"""


@torch.no_grad()
def measure_redundancy(
    transcoder: Transcoder,
    rows: StoreRows,
    threshold: Tensor,  # [F]
    largest_share: float = LARGEST_SHARE,
) -> Redundancy:
    """Find groups of latents in whose place one costs at most `largest_share` of what all but one of them explain.

    Single latents are fitted on the calibration blocks and judged on the report blocks, under the thresholds of
    inference. What latents explain is by how much the squared error rises without each of them alone. Leaves
    `transcoder` as it was.
    """
    held, judged, live = _held(transcoder, rows, threshold)
    W_enc = transcoder.W_enc.detach().T
    units = W_enc / W_enc.norm(dim=1, keepdim=True).clamp_min(torch.finfo(W_enc.dtype).tiny)
    found = candidates(transcoder.unit_decoder(), units, held.report.active, judged, LEAST_ROWS, transcoder.blas)
    groups = _groups(held, _promising(held, found.pairs), largest_share)
    return Redundancy(
        rows=(len(held.fit.weight), len(held.report.weight)),
        largest_share=largest_share,
        least_rows=LEAST_ROWS,
        live=live,
        not_judged=live - len(judged),
        redundant=sum(len(one.latents) - 1 for one in groups),
        candidates=_counted(found, groups, transcoder.d_sae),
        groups=[_described(held, one, transcoder.unit_decoder().cpu()) for one in groups],
        merged=_merged(transcoder, rows, threshold, held, groups),
    )


def _held(transcoder: Transcoder, rows: StoreRows, threshold: Tensor) -> tuple[_Held, Tensor, int]:
    """Return what latents are judged by, the latents [n] that can be, and how many are active at all."""
    D, O = transcoder.W_enc.shape[0], transcoder.W_dec.shape[1]
    most = _MOST_FLOATS // (2 * (D + O))
    blocks = calibration_blocks(rows.store), rows.store.record.report_blocks
    report = held_rows(transcoder, rows, blocks[1], threshold, most)
    fit = report if blocks[0] == blocks[1] else held_rows(transcoder, rows, blocks[0], threshold, most)
    W_dec = transcoder.W_dec.detach().cpu()
    held = _Held(
        fit=fit,
        report=report,
        W_enc=transcoder.W_enc.detach().cpu(),
        b_enc=transcoder.b_enc.detach().cpu(),
        W_dec=W_dec,
        threshold=threshold.cpu().double().numpy(),
        explained=report.explained(W_dec),
    )
    counts = [torch.bincount(one.active.latents, minlength=transcoder.d_sae) for one in (fit, report)]
    useful = torch.from_numpy(held.explained) > 0
    judged = (torch.minimum(*counts) >= LEAST_ROWS) & useful
    return held, judged.nonzero().squeeze(1), int((torch.maximum(*counts) > 0).sum())


def _promising(held: _Held, pairs: Pairs) -> list[list[int]]:
    """Return the pairs that one latent with any encoder could stand for, the residual aside: few of all."""
    active, weight = held.report.active, torch.from_numpy(np.sqrt(held.report.weight))
    weighted = active.with_values(active.values * weight[active.rows].float())
    squares = np.bincount(active.latents.numpy(), weighted.values.double().square().numpy(), minlength=len(held.W_dec))
    W_dec, together = held.W_dec.double(), meetings(weighted, pairs)[1].numpy()
    along = torch.linalg.vecdot(*(W_dec[side] for side in pairs)).numpy()
    sides = [side.numpy() for side in pairs]
    lost = lost_by_one(_symmetric(squares, together, sides), _symmetric(W_dec.square().sum(1).numpy(), along, sides))
    lesser = np.minimum(*(held.explained[side] for side in sides))
    kept = torch.from_numpy(lost <= _PROMISING * lesser)
    return torch.stack(list(pairs), 1)[kept].tolist()


def _symmetric(diagonal: Array, beside: Array, sides: Sequence[Array]) -> Array:  # [C, 2, 2]
    """Return a matrix for each pair of its latents' numbers [F] and the pair's [C]."""
    first, second = (diagonal[side] for side in sides)
    return np.stack([np.stack([first, beside], 1), np.stack([beside, second], 1)], 1)


def _groups(held: _Held, pairs: list[list[int]], largest_share: float) -> list[_Judged]:
    """Join redundant pairs, the cheapest first, as long as one latent can stand for all that are joined."""
    redundant = [one for one in _judge_pairs(held, pairs) if one.high <= largest_share]
    group_of: dict[int, _Judged] = {}
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


def _judge_pairs(held: _Held, pairs: list[list[int]]) -> Iterator[_Judged]:
    for low in range(0, len(pairs), _AT_ONCE // 2):
        part = pairs[low : low + _AT_ONCE // 2]
        latents = sorted({latent for pair in part for latent in pair})
        fit, report = held.pre_acts(latents)
        for pair in part:
            columns = np.searchsorted(latents, pair)
            yield _judge(held, pair, (fit[:, columns], report[:, columns]))


def _judge(held: _Held, latents: list[int], pre_acts: tuple[Array, Array]) -> _Judged:
    cost = best_single(held.group(latents), held.fit, held.report, pre_acts)
    needed = held.needed(latents)
    return _Judged(latents, cost, cost.rise / needed, (cost.rise + _SURE * cost.deviation) / needed)


def _counted(found: Candidates, groups: list[_Judged], d_sae: int) -> dict[str, Found]:
    """Count pairs by how they were found, and those of one group."""
    number = torch.arange(-d_sae, 0)  # latents of no group have numbers of their own
    for i, one in enumerate(groups):
        number[one.latents] = i
    redundant = number[found.pairs.first] == number[found.pairs.second]
    ways = {"all": torch.ones_like(redundant)} | found.found
    return {name: Found(pairs=int(of.sum()), redundant=int((of & redundant).sum())) for name, of in ways.items()}


def _described(held: _Held, one: _Judged, units: Tensor) -> RedundantGroup:
    single, rows = one.cost.single, units[one.latents]
    return RedundantGroup(
        latents=one.latents,
        best=None if single.refitted else one.latents[int(single.encoder.argmax())],
        fvu_rise=one.cost.rise / held.report.total,
        share=one.share,
        freed=one.cost.freed / held.report.weight.sum(),
        cosine=float((rows @ rows.T).min()),
    )


def _merged(transcoder: Transcoder, rows: StoreRows, threshold: Tensor, held: _Held, groups: list[_Judged]) -> Merged:
    """Measure the transcoder with a single latent in the place of every group, on all report rows."""
    before = at_same = at_equal = evaluate_whole(transcoder, rows, threshold)
    if groups:
        with _kept_as_it_is(transcoder, [latent for one in groups for latent in one.latents]):
            at_same, at_equal = _replaced(transcoder, rows, threshold, held, groups, before.l0)
    return Merged(
        fvu=before.fvu,
        l0=before.l0,
        fvu_rise=at_same.fvu - before.fvu,
        l0_after=at_same.l0,
        fvu_rise_at_equal_l0=at_equal.fvu - before.fvu,
        l0_at_equal=at_equal.l0,
    )


def _replaced(
    transcoder: Transcoder, rows: StoreRows, threshold: Tensor, held: _Held, groups: list[_Judged], l0: float
) -> tuple[Part, Part]:
    """Give the first latent of each group the weights of its single latent, and silence the others.

    Returns the figures at the same thresholds, and at those at which `l0` latents are active on a row.
    """
    singles = [_weights(transcoder, one) for one in groups]
    members, kept = [latent for one in groups for latent in one.latents], [one.latents[0] for one in groups]
    same = threshold.clone()
    same[kept] = torch.tensor([one.cost.single.threshold for one in groups], dtype=same.dtype).to(same.device)
    _silence(transcoder, members)
    _place(transcoder, kept, singles)
    at_same = evaluate_whole(transcoder, rows, same)
    _silence(transcoder, kept)
    lower = threshold_at(transcoder, rows, _l0_of_others(held.fit, members) + l0 - at_same.l0).clone()
    lower[kept] = same[kept]
    _place(transcoder, kept, singles)
    return at_same, evaluate_whole(transcoder, rows, lower)


@contextmanager
def _kept_as_it_is(transcoder: Transcoder, latents: list[int]) -> Iterator[None]:
    """Give `latents` back their weights at the end."""
    before = [part[latents].clone() for part in _by_latent(transcoder)]
    try:
        yield
    finally:
        for part, one in zip(_by_latent(transcoder), before, strict=True):
            part[latents] = one


def _by_latent(transcoder: Transcoder) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of the weights: encoder columns [F, D], biases [F], decoder rows [F, O]."""
    return transcoder.W_enc.detach().T, transcoder.b_enc.detach(), transcoder.W_dec.detach()


def _silence(transcoder: Transcoder, latents: list[int]) -> None:
    W_enc, b_enc, _ = _by_latent(transcoder)
    W_enc[latents], b_enc[latents] = 0.0, -1.0  # below every threshold


def _weights(transcoder: Transcoder, one: _Judged) -> tuple[Tensor, Tensor, Tensor]:
    """Return encoder column [D], bias and decoder row [O] of a group's single latent."""
    W_enc, b_enc, W_dec = (part[one.latents] for part in _by_latent(transcoder))
    single = one.cost.single
    encoder, decoder = (torch.from_numpy(part).to(W_dec)[None] for part in (single.encoder, single.decoder))
    return (encoder @ W_enc)[0], (encoder[0] * b_enc).sum() + single.bias, (decoder @ W_dec)[0]


def _place(transcoder: Transcoder, kept: list[int], singles: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give the latents `kept` the weights of single latents."""
    for latent, single in zip(kept, singles, strict=True):
        for part, one in zip(_by_latent(transcoder), single, strict=True):
            part[latent] = one


def _l0_of_others(held: HeldRows, members: list[int]) -> float:
    """Return how many latents but `members` are active on a row."""
    others = ~torch.isin(held.active.latents, torch.tensor(members, dtype=torch.int64))
    return float(held.weight[held.active.rows[others].numpy()].sum() / held.weight.sum())
