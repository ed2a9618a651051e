"""Progress with rate and time left, on stderr: a panel on a terminal, a plain line every few seconds elsewhere."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from rich.console import RenderableType
from rich.text import Text

from shared.console.panel import Pace, panel
from shared.console.terminal import Verbosity, panel_shown, shows_panels, verbosity
from shared.errors import printable, tell

_PLAIN_SECONDS = 5.0


class Progress:
    """Counts `unit`s towards `total`; rates leave out the `done` units that a resumed job starts with.

    A quiet command shows none of it, and a verbose one prints every detail that it is given.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        done: int = 0,
        *,
        draw: Callable[[Pace], RenderableType] | None = None,
        alone: bool = True,
    ) -> None:
        """Count from `done`.

        `draw` makes the panel, if it has more than the bar. `alone`: no other process has one on this terminal.
        """
        self._name, self._total, self._unit, self._start, self._done = name, total, unit, done, done
        self._began = self._printed = time.monotonic()
        self._note, self._told = "", True
        self._draw = draw or (lambda pace: panel(name, pace, *([Text(self._note)] if self._note else [])))
        self._panel = alone and verbosity() > Verbosity.QUIET and shows_panels()
        self._shown = ExitStack()

    def __enter__(self) -> "Progress":
        if self._panel:
            self._shown.enter_context(panel_shown(lambda: self._draw(self.pace())))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.close()
        if self._done == self._total and not self._told:
            self._print(self._note)

    def pace(self) -> Pace:
        """Tell how far it is now."""
        done, seconds = self._done, time.monotonic() - self._began
        rate = (done - self._start) / max(seconds, 1e-9)
        return Pace(done=done, total=self._total, unit=self._unit, seconds=seconds, rate=rate)

    def update(self, done: int, note: str = "", detail: str = "") -> None:
        """Say that `done` units are done.

        `note` stands at the end of the plain line, and an empty one keeps the last; in its place a verbose command
        prints `detail`, at once.
        """
        self._done, self._note = done, note or self._note
        if self._panel or verbosity() == Verbosity.QUIET:
            return
        self._told = False
        if detail and verbosity() == Verbosity.VERBOSE:
            self._print(detail)
        elif time.monotonic() - self._printed >= _PLAIN_SECONDS:
            self._print(self._note)

    def _print(self, note: str) -> None:
        self._printed, self._told = time.monotonic(), True
        tell(printable(f"{self._name} {self.pace().line()}  {note}".rstrip()))
