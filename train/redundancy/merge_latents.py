"""Merges redundant latents while a run trains: one takes the place of each group, and the others start anew.

Groups are found as `measure_redundancy` finds them, on rows of training. The latents that this frees start from rows
that are explained worst, as dead ones are in Bricken et al. 2023 ("Towards Monosemanticity", resampling).
Legend: R rows, D d_in, O d_out, F latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.keyed import key_bits
from train.data.batches import StoreRows
from train.duplicates.diversity import MergeConfig
from train.evaluation.evaluate import calibrate
from train.model.transcoder import Transcoder
from train.redundancy.groups import Judged, Judging, find_groups, place, weights_of
from train.redundancy.held_rows import HeldRows, held_rows, rows_in_memory

_CALIBRATION_ROWS = 4096
_PROMISING = 0.3
"""As in `find_groups`: on the embedded store 22 of the 24 groups that 0.5 finds, in less than half of the time."""
_TINY = torch.finfo(torch.float32).tiny

Weights = tuple[Tensor, Tensor, Tensor]
"""Of a latent: encoder column [D], bias [], decoder row [O]."""


class Merged(NamedTuple):
    """The latents that a merge has given other weights; each is in one list."""

    kept: list[int]
    """One per group, that stands for all of it: its first, which is in the smallest prefix"""
    freed: list[int]
    """The others, rising, which start anew"""


@torch.no_grad()
def merge_latents(
    transcoder: Transcoder, rows: StoreRows, blocks: range, config: MergeConfig, seed: int, step: int
) -> Merged:
    """Put one latent in the place of each redundant group, and start the others anew; changes weights in place.

    Single latents are fitted on about `config.rows` rows of the first half of `blocks`, and judged on as many of the
    second half, or on the same where there is one block alone. The result is a function of the arguments: rows that
    latents start from are drawn by `seed` and `step`.
    """
    most, middle = min(config.rows, rows_in_memory(transcoder)), len(blocks) // 2
    threshold = calibrate(transcoder, rows, min(most, _CALIBRATION_ROWS), blocks)
    report = held_rows(transcoder, rows, blocks[middle:], threshold, most)
    fit = held_rows(transcoder, rows, blocks[:middle], threshold, most) if middle else report
    held = Judging.of(transcoder, fit, report, threshold)
    groups, _ = find_groups(transcoder, held, config.largest_share, _PROMISING)
    return replace(transcoder, groups, report, threshold, seed, step)


@torch.no_grad()
def replace(
    transcoder: Transcoder, groups: list[Judged], held: HeldRows, threshold: Tensor, seed: int, step: int
) -> Merged:
    """Give all latents of `groups` their new weights, and learned thresholds; `threshold` [F] is that of inference."""
    kept = [one.latents[0] for one in groups]
    freed = sorted(latent for one in groups for latent in one.latents[1:])
    if not groups:
        return Merged(kept, freed)
    usual = float(threshold.mean())
    singles = [_scaled(transcoder, one, usual) for one in groups]
    generator = torch.Generator().manual_seed(key_bits("merge", seed, step) % 2**63)
    starts = new_latents(held, len(freed), usual, generator, unit=transcoder.has_unit_decoder)
    place(transcoder, kept, [weights for weights, _ in singles])
    place(transcoder, freed, starts)
    if transcoder.log_threshold is not None:
        learned = torch.tensor([above for _, above in singles] + [usual] * len(freed)).to(threshold)
        transcoder.log_threshold[kept + freed] = learned.clamp_min(torch.finfo(learned.dtype).tiny).log()
    return Merged(kept, freed)


def _scaled(transcoder: Transcoder, one: Judged, usual: float) -> tuple[Weights, float]:
    """Return the weights of a group's single latent, and its threshold, on the scale of the other latents.

    That is a decoder row of norm 1 where all have it; else the one on which its threshold is the `usual` one.
    """
    encoder, bias, decoder = weights_of(transcoder, one)
    threshold = one.cost.single.threshold
    if transcoder.has_unit_decoder:
        times = float(decoder.norm())
    else:
        times = usual / threshold if usual > 0 and threshold > 0 else 1.0
    return (times * encoder, times * bias, decoder / times), times * threshold


def new_latents(
    held: HeldRows, count: int, threshold: float, generator: torch.Generator, *, unit: bool
) -> list[Weights]:
    """Return weights for `count` latents, each of which predicts what is left of some row and of those like it.

    Rows are drawn by the squared error that is left of them, each once. The encoder's column points along the row. It
    is scaled and shifted so that the latent is above `threshold` on as many rows as latents are on average, with their
    mean value. The decoder's row predicts best what those before it leave of these; with norm 1 if so asked for.
    """
    usual, weight = float(held.active.values.double().mean()), torch.from_numpy(held.weight).float()
    rows = min(max(1, len(held.active.rows) // len(held.active.latents.unique())), len(weight) - 1)
    error = weight.double() * held.residual.double().square().sum(1)
    waits = torch.empty(len(error), dtype=torch.float64).exponential_(generator=generator)
    left, found = held.residual.clone(), []
    for row in (waits / error.clamp_min(_TINY)).topk(count, largest=False).indices.tolist():
        along = held.x @ held.x[row]
        top = along.topk(rows + 1)
        at, above, cut = top.indices[:-1], top.values[:-1], top.values[-1]
        times = (usual - threshold) / (above.mean() - cut).clamp_min(_TINY)
        values, part = threshold + times * (above - cut), left[at]
        decoder = (weight[at] * values) @ part / (weight[at] @ values.square()).clamp_min(_TINY)
        left[at] = part - values[:, None] * decoder
        scaled = decoder / decoder.norm().clamp_min(_TINY) if unit else decoder
        found.append((times * held.x[row], threshold - times * cut, scaled))
    return found
