"""The panel of a run: one drawing of its status, for the trainer and for `watch`."""

import math
from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from shared.panel import Fitted, Pace, figures_table, inner, pairs, panel, per_second, short, size, sparkline
from train.status import PENALTIES, Status

_COURSE = 8
"""Columns for the course of the fvu, at least."""
_BESIDE, _UNITS = 76, 100
"""Columns from which figures and components are side by side, and components say what their effect counts."""


def run_panel(
    status: Status, pace: Pace, disk: tuple[int, int], state: str = "", *, verbose: bool = False
) -> RenderableType:
    """A run as it is known now. `disk`: the bytes that it takes, and those that are free; `state`: in a few words."""
    return Fitted(lambda width, blocks: _panel(status, pace, disk, state, inner(width), blocks, verbose))


def _panel(
    status: Status, pace: Pace, disk: tuple[int, int], state: str, width: int, blocks: bool, verbose: bool
) -> RenderableType:
    beside, parts = width >= _BESIDE, list[RenderableType]()
    table = _components(status, units=width >= _UNITS)
    course = _course(status, max(_COURSE, width - _UNITS)) if blocks else ""
    figures = _figures(status, disk, course)
    if not status.row:
        parts = [pairs(figures, 1 if beside else 2), "no figures yet: the first come with the first row of the logs"]
    elif beside:
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column()
        grid.add_row(pairs(figures), table)
        parts = [grid]
    else:
        parts = [pairs(figures, 2), "", table]
    if verbose and status.row:
        parts += ["", _more(status)]
    rows = f"{per_second(pace.rate * status.batch_rows)} rows/s"
    return panel(f"train {status.run.name}", pace, "", *parts, more_rates=[rows], state=state)


def _figures(status: Status, disk: tuple[int, int], course: str) -> list[tuple[str, str]]:
    taken, free = disk
    space = [("disk", f"{size(taken)} taken"), ("", f"{size(free)} free")]
    if not status.row:
        return space
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
        *space,
    ]


def _course(status: Status, width: int) -> str:
    """The course of the training rows' fvu, by its logarithm."""
    return sparkline([math.log(value) for value in status.fvu if value > 0], width)


def _components(status: Status, *, units: bool) -> Table:
    """What each component that is on adds to the loss, and has done."""
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
    effect = short(one["effect"]) if one["effect"] else "not yet"
    return name, *loss, f"{one['calls']:,}", effect, one["effect_counts"]


def _more(status: Status) -> Table:
    """Figures by position and by prefix, and those that few ask for."""
    strata, prefixes = status.row.get("strata", {}), status.row.get("prefixes", {})
    by_position = [
        (name, f"{part['rows']:,}", short(part["fvu"]), f"{part['l0_training_rule']:.1f}")
        for name, part in strata.items()
    ]
    by_prefix = [(f"{int(name):,}", short(part["fvu"])) for name, part in prefixes.items()]
    others = [("fvu, natural", "fvu_natural"), ("grad norm", "grad_norm"), ("threshold", "running_threshold")]
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(
        figures_table(["positions", "rows", "fvu", "l0"], by_position),
        figures_table(["prefix", "fvu"], by_prefix),
        pairs([(label, short(status.figure(name))) for label, name in others]),
    )
    return grid


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 else f"{share:.2%}"
