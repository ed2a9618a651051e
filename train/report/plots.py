"""The plots of a report, as Plotly figures. Pure; the page gives them the colours of light or dark.

Series differ in dash and marker as well as in colour.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from shared.store.strata import positions
from train.report.report_record import Curves, Histogram, Report

_SHORT = ("1", "10", "100", "1k", "10k", "100k", "1M", "10M")
"""Powers of ten."""
_MOST_POINTS = 1500
"""Of one series on the page; `report.json` has all."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


def figures(report: Report) -> dict[str, go.Figure]:
    """Draw all plots that there is anything for, by id."""
    every = {
        "fvu": _fvu(report),
        "l0": _l0(report),
        "terms": _terms(report),
        "dead": _lines(report.training, {"dead_share": "dead while training"}, "share of latents", percent=True),
        "lr": _lines(report.training, {"lr": "learning rate"}, "learning rate"),
        "throughput": _lines(report.timing, {"rows_per_second": "rows per second"}, "rows per second"),
        "waiting": _lines(report.timing, {"data_wait_share": "waiting for rows"}, "share of the time", percent=True),
        "strata": _strata(report),
        "prefixes": _by_prefix(report, "fvu", "fvu, held out"),
        "prefixes_l0": _by_prefix(report, "l0", "active latents per row, held out"),
        "density": _density(report.density),
        "bos": _histogram(report.at_position_0, "share of a latent's active rows at position 0"),
        "nearest": _nearest(report),
        "repeats": _lines(
            report.monitor,
            {"share_with_neighbour_above_0_7": "latents with a neighbour above cosine 0.7"},
            "share of live latents",
            percent=True,
        ),
        "correlated": _lines(report.monitor, {"pairs_above_0_8": "pairs correlated above 0.8"}, "pairs"),
    }
    return {name: one for name, one in every.items() if one is not None}


def _fvu(report: Report) -> go.Figure | None:
    names = {
        "fvu_natural": "training rows, natural frequencies",
        "held_out.fvu": "held out, calibrated thresholds",
        "held_out.fvu_training_rule": "held out, the training rule",
    }
    return _lines(report.training, names, "fvu", log=True)


def _l0(report: Report) -> go.Figure | None:
    names = {
        "l0_training_rule": "the training rule",
        "l0_threshold": "the running threshold",
        "held_out.l0": "held out, calibrated thresholds",
    }
    return _lines(report.training, names, "active latents per row")


def _terms(report: Report) -> go.Figure | None:
    names = {name: name.removeprefix("terms.") for name in report.training.series if name.startswith("terms.")}
    return _lines(report.training, names, "weighted loss", log=True)


def _lines(
    curves: Curves, names: Mapping[str, str], axis: str, *, log: bool = False, percent: bool = False
) -> go.Figure | None:
    traces = []
    for i, (name, label) in enumerate((name, label) for name, label in names.items() if name in curves.series):
        points = [
            (step, value)
            for step, value in zip(curves.steps, curves.series[name], strict=True)
            if value is not None and (value > 0 or not log)
        ]
        if not points:
            continue
        points = thinned(points)
        sparse = len(points) < 40
        traces.append(
            go.Scatter(
                x=[step for step, _ in points],
                y=[value for _, value in points],
                name=label,
                mode="lines+markers" if sparse else "lines",
                **look(i),
            )
        )
    if not traces:
        return None
    return figure(traces, "step", axis, y=log_axis(traces) if log else {"tickformat": ".3~%"} if percent else {})


def log_axis(traces: Sequence[go.Scatter]) -> dict[str, Any]:
    """Put labels at 1, 2 and 5 of every power of ten where there are few of them, else at powers alone.

    Values of less than a power of ten have labels closer than that, and values of one size a linear axis.
    """
    values = [value for trace in traces for value in trace.y]
    if max(values) < 3 * min(values):
        return {"rangemode": "normal"}  # a power of ten might not be among them
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    if high - low > 3:
        return {"type": "log", "dtick": 1, "exponentformat": "power"}
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if max(values) < 10 * min(values) else (1, 2, 3, 5)
    ticks = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return every n-th of many points, and the last."""
    every = -(-len(points) // _MOST_POINTS)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _strata(report: Report) -> go.Figure | None:
    parts = report.held_out.strata
    bars = go.Bar(x=[positions(name) for name in parts], y=[part.fvu for part in parts.values()], name="fvu")
    return figure([bars], "positions", "fvu, held out", x={"type": "category"})


def _by_prefix(report: Report, name: str, axis: str) -> go.Figure:
    sizes = sorted(report.held_out.prefixes)
    values = [getattr(report.held_out.prefixes[size], name) for size in sizes]
    trace = go.Scatter(x=sizes, y=values, name=name, mode="lines+markers", line={"width": 2}, marker={"size": 8})
    ticks = {"tickvals": sizes, "ticktext": [f"{size:,}" for size in sizes]}
    return figure([trace], "latents of the prefix", axis, x={"type": "log", **ticks})


def _histogram(found: Histogram | None, axis: str) -> go.Figure | None:
    if found is None or not any(found.counts):
        return None
    return figure([_bars(found, "latents")], axis, "latents")


def _density(found: Histogram) -> go.Figure | None:
    """Draw how many tokens there are for one on which a latent is active: powers of ten, from rare to frequent."""
    if not any(found.counts):
        return None
    some = [i for i, count in enumerate(found.counts) if count]
    powers = range(math.floor(math.log10(found.edges[some[0]])), 1)
    ticks = [f"1 in {_SHORT[-power]}" if power else "all" for power in powers]
    told = [f"1 in {1 / b:,.3g} to 1 in {1 / a:,.3g}" for a, b in pairwise(found.edges)]
    bars = _bars(found, "latents", log=True).update(customdata=told)
    x = {"type": "log", "tickvals": [10.0**power for power in powers], "ticktext": ticks}
    low, high = math.log10(found.edges[some[0]]), math.log10(found.edges[some[-1] + 1])
    return figure(
        [bars], "tokens without position 0 on which a latent is active", "latents", x={**x, "range": [low, high]}
    )


def _nearest(report: Report) -> go.Figure | None:
    found = report.nearest
    if not any(found.latents.counts):
        return None
    traces = [_bars(found.latents, "latents"), _steps(found.random, "random directions")]
    low = min(edge for one in (found.latents, found.random)
              for edge, count in zip(one.edges, one.counts, strict=False) if count)  # fmt: skip
    return figure(traces, "largest cosine with another decoder row", "latents", x={"range": [low - 0.05, 1.02]})


def _bars(found: Histogram, name: str, *, log: bool = False) -> go.Bar:
    centres = [(a * b) ** 0.5 for a, b in pairwise(found.edges)] if log else _centres(found)
    widths = [b - a for a, b in pairwise(found.edges)]
    told = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(found.edges)]
    return go.Bar(x=centres, y=found.counts, width=widths, name=name, customdata=told,
                  hovertemplate="%{customdata}: %{y:,}<extra>" + name + "</extra>")  # fmt: skip


def _steps(found: Histogram, name: str) -> go.Scatter:
    return go.Scatter(x=_centres(found), y=found.counts, name=name, mode="lines",
                      line={"shape": "hvh", "dash": "dash", "width": 2})  # fmt: skip


def _centres(found: Histogram) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(found.edges)]


def figure(
    traces: list[Any], x_title: str, y_title: str, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None
) -> go.Figure:
    """Draw traces with titled axes, in no colours of their own."""
    titles = [f"{title} (log scale)" if (axis or {}).get("type") == "log" else title
              for title, axis in ((x_title, x), (y_title, y))]  # fmt: skip
    return go.Figure(traces).update_layout(
        template="none",
        xaxis={"title": {"text": titles[0]}, "automargin": True, **(x or {})},
        yaxis={"title": {"text": titles[1]}, "automargin": True, "rangemode": "tozero", **(y or {})},
        showlegend=len(traces) > 1,
    )


def look(i: int) -> dict[str, Any]:
    """Return the dash and marker of the i-th series, and its number, by which the page gives it a colour."""
    return {
        "meta": {"series": i},
        "line": {"dash": _DASHES[i % len(_DASHES)], "width": 2},
        "marker": {"symbol": _MARKERS[i % len(_MARKERS)], "size": 8},
    }
