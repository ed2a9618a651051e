"""The panel of a run: one drawing of its status, for the trainer and for `watch`."""

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shared.console.panel import (
    Fitted,
    Kept,
    Pace,
    figures_table,
    inner,
    pairs,
    panel,
    per_second,
    short,
    size,
    sparkline,
)
from shared.console.terminal import Verbosity, verbosity
from shared.files import durable
from shared.files.disk_usage import Measured, size_of
from shared.store.strata import positions
from train.live.log_rows import OUTLIERS
from train.live.status import PENALTIES, Status

Pairs = list[tuple[str, str]]
_COURSE = 8
"""Columns for the course of the fvu, at least."""
_BESIDE, _UNITS = 76, 100
"""Columns from which figures and components are side by side, and components say what their effect counts."""


class RunPanel:
    """Draws a run as its `status` is at the time."""

    def __init__(self, status: Status) -> None:
        self._status, self._body = status, Kept()
        self.disk = Measured(lambda: (size_of(status.run), durable.free_bytes(status.run)))
        """Bytes that the run takes, and those that are free."""

    def draw(self, pace: Pace, state: str = "") -> RenderableType:
        """Draw the panel: `pace` as the run is, or was; `state` in a few words."""
        taken, free = (size(count) for count in self.disk.value())
        space = [("disk", f"{taken} taken"), ("", f"{free} free")]

        def drawn(width: int, blocks: bool) -> RenderableType:
            key = (self._status.changes, taken, free)
            body = self._body.drawing(key, lambda: _body(self._status, space, inner(width), blocks))
            rows = f"{per_second(pace.rate * self._status.batch_rows)} rows/s"
            return panel(f"train {self._status.run.name}", pace, "", body, more_rates=[rows], state=state)

        return Fitted(drawn)


def _body(status: Status, space: Pairs, width: int, blocks: bool) -> RenderableType:
    """Draw figures and components, side by side where there is room."""
    beside = width >= _BESIDE
    if not status.row:
        return Group(pairs(space), "no figures yet: the first come with the first row of the logs")
    course = _course(status, max(_COURSE, width - _UNITS)) if blocks else ""
    figures, table = [*_figures(status, course), *space], _components(status, units=width >= _UNITS)
    parts: list[RenderableType] = [pairs(figures, 2), Text(), table]
    if beside:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column()
        grid.add_row(pairs(figures), table)
        parts = [grid]
    return Group(*parts, *([Text(), _more(status)] if verbosity() == Verbosity.VERBOSE else []))


def _figures(status: Status, course: str) -> Pairs:
    held_out, waited = status.held_out, status.timing.get("data_wait_share", math.nan)
    evaluated = [("held out", "not yet")]
    if held_out:
        evaluated = [("held out", f"{held_out['fvu']:.4f} at {held_out['step']:,}"), ("", f"l0 {held_out['l0']:.1f}")]
    penalty = [("penalty", f"{_percent(status.share(*PENALTIES))} of loss")]
    return [
        ("fvu", f"{status.figure('fvu'):.4f} {course}"),
        *evaluated,
        ("l0", f"{status.figure('l0_training_rule'):.1f}"),
        ("dead", f"{status.figure('dead_share'):.1%}"),
        ("loss", short(status.figure("loss"))),
        *(penalty if any(name in status.terms for name in PENALTIES) else []),
        ("lr", short(status.figure("lr"))),
        ("data wait", f"{waited:.1%} of time"),
    ]


def _course(status: Status, width: int) -> str:
    """Draw the course of the training rows' fvu, by its logarithm."""
    return sparkline([math.log(value) for value in status.fvu if value > 0], width)


def _components(status: Status, *, units: bool) -> Table:
    """Make a table of what each component that is on adds to the loss, and has done."""
    rows = [_component(status, name) for name in status.components]
    if not units:
        rows = [row[:-1] for row in rows]
    table = figures_table(["component", "loss", "share", "calls", "effect", "effect counts"][: 5 + units], rows)
    if units:
        table.columns[-1].justify = "left"
        table.columns[-1].style = "dim"
    return table


def _component(status: Status, name: str) -> Sequence[str]:
    one, term = status.components[name], status.terms.get(name)
    loss = ("", "") if term is None else (short(term), _percent(status.share(name)))
    effect = short(one["effect"]) if one["effect"] else "none" if one["calls"] else "not yet"
    return name, *loss, f"{one['calls']:,}", effect, one["effect_counts"]


def _more(status: Status) -> RenderableType:
    """Draw figures by position and by prefix, and those that few ask for."""
    strata, prefixes = status.row.get("strata", {}), status.row.get("prefixes", {})
    by_position = [
        (
            name if name == OUTLIERS else positions(name),
            f"{part['rows']:,}",
            "-" if part["fvu"] is None else short(part["fvu"]),
            f"{part['l0_training_rule']:.1f}",
        )
        for name, part in strata.items()
    ]
    by_prefix = [(f"{int(name):,}", short(part["fvu"])) for name, part in prefixes.items()]
    others = [("fvu, natural", "fvu_natural"), ("grad norm", "grad_norm"), ("threshold", "running_threshold")]
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(
        figures_table(["positions", "rows", "fvu", "l0"], by_position),
        figures_table(["prefix", "fvu"], by_prefix),
    )
    return Group(grid, Text(), pairs([(label, short(status.figure(name))) for label, name in others], 2))


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"
