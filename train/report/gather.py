"""Reads what a run left, and puts it into a report. Writes nothing, and judges nothing.

Legend: F latents, O d_out.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from shared.config import read_record
from shared.errors import CorruptData
from shared.files import durable
from shared.store.store import Store
from train.duplicates.correlation_report import CorrelationReport, counted
from train.live.run_files import HELD_OUT, REPORTS, TIMING, Row
from train.report.report_record import (
    Cluster,
    Context,
    Curves,
    Duplicates,
    Example,
    Histogram,
    Nearest,
    StoreFacts,
)
from train.run.metrics import Log

_DENSITY_EDGES = np.logspace(-7, 0, 57)
_COSINE_EDGES = np.linspace(-1, 1, 81)
_SHARE_EDGES = np.linspace(0, 1, 21)
_RANDOM_ROWS, _BLOCK = 2**15, 1024
"""Of random directions, at most, against all of them: the same distribution from a part."""
_PAIRS, _CLUSTERS, _OF_A_CLUSTER, _CONTEXTS = 20, 10, 6, 3
"""Whose contexts are shown, and how many of each latent."""
_REMOVE = "remove the file, and the report is made without it"


def training_curves(metrics: Sequence[Row], step: int) -> Curves:
    """Return what rows of `metrics.jsonl` have up to `step`."""
    return _curves([_flat(row) for row in metrics if row["step"] <= step])


def timing_curves(run: Path, step: int) -> Curves:
    """Return speed and waiting between rows of `timing.jsonl`; a resumed run's clock starts over."""
    found: list[dict[str, Any]] = []
    rows, seconds, first = 0.0, 0.0, None
    for row in Log(run / TIMING).rows():
        if row["step"] > step:
            break
        if first != (resumed := row.get("from_step", 0)):
            rows, seconds, first = row["rows"] / row["step"] * resumed, 0.0, resumed
        spent = row["seconds"] - seconds
        rate = (row["rows"] - rows) / spent if spent > 0 else None
        found.append({"step": row["step"], "rows_per_second": rate, "data_wait_share": row.get("data_wait_share")})
        rows, seconds = row["rows"], row["seconds"]
    return _curves(found)


def trained(run: Path, step: int) -> tuple[int, float] | None:
    """Return how many rows the run trained on up to `step`, and in how many seconds, the parts of a resumed run added.

    None where `timing.jsonl` has no such rows.
    """
    parts = {row.get("from_step", 0): row for row in Log(run / TIMING).rows(tell=False) if row["step"] <= step}
    if not parts:
        return None
    last = max(parts.values(), key=lambda row: row["step"])
    return round(last["rows"]), sum(row["seconds"] for row in parts.values())


def monitor_curves(run: Path, step: int) -> Curves:
    """Return the trend over reports of the correlation monitor."""
    found, reports = [], [read_correlations(path) for path in _monitor_reports(run)]
    is_tracked = any(report.tracked for report in reports)
    for report in reports:
        if report.step <= step:
            pairs = None if is_tracked and not report.tracked else counted(report)  # one curve, one way to count
            found.append(
                {
                    "step": report.step,
                    "pairs_above_0_8": pairs and pairs.pairs_above["0.8"],
                    "largest_correlation": pairs and pairs.largest,
                    "share_with_neighbour_above_0_7": report.directions.share_with_neighbour_above["0.7"],
                    "effective_share": report.directions.effective_number / max(report.directions.live, 1),
                }
            )
    return _curves(found)


def _monitor_reports(run: Path) -> list[Path]:
    """List the monitor's reports in order of step."""
    found = [path for path in (run / REPORTS).glob("correlation-*.json") if path.stem.split("-")[1].isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.split("-")[1]))


def read_correlations(path: Path) -> CorrelationReport:
    """Read a report of the monitor. Raises `CorruptData`."""
    report = read_record(CorrelationReport, durable.read_json(path), path)
    if not _levels(report):
        raise CorruptData(f"{path}: lacks the counts of pairs above 0.8, or of neighbours above 0.7 and 0.8; {_REMOVE}")
    return report


def _levels(report: CorrelationReport) -> bool:
    """Tell whether a report has the counts that are shown."""
    neighbours = report.directions.share_with_neighbour_above
    return "0.8" in counted(report).pairs_above and {"0.7", "0.8"} <= set(neighbours)


def duplicates(run: Path, step: int, d_sae: int) -> Duplicates | None:
    """Return the report on all held-out rows of `step`; where there is none, the last one up to it.

    Raises `CorruptData` when it names other latents than those of `d_sae`.
    """
    whole = run / REPORTS / HELD_OUT
    found = [(read_correlations(path), path) for path in ([whole] if whole.is_file() else [])]
    if not found or found[0][0].step != step:
        found = [(read_correlations(path), path) for path in _monitor_reports(run)[::-1]]
    report, path = next(((one, path) for one, path in found if one.step <= step), (None, None))
    if not report or not path:
        return None
    named = chain((one.latent for pair in report.pairs for one in pair.latents), *report.clusters)
    if odd := [latent for latent in named if not 0 <= latent < d_sae]:
        raise CorruptData(f"{path}: names latent {odd[0]}, and the run has {d_sae:,}; {_REMOVE}")
    return Duplicates(
        source=str(path.relative_to(run)),
        rows=counted(report).rows,
        largest_correlation=counted(report).largest,
        pairs_above=counted(report).pairs_above,
        directions=report.directions,
        pairs=report.pairs,
        clusters=[Cluster(latents=latents) for latents in report.clusters],
    )


def density(table: pa.Table) -> Histogram:
    """Count all latents by density, without position 0; `outside` are those active nowhere else, or never."""
    values = table["density"].to_numpy()
    return histogram(values[values > 0], _DENSITY_EDGES, outside=int((values == 0).sum()))


def at_position_0(table: pa.Table) -> Histogram | None:
    """Count live latents by the share of their active rows that are of position 0."""
    values = table["position_0_share"].drop_null().to_numpy()
    return histogram(values, _SHARE_EDGES) if len(values) else None


def nearest(
    table: pa.Table,
    width: int,
) -> Nearest:
    """Return the largest cosines of live latents, beside those of random directions of as many dimensions, `width`."""
    first = pc.list_element(table.filter(pc.greater(pc.list_value_length(table["nearest_cosines"]), 0))
                            ["nearest_cosines"], 0).to_numpy()  # fmt: skip
    live = len(first)
    random = _nearest_of_random(live, width)
    scaled = histogram(random, _COSINE_EDGES)
    times = live / max(len(random), 1)
    return Nearest(
        latents=histogram(first, _COSINE_EDGES),
        random=scaled.model_copy(update={"counts": [round(count * times) for count in scaled.counts]}),
        median=_quantile(first, 0.5),
        largest=_quantile(first, 1.0),
        random_median=_quantile(random, 0.5),
        random_largest=_quantile(random, 1.0),
    )


def examples(contexts: pa.Table, table: pa.Table, found: Duplicates | None) -> dict[int, Example]:
    """Return the latents of the first pairs and clusters, with their strongest contexts of the samples."""
    if not found:
        return {}
    wanted = [one.latent for pair in found.pairs[:_PAIRS] for one in pair.latents]
    wanted += [latent for cluster in found.clusters[:_CLUSTERS] for latent in cluster.latents[:_OF_A_CLUSTER]]
    latents = sorted(set(wanted))
    shown: dict[int, list[Context]] = {latent: [] for latent in latents}
    columns = ["latent", "kind", "rank", "position", "peak", "tokens", "text", "activations"]
    wanted_rows = pc.and_(
        pc.is_in(contexts["latent"], pa.array(latents, contexts["latent"].type)), pc.less(contexts["rank"], _CONTEXTS)
    )
    for row in contexts.select(columns).filter(wanted_rows).to_pylist():
        if row["kind"] == "top":
            shown[row["latent"]].append(
                Context(
                    text=[
                        f"#{token}" if text is None else text
                        for token, text in zip(row["tokens"], row["text"], strict=True)
                    ],
                    activations=row["activations"],
                    peak=row["peak"],
                    position=row["position"],
                )
            )
    densities, largest = table["density"].to_numpy(), table["max"].to_pylist()
    return {
        latent: Example(
            latent=latent, density=float(densities[latent]), largest=largest[latent], contexts=shown[latent]
        )
        for latent in latents
    }


def store_facts(store: Store) -> StoreFacts:
    """Return what a reader of the report wants to know of the store."""
    record, request = store.record, store.request
    rows = {s.name: len(record.training_blocks) * s.rows for s in record.plan.stored_strata}
    return StoreFacts(
        name=store.path.name,
        request=request.digest,
        model=request.model.name,
        corpus=request.corpus.name,
        source_hook=request.source_hook,
        target_hook=request.target_hook,
        layer=request.layer,
        context_size=request.context_size,
        d_in=record.d_in,
        d_out=record.d_out,
        training_rows=sum(rows.values()),
        held_out_rows=len(record.report_blocks) * sum(s.rows for s in record.plan.stored_strata),
        bytes=store.shard_bytes,
        strata=rows,
        storage=request.storage,
        storage_floor=record.storage_floor.model_dump() if record.storage_floor else None,
    )


def histogram(values: NDArray[Any], edges: NDArray[np.float64], outside: int = 0) -> Histogram:
    """Count `values` between `edges`; those past the first or last edge are counted at it."""
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist(), outside=outside)


def _nearest_of_random(count: int, width: int) -> NDArray[np.float32]:
    """Return the largest cosine of each of `count` random directions with another of them."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    rows /= rows.norm(dim=1, keepdim=True)
    some = min(count, _RANDOM_ROWS)
    largest = torch.full((some,), -1.0)
    for low in range(0, count, _BLOCK):
        cosines = rows[:some] @ rows[low : low + _BLOCK].T
        itself = torch.arange(low, max(low, min(low + _BLOCK, some)))
        cosines[itself, itself - low] = -1
        largest = torch.maximum(largest, cosines.amax(1))
    return largest.numpy()


def _quantile(values: NDArray[Any], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else 0.0


def merged(metrics: Sequence[Row], step: int) -> dict[int, int]:
    """Return how many latents were merged into others up to `step`, by the step after which they were."""
    rows = [row for row in metrics if row["step"] <= step]
    return {int(at): freed for at, freed in (rows[-1].get("merged", {}) if rows else {}).items()}


def _curves(rows: Sequence[Mapping[str, Any]]) -> Curves:
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    return Curves(
        steps=[row["step"] for row in rows],
        series={name: [_finite(row.get(name)) for row in rows] for name in names},
    )


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _flat(row: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Return numbers by dotted names, but for held-out figures of parts, which the last evaluation has."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            if start != "held_out.":
                found |= _flat(value, f"{start}{name}.")
        elif isinstance(value, int | float):
            found[f"{start}{name}"] = value
    return found
