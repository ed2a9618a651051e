"""Report redundant latents every `monitor.every` steps, in `anti_duplication_logs/`.

Exact on a stated sample: the rows of the last steps before each report. Correlation is between latents over rows, never
along them, and from active pairs alone; without position 0, where latents of that position correlate by construction,
and with it.
Legend: R rows, F latents.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.config import Config
from shared.errors import DiskFull, warn
from shared.files import durable
from shared.store.strata import POSITION_0
from train.duplicates.co_activation import Correlated, correlated_pairs, measure
from train.duplicates.correlation_report import (
    CorrelatedPair,
    CorrelationReport,
    Correlations,
    Directions,
    Latent,
    Sample,
    change_of,
)
from train.duplicates.directions import Pairs, close_pairs, connected, effective_number, steps_between_scans
from train.evaluation.held_out import HeldOutActive
from train.live.run_files import HELD_OUT, REPORTS
from train.model import blas
from train.model.blas import Blas
from train.model.saved_tensors import fitting, numbers
from train.model.sparse_latents import SparseLatents, countable, offsets
from train.model.transcoder import StepOutput, Transcoder

LEVELS = (0.5, 0.7, 0.8, 0.9)
_MOST_MEETINGS = 2**27
"""Of two latents on a row, each pair of them twice, in a report: about a third of a second on one core."""


class MonitorConfig(Config):
    """When duplicates are looked for, and on how many rows."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps between reports; the last step always makes one. 0 switches the monitor off; `auto`: 100, or a fourth of a
    run that is shorter than 400 steps."""
    rows: int = Field(8192, ge=1)
    """Rows of the sample: those of the last steps before a report, whole batches; fewer where very many latents are
    active. Reports say how many they looked at."""
    cost_share: float = Field(0.02, gt=0, le=1)
    """Share of a step's product that scans of all decoder rows may take; reports in between repeat the last scan's."""
    least_together: int = Field(4, ge=2)
    """Rows on which two latents must both be active to be listed."""
    listed: int = Field(50, ge=1)
    """Pairs of a report, at most."""
    cluster_cosine: float = Field(0.7, ge=0.5, le=1)
    """Two latents are of one cluster when their decoder rows have at least this cosine ..."""
    cluster_jaccard: float = Field(0.3, gt=0, le=1)
    """... and their firing sets at least this Jaccard index."""

    def resolve(self, steps: int) -> "MonitorConfig":
        """Return the same with `every` as a number, for a run of so many steps."""
        return self.model_copy(update={"every": max(1, min(100, steps // 4))}) if self.every == "auto" else self

    def sample_bytes(self, batch_rows: int, per_row: int) -> int:
        """Return the most bytes of the open sample, with so many rows in a batch and active latents on a row."""
        rows = -(-self.rows // batch_rows) * batch_rows if self.every else 0
        return 20 * min(rows * per_row, math.isqrt(2 * _MOST_MEETINGS * rows)) + 24 * rows


class CorrelationMonitor:
    """Collects the rows before a report, and reports. What it holds is state that a resumed run continues from."""

    def __init__(
        self, run: Path, config: MonitorConfig, transcoder: Transcoder, strata: dict[str, slice], steps: int
    ) -> None:
        self._folder, self._config, self._transcoder, self._steps = run / REPORTS, config, transcoder, steps
        assert isinstance(config.every, int), "resolve the configuration first"
        self._every, self._strata = config.every, list(strata)
        sizes = torch.tensor([part.stop - part.start for part in strata.values()])
        self._of_row = torch.arange(len(strata)).repeat_interleave(sizes)
        """[B] the stratum of each row of a batch"""
        sides = transcoder.W_enc, transcoder.W_dec
        self._scan_every = steps_between_scans(*sides, len(self._of_row), config.cost_share)
        self._window = -(-config.rows // len(self._of_row))
        self._kept: list[tuple[SparseLatents, Tensor]] = []
        """The active pairs of each batch of the sample, and the stratum of each of their rows"""
        self._last: CorrelationReport | None = None
        self.lost_reports = 0
        self.correlated = Correlated.none()
        """The pairs of the last report on training steps by falling correlation, those not listed included."""

    def due(self, done: int) -> bool:
        """Tell whether a report follows step `done`, counted from 1."""
        return bool(self._every) and (done % self._every == 0 or done == self._steps)

    def add(self, step: StepOutput, done: int) -> None:
        """Keep the pairs of step `done`, if a report will look at them.

        Counting costs the square of a row's active latents: where these are so many that a report would take more than
        `_MOST_MEETINGS`, every n-th row is kept.
        """
        if self._every and self._report_after(done) - done < self._window:
            active = step.active.cpu().positive()
            kept = countable(active, self._window, _MOST_MEETINGS)
            self._kept.append((active.of_rows(kept), self._of_row[kept]))

    def report(self, done: int, dead: Tensor) -> CorrelationReport:
        """Write the report after step `done`, counted from 1; `dead` [F] latents are left out of the directions.

        A full disk costs the report and one warning, never the run.
        """
        every, stratum = self._sample()
        sample = Sample(
            rows_of="training steps",
            first_step=done - len(self._kept) + 1,
            last_step=done,
            strata=_rows_of_each(self._strata, stratum),
        )
        report, self.correlated = self._make(sample, every, stratum, dead.cpu(), self._last)
        self._publish(f"correlation-{done:06d}.json", report)
        self._kept, self._last = [], report
        return report

    def report_held_out(self, done: int, held_out: HeldOutActive, dead: Tensor) -> CorrelationReport:
        """Write the report on all rows of `held_out`, under the weights of step `done`; by stratum, too.

        It is compared with no other, and no run is steered by it.
        """
        every, stratum = held_out.active, held_out.stratum
        sample = Sample(
            rows_of="held-out blocks", first_step=done, last_step=done, strata=_rows_of_each(held_out.strata, stratum)
        )
        report, _ = self._make(sample, every, stratum, dead.cpu(), None)
        parts = {name: every.of_rows(stratum == i) for i, name in enumerate(held_out.strata)}
        strata = {name: _correlations(part, self._config)[1] for name, part in parts.items()}
        report = report.model_copy(update={"strata": strata})
        self._publish(HELD_OUT, report)
        return report

    @property
    def reported_held_out(self) -> bool:
        """Whether `report_held_out` has written its report."""
        return (self._folder / HELD_OUT).is_file()

    def _publish(self, name: str, report: CorrelationReport) -> None:
        try:
            durable.make_folder(self._folder)
            durable.publish_json(self._folder / name, report.model_dump(mode="json"))
        except (DiskFull, OSError) as error:
            if not self.lost_reports:
                warn(f"{error}; training goes on, reports are lost")
            self.lost_reports += 1

    def state(self) -> dict[str, Tensor]:
        """Return the open sample and the last report, for a checkpoint: a file can be lost to a full disk."""
        report = self._last.model_dump_json().encode() if self._last else b""
        sample = {
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
        return sample | {"monitor.report": torch.tensor(list(report), dtype=torch.uint8)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        size = tensors["monitor.report"].numel()
        text = fitting(tensors, "monitor.report", torch.empty(size, dtype=torch.uint8)).numpy().tobytes()
        self._last = CorrelationReport.model_validate_json(text) if text else None
        count = sum(name.startswith("monitor.") and name.endswith(".rows") for name in tensors)
        self._kept = [self._loaded_batch(tensors, f"monitor.{i:04d}") for i in range(count)]

    def _loaded_batch(self, tensors: dict[str, Tensor], name: str) -> tuple[SparseLatents, Tensor]:
        stratum = numbers(tensors, f"{name}.stratum", len(self._strata))
        rows = numbers(tensors, f"{name}.rows", len(stratum))
        latents = numbers(tensors, f"{name}.latents", self._transcoder.d_sae, len(rows))
        starts = numbers(tensors, f"{name}.starts", len(rows) + 1, len(stratum) + 1)
        values = fitting(tensors, f"{name}.values", torch.empty(len(rows)))
        if not torch.equal(starts, offsets(rows, len(stratum))) or bool((rows.diff() < 0).any()):
            raise ValueError(f"tensor '{name}.starts' does not say where the rows of '{name}.rows' begin")
        return SparseLatents(rows, latents, values, starts, self._transcoder.d_sae), stratum

    def _report_after(self, done: int) -> int:
        return min(-(-done // self._every) * self._every, self._steps)

    def _sample(self) -> tuple[SparseLatents, Tensor]:
        """Return the active pairs of all rows kept, and the stratum of every row."""
        return SparseLatents.joined([active for active, _ in self._kept]), torch.cat(
            [stratum for _, stratum in self._kept]
        )

    def _make(
        self, sample: Sample, every: SparseLatents, stratum: Tensor, dead: Tensor, before: CorrelationReport | None
    ) -> tuple[CorrelationReport, Correlated]:
        config, done = self._config, sample.last_step
        strata = list(sample.strata)
        position_0 = strata.index(POSITION_0) if POSITION_0 in strata and len(strata) > 1 else -1
        rest = every.of_rows(stratum != position_0)
        correlated, without = _correlations(rest, config)
        _, whole = _correlations(every, config)
        listed = Pairs(*(side[: config.listed] for side in correlated.pairs))
        pairs = self._listed(listed, every, rest, stratum, strata, before)
        known = {pair.key for pair in before.pairs} if before else set()
        if before and done - before.directions.step < self._scan_every:
            directions, clusters = before.directions, before.clusters
        else:
            directions, clusters = self._scan(done, every, dead)
        report = CorrelationReport(
            step=done,
            sample=sample,
            least_together=config.least_together,
            without_position_0=without,
            with_position_0=whole,
            strata=None,
            directions=directions,
            pairs=pairs,
            clusters=clusters,
            persisting_pairs=sum(pair.key in known for pair in pairs),
            change=None,
        )
        return report.model_copy(update={"change": change_of(report, before)}), correlated

    def _listed(
        self,
        pairs: Pairs,
        every: SparseLatents,
        rest: SparseLatents,
        stratum: Tensor,
        strata: list[str],
        before: CorrelationReport | None,
    ) -> list[CorrelatedPair]:
        model, (inner, outer) = self._transcoder, (measure(rest, pairs), measure(every, pairs))
        rows = model.unit_decoder()
        cosines = torch.linalg.vecdot(*(rows[side.to(rows.device)] for side in pairs)).tolist()
        fires = torch.bincount(every.latents * len(strata) + stratum[every.rows],
                               minlength=model.d_sae * len(strata)).view(model.d_sae, -1)  # fmt: skip
        shares = fires / torch.bincount(stratum, minlength=len(strata)).clamp_min(1)
        group, streaks = model.group.cpu(), {pair.key: pair.reports for pair in before.pairs} if before else {}

        def latent(number: int) -> Latent:
            return Latent(
                latent=number,
                prefix=model.prefixes[int(group[number])],
                rows=int(fires[number].sum()),
                strata=dict(zip(strata, shares[number].tolist(), strict=True)),
            )

        return [
            CorrelatedPair(
                latents=(latent(first), latent(second)),
                cosine=cosines[i],
                correlation=float(inner.correlation[i]),
                correlation_with_position_0=float(outer.correlation[i]),
                jaccard=float(inner.jaccard[i]),
                rows_together=int(inner.rows[i]),
                within_segment=bool(group[first] == group[second]),
                reports=streaks.get((first, second), 0) + 1,
            )
            for i, (first, second) in enumerate(zip(*(side.tolist() for side in pairs), strict=True))
        ]

    def _scan(self, done: int, every: SparseLatents, dead: Tensor) -> tuple[Directions, list[list[int]]]:
        model, live = self._transcoder, int((~dead).sum())
        latents = (~dead).nonzero().squeeze(1).to(model.W_dec.device)
        rows = model.unit_decoder()
        close, cosines = close_pairs(rows, latents, min(LEVELS), model.blas)
        nearest, inside = (torch.zeros(model.d_sae) for _ in range(2))
        within = model.group[close.first] == model.group[close.second]
        for side in close:
            nearest.scatter_reduce_(0, side.cpu(), cosines.cpu(), "amax")
            inside.scatter_reduce_(0, side[within].cpu(), cosines[within].cpu(), "amax")
        directions = Directions(
            step=done,
            live=live,
            share_with_neighbour_above={f"{level}": _share(nearest > level, live) for level in LEVELS},
            share_within_segment_above={f"{level}": _share(inside > level, live) for level in LEVELS},
            largest=float(nearest.max()),
            effective_number=effective_number(close.kept(cosines > 0.7), latents, model.d_sae),
            effective_rank=_effective_rank(rows[latents], model.blas),
        )
        close, cosines = close.cpu(), cosines.cpu()
        same = (cosines >= self._config.cluster_cosine) & (
            measure(every, close).jaccard >= self._config.cluster_jaccard
        )
        return directions, connected(close.kept(same))


def _rows_of_each(strata: Sequence[str], stratum: Tensor) -> dict[str, int]:
    return dict(zip(strata, torch.bincount(stratum, minlength=len(strata)).tolist(), strict=True))


def _correlations(active: SparseLatents, config: MonitorConfig) -> tuple[Correlated, Correlations]:
    found, above = correlated_pairs(active, config.least_together, levels=LEVELS)
    return found, Correlations(
        rows=len(active.starts) - 1,
        largest=float(found.correlation[:1].sum()),
        pairs_above={f"{level}": count for level, count in above.items()},
    )


def _share(which: Tensor, live: int) -> float:
    return int(which.sum()) / max(live, 1)


def _effective_rank(rows: Tensor, library: Blas) -> float:
    """Return the effective rank of rows [n, O]; 0 for none."""
    if not len(rows):
        return 0.0
    values = torch.linalg.eigvalsh(blas.product(library, rows.T, rows).double().cpu()).clamp_min(0).sqrt()
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
