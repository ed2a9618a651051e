"""A run's files by name, and the rows of its logs as they are added: for those who look at it from outside.

Nothing here imports torch, which they have no use for.
"""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.files.untrusted import regular_or_link

METRICS, TIMING, USAGE, CONFIG, LOCK = "metrics.jsonl", "timing.jsonl", "usage.json", "config.json", ".lock"
REPORTS, HELD_OUT = "anti_duplication_logs", "correlation-held-out.json"
"""The folder of the correlation monitor's reports, and the one on held-out rows."""

Row = dict[str, Any]


class Lines:
    """The rows of a file of JSON lines, each read once; a file that was replaced is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0

    def read(self) -> Iterator[Row]:
        """Yield the rows that were added; a line that is being written waits, one that is torn is left out."""
        with suppress(FileNotFoundError), open(self._path, "rb", opener=regular_or_link) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._inode, self._offset = status.st_ino, 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                with suppress(ValueError):
                    yield json.loads(line)
