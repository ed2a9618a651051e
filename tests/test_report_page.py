"""The pages of reports in a real browser: they draw what the files say, by keyboard as well, and ask for nothing."""

import json
import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.browser import open_page
from tests.reports import train
from tests.runs import SMALL, rows
from tests.stores import make_store
from train.samples.parquet import paths

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_browser")]
STEPS = 60
HOSTILE = [
    "<script>document.title='run'</script>",
    "<img src=x onerror=document.title='run'>",
    "\u202eשלום",
    "👩‍🔬",
    "x" * 10_000,
]


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its report and a comparison with another; its samples hold text of an enemy."""
    scratch = tmp_path_factory.mktemp("reported")
    store = make_store(scratch / "store", keep={0: 0.5}, training_blocks=6, tokenizer=True).path
    cadence = ["--set", "evaluation.every=20", "--set", "log_every=5", "--set", "monitor.every=20"]
    for name, lr in (("run", 0.004), ("other", 0.001)):
        train(
            "run",
            "--store",
            store,
            "--runs",
            scratch,
            "--name",
            name,
            "--set",
            f"optimizer.lr={lr}",
            "--steps",
            STEPS,
            *SMALL,
            *cadence,
        )
    run = scratch / "run"
    contexts, _ = paths(run, STEPS)
    samples = pq.read_table(contexts)
    place = samples.schema.get_field_index("text")
    texts = [[HOSTILE[i % len(HOSTILE)] for i, _ in enumerate(one)] for one in samples["text"].to_pylist()]
    samples = samples.set_column(place, samples.schema.field(place), pa.array(texts, pa.list_(pa.string())))
    pq.write_table(samples, contexts)
    train("report", run)
    train("compare", run, scratch / "other", "--html", scratch / "compare.html")
    return run


def drawn(page) -> None:
    """Wait for the plots in view, and have the others drawn."""
    page.wait_for_selector("html[data-drawn]")
    page.evaluate("drawAll()")


@pytest.fixture
def page(reported: Path) -> Iterator:
    with open_page(reported / "report.html") as found:
        drawn(found)
        yield found


def test_plots_hold_the_data(page, reported: Path) -> None:
    found = rows(reported)

    def series(plot: str, name: str) -> list[list[float]]:
        return page.evaluate(
            "([plot, name]) => { const one = document.getElementById('plot-' + plot).data.find((d) => d.name === name);"
            " return [Array.from(one.x), Array.from(one.y)]; }",
            [plot, name],
        )

    steps, values = series("fvu", "training rows, natural frequencies")
    assert steps == [row["step"] for row in found]
    assert values == pytest.approx([row["fvu_natural"] for row in found])
    steps, values = series("l0", "held out, calibrated thresholds")
    assert steps == [20, 40, 60]
    assert values == pytest.approx([row["held_out"]["l0"] for row in found if "held_out" in row])
    _, counts = series("density", "latents")
    density = pq.read_table(paths(reported, STEPS)[1])["density"].to_numpy()  # 0 of those of position 0 alone
    assert sum(counts) == (density > 0).sum()
    lines = page.locator("#plot-terms .scatterlayer .trace").count()
    assert lines == len(page.evaluate("document.getElementById('plot-terms').data"))


def test_the_verdict_comes_first_with_words_beside_its_colours(page, reported: Path) -> None:
    report = json.loads((reported / "report.json").read_text())
    assert page.locator("main section").first.get_attribute("id") == "verdict"
    lines = page.locator(".verdict li").evaluate_all("all => all.map((one) => one.textContent)")
    assert page.locator(".good-checks .verdict li").count() == sum(one["state"] == "good" for one in report["verdict"])
    assert page.locator(".settings dt").all_inner_texts()[:4] == ["k", "d_sae", "learning rate", "seed"]
    assert len(lines) == len(report["verdict"])
    for check in report["verdict"]:
        (line,) = [one for one in lines if check["said"] in one]
        assert {"good": "good:", "look": "worth a look:", "bad": "failed:"}[check["state"]] in line
    order = [["failed", "worth", "good"].index(line[2:].split(":")[0].split(" ")[0]) for line in lines]
    assert order == sorted(order)


def test_a_link_leads_to_the_latent_and_back(page) -> None:
    link = page.locator("#pairs details[open] h4 a").first
    latent = link.inner_text().removeprefix("Latent ")
    link.click()
    page.wait_for_url("**/report/latents.html#latent-" + latent)
    page.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    page.go_back()
    drawn(page)
    assert page.locator("h1").inner_text() == "run"


def test_plots_are_drawn_as_they_come_near_and_no_legend_lies_over_one(reported: Path) -> None:
    with open_page(reported / "report.html", width=390) as page:
        page.wait_for_selector("html[data-drawn]")
        last = page.locator(".plot").last
        assert page.locator(".plot.drawn").count() < page.locator(".plot").count()
        last.scroll_into_view_if_needed()
        page.locator(f"#{last.get_attribute('id')}.drawn").wait_for()
        assert page.locator("nav.contents").bounding_box()["y"] == 0
        drawn(page)
        plot, legend = page.locator("#plot-terms").bounding_box(), page.locator("#legend-terms").bounding_box()
        assert legend["y"] >= plot["y"] + plot["height"] - 1
        series = page.locator("#legend-terms button")
        assert series.count() == len(page.evaluate("FIGURES.terms.data"))
        series.first.click()
        assert page.evaluate("plotOf('terms').data[0].visible") == "legendonly"
        ends = "all => all.map((one) => one.getBoundingClientRect().right)"
        assert max(page.locator(".plot .xtitle").evaluate_all(ends)) <= 390


def test_a_point_of_the_map_leads_to_its_latent(page, reported: Path) -> None:
    found = json.loads((reported / "report.json").read_text())["map"]
    canvas = page.locator("#map-canvas")
    for colour in ("group", "family", "density"):
        page.select_option("#map-colour", colour)
        assert page.locator("#map-legend span").count() >= 2
    box, (x, y) = canvas.bounding_box(), (found["x"], found["y"])
    at = found["x"].index(max(x))
    place = {
        "x": box["width"] - 8,
        "y": box["height"] - 8 - (box["height"] - 16) * (y[at] - min(y)) / (max(y) - min(y)),
    }
    canvas.click(position=place)
    page.wait_for_url(f"**/report/latents.html#latent-{found['latents'][at]}")


def test_it_is_reached_by_keyboard(page) -> None:
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.wait_for_url("**/report.html#verdict")  # at once, unless the machine is busy
    summary = page.locator("figure summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("figure details[open] table").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_it_is_labelled_for_screen_readers(page) -> None:
    for plot in page.locator(".plot").all():
        assert plot.get_attribute("role") == "img" and plot.get_attribute("aria-label").startswith("Plot: ")
    headings = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((one) => Number(one.tagName[1]))")
    assert headings[0] == 1 and all(b <= a + 1 for a, b in pairwise(headings))
    assert page.locator("table thead th:not([scope])").count() == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    names = page.get_by_role("region").evaluate_all(
        "all => all.map((one) => one.ariaLabel || one.getAttribute('aria-labelledby'))"
    )
    assert all(names) and len(names) > 5


def test_text_of_the_corpus_runs_nothing_and_breaks_nothing(page) -> None:
    assert page.title() == "run: transcoder report"
    assert page.locator("#pairs img, #pairs script").count() == 0
    shown = page.locator("#pairs details[open] .token").all_inner_texts()
    assert "<script>document.title='run'</script>" in shown and "👩‍🔬" in shown
    assert any("… (10,000 characters)" in text for text in shown) and max(map(len, shown)) < 100
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("width", "name"),
    [
        (360, "report.html"),
        (1280, "../compare.html"),
        pytest.param(1280, "report.html", marks=pytest.mark.exhaustive),
        pytest.param(360, "../compare.html", marks=pytest.mark.exhaustive),
    ],
)
def test_a_phone_and_the_dark(reported: Path, name: str, width: int) -> None:
    with open_page(reported / name, width=width, dark=True) as page:
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == "rgb(20, 23, 27)"
        plot = page.locator(".plot .main-svg").first
        assert ground in plot.get_attribute("style")
        page.emulate_media(color_scheme="light")
        deadline = time.monotonic() + 20  # the page's policy forbids what Playwright would wait with
        while page.evaluate("document.querySelector('.plot .main-svg').style.background") != "rgb(255, 255, 255)":
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)


def test_a_comparison_holds_the_arms(reported: Path) -> None:
    with open_page(reported.parent / "compare.html") as page:
        drawn(page)
        data = page.evaluate(
            "document.getElementById('plot-tradeoff').data.map((d) => [d.name, d.x.length, d.y.length])"
        )
        assert [one[1:] for one in data] == [[5, 5], [5, 5]]
        colours = [
            page.evaluate("name => plotOf(name).data.map((one) => one.line.color)", name)
            for name in ("tradeoff", "training")
        ]
        assert colours[0] == colours[1] and len(set(colours[0])) == 2
        assert page.locator("table").first.locator("tbody tr").count() > 20


def test_the_file_alone_is_enough_for_the_report(reported: Path, tmp_path: Path) -> None:
    shutil.copy(reported / "report.html", tmp_path / "alone.html")
    with open_page(tmp_path / "alone.html") as page:
        drawn(page)
        assert page.locator(".plot .main-svg").count() >= 10
