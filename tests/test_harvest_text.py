"""Harvests of text as people have it: what is joined, counted, warned of and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from shared.store.layout import PackingCounts
from shared.store.store import Store
from tests.llms import Line, command, edit_json, make_gpt2, make_llama, refused, texts, write_jsonl

EOS = 1


def tokens_of(path: Path) -> np.ndarray:
    """All windows of a store."""
    store = Store.open(path)
    found = np.empty((store.tokens.rows, store.request.context_size), np.int32)
    store.tokens.read(0, len(found), found)
    return found


def packing(path: Path) -> PackingCounts:
    return Store.open(path).record.plan.packing[0]


def lossy(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / name, rows)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.mark.fault(54)
@pytest.mark.parametrize("separator", ["auto", "true", "false"])
def test_where_bos_is_eos_it_stands_between_documents(small: Line, gpt2: Path, tmp_path: Path, separator: str) -> None:
    text = lossy(tmp_path, "short.jsonl", [{"text": "class index"}] * 4000)
    more = ("--set", f"windows.separator={separator}")
    path = command(*small(tmp_path / "cache", *more, model=gpt2, text=text, tokens=1)).store
    tokenizer = Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    ids = tokenizer.encode("class index", add_special_tokens=False).ids
    windows = tokens_of(path)
    assert (windows[:, 0] == EOS).all()
    document = [*ids, *([] if separator == "false" else [EOS])]
    stream = windows[:32, 1:].ravel()  # the held-out windows, in order of the text
    assert stream.tolist() == (document * (len(stream) // len(document) + 1))[: len(stream)]


@pytest.mark.fault(50, 52)
def test_what_is_lost_is_counted_and_warned_of(small: Line, model: Path, tmp_path: Path) -> None:
    found = texts(80)
    path = tmp_path / "lossy.jsonl"
    rows = [json.dumps({"text": f"{text} café"}, ensure_ascii=False) for text in found]
    rows[1:1] = ['{"content": "a"}', "{broken"]
    path.write_bytes("\n".join([*rows, *['{"text": null}'] * 200]).encode("latin-1"))
    line = small(tmp_path / "cache", "--set", "text.max_refused=2", "--set", "text.streaming=true", text=path)
    done = command(*line)
    counts = packing(done.store)
    assert (counts.refused_rows, counts.empty_documents, counts.padding_tokens) == (2, 0, 0)
    assert counts.replaced_characters == counts.documents > 10
    assert f"lossy.jsonl: 2 of {counts.documents + 2} rows" in done.err and "line 2: no column 'text'" in done.err
    assert f"lossy.jsonl: {counts.replaced_characters} characters, one for every" in done.err
    assert "characters" in command("info", done.store).out  # the table breaks its heads into lines
    whole = command(*small(tmp_path / "all", "--set", "text.max_refused=2", text=path, tokens=10**6))
    assert "lossy.jsonl: 200 of 282 rows (71%) hold nothing" in whole.err
    refused(command(*small(tmp_path / "none", text=path, tokens=10**6)), "lossy.jsonl, line", folder=tmp_path / "none")


@pytest.mark.fault(52)
def test_files_with_another_column_are_no_empty_documents(small: Line, tmp_path: Path) -> None:
    files = [lossy(tmp_path, f"{name}.jsonl", [{name: text} for text in texts(80)]) for name in ("text", "content")]
    for names in (files, files[::-1]):
        line = [*small(tmp_path / "cache", text=names[0], tokens=20_000), "--text", names[1]]
        refused(
            command(*line), "content.jsonl, line", "no column 'text'; its columns: content", folder=tmp_path / "cache"
        )


def test_a_good_text_loses_nothing_and_is_recorded_as_before(finished: Path) -> None:
    recorded = json.loads((finished / "plan.json").read_text())["packing"][0]
    assert set(recorded) == {name for name in PackingCounts.model_fields if "tokens_" in name or "documents" in name}


@pytest.mark.parametrize("more", [(), ("--set", "windows.documents=apart"), ("--set", "store.block_sequences=4")])
def test_one_long_document_says_what_is_in_the_way(small: Line, tmp_path: Path, more: tuple[str, ...]) -> None:
    text = tmp_path / "giant.txt"
    text.write_text(" ".join(texts(300)))
    line = small(tmp_path / "cache", *more, text=text)
    found = command(*line)
    refused(found, "giant.txt: no whole training block is left: document 1 of 1", folder=tmp_path / "cache")
    assert "split the text into more documents, or --set store.held_out_blocks=0" in found.err
    assert Store.open(command(*line, "--set", "store.held_out_blocks=0").store).record.blocks >= 3


def test_a_document_that_costs_a_block_at_the_boundary_is_told(small: Line, tmp_path: Path) -> None:
    text = tmp_path / "two.txt"
    text.write_text(" ".join(texts(300)) + "\n" + " ".join(texts(50)))
    done = command(*small(tmp_path / "cache", "--set", "text.streaming=true", text=text, tokens=10**6))
    assert "document 1 of 2 begins in the held-out part, and its other" in done.err and done.code == 0


def test_ids_are_harvested_without_a_tokenizer(small: Line, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 320, (60, 100))
    text = lossy(tmp_path, "ids.jsonl", [{"input_ids": row.tolist()} for row in rows])
    path = command(*small(tmp_path / "cache", "--set", "text.streaming=true", model=folder, text=text)).store
    request = Store.open(path).request
    assert not request.bos and request.corpus.separator is None and not (path / "tokenizer").exists()
    assert tokens_of(path)[:32].ravel().tolist() == rows.ravel()[: 32 * 32].tolist()
    assert command("verify", path, "--against-model", 10, "--model", folder).code == 0
    refused(command(*small(tmp_path / "none", model=folder)), "has no tokenizer", folder=tmp_path / "none")


def test_a_store_has_a_tokenizer_json_whatever_files_the_tokenizer_is_in(
    small: Line, gpt2: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(gpt2, tmp_path / "model"))
    made = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(made["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in made["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    path = command(*small(tmp_path / "cache", model=folder)).store
    assert {one.name for one in (path / "tokenizer").iterdir()} > {"tokenizer.json", "vocab.json", "merges.txt"}
    written, whole = (Tokenizer.from_file(str(one / "tokenizer.json")) for one in (path / "tokenizer", gpt2))
    for text in texts(5):
        assert written.encode(text).ids == whole.encode(text, add_special_tokens=False).ids
    assert "tokenizer/tokenizer.json" in json.loads((path / "store.json").read_text())["files"]
    assert command("verify", path).code == 0


@pytest.mark.fault(53)
def test_a_tokenizer_of_another_model_is_one_line(small: Line, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.llms import _SMALL, _save

    config = LlamaConfig(**{**_SMALL, "vocab_size": 290}, num_hidden_layers=3, tie_word_embeddings=False)
    folder = _save(tmp_path / "model", LlamaForCausalLM, config)
    words = ("its tokenizer has token", "the model's embedding has 290 rows")
    refused(command(*small(tmp_path / "cache", model=folder)), *words, folder=tmp_path / "cache")
