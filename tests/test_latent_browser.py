"""The browser of latents shows what its files say, whatever the corpus holds; `test_latent_files.py` has the files."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.browsed import HOSTILE, Browsed, handed, store_with
from tests.browser import open_page
from tests.reported import DEAD
from train.report import browser
from train.report.browser import browser_files
from train.report.latent_labels import LatentLabel, merge_labels

pytestmark = pytest.mark.usefixtures("one_browser")


def rows_of(page) -> list[int]:
    return [int(text) for text in page.locator("#rows th a").all_inner_texts()]


def searched(page, query: str, told: str) -> list[int]:
    page.fill("#query", query)
    page.wait_for_function("told => document.querySelector('#count').textContent.startsWith(told)", arg=told)
    return rows_of(page)


@pytest.mark.slow
def test_the_list_sorts_searches_filters_and_turns_pages(browsed: Browsed) -> None:
    page_file, run, table = browsed.page, browsed.run, browsed.table
    F = len(table)
    with open_page(page_file) as page:
        page.wait_for_selector("#rows tr")
        assert "<b>a run</b>" in page.inner_text("h1") and rows_of(page) == list(range(50))
        assert page.inner_text("#count") == f"{F} of {F} latents"
        page.get_by_role("button", name="Next page").click()
        assert rows_of(page) == list(range(50, F)) and page.get_by_role("button", name="Next page").is_disabled()
        page.get_by_role("button", name="Previous page").click()
        for title, column in (
            ("Density", "density"),
            ("Max", "max"),
            ("position 0", "position_0_share"),
            ("Nearest", "nearest_cosines"),
        ):
            values: list[Any] = [
                v[0] if isinstance(v, list) and v else None if isinstance(v, list) else v
                for v in table[column].to_pylist()
            ]
            for direction in ("descending", "ascending"):
                page.get_by_role("button", name=title).click()
                assert page.get_attribute(f"th:has-text('{title}')", "aria-sort") == direction
                assert page.locator("th[aria-sort]").count() == 1
                page.get_by_role("button", name="Next page").click()
                if title != "Density":  # those without a value are last, both ways
                    assert rows_of(page)[-len(DEAD) :] == DEAD
                page.get_by_role("button", name="Previous page").click()
                found = [values[f] for f in rows_of(page)]
                assert found == pytest.approx(sorted(found, reverse=direction == "descending"), rel=1e-2)
        page.select_option("#show", "dead")
        assert rows_of(page) == DEAD and "never active" in page.inner_text("#rows")
        page.select_option("#show", "all")
        page.locator("#heads").get_by_role("button", name="Latent").click()
        assert searched(page, "17", "1 of") == [17]
        assert searched(page, "99", "0 of") == []
        assert len(searched(page, "WORD60", f"{F} of")) == 50  # all promote it
        peaks = {f for f, tokens in enumerate(table["peaks"].to_pylist()) if 20 in tokens}
        page.select_option("#scope", "peaks")
        assert set(searched(page, "word20", f"{len(peaks)} of")) == peaks
        digits = {f for f, tokens in enumerate(table["peaks"].to_pylist()) if 15 in tokens}
        assert set(searched(page, '"2024"', f"{len(digits)} of")) == digits
        for shown, token in (("↵", 11), ("␣the", 14), ('" the" ', 14)):  # as the page writes them
            there = {f for f, tokens in enumerate(table["peaks"].to_pylist()) if token in tokens}
            assert set(searched(page, shown, f"{len(there)} of")) == there and 0 < len(there) < 50, shown
        page.select_option("#scope", "suppressed")
        assert len(searched(page, "</script>", f"{F} of")) == 50
        page.select_option("#scope", "any")
        page.fill("#query", "")
        page.select_option("#group", str(table["prefix"][F - 1].as_py()))
        last = [f for f, prefix in enumerate(table["prefix"].to_pylist()) if prefix == table["prefix"][F - 1].as_py()]
        assert rows_of(page) == last[:50]
        page.select_option("#group", "")
        page.select_option("#show", "duplicates")
        firsts = zip(*(table[name].to_pylist() for name in ("nearest_cosines", "correlations")), strict=True)
        twins = [f for f, (near, r) in enumerate(firsts) if (near and near[0] > 0.7) or (r and r[0] > 0.8)]
        assert rows_of(page) == twins[:50]
        page.select_option("#show", "live")
        densities = np.stack([table[f"density_{name}"].to_numpy() for name in run.store.strata])
        page.select_option("#at", list(run.store.strata)[-1])
        densest = [f for f in range(F) if f not in DEAD and densities[:, f].argmax() == len(densities) - 1]
        assert rows_of(page) == densest[:50] and densest
        address = page.url
        page.get_by_role("button", name="Random latent").click()
        page.wait_for_selector("h2:has-text('Latent')")
        assert int(page.url.split("#latent-")[1]) in densest
        page.goto("about:blank")
        page.goto(address)  # what was asked for stands in the address
        page.wait_for_function("() => document.querySelector('#show').value === 'live'")
        assert rows_of(page) == densest[:50]
        page.select_option("#show", "all")
        page.select_option("#at", "")
        page.fill("#query", "23")
        page.press("#query", "Enter")
        page.wait_for_selector("h2:has-text('Latent 23')")


@pytest.mark.slow
def test_a_latent_shows_its_contexts_and_leads_to_its_neighbours(browsed: Browsed) -> None:
    page_file, run, table = browsed.page, browsed.run, browsed.table
    live = next(f for f, values in enumerate(table["correlated_latents"].to_pylist()) if values)
    contexts = [row for row in run.contexts.to_pylist() if row["latent"] == live]
    with open_page(page_file, fragment=f"#latent-{live}") as page:
        page.wait_for_selector(".sample")
        assert page.title() == f"Latent {live} · <b>a run</b>"
        assert page.locator(".sample").count() == len(contexts)
        first = page.locator(".sample").first
        tokens = first.locator(".token")
        assert tokens.count() == len(contexts[0]["tokens"]) and first.locator(".peak").count() == 1
        titles = [token.get_attribute("title") for token in tokens.all()]
        for title, token, value in zip(titles, contexts[0]["tokens"], contexts[0]["activations"], strict=True):
            assert title.endswith(f"token {token}")
            assert title.startswith("not in the store" if value is None else "activation ")
            assert value is None or float(title.split()[1]) == pytest.approx(value, rel=1e-2)
        assert any(value is None for value in contexts[0]["activations"])
        unknown = page.locator(".token.unknown").first.evaluate("e => getComputedStyle(e).textDecorationStyle")
        assert unknown == "dotted" and page.locator(".value").count() == 0
        page.get_by_role("button", name="Show values").click()
        assert page.locator(".value").count() == sum(bool(v) for row in contexts for v in row["activations"])
        labels = page.get_by_role("region", name="Labels of tokens").locator("tbody tr").all_inner_texts()
        assert [row.split("\t")[:2] for row in labels] == [
            ["<i>keyword def", "0.750 (0.750 to 0.750)"], ["name", "0.125 (0.125 to 0.125)"],
        ]  # fmt: skip
        assert page.locator(".bars tbody tr").count() == 4 and "16–31" in page.inner_text(".bars")
        near, together = table["nearest_latents"][live].as_py()[0], table["correlated_latents"][live].as_py()[0]
        page.get_by_role("region", name="Nearest by cosine").get_by_role("link", name=str(near), exact=True).click()
        page.wait_for_selector(f"h2:has-text('Latent {near}')")
        page.go_back()
        page.wait_for_selector(f"h2:has-text('Latent {live}')")
        page.get_by_role("region", name="Most correlated").get_by_role("link", name=str(together), exact=True).click()
        page.wait_for_selector(f"h2:has-text('Latent {together}')")
        page.get_by_role("link", name="All latents").click()
        page.wait_for_selector("#rows tr")
        page.goto(page_file.as_uri() + f"#latent-{DEAD[0]}")
        page.wait_for_selector("text=It is not active on any of the rows")
        page.goto(page_file.as_uri() + "#latent-64")
        page.wait_for_selector("text=There is no latent 64")


@pytest.mark.slow
def test_words_are_found_in_contexts_and_more_of_their_text_is_shown(browsed: Browsed) -> None:
    page_file, run, files = browsed.page, browsed.run, browsed.files
    words = [handed(files[f"latents/{name}.js"])[2] for name in ("tokens", "text")]
    text = dict(zip(words[0]["ids"] + words[1]["ids"], words[0]["texts"] + words[1]["texts"], strict=True))
    rows, expected = run.contexts.to_pylist(), Counter[int]()
    plain = [text[token] for token in rows[0]["tokens"] if token > 15]
    pair = next(pair for pair in pairwise(rows[0]["tokens"]) if min(pair) > 15)
    asked = [plain[-1], text[pair[0]] + text[pair[1]]]
    for row in rows:
        whole = "".join(text[token] for token in row["tokens"])
        expected[row["latent"]] += all(word in whole for word in asked)
    expected = +expected
    assert 0 < len(expected) < 50
    with open_page(page_file, fragment=f"#list?q={asked[0].upper()}+%22{asked[1]}%22&in=contexts") as page:
        page.wait_for_function("() => document.querySelector('#count').textContent.includes('of their contexts')")
        told = {
            int(row.locator("th").inner_text()): int(re.findall(r"in (\d+) of its \d+ contexts", row.inner_text())[0])
            for row in page.locator("#rows tr").all()
        }
        assert told == dict(expected)
        marked = page.locator("#rows tr").first.locator("mark").all_inner_texts()
        assert all(word in "".join(marked) for word in asked) and set(marked) == {
            asked[0],
            *(text[token] for token in pair),
        }
        page.locator("#rows th a").first.click()
        page.wait_for_selector(".sample.found")
        latent = int(page.url.split("-")[-1])
        assert page.locator(".sample.found").count() == expected[latent]


@pytest.mark.slow
def test_more_of_a_contexts_text_is_shown(browsed: Browsed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, table, tokenizer = browsed.run, browsed.table, browsed.tokenizer
    monkeypatch.setattr(browser, "TOKENS", 8)
    files = browser_files("a run", store_with(run, tokenizer), table, run.contexts)
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    text, row = handed(files["latents/text.js"])[2], run.contexts.slice(0, 1).to_pylist()[0]
    first, length, breaks = text["first"][0], text["length"][0], text["breaks"][text["sequence"][0]]
    edges = [0, *breaks, text["width"]]
    low, high = max(e for e in edges if e <= first), min(e for e in edges if e >= first + length)
    tokens = np.empty((1, text["width"]), np.int32)
    run.store.tokens.read(row["sequence"], row["sequence"] + 1, tokens)
    with open_page(tmp_path / "latents.html", fragment=f"#latent-{row['latent']}") as page:
        sample = page.locator(".sample").first
        sample.wait_for()
        assert sample.locator(".token").count() == 8
        page.evaluate("() => { corpus = Promise.reject(new Error('it is torn')); corpus.catch(() => {}); }")
        sample.get_by_role("button", name="more text").click()
        sample.get_by_role("status").filter(has_text="more text cannot be shown: it is torn").wait_for()
        page.evaluate("() => { corpus = null; }")
        button = sample.get_by_role("button", name="more text")
        button.evaluate("one => { one.click(); one.click(); }")  # the second comes while the text is loaded
        sample.get_by_role("button", name="less text").wait_for()
        shown = sample.locator(".token").evaluate_all("all => all.map((one) => Number(one.dataset.token))")
        assert shown == tokens[0, low:high].tolist() and len(shown) > 8
        assert sample.locator(".beyond").count() == len(shown) - 8
        before, after = first - low, high - first - length
        assert f"in grey: {before} tokens before and {after} after" in sample.get_by_role("status").inner_text()
        lines = sample.locator(".context").evaluate("one => one.textContent")
        assert lines.count("↵") == lines.count("↵\n") > 0
        sample.get_by_role("button", name="less text").click()
        assert sample.locator(".token").count() == 8 and not sample.get_by_role("status").inner_text()
        assert "\n" not in sample.locator(".context").evaluate("one => one.textContent")


@pytest.mark.slow
def test_bars_are_those_of_the_table_and_two_latents_stand_side_by_side(browsed: Browsed) -> None:
    page_file, table = browsed.page, browsed.table
    live = next(f for f, near in enumerate(table["nearest_latents"].to_pylist()) if near)
    near = table["nearest_latents"][live].as_py()[0]
    with open_page(page_file, fragment=f"#latent-{live}", dark=True) as page:
        bars = page.get_by_role("region", name="Activations").locator(".column")
        bars.first.wait_for()
        titles = bars.evaluate_all("all => all.map((one) => one.title)")
        counts = [int(title.split(": ")[1].split(" ")[0].replace(",", "")) for title in titles]
        assert counts == table["histogram"][live].as_py()
        assert "59 tokens" in page.get_by_role("region", name="Logits").locator(".column").last.get_attribute("title")
        assert page.locator(".column.mine").count() == 1
        page.get_by_role("link", name=f"Latents {live} and {near} side by side").first.click()
        page.wait_for_selector(f"h2:has-text('Latents {live} and {near}')")
        assert page.locator(".two > section").count() == 2
        samples = page.locator(".two > section").first.locator(".sample").count()
        assert samples == table["contexts"][live].as_py()
        page.keyboard.press("Escape")
        page.wait_for_selector("#all:not([hidden])")
        ground = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(ground) == "rgb(20, 23, 27)"
        page.locator("#theme").click()
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        page.reload()
        page.wait_for_selector("#rows tr")
        assert page.evaluate(ground) == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_labels_are_kept_exported_and_imported(browsed: Browsed, tmp_path: Path) -> None:
    page_file, run = browsed.page, browsed.run

    def label(latent: int, words: str) -> None:
        page.goto(page_file.as_uri() + f"#latent-{latent}")
        page.wait_for_selector(f"h2:has-text('Latent {latent}')")
        page.get_by_label("Label", exact=True).fill(words)
        page.get_by_role("textbox", name="Notes").fill('a "note", of two\nlines')
        page.get_by_role("button", name=f"Star latent {latent}").click()

    with open_page(page_file) as page:
        page.wait_for_selector("#rows tr")
        label(7, "<b>seven</b>")
        page.wait_for_selector("h2:has-text('Latent 7: <b>seven</b>')")
        page.reload()
        page.wait_for_selector("h2:has-text('Latent 7: <b>seven</b>')")
        page.get_by_role("link", name="All latents").click()
        page.select_option("#show", "starred")
        assert rows_of(page) == [7] and "<b>seven</b>" in page.inner_text("#rows")
        page.locator(".labels-menu summary").click()
        for kind in ("json", "csv"):
            with page.expect_download() as download:
                page.get_by_role("button", name=f"Export as {kind.upper()}").click()
            download.value.save_as(tmp_path / f"labels.{kind}")
    expected = [LatentLabel(latent=7, label="<b>seven</b>", note='a "note", of two\nlines', star=True)]
    for kind in ("json", "csv"):
        (tmp_path / kind).mkdir()
        assert merge_labels(tmp_path / kind, 30, run.model.d_sae, tmp_path / f"labels.{kind}").latents == expected
        with open_page(page_file) as page:
            page.wait_for_selector("#rows tr")
            page.locator(".labels-menu summary").click()
            page.locator("#labels-file").set_input_files(tmp_path / f"labels.{kind}")
            page.wait_for_function(
                "() => document.querySelector('#labels-state').textContent.includes('1 latents imported')"
            )
            page.fill("#query", "two")
            page.select_option("#scope", "labels")
            page.wait_for_function("() => document.querySelector('#count').textContent.startsWith('1 of')")
            assert rows_of(page) == [7]


@pytest.mark.slow
def test_all_of_it_can_be_reached_by_keyboard(browsed: Browsed) -> None:
    page_file = browsed.page
    with open_page(page_file) as page:
        page.wait_for_selector("#rows tr")
        for _ in range(30):
            page.keyboard.press("Tab")
            focused = page.evaluate("document.activeElement.getAttribute('href')")
            if focused == "#latent-0":
                break
        assert focused == "#latent-0"
        page.keyboard.press("Enter")
        page.wait_for_selector("h2:has-text('Latent 0')")
        assert page.evaluate("document.activeElement.id") == "title"
        for key, latent in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0)):
            page.keyboard.press(key)
            page.wait_for_selector(f"h2:has-text('Latent {latent}')")
        page.keyboard.press("v")
        assert page.locator(".value").count() and page.get_attribute("#values", "aria-pressed") == "true"
        page.keyboard.press("Escape")
        page.wait_for_selector("#all:not([hidden])")
        assert page.evaluate("document.activeElement.getAttribute('href')") == "#latent-0"
        page.keyboard.press("/")
        page.wait_for_function("() => document.activeElement.id === 'query'")
        page.keyboard.type("j7")  # a letter in the field moves nowhere
        assert page.input_value("#query") == "j7" and "#list" in page.url
        page.goto(page_file.as_uri() + "#latent-3")
        page.wait_for_selector("h2:has-text('Latent 3')")
        page.locator("#reading summary").click()
        page.locator("#shortcuts").uncheck()  # WCAG 2.2, 2.1.4: single keys can be switched off
        page.locator("h2").focus()
        page.keyboard.press("j")
        assert page.evaluate("location.hash") == "#latent-3"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, True)])
def test_a_hostile_corpus_is_text_and_fits_the_screen(browsed: Browsed, width: int, dark: bool) -> None:
    page_file, run = browsed.page, browsed.run

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    where = {token: row["latent"] for row in run.contexts.to_pylist() for token in row["tokens"] if token in HOSTILE}
    assert where.keys() == HOSTILE.keys()
    with open_page(page_file, width=width, dark=dark) as page:
        page.wait_for_selector("#rows tr")
        assert fits()
        for latent in sorted(set(where.values())):
            page.goto(page_file.as_uri() + f"#latent-{latent}")
            page.wait_for_selector(f"h2:has-text('Latent {latent}')")
            assert fits()
            texts = set(page.locator(".context .token").all_inner_texts())
            mine = {HOSTILE[token] for token, at in where.items() if at == latent}
            assert {t for t in mine if t in (HOSTILE[5], HOSTILE[6], HOSTILE[7], HOSTILE[9], HOSTILE[12])} <= texts
            told = {
                HOSTILE[8]: "[U+202E]مرحبا",
                HOSTILE[10]: "long" * 15 + "… (10,000 characters)",
                HOSTILE[11]: "↵",
                HOSTILE[13]: "[U+0000]\ufffd",
            }
            assert {shown for text, shown in told.items() if text in mine} <= texts
        isolated = "[...document.querySelectorAll('.context, .chip')].map((one) => getComputedStyle(one).unicodeBidi)"
        assert set(page.evaluate(isolated)) == {"isolate"}
        assert page.locator("main script, main img, main svg").count() == 0


@pytest.mark.slow
def test_a_browser_or_a_folder_that_lacks_something_is_told_so(browsed: Browsed, tmp_path: Path) -> None:
    files = browsed.files
    for name in ("latents/page.js", "latents/page.css", "latents/index.js", "latents/tokens.js", "latents.html"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    script = tmp_path / "latents" / "page.js"
    with (
        pytest.raises(AssertionError, match=r"001\.js"),
        open_page(tmp_path / "latents.html", fragment="#latent-17") as page,
    ):
        page.wait_for_selector("text=Latent 17: cannot read latents/001.js")
    script.write_bytes(b"delete globalThis.DecompressionStream;\n" + files["latents/page.js"])
    with pytest.raises(AssertionError), open_page(tmp_path / "latents.html") as page:
        page.wait_for_selector("text=Use Chrome or Edge 97, Firefox 113 or Safari 16.4")
    script.write_bytes(files["latents/page.js"])
    (tmp_path / "latents" / "index.js").unlink()
    with pytest.raises(AssertionError, match=r"index\.js"), open_page(tmp_path / "latents.html") as page:
        page.wait_for_selector("text=latents/index.js is missing")
