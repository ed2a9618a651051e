"""The files of the browser of latents say what the samples say."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.browsed import CHUNK, HOSTILE, Browsed, handed, store_with
from tests.reported import DEAD
from train.report import context_text
from train.report.browser import browser_files, cut
from train.samples.parquet import RECORD, SamplesRecord
from train.samples.token_text import pieces


def test_chunks_hold_the_contexts_of_the_samples(browsed: Browsed) -> None:
    run, files = browsed.run, browsed.files
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


def test_the_index_and_the_chunks_hold_the_table(browsed: Browsed) -> None:
    table, files = browsed.table, browsed.files
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


def test_the_text_holds_every_context_where_it_lies(browsed: Browsed) -> None:
    run, files = browsed.run, browsed.files
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


def test_text_that_would_be_too_much_is_left_out_rarest_first(
    browsed: Browsed, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = browsed.run
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


def test_every_text_is_there_once_and_no_script_can_end_early(browsed: Browsed) -> None:
    files, tokenizer = browsed.files, browsed.tokenizer
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


def test_the_same_input_gives_the_same_bytes(browsed: Browsed) -> None:
    run, table, tokenizer = browsed.run, browsed.table, browsed.tokenizer
    store = store_with(run, tokenizer)
    one, other = (browser_files("a run", store, table, run.contexts) for _ in range(2))
    assert one == other
    assert not any(str(run.path).encode() in data for data in one.values())


def test_latents_take_so_few_bytes_that_18_432_of_them_fit_into_60_mb(browsed: Browsed) -> None:
    files = browsed.files
    scripts = sum(len(data) for name, data in files.items() if name.endswith(".js"))
    chunks = sum(re.fullmatch(r"latents/\d+\.js", name) is not None for name in files)
    assert chunks and scripts / chunks / CHUNK < 60e6 / 18_432


def test_without_a_tokenizer_there_are_numbers(browsed: Browsed, tmp_path: Path) -> None:
    run, table = browsed.run, browsed.table
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
