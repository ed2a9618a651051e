"""Pages of reports: what they weigh, and how long a browser takes to open them.

    python -m tests.bench.pages RUN [RUN ...]      finished runs with samples: makes and measures their reports

Each page is opened from disk in a new browser, without a network; times are medians of five.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.record import record, run, sized
from tests.browser import open_page
from train.run.settings import read_config

_TIMES = sized(5, 1)


def main() -> None:
    """Measure the runs that are named."""
    for path in map(Path, sys.argv[1:]):
        made = run(sys.executable, "-m", "train", "report", path)
        d_sae = read_config(path).settings.transcoder.d_sae
        record(f"pages: {int(d_sae):,} latents", "python -m tests.bench.pages RUN", figures(path, made.seconds))


def figures(path: Path, seconds: float) -> dict[str, tuple[float, str]]:
    """Sizes and times of a run's pages."""
    report, folder = path / "report.html", path / "report"
    latents = [file for file in folder.rglob("*") if file.is_file()]
    pages = [file for file in latents if file.suffix != ".parquet"]
    return {
        "making the report, samples being there": (seconds, "s"),
        "report.html": (report.stat().st_size / 1e6, "MB"),
        "browser of latents, without latents.parquet": (sum(file.stat().st_size for file in pages) / 1e6, "MB"),
        "folder report/": (sum(file.stat().st_size for file in latents) / 1e6, "MB"),
        "opening the report: the verdict is painted": (median(lambda: painted(report)), "s"),
        "opening the report: the plots in view are drawn": (median(lambda: timed(report, in_view)), "s"),
        "opening the report: all plots are drawn": (median(lambda: timed(report, drawn)), "s"),
        "opening the list of latents": (median(lambda: timed(folder / "latents.html", listed)), "s"),
        "opening a latent's page by its link": (
            median(lambda: timed(folder / "latents.html", shown, "#latent-7")),
            "s",
        ),
        "from the list to a latent": (median(lambda: from_list(folder / "latents.html")), "s"),
        "opening the list by a link that asks for a word in contexts": (
            median(lambda: timed(folder / "latents.html", counted, "#list?q=1&in=contexts")),
            "s",
        ),
    }


def median(measure: Callable[[], float]) -> float:
    """Of some repeats."""
    return statistics.median(measure() for _ in range(_TIMES))


def timed(path: Path, ready: Callable[[Any], object], fragment: str = "") -> float:
    """From the address to the page being ready; the browser's own start is not in it."""
    with opened(path.parent / "nothing.html") as page:
        began = time.monotonic()
        page.goto(path.resolve().as_uri() + fragment)
        ready(page)
        return time.monotonic() - began


def painted(path: Path) -> float:
    """From the address to the first paint, which has the verdict: it stands before all scripts."""
    with opened(path) as page:
        drawn(page)
        return float(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")) / 1000


def from_list(path: Path) -> float:
    """From the press on a latent of the list to its contexts."""
    with opened(path) as page:
        listed(page)
        began = time.monotonic()
        page.locator("tbody a").first.click()
        shown(page)
        return time.monotonic() - began


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A page of an existing file, or an empty one."""
    blank = not path.exists()
    if blank:
        path.write_text("<!doctype html><link rel=icon href='data:,'>")
    try:
        with open_page(path) as page:
            yield page
    finally:
        if blank:
            path.unlink()


def in_view(page: Any) -> None:
    """Wait until the plots that are in view at first are drawn."""
    page.wait_for_selector("html[data-drawn]")


def drawn(page: Any) -> None:
    """Have all plots of a report drawn, as before printing, and wait for them."""
    in_view(page)
    page.evaluate("drawAll()")


def counted(page: Any) -> None:
    """Wait until a search in contexts has found some."""
    page.locator("#count", has_text="of their contexts").wait_for()


def listed(page: Any) -> None:
    """Wait until the list of latents has its rows."""
    page.locator("tbody a").first.wait_for()


def shown(page: Any) -> None:
    """Wait until a latent has its contexts."""
    page.locator(".context").first.wait_for()


if __name__ == "__main__":
    main()
