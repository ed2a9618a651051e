"""Report redundant latents every `monitor.every` steps, in `anti_duplication_logs/`.

Exact on a stated sample: the rows of the last steps before each report. Correlation is between latents over rows, never
along them, and from active pairs alone; without position 0, where latents of that position correlate by construction,
and with it. A sample proposes pairs, which are tracked over later rows without position 0: on CPU those of every step,
elsewhere those of later samples. Every report but the first lists and counts these. The diversity loss takes its pairs
from the sample (decisions/007).
Legend: R rows, F latents.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from shared.config import Config
from shared.errors import DiskFull, warn
from shared.files import durable
from shared.store.strata import POSITION_0
from train.duplicates.co_activation import Correlated, Measures, correlated_pairs, measure
from train.duplicates.correlation_report import (
    CorrelatedPair,
    CorrelationReport,
    Correlations,
    Directions,
    Latent,
    Sample,
    change_of,
)
from train.duplicates.directions import Pairs, connected, effective_number
from train.duplicates.monitor_limits import MOST_PARTNERS, MOST_SAMPLED_MEETINGS, state_bytes
from train.duplicates.scans import Scans
from train.duplicates.tracked import NO_ROWS, TrackedPairs
from train.evaluation.held_out import HeldOutActive
from train.live.run_files import HELD_OUT, REPORTS
from train.model import blas
from train.model.saved_tensors import fitting, numbers
from train.model.sparse_latents import SparseLatents, countable, offsets
from train.model.step_output import StepOutput
from train.model.transcoder import Transcoder

LEVELS = (0.5, 0.7, 0.8, 0.9)


class MonitorConfig(Config):
    """When to look for duplicates, and on how many rows."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps between reports; the last step always makes one. 0 switches the monitor off. `auto`: 100; on CUDA about as
    many as take a second, or a fourth of a run that is shorter than four times that."""
    delay: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """Steps after which a report is complete and affects the training; less than `every`. `auto`: 0 on CPU; on CUDA
    half of `every`, while a thread counts beside the training. The last report is never delayed."""
    rows: int = Field(8192, ge=1)
    """Rows of the sample, in whole batches from the last steps before a report; fewer if very many latents are active.
    Each report records the number."""
    cost_share: float = Field(0.02, gt=0, le=1)
    """Cost of scans of all decoder rows as a share of a step's product; reports in between repeat the last scan's
    figures."""
    least_together: int = Field(4, ge=2)
    """A pair is listed only if both latents are active on at least this many rows."""
    listed: int = Field(50, ge=1)
    """Most pairs in a report."""
    cluster_cosine: float = Field(0.7, ge=0.5, le=1)
    """Two latents belong to one cluster if their decoder rows have at least this cosine ..."""
    cluster_jaccard: float = Field(0.3, gt=0, le=1)
    """... and the rows on which they are active have at least this Jaccard index."""

    def state_bytes(self, batch_rows: int, per_row: int, d_sae: int) -> int:
        """Return the most bytes of its state, with so many rows in a batch and active latents on a row.

        In settings that are resolved; in those of runs from before there was a `delay`, it is 0.
        """
        assert isinstance(self.every, int), "resolve the settings first"
        delay = self.delay if isinstance(self.delay, int) else 0
        return state_bytes(self.every, delay, self.rows, batch_rows, per_row, d_sae)


class _Scan(NamedTuple):
    """Close directions under the weights of a report, on CPU but for the last."""

    live: Tensor
    """[n] int64"""
    close: Pairs
    cosines: Tensor
    """[N]"""
    gram: Tensor
    """[O, O] products of the dimensions over live rows, on the transcoder's device"""


Batch = tuple[SparseLatents, Tensor]
"""Active pairs of a batch of the sample, and the stratum of each of its rows."""
Counted = tuple[CorrelationReport, Correlated]


def _known(batch: Batch) -> Callable[[], Batch]:
    return lambda: batch


def _without(kept: Callable[[], Batch], latents: Tensor) -> Batch:
    active, stratum = kept()
    return active.with_values(active.values.masked_fill(torch.isin(active.latents, latents), 0)).positive(), stratum


class CorrelationMonitor:
    """Collects the rows before a report, and reports. What it holds is state that a resumed run continues from.

    A report begins after a step and is finished `delay` steps later, at a step that the settings fix; on CUDA a thread
    counts meanwhile. Its cosines are those of the step at which it is finished, and all else of that at which it began.
    """

    def __init__(
        self,
        run: Path | None,
        config: MonitorConfig,
        transcoder: Transcoder,
        strata: dict[str, slice],
        steps: int,
        scans: Scans | None = None,
    ) -> None:
        """Set up the monitor of a run; without a `run` its reports act on the training, and are not written."""
        self._folder, self._config = run / REPORTS if run else None, config
        self._transcoder, self._steps = transcoder, steps
        assert isinstance(config.every, int), "resolve the configuration first"
        self._every, self._strata = config.every, list(strata)
        self._delay = config.delay if isinstance(config.delay, int) else 0  # none: in runs from before there were
        self._group = transcoder.group.cpu()
        sizes = torch.tensor([part.stop - part.start for part in strata.values()])
        self._of_row = torch.arange(len(strata)).repeat_interleave(sizes)
        """[B] the stratum of each row of a batch"""
        self._scans = scans or Scans(transcoder)
        self._scan_every = self._scans.steps_between(len(self._of_row), config.cost_share)
        self._window = -(-config.rows // len(self._of_row))
        self._kept: list[Callable[[], Batch]] = []
        """The sample, whose batches may still be on their way to the host"""
        self._pending: tuple[int, Callable[[], Counted]] | None = None
        """The step at which a report began, and what waits for the counting"""
        on_cuda = transcoder.W_dec.device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="monitor") if self._delay and on_cuda else None
        self._last: CorrelationReport | None = None
        self._tracked = TrackedPairs(transcoder.d_sae, LEVELS[0])
        self._left_out = strata.get(POSITION_0, NO_ROWS) if len(strata) > 1 else NO_ROWS
        self.lost_reports = 0
        self.correlated = Correlated.none()
        """The pairs of the last sample by falling correlation, which the diversity loss acts on."""

    @property
    def _on_cpu(self) -> bool:
        """Whether the rows of every step are there to be counted."""
        return self._transcoder.W_dec.device.type == "cpu"

    def due(self, done: int) -> bool:
        """Tell whether a report begins after step `done`, counted from 1."""
        return bool(self._every) and (done % self._every == 0 or done == self._steps)

    def is_complete(self, done: int) -> bool:
        """Tell whether there is a report to finish after step `done`."""
        return self._pending is not None and done == min(self._pending[0] + self._delay, self._steps)

    def add(self, step: StepOutput, done: int) -> None:
        """Keep the pairs of step `done`, if a report will look at them; no device is waited for.

        On CPU its rows are counted for tracked pairs first.

        Counting costs the square of a row's active latents: where these are so many that a report would take more than
        `MOST_SAMPLED_MEETINGS`, every n-th row is kept.
        """
        if self._every and self._on_cpu:
            self._tracked.add(step.active, self._left_out)
        if self._every and self._report_after(done) - done < self._window:
            fetched = step.active.fetch()

            @cache
            def kept() -> Batch:
                active = fetched().positive()
                rows = countable(active, self._window, MOST_SAMPLED_MEETINGS)
                return active.of_rows(rows), self._of_row[rows]

            if step.active.rows.device.type == "cpu":
                kept()
            self._kept.append(kept)

    def report(self, done: int, dead: Tensor) -> CorrelationReport:
        """Write the report after step `done` at once: as `begin` and `finish`."""
        self.begin(done, dead)
        return self.finish()

    def begin(self, done: int, dead: Tensor) -> None:
        """Begin the report after step `done`, counted from 1; `dead` [F] latents are left out of the directions."""
        assert self._pending is None, "one report at a time"
        kept, before, scan = self._kept, self._last, self._scan(done, dead, self._last)
        self._kept = []

        def count() -> Counted:
            batches = [one() for one in kept]
            every, stratum = SparseLatents.joined([one for one, _ in batches]), torch.cat([of for _, of in batches])
            strata = _rows_of_each(self._strata, stratum)
            first = done - len(kept) + 1
            sample = Sample(rows_of="training steps", first_step=first, last_step=done, strata=strata)
            return self._counted(sample, every, stratum, scan, before, self._tracked)

        if self._pool:
            self._pending = done, self._pool.submit(count).result
        else:
            counted = count()
            self._pending = done, lambda: counted

    def finish(self) -> CorrelationReport:
        """Write the report that began last.

        A full disk costs the report and one warning, never the run.
        """
        assert self._pending
        counted, self.correlated = self._pending[1]()
        report = self._with_cosines(counted)
        self._publish(f"correlation-{report.step:06d}.json", report)
        self._pending, self._last = None, report
        return report

    def report_held_out(self, done: int, held_out: HeldOutActive, dead: Tensor) -> CorrelationReport:
        """Write the report on all rows of `held_out`, under the weights of step `done`; by stratum, too.

        It is compared with no other, and no run is steered by it.
        """
        every, stratum = held_out.active, held_out.stratum
        sample = Sample(
            rows_of="held-out blocks", first_step=done, last_step=done, strata=_rows_of_each(held_out.strata, stratum)
        )
        counted, _ = self._counted(sample, every, stratum, self._scan(done, dead, None), None, None)
        report = self._with_cosines(counted)
        parts = {name: every.of_rows(stratum == i) for i, name in enumerate(held_out.strata)}
        strata = {name: _correlations(part, self._config)[1] for name, part in parts.items()}
        report = report.model_copy(update={"strata": strata})
        self._publish(HELD_OUT, report)
        return report

    @property
    def reported_held_out(self) -> bool:
        """Whether `report_held_out` has written its report."""
        return self._folder is not None and (self._folder / HELD_OUT).is_file()

    def _publish(self, name: str, report: CorrelationReport) -> None:
        if self._folder is None:
            return
        try:
            durable.make_folder(self._folder)
            durable.publish_json(self._folder / name, report.model_dump(mode="json"))
        except (DiskFull, OSError) as error:
            if not self.lost_reports:
                warn(f"{error}; training goes on, reports are lost")
            self.lost_reports += 1

    def state(self) -> dict[str, Tensor]:
        """Return the open sample and the last reports, for a checkpoint: a file can be lost to a full disk.

        Waits for one that is counted.
        """
        report = self._last.model_dump_json().encode() if self._last else b""
        sample = {
            f"monitor.{i:04d}.{name}": tensor
            for i, (active, stratum) in enumerate(kept() for kept in self._kept)
            for name, tensor in {
                "rows": active.rows,
                "latents": active.latents,
                "values": active.values,
                "starts": active.starts,
                "stratum": stratum,
            }.items()
        }
        found = sample | {"monitor.report": torch.tensor(list(report), dtype=torch.uint8)}
        if self._pending:
            counted, (pairs, correlation, scale) = self._pending[1]()  # after which `tracked` is that of this step
            found |= {
                "monitor.pending": torch.tensor(list(counted.model_dump_json().encode()), dtype=torch.uint8),
                "monitor.pending.first": pairs.first,
                "monitor.pending.second": pairs.second,
                "monitor.pending.correlation": correlation,
                "monitor.pending.scale": scale,
            }
        return found | (self._tracked.state() if self._every else {})

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        self._last = _loaded_report(tensors, "monitor.report")
        self._pending = None
        if "monitor.pending" in tensors and (counted := _loaded_report(tensors, "monitor.pending")):
            found = counted, self._loaded_correlated(tensors, "monitor.pending")
            self._pending = counted.step, lambda: found
        count = sum(name.startswith("monitor.") and name.endswith(".rows") for name in tensors)
        self._kept = [_known(self._loaded_batch(tensors, f"monitor.{i:04d}")) for i in range(count)]
        if self._every:
            self._tracked.load(tensors, begun=bool(self._last or self._pending))

    def start_anew(self, latents: Tensor) -> None:
        """Drop the pairs of `latents` [n] int64, which have become others.

        They are no longer tracked, the open sample no longer has them on the rows so far, and a report that began
        before lists them but hands none to the diversity loss.
        """
        self._kept = [partial(_without, one, latents.cpu()) for one in self._kept]
        if self._pending:
            done, (counted, correlated) = self._pending[0], self._pending[1]()  # a thread may be counting
            found = counted, correlated.without(latents)
            self._pending = done, lambda: found
        self._tracked.start_anew(latents)

    def _loaded_correlated(self, tensors: dict[str, Tensor], name: str) -> Correlated:
        first = numbers(tensors, f"{name}.first", self._transcoder.d_sae)
        second = numbers(tensors, f"{name}.second", self._transcoder.d_sae, len(first))
        like = torch.empty(len(first), dtype=torch.float64)
        return Correlated(
            Pairs(first, second), *(fitting(tensors, f"{name}.{of}", like) for of in ("correlation", "scale"))
        )

    def _loaded_batch(self, tensors: dict[str, Tensor], name: str) -> Batch:
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

    def _counted(
        self,
        sample: Sample,
        every: SparseLatents,
        stratum: Tensor,
        scan: _Scan | None,
        before: CorrelationReport | None,
        tracking: TrackedPairs | None,
    ) -> Counted:
        """Return a report whose pairs have no cosines yet; without a `scan` it has the directions of that `before`.

        It lists pairs of `tracking`, once there are some, and proposes new ones there.
        """
        config, done = self._config, sample.last_step
        strata = list(sample.strata)
        position_0 = strata.index(POSITION_0) if POSITION_0 in strata and len(strata) > 1 else -1
        rest = every.of_rows(stratum != position_0)
        correlated, without = _correlations(rest, config)
        whole = _correlations(every, config)[1] if len(rest.starts) < len(every.starts) else without
        tracked = (
            tracking.follow(rest, config.least_together, MOST_PARTNERS, new=not self._on_cpu) if tracking else None
        )
        shown = tracked.correlated if tracked else correlated
        listed = Pairs(*(side[: config.listed] for side in shown.pairs))
        if tracked:
            inner, over = Measures(*(of[: config.listed] for of in tracked.measures)), tracked.rows
        else:
            inner, over = measure(rest, listed), torch.full((config.listed,), without.rows)
        pairs = self._listed(listed, inner, over, every, stratum, strata, before)
        known = {pair.key for pair in before.pairs} if before else set()
        if scan:
            directions, clusters = self._directions(done, every, scan)
        else:
            assert before
            directions, clusters = before.directions, before.clusters
        report = CorrelationReport(
            step=done,
            sample=sample,
            least_together=config.least_together,
            without_position_0=without,
            with_position_0=whole,
            tracked=tracked.figures(LEVELS) if tracked else None,
            pairs_without_room=tracked.without_room if tracked else None,
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
        inner: Measures,
        over: Tensor,  # [C or more] int64 rows
        every: SparseLatents,
        stratum: Tensor,
        strata: list[str],
        before: CorrelationReport | None,
    ) -> list[CorrelatedPair]:
        model, outer = self._transcoder, measure(every, pairs)
        fires = torch.bincount(every.latents * len(strata) + stratum[every.rows],
                               minlength=model.d_sae * len(strata)).view(model.d_sae, -1)  # fmt: skip
        shares = fires / torch.bincount(stratum, minlength=len(strata)).clamp_min(1)
        group, streaks = self._group, {pair.key: pair.reports for pair in before.pairs} if before else {}

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
                cosine=0.0,
                correlation=float(inner.correlation[i]),
                correlation_with_position_0=float(outer.correlation[i]),
                jaccard=float(inner.jaccard[i]),
                rows_together=int(inner.rows[i]),
                rows=int(over[i]),
                within_segment=bool(group[first] == group[second]),
                reports=streaks.get((first, second), 0) + 1,
            )
            for i, (first, second) in enumerate(zip(*(side.tolist() for side in pairs), strict=True))
        ]

    def _with_cosines(self, report: CorrelationReport) -> CorrelationReport:
        """Return a report with the cosines of its pairs under the present weights."""
        rows = self._transcoder.unit_decoder()
        sides = torch.tensor([pair.key for pair in report.pairs], dtype=torch.int64).view(-1, 2).to(rows.device)
        cosines = torch.linalg.vecdot(rows[sides[:, 0]], rows[sides[:, 1]]).tolist()
        pairs = [pair.model_copy(update={"cosine": cosine}) for pair, cosine in zip(report.pairs, cosines, strict=True)]
        return report.model_copy(update={"pairs": pairs})

    def _scan(self, done: int, dead: Tensor, before: CorrelationReport | None) -> _Scan | None:
        """Scan the present weights after step `done`; none: it is too early after the scan of the report `before`."""
        if before:
            then, every = before.directions.step, self._scan_every
            if done // every == then // every if self._scans.at_reports else done - then < every:
                return None
        model, live = self._transcoder, (~dead).nonzero().squeeze(1)
        close, cosines = self._scans.reported(done, live, min(LEVELS))
        rows = model.unit_decoder()[live]
        gram = blas.product(model.blas, rows.T, rows)  # complete before what follows is copied
        return _Scan(live.cpu(), close.cpu(), cosines.cpu(), gram)

    def _directions(self, done: int, every: SparseLatents, scan: _Scan) -> tuple[Directions, list[list[int]]]:
        d_sae, live, (_, close, cosines, gram) = self._transcoder.d_sae, len(scan.live), scan
        nearest, inside = (torch.zeros(d_sae) for _ in range(2))
        within = self._group[close.first] == self._group[close.second]
        for side in close:
            nearest.scatter_reduce_(0, side, cosines, "amax")
            inside.scatter_reduce_(0, side[within], cosines[within], "amax")
        directions = Directions(
            step=done,
            live=live,
            share_with_neighbour_above={f"{level}": _share(nearest > level, live) for level in LEVELS},
            share_within_segment_above={f"{level}": _share(inside > level, live) for level in LEVELS},
            largest=float(nearest.max()),
            effective_number=effective_number(close.kept(cosines > 0.7), scan.live, d_sae),
            effective_rank=_effective_rank(gram) if live else 0.0,
        )
        same = (cosines >= self._config.cluster_cosine) & (
            measure(every, close).jaccard >= self._config.cluster_jaccard
        )
        return directions, connected(close.kept(same))


def _loaded_report(tensors: dict[str, Tensor], name: str) -> CorrelationReport | None:
    """Return the report that a checkpoint has under `name`; none: there was none yet."""
    text = fitting(tensors, name, torch.empty(tensors[name].numel(), dtype=torch.uint8)).numpy().tobytes()
    return CorrelationReport.model_validate_json(text) if text else None


def _rows_of_each(strata: Sequence[str], stratum: Tensor) -> dict[str, int]:
    return dict(zip(strata, torch.bincount(stratum, minlength=len(strata)).tolist(), strict=True))


def _correlations(active: SparseLatents, config: MonitorConfig) -> tuple[Correlated, Correlations]:
    found, above = correlated_pairs(active, config.least_together, MOST_PARTNERS, levels=LEVELS)
    return found, Correlations(
        rows=len(active.starts) - 1,
        largest=float(found.correlation[:1].sum()),
        pairs_above={f"{level}": count for level, count in above.items()},
    )


def _share(which: Tensor, live: int) -> float:
    return int(which.sum()) / max(live, 1)


def _effective_rank(gram: Tensor) -> float:
    """Return the effective rank of rows, by the products [O, O] of their dimensions.

    On CUDA on a stream of its own, so that the device's other work goes on.
    """
    on_cuda = gram.device.type == "cuda"
    with torch.cuda.stream(torch.cuda.Stream(gram.device)) if on_cuda else nullcontext():
        values = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
        shares = values / values.sum()
        return float(torch.special.entr(shares).sum().exp())
