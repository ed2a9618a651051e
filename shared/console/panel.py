"""Panels for people: how far a stage is, how fast it goes, and figures under names. Draws, and measures nothing."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_MOST_WIDTH = 120
_EDGES = 4
"""Columns that the frame takes."""
_LEVELS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How far a stage is, and how fast it goes."""

    done: int
    total: int
    unit: str
    seconds: float
    """Since it started, or was resumed."""
    rate: float
    """Units per second since then."""

    @property
    def seconds_left(self) -> float | None:
        """At this rate; none while there is no rate."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None

    @property
    def speed(self) -> str:
        """The rate in words; of what takes over ten seconds, how long each takes."""
        return f"{1 / self.rate:,.0f} s each" if 0 < self.rate < 0.1 else f"{per_second(self.rate)} {self.unit}/s"

    def line(self) -> str:
        """Return all of it, in words."""
        left = "?" if self.seconds_left is None else duration(self.seconds_left)
        return f"{self.done:,}/{self.total:,} {self.unit}  {self.speed}  {left} left"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A drawing that is made for the columns it gets, 120 at most; and whether blocks and lines can be shown there."""

    make: Callable[[int, bool], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _MOST_WIDTH)
        # the console of a live panel wraps nothing, which is for the lines above it
        yield from console.render(
            self.make(width, not options.ascii_only), options.update(width=width, no_wrap=False, overflow="fold")
        )


class Kept:
    """A part of a panel that is laid out again only when its `key` or its place is another: that takes milliseconds."""

    def __init__(self) -> None:
        self._at: tuple[Hashable, ...] = ()
        self._segments: list[Segment] = []

    def drawing(self, key: Hashable, make: Callable[[], RenderableType]) -> "Kept":
        """Set what is drawn: what `make` returns, which is the same for equal keys."""
        self._key, self._make = key, make
        return self

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        at = (self._key, options.max_width, options.ascii_only)
        if at != self._at:
            self._at, self._segments = at, list(console.render(self._make(), options))
        yield from self._segments


def panel(title: str, pace: Pace, *parts: RenderableType, more_rates: Sequence[str] = (), state: str = "") -> Panel:
    """Return a frame with a bar, the rates and times, and `parts` below; `state` is on its lower edge."""
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(justify="right", no_wrap=True)
    share = pace.done / pace.total if pace.total else 1.0
    bar.add_row(
        ProgressBar(total=max(pace.total, 1), completed=pace.done if pace.total else 1),
        f"{pace.done:,}/{pace.total:,} {pace.unit}  {share:.0%}",
    )
    speed = [pace.speed, *more_rates] if pace.rate else []
    left = "?" if pace.seconds_left is None else duration(pace.seconds_left)
    to_go = [f"{left} left"] if pace.done < pace.total else []
    times = Text("  ".join([*speed, *to_go, f"{duration(pace.seconds)} elapsed"]))
    return Panel(
        Group(bar, times, *parts),
        title=Text(f" {title} ", "bold"),
        title_align="left",
        subtitle=Text(f" {state} ") if state else None,
        subtitle_align="left",
        box=box.ROUNDED,
        border_style="dim",
    )


def inner(width: int) -> int:
    """Return the number of columns within the frame of a panel."""
    return width - _EDGES


def pairs(rows: Sequence[tuple[str, str]], columns: int = 1) -> Table:
    """Lay out names and values in `columns` of pairs, filled from top to bottom."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    height = -(-len(rows) // columns)
    for _ in range(columns):
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
    for i in range(height):
        grid.add_row(*(Text(cell) for name, value in rows[i::height] for cell in (name, value)))
    return grid


def figures_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Make a table without lines: text in the first column, and numbers to the right."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the course of `values` in `width` characters, each the mean of a part of them."""
    if len(values) < 2 or width < 2:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in means)


def size(count: float) -> str:
    """Format a number of bytes, such as `3.21 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.4g} {unit}"


def duration(seconds: float) -> str:
    """Format seconds, such as `0:42`, `1:02:03` or `3 d 04:05:06`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days:,} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def per_second(rate: float) -> str:
    """Format a rate: whole, except where the digits after the decimal point say something."""
    return f"{rate:,.0f}" if rate >= 100 or rate == 0 else f"{rate:.3g}"


def short(value: float) -> str:
    """Format a figure in eight characters at most, unless it is huge."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:,.4g}"
    return f"{value:.2e}" if abs(value) < 1 else f"{value:,.0f}"
