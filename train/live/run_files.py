"""A run's files by name, and the rows of its logs as they are added: for those who look at it from outside.

Nothing here imports torch, which they have no use for.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.config import read_record, sealed
from shared.errors import CorruptData, UserError, warn
from shared.files.durable import TEMPORARY, read_json
from shared.files.untrusted import regular_or_link
from train.live.log_rows import AnyRow, MetricsRow, TimingRow, UsageRecord, checked_row

METRICS, TIMING, USAGE, CONFIG, LOCK = "metrics.jsonl", "timing.jsonl", "usage.json", "config.json", ".lock"
BLOCKS = "blocks.json"
"""Checksums of the blocks of the store that the run reads."""
REPORTS, HELD_OUT = "anti_duplication_logs", "correlation-held-out.json"
"""The folder of the correlation monitor's reports, and the one on held-out rows."""
RUNS = Path("runs")
"""The folder of runs where no other is named."""
_MOST_LISTED = 20
EXPORTS = "exports"
"""The folder of transcoders in other libraries' formats."""

Row = dict[str, Any]
_MODELS: dict[str, type[AnyRow]] = {METRICS: MetricsRow, TIMING: TimingRow}


def config_file(run: Path) -> Path:
    """Return the path of the `config.json` of `run`. Raises `UserError` when `run` is none, with what may be meant."""
    if (run / CONFIG).is_file():
        return run / CONFIG
    wrong = f"it has no {CONFIG}" if run.is_dir() else "it is a file" if run.exists() else "there is no such folder"
    raise UserError(f"{run} is not a run: {wrong}{_meant(run)}")


def _meant(run: Path) -> str:
    """Say which run may be meant by a path that is none, of the runs beside it, in it, or in `runs`; else nothing."""
    if _is_there(RUNS / run / CONFIG):
        return f"; did you mean {RUNS / run}?"
    folder = run if run.is_dir() else run.parent
    if not (near := runs_in(folder) or runs_in(folder := RUNS)):
        return ""
    more = f" and {len(near) - _MOST_LISTED} more" if len(near) > _MOST_LISTED else ""
    return f"; the runs in {folder}: {', '.join(near[-_MOST_LISTED:])}{more}"


def runs_in(folder: Path) -> list[str]:
    """List the names of the runs in a folder, but for what is being removed, and for what may not be looked at."""
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix != TEMPORARY and _is_there(path / CONFIG))


def _is_there(path: Path) -> bool:
    """Tell whether a file is there and may be looked at: folders of others on a shared disk may be closed."""
    try:
        return path.is_file()
    except PermissionError:
        return False


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
