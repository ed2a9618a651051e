"""Draws a report: `report.html`, one file that needs no network, and `report.md` for a pull request."""

import json
import os
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any, NamedTuple

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shared.splice_record import Interval
from shared.store.strata import positions
from train.report.plots import figures
from train.report.report_record import STATES, Context, Report

_PLOTLY = "plotly-basic.min.js"
"""Plotly's bundle for lines and bars, from npm's plotly.js-basic-dist-min: a quarter of what the Python package brings,
which takes a browser four times as long to open."""
_ROWS = 24
"""Of the table beside a plot of curves, beside those of series with as few points."""
_LONG = 60
"""Characters of a token that are shown."""
_UNSEEN = re.compile(
    "[\\u0000-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff]"
)
"""Characters that are not seen, and those that turn the direction of text; the same as in latents.js."""
_BLANKS = re.compile(r"^ +| +$|(?<=\n) +")
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


class Table(NamedTuple):
    """What a plot shows, as text."""

    head: list[str]
    rows: list[list[str]]


class Token(NamedTuple):
    """One token of a context, ready to be shown."""

    text: str
    share: float
    """Of the context's largest activation."""
    told: str
    """Its activation in words."""
    peak: bool


def environment() -> Environment:
    """Return the environment of all pages' templates; whatever they are given is escaped."""
    found = Environment(
        loader=PackageLoader("train.report", "assets"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "percent": percent,
        "duration": duration,
        "chip": chip,
        "count": thousands,
        "positions": positions,
        "interval": interval,
        "tokens": tokens,
        "bytes": told_bytes,
        "basename": os.path.basename,
        "plain": plain,
        "code": lambda text: text.replace("`", "'"),
    }
    return found


def asset(name: str) -> Markup:
    """Read a style sheet or script of this package, to stand inside a page."""
    return Markup(files("train.report").joinpath("assets", name).read_text())


def embedded(value: Any) -> Markup:
    """Return JSON that can stand in a script element: nothing in it ends one."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def html(report: Report) -> bytes:
    """Draw the page."""
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            states=STATES,
            settings=flat(report.settings),
            map=embedded(report.map.model_dump() if report.map else None),
            map_script=asset("map.js"),
            style=asset("style.css"),
            **drawn(figures(report)),
        )
        .encode()
    )


def drawn(plots: Mapping[str, go.Figure]) -> dict[str, Any]:
    """Return what a template needs for plots by id: their numbers as tables, and the scripts that draw them."""
    tables = {name: table(one) for name, one in plots.items()}
    given = ",".join(f"{json.dumps(name)}:{_as_text(one).to_json()}" for name, one in plots.items())
    return {
        "tables": tables,
        "figures": embedded(f"{{{given}}}"),
        "script": asset("report.js"),
        "theme": asset("theme.js"),
        "plotly": Markup(str(asset(_PLOTLY)).replace("</script", "<\\/script")),
    }


def markdown(report: Report) -> bytes:
    """Return the same in short, as Markdown."""
    template = environment().get_template("report.md")
    text = template.render(report=report, states=STATES)
    return re.sub(r"\n{3,}", "\n\n", text).encode()


def table(figure: go.Figure) -> Table:
    """List the numbers of a plot by its x values: of a histogram each bin that holds any, of curves some dozen rows.

    A series of few points, such as evaluations, is there whole.
    """
    axis = figure.layout.xaxis.title.text or ""
    traces = list(figure.data)
    by_x: dict[Any, dict[int, Any]] = {}
    for i, trace in enumerate(traces):
        for x, y in zip(trace.x, trace.y, strict=True):
            by_x.setdefault(x, {})[i] = y
    rows = sorted(by_x.items(), key=_key)
    bins = {x: told for trace in traces if trace.customdata for x, told in zip(trace.x, trace.customdata, strict=True)}
    if bins:
        kept = [(bins[x], row) for x, row in rows if any(row.values())]
    else:
        few = {x for trace in traces if len(trace.x) <= _ROWS for x in trace.x}
        every = -(-len(rows) // _ROWS)
        kept = [one for i, one in enumerate(rows) if i % every == 0 or i == len(rows) - 1 or one[0] in few]
    return Table(
        [axis, *(trace.name for trace in traces)],
        [[_number(x), *(_number(row.get(i)) for i in range(len(traces)))] for x, row in kept],
    )


def tokens(context: Context) -> list[Token]:
    """Return the tokens of a context, shaded by their share of its largest activation."""
    largest = max((value for value in context.activations if value), default=0.0) or 1.0
    return [
        Token(short(text), (value or 0) / largest, "not stored" if value is None else f"{value:.3g}", i == context.peak)
        for i, (text, value) in enumerate(zip(context.text, context.activations, strict=True))
    ]


def short(text: str) -> str:
    """Return a token as people can see it.

    Unseen characters are shown as signs, so that none turns text; of a long token only the start is shown.
    """
    if len(text) > _LONG:
        text = f"{text[:_LONG]}… ({len(text):,} characters)"
    return _UNSEEN.sub(lambda found: _VISIBLE.get(found[0], f"[U+{ord(found[0]):04X}]"), text)


def chip(text: str) -> str:
    """Return a token that stands alone: `short`, and with signs for the blanks at its ends and after line breaks."""
    return short(_BLANKS.sub(lambda run: "␣" * len(run[0]) if len(run[0]) < 4 else f"␣×{len(run[0])}", text))


def plain(text: str) -> str:
    """Escape a name for Markdown, which nothing else does.

    No HTML, link or image, and in a table no cell, begins in it.
    """
    return re.sub(r"([\\<\[\]|])", r"\\\1", text)


def percent(share: float, digits: int = 1) -> str:
    """Format a share as people read it."""
    return f"{share:.{digits}%}"


def thousands(count: int) -> str:
    """Format a count as people read it."""
    return f"{count:,}"


def interval(found: Interval | None, share: bool = True) -> str:
    """Format an estimate with half its 95 % interval: a share, or nats."""
    if found is None:
        return "–"
    values = [found.value] if found.high is None else [found.value, found.high - found.value]
    return " ± ".join(percent(value) if share else f"{value:.4f}" for value in values)


def duration(seconds: float) -> str:
    """Format a time as people read it."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def told_bytes(size: float) -> str:
    """Format a size as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def flat(settings: dict[str, Any], start: str = "") -> dict[str, str]:
    """Return settings by dotted names, as `--set` takes them."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        found |= flat(value, f"{start}{name}.") if isinstance(value, dict) else {f"{start}{name}": json.dumps(value)}
    return found


def _as_text(figure: go.Figure) -> go.Figure:
    """Return a copy in which no name is markup.

    Plotly takes some elements of HTML in texts for markup, links among them.
    """
    found = go.Figure(figure)
    for trace in found.data:
        trace.name = escape(trace.name, quote=False)
        if trace.type == "scatter" and trace.text is not None:
            trace.text = [escape(text, quote=False) for text in trace.text]
    return found


def _key(item: tuple[Any, Any]) -> Any:
    return item[0] if not isinstance(item[0], str) else 0  # names stay in their order


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"
