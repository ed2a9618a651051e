"""`train compare --html`: runs side by side on one page, as `report.html` draws a single one."""

from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go

from train.compare.arms import Arm, Comparison, spread
from train.compare.comparison_table import rows
from train.live.run_files import METRICS
from train.report import gather
from train.report.page import asset, drawn, environment
from train.report.plots import figure, log_axis, look, thinned
from train.report.report_record import Curves
from train.run.metrics import Log

_AGAINST = {
    "share_above_0_7": "share of live latents with a neighbour above cosine 0.7",
    "pairs_correlated_above_0_8": "pairs correlated above 0.8",
    "live": "live latents",
    "cpu_ms_per_step": "CPU milliseconds per step",
}
"""What fvu is weighed against."""


def html(comparison: Comparison) -> bytes:
    """Draw the page. Reads `metrics.jsonl` of every run."""
    paths = [path for arm in comparison.arms for path in arm.runs]
    curves = {path: gather.training_curves(Log(Path(path) / METRICS).rows(), 2**53) for path in paths}
    every = {"tradeoff": _tradeoff(comparison), "training": _training(comparison.arms, curves)}
    every |= {name: _against(comparison.arms, name, label) for name, label in _AGAINST.items()}
    return (
        environment()
        .get_template("compare.html")
        .render(
            comparison=comparison,
            rows=rows(comparison),
            against=_AGAINST,
            style=asset("style.css"),
            **drawn({name: one for name, one in every.items() if one}),
        )
        .encode()
    )


def _tradeoff(comparison: Comparison) -> go.Figure:
    """Draw one line per arm, through the means over its seeds, with their deviations.

    Where each arm has an l0 of its own, another line joins these points: what other k buy.
    """
    arms, traces = comparison.arms, []
    for i, arm in enumerate(arms):
        points = list(zip(*arm.tradeoff.values(), strict=False))  # of the seeds, as far as all of them reach
        means = [spread([one.fvu for one in seeds]) for seeds in points]
        traces.append(
            go.Scatter(
                x=[spread([one.l0 for one in seeds]).mean for seeds in points],
                y=[one.mean for one in means],
                error_y={"array": [one.deviation or 0 for one in means], "visible": len(arm.runs) > 1},
                name=arm.name,
                mode="lines+markers",
                **look(i),
            )
        )
    if comparison.l0 is None and len(arms) > 1:
        own = sorted((arm.spread["l0"].mean, arm.spread["fvu"].mean, arm.name) for arm in arms)
        traces.append(
            go.Scatter(
                x=[l0 for l0, _, _ in own],
                y=[fvu for _, fvu, _ in own],
                text=[name for _, _, name in own],
                name="each at its own l0",
                mode="lines+markers+text",
                textposition="top right",
                **look(len(arms)),
            )
        )
    return figure(traces, "active latents per row (l0), held out", "fvu, held out", y={"rangemode": "normal"})


def _training(arms: Sequence[Arm], curves: dict[str, Curves]) -> go.Figure | None:
    """Draw one line per run; those of an arm look the same, and the first of them is in the legend."""
    traces = []
    for i, arm in enumerate(arms):
        for number, path in enumerate(arm.runs):
            values = zip(curves[path].steps, curves[path].series.get("fvu_natural", []), strict=False)
            if points := thinned([(step, value) for step, value in values if value]):
                traces.append(
                    go.Scatter(
                        x=[step for step, _ in points],
                        y=[value for _, value in points],
                        name=arm.name if number == 0 else f"{arm.name}, {Path(path).name}",
                        legendgroup=arm.name,
                        showlegend=number == 0,
                        mode="lines",
                        **look(i),
                    )
                )
    return figure(traces, "step", "fvu, training rows", y=log_axis(traces)) if traces else None


def _against(arms: Sequence[Arm], name: str, label: str) -> go.Figure | None:
    """Draw a point per run."""
    traces = []
    for i, arm in enumerate(arms):
        there = {path: one for path, one in arm.runs.items() if getattr(one, name) is not None}
        if there:
            traces.append(
                go.Scatter(
                    x=[getattr(one, name) for one in there.values()],
                    y=[one.fvu for one in there.values()],
                    name=arm.name,
                    mode="markers",
                    text=[Path(path).name for path in there],
                    **look(i),
                )
            )
    return figure(traces, label, "fvu, held out", y={"rangemode": "normal"}) if traces else None
