"""What a run writes while it trains: a row of metrics and one of timing, and the figures that its panel shows."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shared.errors import warn
from train.live.log_rows import UsageRecord
from train.live.run_files import METRICS, TIMING
from train.live.status import Status
from train.run.metrics import Log, describe_missing


class TrainingLog:
    """The two logs of a run, and its status. Metrics are the same bits whenever a run is repeated; timing is apart."""

    def __init__(self, run: Path, steps: int, batch_rows: int) -> None:
        self.metrics, self.timing = Log(run / METRICS), Log(run / TIMING)
        self.status = Status(run, steps, batch_rows)
        self._batch_rows, self._first = batch_rows, 0
        self._began = self._cpu_began = 0.0
        self._before = (0.0, 0.0)
        """At the row before: seconds since the start, and seconds that steps had waited for rows."""

    @property
    def paths(self) -> tuple[Path, Path]:
        """Both files."""
        return self.metrics.path, self.timing.path

    def open(self, first: int, expected: Sequence[int] = ()) -> None:
        """Begin at step `first`: rows past it, of a run that was killed, are dropped, and those before are shown.

        Rows of `expected` steps that are not there are warned of.
        """
        for log in (self.metrics, self.timing):
            log.cut(first)
            rows = log.rows()
            if missing := sorted(set(expected) - {row["step"] for row in rows}):
                warn(f"{log.path}: {describe_missing(missing)}; the run goes on without them")
            if log is self.metrics:
                for row in rows:
                    self.status.add(row)
        self._first = first

    def start_clock(self) -> None:
        """Count time from now on."""
        self._began, self._cpu_began, self._before = time.monotonic(), time.process_time(), (0.0, 0.0)

    def write(
        self,
        done: int,
        metrics: dict[str, Any],
        waited: float,
        search: dict[str, float],
        publish_usage: Callable[[int], UsageRecord],
    ) -> None:
        """Append a row to each log after `done` steps, with usage.json between the two, and show them.

        `waited`: seconds that steps have waited for rows. `search`: figures of how steps were made, if there are some.
        """
        head = {"step": done, "rows": done * self._batch_rows}
        seconds = time.monotonic() - self._began
        (before, waited_before), self._before = self._before, (seconds, waited)
        timing = {
            "from_step": self._first,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu_began,
            "rows_per_second": (done - self._first) * self._batch_rows / seconds,
            "data_wait": waited - waited_before,
            "data_wait_share": (waited - waited_before) / (seconds - before),
            **search,
        }
        self.metrics.append(head | metrics)
        usage = publish_usage(done)
        self.timing.append(head | timing)
        self.status.add(head | metrics)
        self.status.update(head | timing, usage.model_dump(mode="json"))

    def warn_of_lost_rows(self) -> None:
        """Warn where a full disk has cost rows."""
        for log in (self.metrics, self.timing):
            if log.lost_rows:
                warn(f"{log.lost_rows} rows of {log.path} were lost")
