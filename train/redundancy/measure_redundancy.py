"""Finds redundant latents: groups of which one latent does nearly the work of all, on held-out rows.

Legend: R rows, D d_in, O d_out, F latents, C pairs, g latents of a group.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from train.data.batches import StoreRows
from train.evaluation.evaluate import Part, evaluate_whole, threshold_at
from train.evaluation.evaluated_blocks import calibration_blocks
from train.model.transcoder import Transcoder
from train.redundancy.candidates import Candidates
from train.redundancy.groups import (
    LARGEST_SHARE,
    LEAST_ROWS,
    Judged,
    Judging,
    by_latent,
    find_groups,
    place,
    silence,
    weights_of,
)
from train.redundancy.held_rows import HeldRows, held_rows, rows_in_memory
from train.redundancy.redundancy_record import Found, Merged, Redundancy, RedundantGroup


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
    held = _held(transcoder, rows, threshold)
    live = int((torch.maximum(*held.counts) > 0).sum())
    groups, found = find_groups(transcoder, held, largest_share)
    return Redundancy(
        rows=(len(held.fit.weight), len(held.report.weight)),
        largest_share=largest_share,
        least_rows=LEAST_ROWS,
        live=live,
        not_judged=live - len(held.judged),
        redundant=sum(len(one.latents) - 1 for one in groups),
        candidates=_counted(found, groups, transcoder.d_sae),
        groups=[_described(held, one, transcoder.unit_decoder().cpu()) for one in groups],
        merged=_merged(transcoder, rows, threshold, held, groups),
    )


def _held(transcoder: Transcoder, rows: StoreRows, threshold: Tensor) -> Judging:
    """Return what latents are judged by on held-out rows."""
    record, most = rows.store.record, rows_in_memory(transcoder)
    blocks = calibration_blocks(record), record.report_blocks
    report = held_rows(transcoder, rows, blocks[1], threshold, most)
    fit = report if blocks[0] == blocks[1] else held_rows(transcoder, rows, blocks[0], threshold, most)
    return Judging.of(transcoder, fit, report, threshold)


def _counted(found: Candidates, groups: list[Judged], d_sae: int) -> dict[str, Found]:
    """Count pairs by how they were found, and those of one group."""
    number = torch.arange(-d_sae, 0)  # latents of no group have numbers of their own
    for i, one in enumerate(groups):
        number[one.latents] = i
    redundant = number[found.pairs.first] == number[found.pairs.second]
    ways = {"all": torch.ones_like(redundant)} | found.found
    return {name: Found(pairs=int(of.sum()), redundant=int((of & redundant).sum())) for name, of in ways.items()}


def _described(held: Judging, one: Judged, units: Tensor) -> RedundantGroup:
    single, rows = one.cost.single, units[one.latents]
    return RedundantGroup(
        latents=one.latents,
        best=None if single.refitted else one.latents[int(single.encoder.argmax())],
        fvu_rise=one.cost.rise / held.report.total,
        share=one.share,
        freed=one.cost.freed / held.report.weight.sum(),
        cosine=float((rows @ rows.T).min()),
    )


def _merged(transcoder: Transcoder, rows: StoreRows, threshold: Tensor, held: Judging, groups: list[Judged]) -> Merged:
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
    transcoder: Transcoder, rows: StoreRows, threshold: Tensor, held: Judging, groups: list[Judged], l0: float
) -> tuple[Part, Part]:
    """Give the first latent of each group the weights of its single latent, and silence the others.

    Returns the figures at the same thresholds, and at those at which `l0` latents are active on a row.
    """
    singles = [weights_of(transcoder, one) for one in groups]
    members, kept = [latent for one in groups for latent in one.latents], [one.latents[0] for one in groups]
    same = threshold.clone()
    same[kept] = torch.tensor([one.cost.single.threshold for one in groups], dtype=same.dtype).to(same.device)
    silence(transcoder, members)
    place(transcoder, kept, singles)
    at_same = evaluate_whole(transcoder, rows, same)
    silence(transcoder, kept)
    lower = threshold_at(transcoder, rows, _l0_of_others(held.fit, members) + l0 - at_same.l0).clone()
    lower[kept] = same[kept]
    place(transcoder, kept, singles)
    return at_same, evaluate_whole(transcoder, rows, lower)


@contextmanager
def _kept_as_it_is(transcoder: Transcoder, latents: list[int]) -> Iterator[None]:
    """Give `latents` back their weights at the end."""
    before = [part[latents].clone() for part in by_latent(transcoder)]
    try:
        yield
    finally:
        for part, one in zip(by_latent(transcoder), before, strict=True):
            part[latents] = one


def _l0_of_others(held: HeldRows, members: list[int]) -> float:
    """Return how many latents but `members` are active on a row."""
    others = ~torch.isin(held.active.latents, torch.tensor(members, dtype=torch.int64))
    return float(held.weight[held.active.rows[others].numpy()].sum() / held.weight.sum())
