"""What a run has written, as rows for the sync: one per step, in order, with names like `strata/000-001/fvu`.

The names of files are those that the trainer writes; nothing here imports torch, which the child has no use for.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.live.run_files import CONFIG, HELD_OUT, METRICS, REPORTS, TIMING, USAGE, Lines, Row

LATENTS = "samples/latents-{:06d}.parquet"
BINS = 60


class Records:
    """The rows of a run, each given out once, when all that belongs to its step has been written."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._steps: int = json.loads((run / CONFIG).read_bytes())["settings"]["steps"]
        self._metrics, self._timing = Lines(run / METRICS), Lines(run / TIMING)
        self._rows: dict[int, Row] = {}
        self._reported: set[Path] = set()
        self._newest = {METRICS: -1, TIMING: -1}

    def ready(self, complete: bool) -> Iterator[tuple[int, Row]]:
        """Yield steps and their rows, in order: those to which nothing is added any more, or all of a `complete` run.

        So the last step's, to which the reports after it belong, waits for the run's end.
        """
        for row in self._metrics.read():
            self._add(METRICS, row["step"], flatten(row))
        for row in self._timing.read():
            self._add(TIMING, row["step"], flatten({"timing": row | {"step": None, "rows": None}}))
        for path in sorted(set((self._run / REPORTS).glob("correlation-[0-9]*.json")) - self._reported):
            with suppress(ValueError):  # the folder is the user's, too
                report = json.loads(path.read_bytes())
                self._add(REPORTS, report["step"], summary(report, "correlation"))
                self._reported.add(path)
        settled = max(self._newest[TIMING], self._newest[METRICS] - 1)
        last = self._steps if complete else min(settled, self._steps - 1)
        for step in sorted(step for step in self._rows if step <= last):
            yield step, self._rows.pop(step)

    def _add(self, source: str, step: int, row: Row) -> None:
        self._rows.setdefault(step, {"step": step}).update(row)
        if source in self._newest:
            self._newest[source] = max(self._newest[source], step)

    @property
    def steps(self) -> int:
        """The last step."""
        return self._steps

    def usage(self) -> Row:
        """Return calls and effect of every component so far."""
        with suppress(FileNotFoundError):
            record = json.loads((self._run / USAGE).read_bytes())
            found = {name: {key: of[key] for key in ("calls", "effect")} for name, of in record["components"].items()}
            return flatten({"usage": found | {"rows": record["rows"]}})
        return {}

    def held_out(self) -> Row:
        """Return the summary of the report of held-out rows."""
        with suppress(FileNotFoundError):
            return summary(json.loads((self._run / REPORTS / HELD_OUT).read_bytes()), "correlation_held_out")
        return {}

    def histograms(self) -> dict[str, tuple[Any, Any]]:
        """Return counts and edges of those histograms that there are.

        They are of latents by the logarithm of their density, and of listed pairs by correlation.
        """
        import numpy as np
        import pyarrow.parquet as pq

        found: dict[str, tuple[Any, Any]] = {}
        with suppress(FileNotFoundError):
            path = self._run / LATENTS.format(self._steps)
            table = pq.read_table(path, columns=["density"], page_checksum_verification=True)
            density = table["density"].to_numpy()
            found["plots/log10_density"] = np.histogram(np.log10(density[density > 0]), BINS)
        with suppress(FileNotFoundError):
            pairs = json.loads((self._run / REPORTS / HELD_OUT).read_bytes())["pairs"]
            found["plots/held_out_correlations"] = np.histogram([pair["correlation"] for pair in pairs], BINS, (-1, 1))
        return found


def flatten(value: Row) -> Row:
    """Return nested objects as one, without lists and nulls: `{"a": {"0.5": 1}}` becomes `{"a/0_5": 1}`.

    Points become underscores: W&B takes `a.b` for a path of its own.
    """
    flat: Row = {}
    for key, inner in value.items():
        name = str(key).replace(".", "_")
        if isinstance(inner, dict):
            flat |= {f"{name}/{below}": leaf for below, leaf in flatten(inner).items()}
        elif inner is not None and not isinstance(inner, list):
            flat[name] = inner
    return flat


def summary(report: Row, name: str) -> Row:
    """Return a report's figures: all but the listed pairs and clusters, of which there are the numbers."""
    counts = {"pairs_listed": len(report["pairs"]), "clusters": len(report["clusters"])}
    figures = {key: part for key, part in report.items() if key not in ("schema_version", "step", "sample")}
    return flatten({name: figures | counts})
