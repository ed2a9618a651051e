"""How much is said on stderr, and how: live panels on a terminal, plain lines elsewhere.

Warnings and errors are printed whatever the verbosity is; while a panel is shown they appear above it.
"""

import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

from shared.console.signals import cursor_back_on_quit
from shared.errors import give_up, printable, tell
from shared.files.object_store import address, is_address

_WIDTH = 80
"""Columns of a terminal that says it has none."""
_REFRESHES = 1
"""Of a panel, per second: each takes two milliseconds of the interpreter from the work that it shows."""


class Verbosity(IntEnum):
    """How much a command says beside its result."""

    QUIET = 0
    """Warnings and errors."""
    NORMAL = 1
    VERBOSE = 2
    """All figures, whenever there are new ones."""


_verbosity = Verbosity.NORMAL
_of_thread = threading.local()


def verbosity() -> Verbosity:
    """Return the verbosity of this process, or of this thread where it is quiet."""
    return getattr(_of_thread, "verbosity", _verbosity)


def quiet_thread() -> None:
    """Let the calling thread say no more than warnings and errors: one of several whose work is shown together."""
    _of_thread.verbosity = Verbosity.QUIET


@contextmanager
def with_verbosity(wanted: Verbosity) -> Iterator[None]:
    """Set the verbosity of this process, and put back what it was."""
    global _verbosity
    before, _verbosity = _verbosity, wanted
    try:
        yield
    finally:
        _verbosity = before


def say(text: str) -> None:
    """Print what is good to know, and no warning: on stderr, unless the user wants quiet."""
    if verbosity() > Verbosity.QUIET:
        tell(printable(text))


def show_text(text: str) -> None:
    """Print (a part of) a result on stdout."""
    tell(printable(text), sys.stdout)


def show_path(path: Path) -> None:
    """Print a path, or an address of objects, on stdout, as it is: a program may read it.

    On a terminal it is text like all other.
    """
    text = address(path) if is_address(path) else str(path)
    tell(printable(text) if sys.stdout.isatty() else text, sys.stdout)


class PlainConsole(Console):
    """A console that takes every text as it stands: nothing in it is markup, an emoji's name or a control sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)
        if self.width < 1:  # COLUMNS=0
            self.width = _WIDTH

    def print(self, *given: Any, **options: Any) -> None:
        """Print as rich does; where nobody reads it any more, that stops no work."""
        try:
            super().print(*given, **options)
        except OSError as error:
            give_up(self.file, error)

    def on_broken_pipe(self) -> None:
        """Be silent, in place of rich's end of the process."""
        give_up(self.file, BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)))

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a text; its width is measured with the escapes in it."""
        return super().render_str(printable(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield what is to be printed; only rich's own control sequences are left."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def shows_panels(stderr: bool = True) -> bool:
    """Tell whether stderr, or stdout, is a terminal on which a panel can be drawn in place."""
    console = PlainConsole(stderr=stderr)
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class _Drawing:
    """What `draw` returns whenever it is shown. One that fails says so: it stops no work, and hides no warning."""

    def __init__(self, draw: Callable[[], RenderableType]) -> None:
        self._draw = draw

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        try:
            drawn = list(console.render(self._draw(), options))
        except Exception as error:
            drawn = list(console.render(Text(f"the panel cannot be drawn: {error!r}"), options))
        yield from drawn


@contextmanager
def panel_shown(draw: Callable[[], RenderableType], stderr: bool = True) -> Iterator[None]:
    """Show what `draw` returns in place, drawn by a thread of its own; the last drawing stays.

    What is printed on stderr meanwhile appears above it, each line whole. A terminal that is gone stops nothing.
    """
    # Lines of others are left to the terminal, so that they can be copied.
    console = PlainConsole(stderr=stderr, soft_wrap=True)
    live = Live(
        _Drawing(draw),
        console=console,
        refresh_per_second=_REFRESHES,
        redirect_stdout=not stderr,
        redirect_stderr=True,
    )
    with cursor_back_on_quit(console.file):
        with suppress(OSError):
            live.start()
        try:
            yield
        finally:
            with suppress(OSError):
                live.stop()
