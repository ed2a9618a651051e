"""What a finished run is measured by, on held-out rows at natural frequencies.

Legend: F latents, O d_out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from shared.config import Config
from shared.errors import UserError
from shared.splice_record import splice_of
from shared.store.store import Store
from train.compare.merging import alike, densest_of, merge, without
from train.data.batches import StoreRows
from train.duplicates.co_activation import correlated_pairs, measure
from train.duplicates.directions import Pairs, close_pairs, connected, effective_number, nearest_cosines
from train.evaluation.evaluate import calibrate, evaluate_strata, evaluate_whole, threshold_at
from train.evaluation.held_out import HeldOutActive, held_out_active
from train.live.run_files import TIMING
from train.model import checkpoint
from train.model.checkpoint import Checkpoint
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder
from train.probe.probe_record import probe_of
from train.redundancy.measure_redundancy import measure_redundancy
from train.run.load_run import load_run
from train.run.metrics import Log
from train.run.settings import RunConfig, Settings

TOP = 10
"""Strongest rows of each latent whose position counts."""
LEAST_TOGETHER = 10
"""Rows on which two latents must both be active for their correlation to count."""
_COSINE, _JACCARD, _CORRELATION = 0.7, 0.3, 0.8
_TIMES = (0.5, 0.7, 1.4, 2.0)
"""Of the l0 that runs are compared at: the other points of the trade-off curve."""
_CHUNK_ROWS = 1024
_CALIBRATION_ROWS = 4096
"""For those: each is at the l0 that it has, not at one that was asked for."""


class Nearest(Config):
    """Over latents, the largest cosine of a decoder row with another."""

    median: float
    p99: float
    largest: float


class Merged(Config):
    """Clusters, and latents that correlate above 0.8, each group merged into its densest latent."""

    removed: int
    """Latents that merging removed."""
    fvu_rise: float
    """Of merging, the kept latents' decoder rows fitted again on the calibration rows."""
    fvu_rise_random: float
    """Of removing as many other live latents of the same densities."""


class Point(Config):
    """What a run reconstructs at another threshold; of held-out rows."""

    l0: float
    fvu: float


class StratumFigures(Config):
    """Of one position stratum."""

    fvu: float | None
    """None where the target is constant."""
    l0: float


class Figures(Config):
    """Of one run. Position 0 is left out of fvu, l0 and, unless it is named, correlations; elsewhere it is in."""

    fvu: float
    l0: float
    live: int
    """Latents that are active on the held-out rows."""
    dead_share: float
    nearest: Nearest
    nearest_of_random: Nearest
    """The same of as many random directions."""
    share_above_0_7: float
    """Of live latents, those with a neighbour above this cosine."""
    share_above_0_9: float
    share_within_segment_above_0_7: float
    """The same, neighbours of the same Matryoshka group alone."""
    pairs_cosine_above_0_9: int
    effective_number: float
    """Sum over live latents of 1 / (neighbours with a cosine above 0.7, itself included)."""
    pairs_correlated_above_0_5: int
    pairs_correlated_above_0_8: int
    pairs_correlated_above_0_8_with_position_0: int
    largest_correlation: float
    clusters: int
    """Latents connected by a cosine of at least 0.7 and a Jaccard index of at least 0.3."""
    latents_in_clusters: int
    merged: Merged
    redundant: int | None = None
    """Latents fewer, if one takes the place of each group in whose place one does nearly as well (train/redundancy);
    none: a comparison from before that was measured."""
    redundant_fvu_rise: float | None = None
    """Of that, at equal l0."""
    position_0_share_of_top: float
    """Mean over live latents of the share of position 0 among the 10 strongest rows, at natural frequencies."""
    latents_at_position_0: int
    """Live latents whose 10 strongest rows are all of position 0."""
    cpu_ms_per_step: float | None
    """Of all cores, between rows of the logs with no evaluation or checkpoint between; none: there are no such rows."""
    ms_per_step: float | None
    """The same by the clock."""
    ce_recovered: float | None = None
    """By `python -m harvest splice`, of the run's own thresholds; none: not measured at this step."""
    kl: float | None = None
    """The same; nats per token."""
    explained_share: float | None = None
    """By `python -m train probe`, of the run's own thresholds: share of live latents that a label explains with an F1
    of at least 0.5; none: not measured at this step."""
    probe_f1: float | None = None
    """The same; mean F1 over labels of the best single latent."""
    probe_f1_of_5: float | None = None
    strata: dict[str, StratumFigures] = {}
    """By name, without position 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A run's figures, and what matching it with another seed needs."""

    path: Path
    config: RunConfig
    figures: Figures
    tradeoff: list[Point]
    """By rising l0."""
    live: Tensor
    """[n] latents that are active on the held-out rows"""
    density: Tensor
    """[F] rows on which each is, without position 0"""
    W_dec: Tensor
    """[F, O] on CPU, each row divided by its norm"""
    probed: str | None = None
    """Digest of what `probe.json` was asked; none: not measured at this step."""


def require_finished(run: Path, config: RunConfig) -> Checkpoint:
    """Return the newest checkpoint of `run`. Raises `UserError` when it is not of the last step."""
    found = checkpoint.find(run)
    if found.step < config.settings.steps:
        raise UserError(
            f"{run} is at step {found.step} of {config.settings.steps}; finish it with: python -m train resume {run}"
        )
    return found


@torch.no_grad()
def measure_run(run: Path, store: Store, l0: float | None, found: Checkpoint | None = None) -> Measured:
    """Measure the newest checkpoint of `run`, or the one that was `found`, on `store`.

    Thresholds are those at which rows have `l0` active latents each; without one, those that the run has: by its own k
    or its learned thresholds.

    Raises `UserError` when it has fewer active latents even without a threshold, and `CorruptData` when its
    `splice.json` or `probe.json` is damaged.
    """
    loaded = load_run(run, store=store, found=found)
    record = splice_of(run, loaded.step, store.request.digest)
    spliced = record and record.headline
    probes = probe_of(run, loaded.step, store.request.digest)
    probed = probes and probes.summary
    config, model, rows = loaded.config, loaded.transcoder, replace(loaded.rows, chunk_rows=_CHUNK_ROWS)
    threshold = calibrate(model, rows) if l0 is None else threshold_at(model, rows, l0)
    held_out = held_out_active(model, rows, store.record.report_blocks, threshold)
    rest, W_dec = held_out.without_position_0, model.unit_decoder()
    trained_on = rest if store.exclusion and store.exclusion.position_0 else held_out.active
    live = torch.bincount(trained_on.latents, minlength=model.d_sae).nonzero().squeeze(1)
    density = torch.bincount(rest.latents, minlength=model.d_sae)

    close, cosines = close_pairs(W_dec, live.to(W_dec.device), _COSINE, model.blas)
    within = (model.group[close.first] == model.group[close.second]).cpu()
    close, cosines = close.cpu(), cosines.cpu()
    near, random = nearest_cosines(W_dec, live.to(W_dec.device), model.blas).cpu(), _random(len(live), W_dec.shape[1])
    same = close.kept(measure(rest, close).jaccard >= _JACCARD)
    counts, correlated, largest = _correlations(rest)
    evaluation, strata = evaluate_strata(model, rows, threshold)
    if l0 is not None and not threshold.any() and evaluation.l0 < 0.9 * l0:
        raise UserError(f"rows of {run} have {evaluation.l0:.1f} active latents, not {l0:g}; pass a smaller --l0")
    at_0, (cpu, wall) = position_0_share_of_top(held_out)[live], cost_per_step(run, config.settings)

    kept, dropped = densest_of(connected(same.joined(correlated)), density)
    others = alike(dropped, live[~torch.isin(live, torch.cat([kept, dropped]))], density, seed=0)
    merged = merge(model, rows, kept, dropped, threshold)
    less = without(model, rows, others, threshold)
    redundancy = measure_redundancy(model, rows, threshold)

    figures = Figures(
        fvu=evaluation.fvu,
        l0=evaluation.l0,
        live=len(live),
        dead_share=1 - len(live) / model.d_sae,
        nearest=_nearest(near),
        nearest_of_random=_nearest(nearest_cosines(random, torch.arange(len(random)), "torch")),
        share_above_0_7=_share(near > 0.7),
        share_above_0_9=_share(near > 0.9),
        share_within_segment_above_0_7=len(torch.unique(torch.cat(close.kept(within)))) / max(len(live), 1),
        pairs_cosine_above_0_9=int((cosines > 0.9).sum()),
        effective_number=effective_number(close, live, model.d_sae),
        pairs_correlated_above_0_5=counts[0.5],
        pairs_correlated_above_0_8=counts[0.8],
        pairs_correlated_above_0_8_with_position_0=_correlations(held_out.active)[0][0.8],
        largest_correlation=largest,
        clusters=len(connected(same)),
        latents_in_clusters=sum(map(len, connected(same))),
        merged=Merged(removed=len(dropped), fvu_rise=merged - evaluation.fvu, fvu_rise_random=less - evaluation.fvu),
        redundant=redundancy.redundant,
        redundant_fvu_rise=redundancy.merged.fvu_rise_at_equal_l0,
        position_0_share_of_top=float(at_0.mean()) if len(at_0) else 0.0,
        latents_at_position_0=int((at_0 == 1).sum()),
        cpu_ms_per_step=cpu,
        ms_per_step=wall,
        ce_recovered=spliced.ce_recovered.value if spliced and spliced.ce_recovered else None,
        kl=spliced.kl.value if spliced else None,
        explained_share=probed.explained["latents"]["0.5"] if probed else None,
        probe_f1=probed.mean_f1["latents"]["1"] if probed else None,
        probe_f1_of_5=probed.mean_f1["latents"].get("5") if probed else None,
        strata={name: StratumFigures(fvu=part.fvu, l0=part.l0) for name, part in strata.items()},
    )
    return Measured(
        path=run,
        config=config,
        figures=figures,
        tradeoff=sorted(
            [
                Point(l0=evaluation.l0, fvu=evaluation.fvu),
                *tradeoff(model, rows, [(l0 or evaluation.l0) * times for times in _TIMES]),
            ],
            key=lambda point: point.l0,
        ),
        live=live,
        density=density,
        W_dec=W_dec.cpu(),
        probed=probed.asked if probed else None,
    )


def tradeoff(model: Transcoder, rows: StoreRows, wanted: Sequence[float]) -> list[Point]:
    """Measure held-out fvu at thresholds for about the `wanted` l0, rising, as far as the latents reach it."""
    found = []
    for l0 in wanted:
        threshold = threshold_at(model, rows, l0, _CALIBRATION_ROWS)
        part = evaluate_whole(model, rows, threshold)
        found.append(Point(l0=part.l0, fvu=part.fvu))
        if not threshold.any():
            break  # without a threshold there are no more
    return found


def position_0_share_of_top(held_out: HeldOutActive) -> Tensor:  # [F] float64
    """Return position 0's share of the strongest rows of each latent, as many as count `TOP` at natural frequencies.

    0 for a latent that is never active.
    """
    active, at_0 = held_out.active, held_out.at_position_0[held_out.active.rows]
    order = active.values.argsort(descending=True, stable=True)
    order = order[active.latents[order].argsort(stable=True)]
    at_0, latents = at_0[order], active.latents[order]
    weights = torch.where(at_0, held_out.weight_of_position_0, 1.0).double()
    past = weights.cumsum(0)
    counts = torch.bincount(latents, minlength=active.d_sae)
    before = torch.cat([past.new_zeros(1), past])[counts.cumsum(0) - counts].repeat_interleave(counts)
    taken = torch.minimum(weights, TOP - (past - weights - before)).clamp_min(0)
    total = torch.zeros(active.d_sae, dtype=torch.float64)
    return total.index_add(0, latents, taken * at_0) / total.index_add(0, latents, taken).clamp_min(1e-300)


def cost_per_step(run: Path, settings: Settings) -> tuple[float | None, float | None]:
    """Return milliseconds per step: of CPU time of all cores, and by the clock.

    Between rows of `timing.jsonl` that no evaluation or checkpoint falls between, the first left out: it compiles.
    """
    rows = Log(run / TIMING).rows()
    spent = {"cpu_seconds": 0.0, "seconds": 0.0}
    steps = 0
    evaluation, checkpoint_every = int(settings.evaluation.every), int(settings.checkpoint.every)
    for before, row in pairwise(rows):
        evaluated = row["step"] // evaluation > before["step"] // evaluation
        saved = (row["step"] - 1) // checkpoint_every > (before["step"] - 1) // checkpoint_every
        resumed = row.get("from_step") != before.get("from_step")  # its clocks start over
        timed = "cpu_seconds" in row and "cpu_seconds" in before
        if evaluated or saved or resumed or row["step"] == settings.steps or not timed:
            continue
        steps += row["step"] - before["step"]
        for name in spent:
            spent[name] += row[name] - before[name]
    if not steps:
        return None, None
    return 1e3 * spent["cpu_seconds"] / steps, 1e3 * spent["seconds"] / steps


def _correlations(active: SparseLatents) -> tuple[dict[float, int], Pairs, float]:
    """Return how many pairs correlate above each level, the pairs above 0.8, and the largest correlation."""
    found, counts = correlated_pairs(active, LEAST_TOGETHER, partners=64, levels=(0.5, _CORRELATION))
    return counts, found.pairs.kept(found.correlation > _CORRELATION), float(found.correlation[:1].sum())


def _nearest(cosines: Tensor) -> Nearest:
    if not len(cosines):
        return Nearest(median=0, p99=0, largest=0)
    median, p99 = cosines.double().quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return Nearest(median=median, p99=p99, largest=float(cosines.max()))


def _share(which: Tensor) -> float:
    return float(which.double().mean()) if len(which) else 0.0


def _random(count: int, width: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)
