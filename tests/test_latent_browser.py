"""The browser of latents: its files say what the samples say, and its page shows that, whatever the corpus holds."""

import base64
import gzip
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models

from shared.store.store import Store
from tests.browser import open_page
from tests.reported import DEAD, Reported, reported
from train.report import browser, context_text
from train.report.browser import browser_files, cut
from train.report.latent_labels import LatentLabel, merge_labels
from train.samples.parquet import RECORD, SamplesRecord
from train.samples.token_text import pieces

CHUNK = 16
HOSTILE = {
    5: "</script><script>alert(1)</script>",
    6: "<img src=x onerror=alert(2)>",
    7: "</textarea><!--<svg onload=alert(3)>",
    8: "\u202eمرحبا",
    9: "👩‍👩‍👧",
    10: "long" * 2500,
    11: "\n",
    12: "&amp;\"'`${alert(4)}",
    13: "\u0000\ufffd",
    14: " the",
    15: "2024",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    return reported(tmp_path_factory.mktemp("browser"), keep={0: 0.25, 16: 0.5}, bos_norm=2.0)


@pytest.fixture(scope="module")
def table(run: Reported) -> pa.Table:
    """With tokens that are promoted and suppressed, and labels, of which the store and the run know nothing."""
    table, F = run.table(), run.model.d_sae
    known: dict[str, list] = {"promoted": [60, 14], "suppressed": [5, 10], "labels": ["<i>keyword def", "name"]}
    known |= {f"{name}_effects": [0.5, 0.25] for name in ("promoted", "suppressed")}
    known |= {"logit_histogram": [1, 59]}
    known |= {name: [0.75, 0.125] for name in table.column_names if name.startswith("label_")}
    for column, values in known.items():
        at = table.schema.get_field_index(column)
        field = table.schema.field(column)
        table = table.set_column(at, field, pa.array([values] * F, field.type))
    return table


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    words = {HOSTILE.get(i, f"word{i}"): i for i in range(61)}
    made = Tokenizer(models.WordLevel(words, unk_token="word0"))
    made.decoder = decoders.Fuse()  # no spaces between tokens
    made.save(str(folder / "tokenizer.json"))
    return folder


def store_with(run: Reported, tokenizer: Path) -> Store:
    """As much of a store as the browser's files are made from."""
    store = run.store
    return cast(
        Store,
        SimpleNamespace(tokenizer=tokenizer, request=store.request, tokens=store.tokens, documents=store.documents),
    )


@pytest.fixture(scope="module")
def files(run: Reported, table: pa.Table, tokenizer: Path) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(browser, "CHUNK", CHUNK)
        return browser_files("<b>a run</b>", store_with(run, tokenizer), table, run.contexts)


@pytest.fixture(scope="module")
def page_file(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a run's #1 report")
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / "latents.html"


def handed(script: bytes) -> tuple[str, int | None, dict]:
    """What a script calls, and with what."""
    found = re.fullmatch(rb'transcoderCache\.(\w+)\((?:(\d+),)?"([A-Za-z0-9+/=]*)"\)\n', script)
    assert found
    data = json.loads(gzip.decompress(base64.b64decode(found[3])))
    return found[1].decode(), None if found[2] is None else int(found[2]), data


def test_chunks_hold_the_contexts_of_the_samples(run: Reported, files: dict[str, bytes]) -> None:
    ids, rows, latent, nulls = handed(files["latents/tokens.js"])[2]["ids"], run.contexts.to_pylist(), 0, 0
    expected = iter(rows)
    for number in range(run.model.d_sae // CHUNK):
        function, told, data = handed(files[f"latents/{number:03d}.js"])
        assert (function, told, len(data["contexts"])) == ("chunk", number, CHUNK)
        tokens, values, at = iter(data["tokens"]), iter(data["values"]), 0
        for count in data["contexts"]:
            for _ in range(count):
                row = next(expected)
                assert row["latent"] == latent
                for name in ("bin", "position", "sequence", "document", "peak"):
                    assert data[name][at] == row[name]
                assert data["activation"][at] == pytest.approx(row["activation"], rel=6e-3)
                assert [ids[next(tokens)] for _ in range(data["length"][at])] == row["tokens"]
                shown = [next(values) for _ in row["tokens"]]
                assert [value is None for value in shown] == [value is None for value in row["activations"]]
                assert [v or 0 for v in shown] == pytest.approx([v or 0 for v in row["activations"]], rel=6e-3)
                nulls, at = nulls + shown.count(None), at + 1
            latent += 1
        assert (next(tokens, None), next(values, None)) == (None, None)
    assert next(expected, None) is None and latent == run.model.d_sae and nulls > 100


def test_the_index_and_the_chunks_hold_the_table(table: pa.Table, files: dict[str, bytes]) -> None:
    _, _, index = handed(files["latents/index.js"])
    _, _, words = handed(files["latents/tokens.js"])
    assert pq.read_table(pa.BufferReader(files["latents.parquet"])).equals(table)
    for name in ("density", "max", "mean", "position_0_share", "refines_share"):
        assert [value is None for value in index[name]] == [not value.is_valid for value in table[name]]
        assert [v or 0 for v in index[name]] == pytest.approx([v or 0 for v in table[name].to_pylist()], rel=6e-3)
    assert index["prefix"] == table["prefix"].to_pylist()
    for name in ("peaks", "promoted", "suppressed"):
        found = [[words["ids"][word] for word in one] for one in index[name]]
        assert found == table[name].to_pylist()
    assert [near is None for near in index["nearest"]] == [f in DEAD for f in range(len(table))]
    chunks = [handed(files[f"latents/{n:03d}.js"])[2] for n in range(len(table) // CHUNK)]
    assert index["refines"] == table["refines"].to_pylist()
    for name in ("nearest_latents", "correlated_latents", "labels", "histogram", "logit_histogram"):
        assert [one for chunk in chunks for one in chunk[name]] == table[name].to_pylist()
    for name in ("correlations", "promoted_effects", "label_f1", "label_auroc", "bin_edges", "density_016-032"):
        found = [one for chunk in chunks for one in chunk[name]]
        for one, other in zip(found, table[name].to_pylist(), strict=True):
            assert one == (other if other is None else pytest.approx(other, rel=6e-3))


def test_the_text_holds_every_context_where_it_lies(run: Reported, files: dict[str, bytes]) -> None:
    _, _, words = handed(files["latents/tokens.js"])
    _, _, text = handed(files["latents/text.js"])
    ids = words["ids"] + text["ids"]
    assert len(ids) == len(set(ids)) == len(words["texts"] + text["texts"])
    rows, width = run.contexts.to_pylist(), text["width"]
    sequences = sorted({row["sequence"] for row in rows})
    tokens = np.array(ids)[text["tokens"]].reshape(-1, width)
    documents = np.empty((1, width), np.int32)
    for row, where, first, length, peak in zip(
        rows, *(text[name] for name in ("sequence", "first", "length", "peak")), strict=True
    ):
        assert sequences[where] == row["sequence"] and peak == row["peak"]
        assert tokens[where, first : first + length].tolist() == row["tokens"]
    for where, sequence in enumerate(sequences[:5]):
        run.store.documents.read(sequence, sequence + 1, documents)
        assert text["breaks"][where] == [i for i in range(1, width) if documents[0, i] != documents[0, i - 1]]


def test_text_that_would_be_too_much_is_left_out_rarest_first(run: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    width = run.store.request.context_size
    monkeypatch.setattr(context_text, "MOST_TOKENS", 2 * width)
    shown = cut(run.contexts, run.model.d_sae)
    found = context_text.context_text(
        run.store, SamplesRecord.model_validate_json(run.contexts.schema.metadata[RECORD]), shown.table, shown.peaks
    )
    held = Counter(shown.table["sequence"].to_pylist())
    assert found.tokens.shape == (2, width) and len(found.breaks) == 2
    assert sorted(Counter(found.sequence[found.sequence >= 0].tolist()).values()) == sorted(
        count for _, count in held.most_common(2)
    )


def test_every_text_is_there_once_and_no_script_can_end_early(files: dict[str, bytes], tokenizer: Path) -> None:
    _, _, words = handed(files["latents/tokens.js"])
    assert len(set(words["ids"])) == len(words["ids"]) == len(words["texts"])
    assert words["texts"] == pieces(tokenizer / "tokenizer.json", words["ids"])
    assert {HOSTILE[5], HOSTILE[10]} <= set(words["texts"])
    page = files["latents.html"].decode()
    assert "<b>a run</b>" not in page and "&lt;b&gt;a run&lt;/b&gt;" in page
    assert "innerHTML" not in files["latents/page.js"].decode()
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", page) == [
        "data:,", "latents/page.css", "latents/page.js", "latents/index.js", "latents/tokens.js", "../report.html"
    ]  # fmt: skip


def test_the_same_input_gives_the_same_bytes(run: Reported, table: pa.Table, tokenizer: Path) -> None:
    store = store_with(run, tokenizer)
    one, other = (browser_files("a run", store, table, run.contexts) for _ in range(2))
    assert one == other
    assert not any(str(run.path).encode() in data for data in one.values())


def test_latents_take_so_few_bytes_that_18_432_of_them_fit_into_60_mb(files: dict[str, bytes]) -> None:
    scripts = sum(len(data) for name, data in files.items() if name.endswith(".js"))
    chunks = sum(re.fullmatch(r"latents/\d+\.js", name) is not None for name in files)
    assert chunks and scripts / chunks / CHUNK < 60e6 / 18_432


def test_without_a_tokenizer_there_are_numbers(run: Reported, table: pa.Table, tmp_path: Path) -> None:
    files = browser_files("a run", store_with(run, tmp_path), table, run.contexts)
    assert handed(files["latents/tokens.js"])[2]["texts"] is None


def test_more_and_longer_contexts_are_cut_around_their_peaks() -> None:
    sizes, peaks = [70, 70, 70, 40, 3, 32], [0, 69, 30, 24, 2, 31]
    n = 30 * len(sizes)
    table = pa.table(
        {
            "latent": pa.array(np.repeat(np.arange(len(sizes)) * 2, 30), pa.int32()),
            "peak": pa.array(np.repeat(peaks, 30), pa.int32()),
            "tokens": pa.array([list(range(size)) for size in sizes for _ in range(30)], pa.list_(pa.int32())),
            "activations": pa.array([[1.5, *[None] * (size - 1)] for size in sizes for _ in range(30)]),
        }
    )
    found = cut(table, 12)
    assert len(table) == n and np.diff(found.starts).tolist() == [25, 0] * 6
    for i, (size, peak) in enumerate(zip(sizes, peaks, strict=True)):
        at = 25 * i
        tokens = found.tokens[found.ends[at] : found.ends[at + 1]].tolist()
        assert len(tokens) == min(size, 32) and tokens[found.peaks[at]] == peak
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
        after = min(8, size - 1 - peak)
        assert size <= 32 or len(tokens) - 1 - found.peaks[at] >= after
        values = found.values[found.ends[at] : found.ends[at + 1]]
        assert values == [1.5 if token == 0 else None for token in tokens]


# In a browser.


def rows_of(page) -> list[int]:
    return [int(text) for text in page.locator("#rows th a").all_inner_texts()]


def searched(page, query: str, told: str) -> list[int]:
    page.fill("#query", query)
    page.wait_for_function("told => document.querySelector('#count').textContent.startsWith(told)", arg=told)
    return rows_of(page)


@pytest.mark.slow
def test_the_list_sorts_searches_filters_and_turns_pages(page_file: Path, run: Reported, table: pa.Table) -> None:
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
def test_a_latent_shows_its_contexts_and_leads_to_its_neighbours(
    page_file: Path, run: Reported, table: pa.Table
) -> None:
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
def test_words_are_found_in_contexts_and_more_of_their_text_is_shown(
    page_file: Path, run: Reported, files: dict[str, bytes]
) -> None:
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
def test_more_of_a_contexts_text_is_shown(
    run: Reported, table: pa.Table, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        sample.get_by_role("button", name="more text").click()
        sample.get_by_role("button", name="less text").wait_for()
        shown = sample.locator(".token").evaluate_all("all => all.map((one) => Number(one.dataset.token))")
        assert shown == tokens[0, low:high].tolist() and len(shown) > 8
        assert sample.locator(".beyond").count() == len(shown) - 8
        sample.get_by_role("button", name="less text").click()
        assert sample.locator(".token").count() == 8


@pytest.mark.slow
def test_bars_are_those_of_the_table_and_two_latents_stand_side_by_side(page_file: Path, table: pa.Table) -> None:
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
def test_labels_are_kept_exported_and_imported(page_file: Path, run: Reported, tmp_path: Path) -> None:
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
def test_all_of_it_can_be_reached_by_keyboard(page_file: Path) -> None:
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
        page.wait_for_function("document.activeElement.id === 'query'")
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
def test_a_hostile_corpus_is_text_and_fits_the_screen(page_file: Path, run: Reported, width: int, dark: bool) -> None:
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
def test_a_browser_or_a_folder_that_lacks_something_is_told_so(
    page_file: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
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
