"""The pictures of the README and docs/, of one run: its curves, a latent, the run beside another k, and the panel.

A part of the bench `pipeline`, whose run they are of. Alone, from a run with a report, and a page of `train compare`:

    python -m tests.bench.pictures RUN compare.html

Each but the panel is there for light and for dark. Nothing may be cut at an edge: pictures end where an element does.
"""

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.terminal_theme import MONOKAI

from shared.console.terminal import PlainConsole
from tests.bench.record import ROOT, SMOKE
from tests.browser import open_page
from train.live.watch import Watched

PICTURES = (SMOKE or ROOT / "docs") / "images"
WIDTH = 1180
_COLUMNS = 110
"""Of the panel's terminal."""
_WORDS = "re.compile"
"""What the text of the pictured latent's contexts holds: in the default run, latents of regular expressions."""
_PLOTS = ("fvu", "density", "nearest", "strata")
_CONTEXTS = 8


def take_pictures(run: Path, comparison: Path) -> None:
    """Take all pictures of `run`, which has a report, and of the page `comparison`."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for dark in (False, True):
        _report(run / "report.html", dark)
        _latent(run / "report" / "latents.html", dark)
        _comparison(comparison, dark)
    _panel(run)


def _place(name: str, dark: bool) -> Path:
    return PICTURES / f"{name}{'-dark' if dark else ''}.png"


@contextmanager
def _drawn(path: Path, dark: bool) -> Iterator[Any]:
    """Open a page of plots, and draw all of them."""
    with open_page(path, width=WIDTH, height=900, dark=dark) as page:
        page.wait_for_selector("html[data-drawn]")
        page.evaluate("drawAll()")
        yield page


def _report(path: Path, dark: bool) -> None:
    """Picture the headline figures and four plots, without what stands between them."""
    with _drawn(path, dark) as page:
        page.evaluate(
            """(names) => {
                const plots = document.createElement("div");
                plots.className = "plots";
                for (const name of names) {
                    const plot = document.getElementById("plot-" + name)?.closest("figure");
                    if (plot) plots.append(plot);
                }
                const figures = [...document.querySelectorAll("#verdict dl.figures")];
                const header = document.querySelector("header");
                header.querySelector("button").remove();
                document.querySelector("main").replaceChildren(...figures, plots);
                document.querySelector("nav").remove();
                for (const one of document.querySelectorAll("details, figcaption, footer")) one.remove();
                for (const plot of plots.querySelectorAll(".plot")) Plotly.Plots.resize(plot);
            }""",
            list(_PLOTS),
        )
        page.wait_for_timeout(500)  # plots are laid out again
        page.screenshot(path=_place("report", dark), full_page=True)


def _latent(path: Path, dark: bool) -> None:
    """Picture the latent with the most contexts of `_WORDS`, the first contexts of it alone."""
    with open_page(path, width=WIDTH, height=900, dark=dark, fragment=f"#list?q={_WORDS}&in=contexts") as page:
        page.locator("#count", has_text=" of ").wait_for()
        links = page.locator("#rows th a")
        page.goto(path.resolve().as_uri() + (links.first.get_attribute("href") if links.count() else "#latent-0"))
        page.locator(".context").first.wait_for()
        page.evaluate(
            """([most, kept]) => {
                const samples = [...document.querySelectorAll("#contexts > *")];
                const last = samples.filter((one) => one.matches(".sample")).slice(0, most).at(-1);
                for (const one of samples.slice(samples.indexOf(last) + 1)) one.remove();
                for (const one of document.querySelectorAll(".facts > *")) {
                    const title = one.querySelector("h3")?.textContent ?? one.textContent;
                    if (!kept.some((start) => title.startsWith(start))) one.remove();
                }
                for (const id of ["reading", "theme"]) document.getElementById(id).remove();
                document.querySelector("footer").remove();
            }""",
            [_CONTEXTS, ["Activations", "Logits", "Promoted"]],
        )
        page.screenshot(path=_place("latent", dark), full_page=True)


def _comparison(path: Path, dark: bool) -> None:
    """Picture the trade-off of a comparison, and its runs while they trained."""
    with _drawn(path, dark) as page:
        page.evaluate(
            """() => {
                const plots = document.createElement("div");
                plots.className = "plots";
                const figure = (name) => document.getElementById("plot-" + name).closest("figure");
                plots.append(figure("tradeoff"), figure("training"));
                document.querySelector("main").replaceChildren(plots);
                for (const one of document.querySelectorAll("header, figcaption, details, footer")) one.remove();
                for (const plot of plots.querySelectorAll(".plot")) Plotly.Plots.resize(plot);
            }"""
        )
        page.wait_for_timeout(500)
        page.locator("body").screenshot(path=_place("compare", dark))


def _panel(run: Path) -> None:
    """Picture what `train watch` shows of the run on a terminal."""
    watched = Watched(run)
    for _ in watched.look():
        pass
    console = PlainConsole(record=True, width=_COLUMNS, force_terminal=True, file=io.StringIO())
    console.print(watched.panel())
    page_text = console.export_html(theme=MONOKAI, inline_styles=True)
    page_text += "<style>pre { display: inline-block; padding: 12px; line-height: 1.25; background: #0c0c0c }</style>"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "panel.html"
        path.write_text(page_text)
        with open_page(path, width=WIDTH, height=600, dark=True) as page:
            page.locator("pre").screenshot(path=PICTURES / "panel.png")


def main(arguments: Sequence[str]) -> None:
    """Take the pictures of a run and a comparison that are there."""
    if len(arguments) != 2:
        sys.exit(__doc__)
    take_pictures(*map(Path, arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
