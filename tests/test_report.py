"""`train report`: figures against the files that they come from, the verdict on planted faults, and the pages."""

import json
import os
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from markupsafe import escape
from safetensors.numpy import load_file

from tests.faults.disk import small_disk
from tests.reports import OPTIONS, STEPS, check, read
from tests.runs import SMALL, Outcome, rows
from tests.stores import SyntheticStore, make_store
from train.model import checkpoint
from train.report import gather
from train.report.page import asset, embedded, html, markdown, short, table
from train.report.report_record import Cluster, Curves, Histogram, Report
from train.report.verdict import verdict
from train.samples.parquet import paths

Command = Callable[..., Outcome]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\u202eשלום",
    "👩‍🔬",
    "x" * 10_000,
    "&amp;\n",
]


@pytest.fixture
def store(report_store: SyntheticStore) -> SyntheticStore:
    return report_store


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy for one test, to change at will."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


def page_of(run: Path) -> str:
    return (run / "report.html").read_text()


def test_the_command_writes_the_page_and_its_twins_and_says_where(command: Command, run: Path) -> None:
    done = command("report", run)
    assert done.code == 0, done.err
    assert done.path == run / "report.html"
    assert "reconstruction" in done.err and "step 120 of 120" in done.err
    assert {path.name for path in run.glob("report*")} == {"report", "report.html", "report.json", "report.md"}
    assert (run / "report" / "latents.html").is_file() and (run / "report" / "latents.parquet").is_file()
    again = {path: path.read_bytes() for path in run.rglob("report*/**/*") if path.is_file()}
    printed = command("report", run, "--json")
    assert json.loads(printed.out) == json.loads((run / "report.json").read_text())
    assert all(path.read_bytes() == data for path, data in again.items())  # the same run gives the same bytes


def test_curves_are_those_of_the_logs(report: Report, reported: Path) -> None:
    found = rows(reported)
    assert report.training.steps == [row["step"] for row in found]
    series = report.training.series
    assert series["fvu_natural"] == [row["fvu_natural"] for row in found]
    assert series["terms.mined"] == [row["terms"]["mined"] for row in found]
    assert series["held_out.l0"] == [row["held_out"]["l0"] if "held_out" in row else None for row in found]
    assert sum(value is not None for value in series["held_out.l0"]) == 3
    timing = [json.loads(line) for line in (reported / "timing.jsonl").read_text().splitlines()]
    rates = [(b["rows"] - a["rows"]) / (b["seconds"] - a["seconds"]) for a, b in pairwise(timing)]
    assert report.timing.series["rows_per_second"][1:] == pytest.approx(rates)
    assert report.monitor.steps == [20, 40, 60, 80, 100, 120]
    logs = [
        json.loads(path.read_text()) for path in sorted((reported / "anti_duplication_logs").glob("correlation-0*"))
    ]
    assert logs[0]["tracked"] is None and len(logs) > 1
    expected = [None, *(log["tracked"]["pairs_above"]["0.8"] for log in logs[1:])]
    assert report.monitor.series["pairs_above_0_8"] == expected


def test_a_resumed_runs_clock_starts_anew(run: Path) -> None:
    from train.report.gather import timing_curves

    lines = [
        {"step": 10, "rows": 100, "from_step": 0, "seconds": 5.0, "data_wait_share": 0.1},
        {"step": 20, "rows": 200, "from_step": 0, "seconds": 7.0, "data_wait_share": 0.2},
        {"step": 30, "rows": 300, "from_step": 20, "seconds": 4.0, "data_wait_share": 0.3},
        {"step": 40, "rows": 400, "from_step": 20, "seconds": 4.0, "data_wait_share": 0.4},
    ]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = timing_curves(run, 40)
    assert found.series == {"rows_per_second": [20.0, 50.0, 25.0, None], "data_wait_share": [0.1, 0.2, 0.3, 0.4]}
    assert timing_curves(run, 20).steps == [10, 20]


def test_densities_and_neighbours_are_those_of_the_latents(report: Report, reported: Path) -> None:
    latents = pq.read_table(paths(reported, STEPS)[1])
    density = latents["density"].to_numpy()
    assert sum(report.density.counts) == (density > 0).sum() and report.density.outside == (density == 0).sum()
    largest = int(np.searchsorted(report.density.edges, density.max(), side="right")) - 1
    assert report.density.counts[largest] > 0 and not any(report.density.counts[largest + 1 :])
    assert f"without position 0. {report.density.outside} latents are active on none" in page_of(reported)
    weights = load_file(checkpoint.folder(reported, STEPS) / checkpoint.WEIGHTS)
    live = latents["rows"].to_numpy() > 0
    directions = weights["W_dec"][live].astype(np.float64)
    cosines = directions @ directions.T
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(1)
    assert report.nearest.median == pytest.approx(np.median(nearest), abs=1e-6)
    assert report.nearest.largest == pytest.approx(nearest.max(), abs=1e-6)
    assert sum(report.nearest.latents.counts) == live.sum() == sum(report.nearest.random.counts)
    assert report.nearest.random_median < report.nearest.random_largest < 1


def test_pairs_are_shown_with_both_latents_contexts(report: Report, reported: Path) -> None:
    held_out = json.loads((reported / "anti_duplication_logs" / "correlation-held-out.json").read_text())
    assert report.duplicates
    assert report.duplicates.source == "anti_duplication_logs/correlation-held-out.json"
    assert [list(pair.key) for pair in report.duplicates.pairs] == [
        [one["latent"] for one in pair["latents"]] for pair in held_out["pairs"]
    ]
    assert report.duplicates.pairs, "the test needs a pair"
    contexts = pq.read_table(paths(reported, STEPS)[0]).to_pandas()
    for latent in report.duplicates.pairs[0].key:
        shown = report.examples[latent].contexts
        top = contexts[(contexts.latent == latent) & (contexts.kind == "top")].sort_values("rank").head(3)
        assert [one.text for one in shown] == [list(text) for text in top.text]
        assert [one.peak for one in shown] == list(top.peak)
    page = (reported / "report.html").read_text()
    assert f'href="report/latents.html#latent-{report.duplicates.pairs[0].key[0]}"' in page


def test_linear_and_an_earlier_step_and_samples_that_are_not_there(
    command: Command, run: Path, store: SyntheticStore
) -> None:
    evaluated = json.loads(command("evaluate", run, "--linear", "--json").out)
    shutil.rmtree(run / "samples")
    assert command("report", run, "--linear").code == 0
    found = read(run)
    assert found.linear_fvu == pytest.approx(evaluated["linear_fvu"])
    assert paths(run, STEPS)[0].is_file()  # made by the way
    steps = [checkpoint.number(path) for path in checkpoint.steps(run)]
    assert command("report", run, "--step", steps[0]).code == 0
    earlier = read(run)
    assert earlier.step == steps[0]
    assert max(earlier.training.steps) == steps[0] < STEPS
    assert (
        check(earlier, "finished").said == "An earlier checkpoint: step 60 of a run that went on to its last one, 120."
    )
    assert earlier.usage
    there = earlier.model_copy(update={"usage": earlier.usage.model_copy(update={"step": steps[0]})})
    assert "continue with `python -m train resume`" in check(there, "finished").said


def test_a_run_without_monitor_and_samples_has_a_report(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 20, *SMALL, "--set", "monitor.every=0",
                   "--set", "diversity.co_activation.weight=0", "--set", "samples.rows=0")  # fmt: skip
    assert command("report", done.path).code == 0
    found = read(done.path)
    assert found.duplicates is None and found.examples == {} and found.monitor.steps == []
    assert "The correlation monitor was off" in (done.path / "report.html").read_text()
    assert "correlations" not in {one.name for one in found.verdict}


def test_an_autoencoder_of_the_targets_is_called_one(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    reads = ("--set", "source=target", "--set", "transcoder.skip=false")
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 20, *SMALL, *reads)
    told = command("report", done.path, "--linear")
    assert told.code == 0 and "--linear says nothing here" in told.err
    found = read(done.path)
    assert found.linear_fvu is None and found.reads == found.store.target_hook != found.store.source_hook
    hook = found.store.target_hook
    assert f"<code>{hook}</code> to <code>{hook}</code>" in page_of(done.path)
    assert f"`{hook}` to `{hook}`" in (done.path / "report.md").read_text()


def test_without_a_tokenizer_contexts_are_numbers_of_tokens(command: Command, tmp_path: Path) -> None:
    plain = make_store(tmp_path / "store", keep={0: 0.5}, training_blocks=6)
    done = command("run", "--store", plain.path, "--runs", tmp_path / "runs", *OPTIONS)
    assert done.code == 0 and command("report", done.path).code == 0
    shown = {latent: one.contexts for latent, one in read(done.path).examples.items() if one.contexts}
    rows = pq.read_table(paths(done.path, STEPS)[0]).to_pylist()
    for latent, contexts in shown.items():
        tokens = next(row["tokens"] for row in rows if row["latent"] == latent and row["kind"] == "top")
        assert contexts[0].text == [f"#{token}" for token in tokens]
    assert shown and f">#{tokens[0]}</span>" in (done.path / "report.html").read_text()


def test_random_directions_are_compared_with_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_BLOCK", 7)
    rows = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double()
    rows /= rows.norm(dim=1, keepdim=True)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    np.testing.assert_allclose(gather._nearest_of_random(50, 5), cosines.amax(1), atol=1e-6)
    monkeypatch.setattr(gather, "_RANDOM_ROWS", 10)
    np.testing.assert_allclose(gather._nearest_of_random(50, 5), cosines.amax(1)[:10], atol=1e-6)
    assert len(gather._nearest_of_random(0, 5)) == 0 and gather._nearest_of_random(1, 5).tolist() == [-1]


def test_reports_of_the_monitor_are_in_order_of_step(run: Path) -> None:
    logs = run / "anti_duplication_logs"
    report = json.loads((logs / "correlation-000120.json").read_text())
    (logs / "correlation-1000000.json").write_text(json.dumps(report | {"step": 1_000_000}))
    assert gather.monitor_curves(run, 2_000_000).steps == [20, 40, 60, 80, 100, 120, 1_000_000]


def test_what_cannot_be_reported_is_said(command: Command, run: Path, tmp_path: Path) -> None:
    missing = command("report", tmp_path / "none")
    assert missing.code == 2 and "Traceback" not in missing.err
    none = command("report", run, "--step", 7)
    assert none.code == 2 and "7" in none.err and not (run / "report.html").exists()


@pytest.mark.parametrize("which", [0, 1])
def test_samples_that_cannot_be_read_are_said(command: Command, run: Path, which: int) -> None:
    damaged = paths(run, STEPS)[which]
    damaged.write_bytes(damaged.read_bytes()[:-20])
    told = command("report", run)
    assert told.code == 1 and f"error: {damaged}: not readable" in told.err and not (run / "report.html").exists()
    damaged.unlink()
    assert command("report", run).code == 0


def test_text_of_the_corpus_is_never_markup(command: Command, run: Path) -> None:
    contexts, _ = paths(run, STEPS)
    samples = pq.read_table(contexts)
    place = samples.schema.get_field_index("text")
    texts = [[HOSTILE[i % len(HOSTILE)] for i, _ in enumerate(one)] for one in samples["text"].to_pylist()]
    pq.write_table(
        samples.set_column(place, samples.schema.field(place), pa.array(texts, pa.list_(pa.string()))), contexts
    )
    assert command("report", run).code == 0
    page = (run / "report.html").read_text()
    body = page[: page.index('id="figures"')]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in body
    assert "<script>alert" not in page and "<img src=x" not in page
    assert "x" * 61 not in body and "… (10,000 characters)" in body
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", body)
    assert read(run).examples  # the twin has the text as it is
    assert any("<script>" in text for one in read(run).examples.values() for c in one.contexts for text in c.text)


def test_markdown_has_the_verdict_and_the_tables(report: Report, reported: Path) -> None:
    text = (reported / "report.md").read_text()
    assert text.startswith("## run\n")
    assert f"| {report.held_out.fvu:.4f} | {report.held_out.explained_variance:.1%} |" in text
    for one in report.verdict:
        assert f"**{one.name}**" in text and one.said in text
    lines = text.splitlines()
    for above, line, below in zip(lines, lines[1:], lines[2:], strict=False):
        if re.fullmatch(r"\|( -+:? \|)+", line):  # every table's head and body have as many cells
            assert above.count("|") == line.count("|") == below.count("|")


def test_no_name_is_markup_in_markdown(report: Report) -> None:
    assert report.usage
    bad = "<img src=x>`<b>`[a](http://x) ![b](http://x) | c"
    store = dict.fromkeys(("name", "model", "corpus", "source_hook", "target_hook"), bad)
    idle = next(iter(report.usage.components.values())).model_copy(update={"effect": 0.0, "effect_counts": bad})
    changed = report.model_copy(
        update={
            "run": bad,
            "store": report.store.model_copy(update=store),
            "usage": report.usage.model_copy(update={"components": {bad: idle}}),
        }
    )
    text = markdown(changed.model_copy(update={"verdict": verdict(changed)})).decode()
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert text.count("img src") == 10 and "\\<img src=x>" in outside
    assert not re.search(r"(?<!\\)[<\[]", outside)
    assert sum(line.startswith("| \\<img") and line.endswith(r"\| c |") for line in text.splitlines()) == 1


@pytest.mark.fault(11)
def test_a_full_disk_leaves_the_report_of_before(command: Command, run: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", size + 7_000_000) as disk:
        there = Path(shutil.copytree(run, disk / "run"))
        assert command("report", there).code == 0
        before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
        with open(disk / "filler", "wb") as filler:
            filler.write(bytes(max(0, shutil.disk_usage(disk).free - 100_000)))
        refused = command("report", there)
        assert refused.code == 2 and "bytes" in refused.err and "free" in refused.err
        assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("what", ["report", "samples"])
def test_a_run_that_cannot_be_written_to_is_told_before_all_the_measuring(
    command: Command, run: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not (Path(path) == run and mode & os.W_OK)
    )
    monkeypatch.setattr("train.model.checkpoint.find", lambda *_: pytest.fail("read a checkpoint first"))
    done = command(what, run)
    assert done.code == 2 and done.err.startswith(f"error: cannot write to {run}: it is read-only")


def test_clusters_are_shown_with_their_latents_contexts(report: Report) -> None:
    assert report.duplicates
    shown = sorted(report.examples)[:3]
    clusters = [Cluster(latents=shown), *(Cluster(latents=[0, 1]) for _ in range(11))]
    changed = report.model_copy(update={"duplicates": report.duplicates.model_copy(update={"clusters": clusters})})
    page = html(changed).decode()
    part = page[page.index("<h3>Clusters</h3>") : page.index('<section id="usage"')]
    assert f"3 latents: {', '.join(map(str, shown))}</summary>" in part
    for latent in shown:
        assert f"#latent-{latent}" in part
        assert str(escape(report.examples[latent].contexts[0].text[0])) in part
    assert "2 smaller clusters are in" in part


def test_what_stands_in_a_script_cannot_end_it() -> None:
    text = str(embedded({"a": "</script><!--\u2028"}))
    assert "<" not in text and "\u2028" not in text and json.loads(text) == {"a": "</script><!--\u2028"}


def test_tokens_are_shown_with_their_line_ends() -> None:
    assert short("\u202e\u200bx\u2066") == "[U+202E][U+200B]x[U+2066]" and short("👩\u200d🔬שלום") == "👩\u200d🔬שלום"
    assert short("a\n\tb") == "a↵⇥b" and short("y" * 61) == "y" * 60 + "… (61 characters)"


def test_tables_have_the_numbers_of_their_plots(report: Report) -> None:
    from train.report.plots import figures

    drawn = figures(report)
    assert {"fvu", "l0", "terms", "dead", "lr", "throughput", "strata", "prefixes", "density", "nearest"} <= set(drawn)
    found = table(drawn["l0"])
    assert found.head == ["step", "the training rule", "the running threshold", "held out, calibrated thresholds"]
    assert found.rows[-1][0] == "120" and found.rows[-1][3] == f"{report.held_out.l0:.4g}"
    assert list(report.held_out.strata) == ["000-001", "001-004", "004-016", "016-032"]
    assert [row[0] for row in table(drawn["strata"]).rows] == ["0", "1-3", "4-15", "16-31"]


def test_a_table_of_a_histogram_has_every_bin_and_one_of_curves_every_evaluation(report: Report) -> None:
    from train.report.plots import figures

    drawn = figures(report)
    latents, random = report.nearest.latents, report.nearest.random
    bins = zip(pairwise(latents.edges), latents.counts, random.counts, strict=True)
    assert table(drawn["nearest"]).rows == [
        [f"{low:.3g} to {high:.3g}", f"{ours:,}", f"{theirs:,}"] for (low, high), ours, theirs in bins if ours or theirs
    ]
    many = Histogram(edges=[10 ** (i / 20 - 4) for i in range(81)], counts=[1] * 80)
    assert len(table(figures(report.model_copy(update={"density": many}))["density"]).rows) == 80
    steps = list(range(1, 1001))
    held_out = [float(step) if step % 250 == 7 else None for step in steps]
    training = Curves(steps=steps, series={"fvu_natural": [0.5] * 1000, "held_out.fvu": held_out})
    monitor = Curves(steps=steps[:3], series={"pairs_above_0_8": [2.0, 0.0, 1.0]})
    drawn = figures(report.model_copy(update={"training": training, "monitor": monitor}))
    found = table(drawn["fvu"]).rows
    assert [row[2] for row in found if row[2]] == ["7", "257", "507", "757"] and 24 <= len(found) < 30
    assert table(drawn["correlated"]).rows == [["1", "2"], ["2", "0"], ["3", "1"]]


def test_logarithmic_axes_say_so_and_densities_are_told_as_one_in_so_many(report: Report) -> None:
    from train.report.plots import figures

    drawn = figures(report)
    for one in drawn.values():
        for axis in (one.layout.xaxis, one.layout.yaxis):
            assert ("(log scale)" in axis.title.text) == (axis.type == "log")
    assert drawn["prefixes"].layout.xaxis.type == "log"
    ticks = dict(zip(drawn["density"].layout.xaxis.tickvals, drawn["density"].layout.xaxis.ticktext, strict=True))
    assert (ticks[1.0], ticks[0.1]) == ("all", "1 in 10") and len(ticks) >= 2
    assert all("1 in " in told for told in drawn["density"].data[0].customdata)


def test_the_headline_has_the_runs_settings_rows_and_time(report: Report, reported: Path) -> None:
    last = json.loads((reported / "timing.jsonl").read_text().splitlines()[-1])
    assert report.headline == {
        "k": report.k, "d_sae": report.d_sae, "learning rate": report.settings["optimizer"]["lr"], "seed": 0,
        "steps": STEPS, "tokens": last["rows"], "seconds": pytest.approx(last["seconds"]),
    }  # fmt: skip


def test_an_index_lists_all_runs_of_a_folder(command: Command, run: Path) -> None:
    assert command("report", run.parent / "none", "--index").code == 2
    assert "takes the folder of runs" in command("report", run, "--index").err
    assert "with --json alone" in command("report", run.parent, "--index", "--linear").err
    other = Path(shutil.copytree(run, run.parent / "a & b"))
    assert command("report", run).code == 0
    done = command("report", run.parent, "--index")
    assert done.path == run.parent / "index.html", done.err
    found = {one["name"]: one for one in json.loads(command("report", run.parent, "--index", "--json").out)}
    report = read(run)
    assert set(found) == {"run", "a & b"}
    assert found["run"]["fvu"] == report.held_out.fvu and found["run"]["report"]
    assert found["run"]["settings"] == {
        name: report.headline[{"lr": "learning rate"}.get(name, name)] for name in ("k", "d_sae", "lr", "seed")
    }
    assert found["a & b"]["fvu"] == rows(other)[-1]["held_out"]["fvu"] and not found["a & b"]["report"]
    page = done.path.read_text()
    assert 'href="run/report.html"' in page and "a &amp; b" in page and "a%20%26%20b" not in page


def test_labels_of_a_file_are_in_the_report_and_stay(command: Command, run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("latent,label,star\n1,one of them,true\n")
    assert command("report", run, "--labels", tmp_path / "mine.csv").code == 0
    assert command("report", run).code == 0
    table = pq.read_table(run / "report" / "latents.parquet")
    assert [i for i, label in enumerate(table["label"].to_pylist()) if label] == [1]
    assert table["label"][1].as_py() == "one of them" and table["star"][1].as_py() and not table["star"][0].as_py()
    wrong = command("report", run, "--labels", tmp_path / "none.csv")
    assert wrong.code == 2 and "no file of labels" in wrong.err


def test_a_resumed_runs_parts_are_added_up(run: Path) -> None:
    lines = [
        {"step": 10, "rows": 100, "from_step": 0, "seconds": 5.0},
        {"step": 20, "rows": 200, "from_step": 0, "seconds": 7.0},
        {"step": 30, "rows": 300, "from_step": 20, "seconds": 4.0},
    ]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert gather.trained(run, 30) == (300, 11.0) and gather.trained(run, 20) == (200, 7.0)
    assert gather.trained(run, 5) is None


def test_text_has_contrast_in_light_and_dark() -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1 for text, on both grounds."""
    sheets = re.findall(r":root[^{]*\{(.*?)\}", str(asset("style.css")), re.S)
    light, by_system, by_switch = (dict(re.findall(r"--(\w+): ([^;]*)", sheet)) for sheet in sheets)
    assert by_system == by_switch != light
    for colour in (light, by_system):
        for ink in ("ink", "soft", "link", "good", "look", "bad"):
            for ground in ("paper", "card"):
                assert contrast(colour[ink], colour[ground]) >= 4.5, (ink, ground)


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
