"""A run's files by name, and the rows of its logs as they are added: for those who look at it from outside.

Nothing here imports torch, which they have no use for.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.config import read_record, sealed
from shared.errors import CorruptData, warn
from shared.files.durable import read_json
from shared.files.untrusted import regular_or_link
from train.live.log_rows import AnyRow, MetricsRow, TimingRow, UsageRecord, checked_row

METRICS, TIMING, USAGE, CONFIG, LOCK = "metrics.jsonl", "timing.jsonl", "usage.json", "config.json", ".lock"
BLOCKS = "blocks.json"
"""Checksums of the blocks of the store that the run reads."""
REPORTS, HELD_OUT = "anti_duplication_logs", "correlation-held-out.json"
"""The folder of the correlation monitor's reports, and the one on held-out rows."""
EXPORTS = "exports"
"""The folder of transcoders in other libraries' formats."""

Row = dict[str, Any]
_MODELS: dict[str, type[AnyRow]] = {METRICS: MetricsRow, TIMING: TimingRow}


def model_of(log: Path) -> type[AnyRow]:
    """Return what checks the rows of a log."""
    return _MODELS.get(log.name, AnyRow)


def read_usage(run: Path) -> UsageRecord | None:
    """Read `usage.json`; none: the run has not written any yet. Raises `CorruptData`."""
    try:
        data = read_json(run / USAGE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CorruptData(f"{run / USAGE}: {error.strerror}") from error
    if isinstance(data, dict) and data.get("digest") and data != sealed(data):
        raise CorruptData(
            f"{run / USAGE}: its digest is not that of what it holds: it was edited, or is damaged; this makes it "
            f"again: python -m train resume {run}"
        )
    return read_record(UsageRecord, data, run / USAGE)


class Lines:
    """The rows of a file of JSON lines, each read once; a file that was replaced is read again."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset, self._line = path, 0, 0, 0
        self._warned = False

    def read(self) -> Iterator[Row]:
        """Yield the rows that were added; a line that is being written waits, one that is no row is left out.

        The first such line is warned of.
        """
        with suppress(FileNotFoundError), open(self._path, "rb", opener=regular_or_link) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset, self._line = status.st_ino, 0, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset, self._line = self._offset + len(line), self._line + 1
                try:
                    row = checked_row(line, model_of(self._path), self._path)
                except CorruptData as error:
                    self._leave_out(error)
                else:
                    yield row

    def _leave_out(self, error: CorruptData) -> None:
        if not self._warned:
            warn(f"{error}, in line {self._line}; such rows are left out")
        self._warned = True
