"""How much is said on stderr, and how: live panels on a terminal, plain lines elsewhere.

Warnings and errors are printed whatever the volume is; while a panel is shown they appear above it.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

_REFRESHES = 1
"""Of a panel, per second: each takes two milliseconds of the interpreter from the work that it shows."""


class Volume(IntEnum):
    """How much a command says beside its result."""

    QUIET = 0
    """Warnings and errors."""
    NORMAL = 1
    VERBOSE = 2
    """All figures, whenever there are new ones."""


_volume = Volume.NORMAL


def volume() -> Volume:
    """That of this process."""
    return _volume


@contextmanager
def speaking(wanted: Volume) -> Iterator[None]:
    """Set the volume of this process, and put back what it was."""
    global _volume
    before, _volume = _volume, wanted
    try:
        yield
    finally:
        _volume = before


def say(text: str) -> None:
    """What is good to know, and no warning: on stderr, unless the user wants quiet."""
    if _volume > Volume.QUIET:
        print(text, file=sys.stderr, flush=True)


def shows_panels(stderr: bool = True) -> bool:
    """Whether stderr, or stdout, is a terminal on which a panel can be drawn in place."""
    console = Console(stderr=stderr)
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
    console = Console(stderr=stderr, soft_wrap=True)  # lines of others are left to the terminal, so they can be copied
    live = Live(
        _Drawing(draw),
        console=console,
        refresh_per_second=_REFRESHES,
        redirect_stdout=not stderr,
        redirect_stderr=True,
    )
    with suppress(OSError):
        live.start()
    try:
        yield
    finally:
        with suppress(OSError):
            live.stop()
