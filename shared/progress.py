"""Progress with rate and time left, on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_PLAIN_SECONDS = 5.0


class Progress:
    """Counts `unit`s towards `total`; rates leave out the `done` units that a resumed job starts with."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0) -> None:
        self._name, self._total, self._unit, self._start = name, total, unit, done
        self._began = self._printed = time.monotonic()
        self._note = ""
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(name, total=total, completed=done, rate="", note="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` units are done; `note` stands at the end of the line, and an empty one keeps the last."""
        now = time.monotonic()
        rate = (done - self._start) / max(now - self._began, 1e-9)
        self._note = note or self._note
        self._bar.update(self._task, completed=done, rate=f"{rate:,.0f} {self._unit}/s", note=self._note)
        if self._bar.disable and (now - self._printed >= _PLAIN_SECONDS or done == self._total):
            self._printed = now
            left = (self._total - done) / max(rate, 1e-9)
            text = f"{self._name} {done:,}/{self._total:,} {self._unit}  {rate:,.0f} {self._unit}/s  {left:,.0f} s left"
            print(f"{text}  {self._note}".rstrip(), file=sys.stderr, flush=True)
