"""The correlation monitor: every so many steps, which latents say the same, in `anti_duplication_logs/`.

Exact on a stated sample: the rows of the last steps before each report. Correlation is between latents over rows, never
along them, and from active pairs alone; without position 0, where latents of that position correlate by construction,
and with it.
Legend: R rows, F latents.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from shared import durable
from shared.config import Config, read_record
from shared.errors import DiskFull
from train import blas
from train.blas import Blas
from train.duplicates.activations import correlated_pairs, measure
from train.duplicates.directions import Pairs, close_pairs, steps_between_scans
from train.sparsity import Active
from train.transcoder import Step, Transcoder

FOLDER = "anti_duplication_logs"
LEVELS = (0.5, 0.7, 0.8, 0.9)
POSITION_0 = "000-001"
_MOST_MEETINGS = 2**27
"""Of two latents on a row, each pair of them twice, in a report: about a third of a second on one core."""


class MonitorConfig(Config):
    """When duplicates are looked for, and on how many rows."""

    every: int = Field(100, ge=1)
    """Steps between reports; the last step always makes one."""
    rows: int = Field(8192, ge=1)
    """Rows of the sample: those of the last steps before a report, whole batches; fewer where very many latents are
    active. Reports say how many they looked at."""
    cost_share: float = Field(0.02, gt=0, le=1)
    """Share of a step's product that scans of all decoder rows may take; reports in between repeat the last scan's."""
    least_together: int = Field(10, ge=2)
    """Rows on which two latents must both be active to be listed."""
    listed: int = Field(50, ge=1)
    """Pairs of a report, at most."""
    cluster_cosine: float = Field(0.7, ge=0.5, le=1)
    """Two latents are of one cluster when their decoder rows have at least this cosine ..."""
    cluster_jaccard: float = Field(0.3, gt=0, le=1)
    """... and their firing sets at least this Jaccard index."""


class Latent(Config):
    """One latent of a listed pair."""

    latent: int
    prefix: int
    """Size of the smallest prefix that holds it."""
    rows: int
    """Rows of the sample on which it is active, position 0 included."""
    strata: dict[str, float]
    """Share of each stratum's rows on which it is active."""


class CorrelatedPair(Config):
    """Two latents by every measure."""

    latents: tuple[Latent, Latent]
    cosine: float
    """Of their decoder rows."""
    correlation: float
    """Pearson's over the sample without position 0."""
    correlation_with_position_0: float
    """The same with it."""
    jaccard: float
    """Rows on which both are active by rows on which either is, without position 0."""
    rows_together: int
    within_segment: bool
    """Both enter with the same prefix."""
    reports: int
    """Reports in a row that listed the pair, this one included."""

    @property
    def key(self) -> tuple[int, int]:
        """Which pair it is."""
        return self.latents[0].latent, self.latents[1].latent


class Correlations(Config):
    """Pairs of latents over the rows of one selection."""

    rows: int
    largest: float
    pairs_above: dict[str, int]
    """By correlation."""


class Directions(Config):
    """Decoder rows of live latents."""

    step: int
    """When they were scanned."""
    live: int
    share_with_neighbour_above: dict[str, float]
    """By cosine, of live latents."""
    share_within_segment_above: dict[str, float]
    """The same counting neighbours of the same prefix segment alone."""
    largest: float
    effective_number: float
    """Sum over live latents of 1 / (neighbours with a cosine above 0.7, itself included)."""
    effective_rank: float
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli 2007)."""


class Sample(Config):
    """The rows that a report looks at."""

    first_step: int
    last_step: int
    strata: dict[str, int]
    """Rows of each."""


class Trend(Config):
    """This report's figures less those of the report before."""

    since_step: int
    pairs_above_0_8: int
    share_above_0_7: float


class CorrelationReport(Config):
    """`anti_duplication_logs/correlation-<step>.json`."""

    schema_version: Literal[1] = 1
    step: int
    sample: Sample
    least_together: int
    without_position_0: Correlations
    """With it, if the store's first stratum holds more than position 0."""
    with_position_0: Correlations
    directions: Directions
    pairs: list[CorrelatedPair]
    """Largest correlation first."""
    clusters: list[list[int]]
    """As of the scan: latents that are the same by cosine and by Jaccard index, the largest cluster first."""
    persisting_pairs: int
    """Of the listed, those that the report before listed, too."""
    change: Trend | None
    """None: this is the first report."""


class CorrelationMonitor:
    """Collects the rows before a report, and reports. What it holds is state that a resumed run continues from."""

    def __init__(
        self, run: Path, config: MonitorConfig, transcoder: Transcoder, strata: dict[str, slice], steps: int
    ) -> None:
        self._folder, self._config, self._transcoder, self._steps = run / FOLDER, config, transcoder, steps
        self._strata = list(strata)
        sizes = torch.tensor([part.stop - part.start for part in strata.values()])
        self._of_row = torch.arange(len(strata)).repeat_interleave(sizes)
        """[B] the stratum of each row of a batch"""
        sides = transcoder.W_enc, transcoder.W_dec
        self._scan_every = steps_between_scans(*sides, len(self._of_row), config.cost_share)
        self._window = -(-config.rows // len(self._of_row))
        self._kept: list[tuple[Active, Tensor]] = []
        """The active pairs of each batch of the sample, and the stratum of each of their rows"""
        self.lost_reports = 0
        nothing = torch.zeros(0, dtype=torch.int64)
        self.correlated = Pairs(nothing, nothing)
        """The pairs of the last report by falling correlation, those that were not listed included."""

    def due(self, done: int) -> bool:
        """Whether a report follows step `done`, counted from 1."""
        return done % self._config.every == 0 or done == self._steps

    def add(self, step: Step, done: int) -> None:
        """Keep the pairs of step `done`, if a report will look at them.

        Counting costs the square of a row's active latents: where these are so many that a report would take more than
        `_MOST_MEETINGS`, every n-th row is kept.
        """
        if self._report_after(done) - done < self._window:
            active = step.active.cpu().positive()
            meetings = int(active.starts.diff().square().sum()) * self._window
            kept = torch.arange(len(self._of_row)) % max(1, -(-meetings // _MOST_MEETINGS)) == 0
            self._kept.append((_rows_of(active, kept), self._of_row[kept]))

    def report(self, done: int, dead: Tensor) -> CorrelationReport:
        """Write the report after step `done`, counted from 1; `dead` [F] latents are left out of the directions.

        A full disk costs the report and one warning, never the run.
        """
        every, stratum = self._sample()
        before = self._before(done)
        report = self._make(done, every, stratum, dead.cpu(), before)
        try:
            durable.make_folder(self._folder)
            durable.publish_json(self._path(done), report.model_dump(mode="json"))
        except DiskFull as error:
            if not self.lost_reports:
                print(f"warning: {error}; training goes on, reports are lost", file=sys.stderr)
            self.lost_reports += 1
        self._kept = []
        return report

    def state(self) -> dict[str, Tensor]:
        """The open sample, for a checkpoint."""
        return {
            f"monitor.{i:04d}.{name}": tensor
            for i, (active, stratum) in enumerate(self._kept)
            for name, tensor in {
                "rows": active.rows,
                "latents": active.latents,
                "values": active.values,
                "starts": active.starts,
                "stratum": stratum,
            }.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an open sample."""
        count = sum(name.startswith("monitor.") and name.endswith(".rows") for name in tensors)
        names = ("rows", "latents", "values", "starts")
        self._kept = [
            (
                Active(**{name: tensors[f"monitor.{i:04d}.{name}"] for name in names}, d_sae=self._transcoder.d_sae),
                tensors[f"monitor.{i:04d}.stratum"],
            )
            for i in range(count)
        ]

    def _report_after(self, done: int) -> int:
        return min(-(-done // self._config.every) * self._config.every, self._steps)

    def _path(self, step: int) -> Path:
        return self._folder / f"correlation-{step:06d}.json"

    def _before(self, done: int) -> CorrelationReport | None:
        """The report before that of `done`, as it was written."""
        step = (done - 1) // self._config.every * self._config.every
        path = self._path(step)
        return read_record(CorrelationReport, durable.read_json(path), path) if path.is_file() else None

    def _sample(self) -> tuple[Active, Tensor]:
        """The active pairs of all rows kept, and the stratum of every row."""
        sizes = [len(stratum) for _, stratum in self._kept]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        joined = Active.of(
            torch.cat([active.rows + first for (active, _), first in zip(self._kept, firsts, strict=True)]),
            torch.cat([active.latents for active, _ in self._kept]),
            torch.cat([active.values for active, _ in self._kept]),
            torch.Size((sum(sizes), self._transcoder.d_sae)),
        )
        return joined, torch.cat([stratum for _, stratum in self._kept])

    def _make(
        self, done: int, every: Active, stratum: Tensor, dead: Tensor, before: CorrelationReport | None
    ) -> CorrelationReport:
        config = self._config
        position_0 = self._strata.index(POSITION_0) if POSITION_0 in self._strata and len(self._strata) > 1 else -1
        rest = _rows_of(every, stratum != position_0)
        correlated, without = _correlations(rest, config)
        _, whole = _correlations(every, config)
        self.correlated = correlated
        listed = Pairs(*(side[: config.listed] for side in correlated))
        pairs = self._listed(listed, every, rest, stratum, before)
        known = {pair.key for pair in before.pairs} if before else set()
        if before and done - before.directions.step < self._scan_every:
            directions, clusters = before.directions, before.clusters
        else:
            directions, clusters = self._scan(done, every, dead)
        report = CorrelationReport(
            step=done,
            sample=Sample(
                first_step=done - len(self._kept) + 1,
                last_step=done,
                strata=dict(
                    zip(self._strata, torch.bincount(stratum, minlength=len(self._strata)).tolist(), strict=True)
                ),
            ),
            least_together=config.least_together,
            without_position_0=without,
            with_position_0=whole,
            directions=directions,
            pairs=pairs,
            clusters=clusters,
            persisting_pairs=sum(pair.key in known for pair in pairs),
            change=None,
        )
        return report.model_copy(update={"change": _change(report, before)})

    def _listed(
        self, pairs: Pairs, every: Active, rest: Active, stratum: Tensor, before: CorrelationReport | None
    ) -> list[CorrelatedPair]:
        model, (inner, outer) = self._transcoder, (measure(rest, pairs), measure(every, pairs))
        cosines = torch.linalg.vecdot(*(model.W_dec.detach()[side.to(model.W_dec.device)] for side in pairs)).tolist()
        fires = torch.bincount(every.latents * len(self._strata) + stratum[every.rows],
                               minlength=model.d_sae * len(self._strata)).view(model.d_sae, -1)  # fmt: skip
        shares = fires / torch.bincount(stratum, minlength=len(self._strata)).clamp_min(1)
        segment, streaks = model.segment.cpu(), {pair.key: pair.reports for pair in before.pairs} if before else {}

        def latent(number: int) -> Latent:
            return Latent(
                latent=number,
                prefix=model.prefixes[int(segment[number])],
                rows=int(fires[number].sum()),
                strata=dict(zip(self._strata, shares[number].tolist(), strict=True)),
            )

        return [
            CorrelatedPair(
                latents=(latent(first), latent(second)),
                cosine=cosines[i],
                correlation=float(inner.correlation[i]),
                correlation_with_position_0=float(outer.correlation[i]),
                jaccard=float(inner.jaccard[i]),
                rows_together=int(inner.rows[i]),
                within_segment=bool(segment[first] == segment[second]),
                reports=streaks.get((first, second), 0) + 1,
            )
            for i, (first, second) in enumerate(zip(*(side.tolist() for side in pairs), strict=True))
        ]

    def _scan(self, done: int, every: Active, dead: Tensor) -> tuple[Directions, list[list[int]]]:
        model, live = self._transcoder, int((~dead).sum())
        latents = (~dead).nonzero().squeeze(1).to(model.W_dec.device)
        close, cosines = close_pairs(model.W_dec.detach(), latents, min(LEVELS), model.blas)
        nearest, inside = (torch.zeros(model.d_sae) for _ in range(2))
        within = model.segment[close.first] == model.segment[close.second]
        for side in close:
            nearest.scatter_reduce_(0, side.cpu(), cosines.cpu(), "amax")
            inside.scatter_reduce_(0, side[within].cpu(), cosines[within].cpu(), "amax")
        over = torch.cat([side[cosines > 0.7] for side in close]).cpu()
        neighbours = torch.bincount(over, minlength=model.d_sae)[~dead]
        directions = Directions(
            step=done,
            live=live,
            share_with_neighbour_above={f"{level}": _share(nearest > level, live) for level in LEVELS},
            share_within_segment_above={f"{level}": _share(inside > level, live) for level in LEVELS},
            largest=float(nearest.max()),
            effective_number=float((1 / (1 + neighbours.double())).sum()),
            effective_rank=_effective_rank(model.W_dec.detach()[latents], model.blas),
        )
        jaccard = measure(every, Pairs(*(side.cpu() for side in close))).jaccard
        return directions, _clusters(close, cosines, jaccard, self._config)


def _rows_of(active: Active, wanted: Tensor) -> Active:
    """The pairs of the `wanted` [R] rows, which are numbered anew."""
    kept, number = wanted[active.rows], wanted.cumsum(0) - 1
    shape = torch.Size((int(wanted.sum()), active.d_sae))
    return Active.of(number[active.rows[kept]], active.latents[kept], active.values[kept], shape)


def _correlations(active: Active, config: MonitorConfig) -> tuple[Pairs, Correlations]:
    pairs, above = correlated_pairs(active, config.least_together, levels=LEVELS)
    first = Pairs(*(side[:1] for side in pairs))
    return pairs, Correlations(
        rows=len(active.starts) - 1,
        largest=float(measure(active, first).correlation.sum()),
        pairs_above={f"{level}": count for level, count in above.items()},
    )


def _share(which: Tensor, live: int) -> float:
    return int(which.sum()) / max(live, 1)


def _effective_rank(rows: Tensor, library: Blas) -> float:
    """Of rows [n, O]; 0 for none."""
    if not len(rows):
        return 0.0
    values = torch.linalg.eigvalsh(blas.product(library, rows.T, rows).double().cpu()).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def _clusters(close: Pairs, cosines: Tensor, jaccard: Tensor, config: MonitorConfig) -> list[list[int]]:
    """Connected latents, by pairs that are the same in direction and in firing."""
    same = (cosines.cpu() >= config.cluster_cosine) & (jaccard >= config.cluster_jaccard)
    parent: dict[int, int] = {}

    def root(latent: int) -> int:
        while parent.setdefault(latent, latent) != latent:
            parent[latent] = latent = parent[parent[latent]]
        return latent

    for first, second in zip(*(side.cpu()[same].tolist() for side in close), strict=True):
        parent[root(second)] = root(first)
    found: dict[int, list[int]] = {}
    for latent in sorted(parent):
        found.setdefault(root(latent), []).append(latent)
    return sorted(found.values(), key=lambda latents: (-len(latents), latents))


def _change(now: "CorrelationReport", before: CorrelationReport | None) -> Trend | None:
    if not before:
        return None
    return Trend(
        since_step=before.step,
        pairs_above_0_8=now.without_position_0.pairs_above["0.8"] - before.without_position_0.pairs_above["0.8"],
        share_above_0_7=now.directions.share_with_neighbour_above["0.7"]
        - before.directions.share_with_neighbour_above["0.7"],
    )
