"""The whole stage through its command: what a store holds, resuming, extending, and what is left out."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.embedded.tokenizer import BOS_ID, EOS_ID
from shared.keyed import permutation
from shared.store.layout import ARRAYS, STORE, UNEMBEDDING
from shared.store.store import Store
from tests.llms import (
    BLOCK_TOKENS,
    Line,
    command,
    contents,
    edit_json,
    make_gemma,
    start,
    texts,
    wait_for,
    write_jsonl,
)
from tests.stores import decode, encode, stock_rows


def plain_rows(model: Path, layer: int, tokens: np.ndarray, batch: int, dtype: str) -> dict[str, np.ndarray]:
    """resid_mid and mlp_out [S, T, d] of the whole model by plain transformers hooks, as float32."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="eager")
    found: dict[str, list[torch.Tensor]] = {"source": [], "target": []}
    block = whole.model.layers[layer]
    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, given: found["source"].append(given[0].clone()))
    block.post_feedforward_layernorm.register_forward_hook(lambda _, given, out: found["target"].append(out.clone()))
    with torch.inference_mode():
        for start_ in range(0, len(tokens), batch):
            whole.model(torch.from_numpy(tokens[start_ : start_ + batch].astype(np.int64)), use_cache=False)
    return {side: torch.cat(parts).float().numpy() for side, parts in found.items()}


def check_store(path: Path, model: Path, rows: int = 200) -> None:
    """Compare a store, read by stock zarr, with plain transformers on random rows of every stratum."""
    store = Store.open(path)
    request, tokens = store.request, stock_rows(path, "tokens")
    assert tokens.shape == (store.record.blocks * request.block_sequences, request.context_size)
    assert (tokens[:, 0] == BOS_ID).all() and (tokens[:, 1:] != BOS_ID).all()
    expected = plain_rows(model, request.layer, tokens, request.batch_sequences, request.model.dtype)
    rng = np.random.default_rng(0)
    for stratum in store.record.plan.stored_strata:
        group = f"strata/{stratum.name}"
        count = store.record.blocks * stratum.rows
        sequence, position = stock_rows(path, f"{group}/sequence"), stock_rows(path, f"{group}/position")
        assert len(sequence) == len(position) == count
        assert len(set(zip(sequence.tolist(), position.tolist(), strict=True))) == count
        assert ((position >= stratum.start) & (position < stratum.stop)).all()
        assert (sequence // request.block_sequences == np.arange(count) // stratum.rows).all()
        chosen = rng.choice(count, min(rows, count), replace=False)
        for side, values in expected.items():
            stored = stock_rows(path, f"{group}/{side}")[chosen]
            wanted = encode(values[sequence[chosen], position[chosen]], request.storage)
            assert (stored == wanted).all()
    check_statistics(store)


def check_statistics(store: Store) -> None:
    """Compare the recorded statistics with one pass over the training rows."""
    weighted = []
    for summary, (name, arrays) in zip(store.record.strata, store.strata.items(), strict=True):
        first = store.request.held_out_blocks * arrays.stratum.rows
        rows = arrays.source.room(arrays.source.rows - first)
        arrays.source.read(first, arrays.source.rows, rows)
        values = decode(rows, store.request.storage).astype(np.float64)
        found = store.statistics[name]["source"]
        np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-6, atol=1e-5)
        # in float32 over some hundred rows at a time
        np.testing.assert_allclose(found.variance, values.var(0), rtol=5e-6, atol=1e-12)
        norms = np.linalg.norm(values, axis=1)
        assert summary.rows == len(values)
        assert summary.source.mean_squared_norm == pytest.approx((norms**2).mean())
        assert summary.source.norm_quantiles["0.5"] == pytest.approx(np.median(norms), rel=0.05)
        if arrays.stratum.start > 0:
            weighted.append((values, arrays.stratum.natural_rows / arrays.stratum.rows))
    weights = np.concatenate([np.full(len(values), weight) for values, weight in weighted])
    mean = np.average(np.concatenate([values for values, _ in weighted]), axis=0, weights=weights)
    np.testing.assert_allclose(store.statistics["overall"]["source"].mean, mean, rtol=1e-6, atol=1e-5)
    training = len(store.record.training_blocks)
    assert store.record.overall.natural_rows == training * store.request.block_sequences * (
        store.request.context_size - 1
    )


@pytest.mark.slow
def test_the_tiny_preset_equals_plain_transformers(tmp_path: Path) -> None:
    """The real command as a process, the preset's own text, context, strata and layer."""
    model = make_gemma(tmp_path / "model", num_hidden_layers=10)
    small = ("--set", "store.block_sequences=16", "--set", "store.held_out_blocks=1", "--tokens", 2 * 16 * 256)
    harvest = ["run", "tiny", "--model", model, "--cache", tmp_path / "cache", *small]
    process = start(*harvest)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    path = Path(out.splitlines()[-1])
    assert path.parent == tmp_path / "cache" and path.name.startswith("model-L8-")
    assert "tokens/s" in err and "Traceback" not in err
    check_store(path, model)
    began = time.monotonic()
    again = start(*harvest, options=["-X", "importtime"])
    out, err = again.communicate(timeout=60)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in err.splitlines() if "|" in line}
    assert Path(out.splitlines()[-1]) == path
    assert "pydantic" in imported and not {"torch", "transformers", "datasets", "transformer_lens"} & imported
    assert time.monotonic() - began < 30  # 2 s on an idle machine


@pytest.mark.parametrize("change", ["store.storage=float32", "store.storage=float16", "model.dtype=bfloat16"])
def test_other_types(small: Line, model: Path, tmp_path: Path, change: str) -> None:
    check_store(command(*small(tmp_path, "--set", change)).store, model)


@pytest.mark.slow
def test_the_gemma_preset_at_its_width(tmp_path: Path) -> None:
    """The resolved settings of `gemma-2-2b` at d 2,304; float32, as bfloat16 is slow where emulated."""
    model = make_gemma(tmp_path / "model", hidden_size=2304, num_hidden_layers=9, sliding_window=512)
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": one} for one in texts(100)])
    small = ("--set", "store.block_sequences=1", "--set", "store.held_out_blocks=1", "--set", "model.dtype=float32")
    given = ["--model", model, "--text", text, "--cache", tmp_path / "cache", "--tokens", 2 * 1024]
    path = command("run", "gemma-2-2b", *given, *small).store
    store = Store.open(path)
    assert path.name.startswith("model-L8-")
    assert (store.record.d_in, store.record.d_out, store.record.blocks) == (2304, 2304, 3)
    assert [stratum.name for stratum in store.record.plan.stored_strata][-1] == "256-1024"
    assert store.request.corpus.order == "as_read" and store.request.batch_sequences == 1
    check_store(path, model, rows=50)


@pytest.mark.fault(39)
def test_windows_are_the_text_and_held_out_documents_are_apart(finished: Path, text: Path, model: Path) -> None:
    """Every window against a naive tokenisation of the documents in their permuted order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    encoded = [
        tokenizer(documents[i], add_special_tokens=False)["input_ids"] + [EOS_ID]
        for i in permutation(len(documents), "documents", 0)
    ]
    store = Store.open(finished)
    counts = store.record.plan.packing[0]
    held_out = [token for document in encoded[: counts.held_out_documents] for token in document]
    training = [token for document in encoded[counts.held_out_documents :] for token in document]
    tokens = np.empty((store.tokens.rows, 32), np.int32)
    store.tokens.read(0, store.tokens.rows, tokens)
    assert tokens[:32, 1:].ravel().tolist() == held_out[: 32 * 31]
    assert sum(map(len, encoded[: counts.held_out_documents - 1])) < 32 * 31
    order = permutation(48, "windows", 0, 0)
    assert tokens[32:, 1:].tolist() == [training[31 * i : 31 * (i + 1)] for i in order]
    assert counts.tokens_read == counts.tokens_kept + counts.tokens_held_out + counts.tokens_left_over
    assert counts.tokens_read == sum(map(len, encoded[: counts.documents]))


def test_two_harvests_are_equal_byte_for_byte(small: Line, finished: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        again = command(*small(tmp_path / str(workers), "--set", f"workers={workers}")).store
        assert again.name == finished.name
        assert contents(again) == contents(finished)
    assert not list((tmp_path / "1").glob("*tmp*"))


def test_nothing_in_a_store_tells_where_or_when_it_was_made(finished: Path) -> None:
    for name, data in contents(finished).items():
        if name.endswith(".json") and not name.startswith("tokenizer/"):
            assert b"/tmp" not in data and b"2026" not in data, name


@pytest.mark.fault(1, 5)
@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_a_stopped_harvest_resumes_to_the_same_bytes(
    small: Line, longer: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    line = small(tmp_path, tokens=8 * BLOCK_TOKENS)
    process = start(*line)
    wait_for(tmp_path, "*/ledger/000002.json", process)
    process.send_signal(stop)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (3 if stop == signal.SIGTERM else -9), err
    assert "Traceback" not in err
    folder = tmp_path / longer.name
    assert not (folder / STORE).exists()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("c/[01]*") if path.is_file()}
    assert command(*line).store == folder
    assert before and all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert contents(folder) == contents(longer)


@pytest.mark.fault(1)
def test_packing_that_was_cut_off_starts_again(small: Line, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    for path in [copy / "plan.json", copy / STORE, copy / "statistics-000005.safetensors"]:
        path.unlink()
    shutil.rmtree(copy / "ledger")
    (copy / ARRAYS / "tokens/c/9").mkdir()
    (copy / ARRAYS / "tokens/c/9/0").write_bytes(b"of a longer plan that was never published")
    (tmp_path / f"{finished.name}.spool.tmp").write_bytes(b"x")
    assert command(*small(tmp_path)).store == copy
    assert contents(copy) == contents(finished)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []


def test_asking_for_more_extends_and_leaves_old_files_alone(
    small: Line, model: Path, finished: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / finished.name)
    path = command(*small(tmp_path, tokens=5 * BLOCK_TOKENS)).store
    assert path == tmp_path / finished.name
    old, new = contents(finished), contents(path)
    assert set(old) - set(new) == {"statistics-000005.safetensors"}
    changed = {name for name in old if name in new and new[name] != old[name]}
    assert all(name.endswith("zarr.json") or "/" not in name for name in changed)
    record = Store.open(path).record
    assert (record.plan.segments, record.blocks) == ((3, 2), 7)
    tokens = np.empty((7 * 16, 32), np.int32)
    Store.open(path).tokens.read(0, 7 * 16, tokens)
    whole = Store.open(command(*small(tmp_path / "w", tokens=5 * BLOCK_TOKENS)).store)
    at_once = np.empty_like(tokens)
    whole.tokens.read(0, 7 * 16, at_once)
    assert sorted(map(tuple, tokens[32:])) == sorted(map(tuple, at_once[32:]))
    check_store(path, model)
    assert command(*small(tmp_path)).store == path
    assert contents(path) == new


@pytest.mark.fault(39)
def test_a_text_that_is_too_short_gives_its_whole_blocks(small: Line, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "short.jsonl", [{"text": one} for one in texts(16)])
    more = small(tmp_path, "--force", text=text, tokens=900 * BLOCK_TOKENS)
    first = command(*more)
    record = Store.open(first.store).record
    blocks = record.plan.training_blocks
    assert 0 < blocks < 900 and record.plan.exhausted
    assert f"holds {blocks * BLOCK_TOKENS:,} training tokens in whole blocks, 460,800 were asked for" in first.err
    assert record.plan.packing[0].tokens_left_over < BLOCK_TOKENS + 800
    again = command(*more)
    assert again.store == first.store and again.err.count("460,800 were asked for; taking what there is") == 1
    planned = command("plan", *more[1:])
    assert planned.code == 0 and planned.err.count("460,800 were asked for; taking what there is") == 1


def test_layers_from_one_pass_equal_single_ones(small: Line, finished: Path, tmp_path: Path) -> None:
    both = command(*small(tmp_path, layers=(1, 2)))
    first, second = [Path(line) for line in both.out.splitlines()]
    assert Store.open(first).request.layer == 1
    assert contents(second) == contents(finished)
    assert contents(first) == contents(command(*small(tmp_path / "alone", layers=(1,))).store)
    assert (first / UNEMBEDDING).samefile(second / UNEMBEDDING)  # one of them on disk


def test_a_plan_counts_one_unembedding_for_all_layers(small: Line, tmp_path: Path) -> None:
    lines = [small(tmp_path, layers=layers)[1:] for layers in ((1,), (1, 2))]
    one, two = (json.loads(command("plan", *line, "--json").out) for line in lines)
    shared = one["stores"][0]["unembedding_bytes_at_most"]
    spool = one["stores"][0]["spool_bytes_at_most"]
    assert two["needed_bytes"] == 2 * one["needed_bytes"] - shared - spool
    command(*small(tmp_path, layers=(1,)))
    written = next(tmp_path.glob(f"*/{UNEMBEDDING}")).stat().st_size
    assert written <= shared < written + 10_000


def test_a_layer_that_lacks_a_block_shares_the_pass(small: Line, finished: Path, tmp_path: Path) -> None:
    """One layer finished, one missing a block in the middle: only that block runs, and only one store is written."""
    shutil.copytree(finished, tmp_path / finished.name)
    first, _ = [Path(line) for line in command(*small(tmp_path, layers=(1, 2))).out.splitlines()]
    expected = contents(first)
    (first / STORE).unlink()
    (first / "ledger/000003.json").unlink()
    again = command(*small(tmp_path, layers=(1, 2)))
    assert f"{5 * BLOCK_TOKENS:,}/{5 * BLOCK_TOKENS:,} tokens" in again.err
    assert contents(first) == expected


def test_a_hook_of_its_own_layer(small: Line, model: Path, tmp_path: Path) -> None:
    more = ("--set", "capture.source=blocks.0.hook_resid_pre", "--set", "capture.target=mlp.hook_pre")
    store = Store.open(command(*small(tmp_path, *more)).store)
    assert (store.request.source_hook, store.request.target_hook) == (
        "blocks.0.hook_resid_pre",
        "blocks.2.mlp.hook_pre",
    )
    assert (store.record.d_in, store.record.d_out) == (32, 48)


@pytest.mark.parametrize("kind", ["messages", "input_ids"])
def test_chats_and_token_ids(small: Line, model: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    edit_json(folder / "tokenizer_config.json", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    rng = np.random.default_rng(0)
    rows = {
        "messages": [[{"role": "user", "content": one}] for one in texts(60)],
        "input_ids": [[BOS_ID, *rng.integers(4, 320, 100).tolist()] for _ in range(60)],
    }[kind]
    path = write_jsonl(tmp_path / "rows.jsonl", [{kind: row} for row in rows])
    done = command(*small(tmp_path / "cache", model=folder, text=path, tokens=1))
    assert Store.open(done.store).request.corpus.kind == kind
    check_store(done.store, folder, rows=30)


@pytest.mark.parametrize("kind", ["joined", "apart"])
def test_what_is_left_out_is_counted_and_the_rest_is_the_models(
    small: Line, model: Path, tmp_path: Path, kind: str
) -> None:
    """Special tokens, norms over a quantile, a cap, documents apart: counts are exact before any row is computed."""
    more = ("exclude_special=true", "max_norm_quantile=0.9", "cap={16 = 64}")
    options = [part for one in more for part in ("--set", f"store.{one}")]
    path = command(*small(tmp_path, *options, "--set", f"windows.documents={kind}", "--set", "store.keep={}")).store
    store = Store.open(path)
    tokens, documents = (np.empty((5 * 16, 32), np.int32) for _ in range(2))
    store.tokens.read(0, 80, tokens)
    store.documents.read(0, 80, documents)
    starts = np.diff(documents, axis=1, prepend=-1) != 0 if kind == "apart" else np.arange(32) == np.zeros((80, 1))
    offsets = np.arange(32)
    positions = offsets - np.maximum.accumulate(np.where(starts, offsets, 0), axis=1)
    assert (tokens[positions == 0] == BOS_ID).all() and (tokens[positions > 0] != BOS_ID).all()
    special = np.isin(tokens, store.record.plan.special_tokens)
    assert {BOS_ID, EOS_ID} <= set(store.record.plan.special_tokens)
    for plan in store.record.plan.strata:
        inside = (positions >= plan.start) & (positions < plan.stop)
        assert plan.total("natural") == inside[32:].sum()
        assert plan.total("special") == (inside & special)[32:].sum()
        allowed = (inside & ~special)[32:].reshape(3, -1).sum(1)
        assert plan.total("over_norm") == sum(int(n * 0.1 + 1e-9) for n in allowed)
        assert plan.total("stored") == 3 * plan.rows
    assert list(store.strata) == ["001-004", "004-016", "016-032"]
    assert store.strata["016-032"].stratum.rows == 64
    for rows in store.strata.values():
        count = rows.source.rows
        tags = {name: np.empty(count, getattr(rows, name).spec.dtype) for name in ("sequence", "offset", "position")}
        for name, found in tags.items():
            getattr(rows, name).read(0, count, found)
        place = tags["sequence"], tags["offset"]
        assert (positions[place] == tags["position"]).all() and not special[place].any()
        norms = np.empty((count, 32), np.uint16)
        rows.source.read(0, count, norms)
        found_norms = np.linalg.norm(decode(norms, "bfloat16"), axis=1).reshape(5, -1)
        assert (found_norms.max(1) < 10 * np.median(found_norms)).all()
    assert json.loads(command("verify", path, "--against-model", 20, "--model", model, "--json").out)[
        "against_model"
    ] == {
        "rows": 20,
        "equal": 20,
        "largest": 0.0,
        "wrong": [],
    }


@pytest.mark.fault(15)
def test_plan_is_what_lies_on_disk_in_the_end(small: Line, tmp_path: Path) -> None:
    line = small(tmp_path)
    planned = json.loads(command("plan", *line[1:], "--json").out)["stores"][0]
    assert not tmp_path.joinpath("tiny").exists() and list(tmp_path.iterdir()) == []
    path = command(*line).store
    assert planned["path"] == str(path)
    files = [file for file in path.rglob("*") if file.is_file()]
    shards = [file for file in files if "/c/" in file.as_posix()]
    assert (planned["shards"], planned["shard_bytes"]) == (len(shards), sum(file.stat().st_size for file in shards))
    assert planned["rows"] == {name: rows.source.rows for name, rows in Store.open(path).strata.items()}
    assert sum(file.stat().st_size for file in set(files) - set(shards)) <= planned["other_bytes_at_most"]
    assert planned["exact"] and planned["present_bytes"] == 0
    after = json.loads(command("plan", *line[1:], "--json").out)["stores"][0]
    assert after["present_bytes"] == planned["shard_bytes"]
    large = command("plan", *line[1:], "--tokens", 10**15)
    assert large.code == 2 and "no room" in large.err and "--force" in large.err
    assert command("plan", *line[1:], "--tokens", 10**15, "--force").code == 0
    assert "about 0:00:" in command("plan", *line[1:], "--eta").out


def test_plans_ask_for_no_more_room_than_there_can_be_need_of(small: Line, tmp_path: Path) -> None:
    """A corpus that is known to end; documents apart, whose rows are counted by their tokens; an extension."""

    def planned(line: list[object]) -> dict:
        return json.loads(command("plan", *line[1:], "--json").out)

    text = write_jsonl(tmp_path / "short.jsonl", [{"text": one} for one in texts(16)])
    line = small(tmp_path / "short", "--force", text=text, tokens=900 * BLOCK_TOKENS)
    store = command(*line).store
    (store / STORE).unlink()
    after = planned(line)
    assert after["stores"][0]["shard_bytes"] == after["stores"][0]["present_bytes"]
    assert after["needed_bytes"] < 10**6
    apart = planned(small(tmp_path, "--set", "windows.documents=apart", "--set", "store.keep={}"))["stores"][0]
    joined = planned(small(tmp_path, "--set", "store.keep={}"))["stores"][0]
    assert not apart["exact"] and joined["shard_bytes"] <= apart["shard_bytes"] < 1.1 * joined["shard_bytes"]
    path = command(*small(tmp_path)).store
    assert planned(small(tmp_path, tokens=5 * BLOCK_TOKENS))["stores"][0]["unembedding_bytes_at_most"] == 0
    assert (path / UNEMBEDDING).is_file()


@pytest.mark.fault(1)
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_kills_at_any_time_do_not_show(small: Line, tmp_path: Path) -> None:
    """By the clock, mostly while blocks are made; the last run finishes. At every operation: tests/faults/sweep.py."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": one} for one in texts(400)])
    line, whole = (small(tmp_path / name, text=text, tokens=40 * BLOCK_TOKENS) for name in ("killed", "whole"))
    expected, rng, inside = command(*whole).store, np.random.default_rng(0), 0
    folder = tmp_path / "killed" / expected.name

    def records() -> int:
        return len(list(folder.glob("ledger/*.json")))

    for number in range(5):
        before, process = records(), start(*line)
        began = time.monotonic()
        while number % 4 and records() == before:
            assert process.poll() is None and time.monotonic() - began < 60
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 0.2 if number % 4 else 8)))
        process.kill()
        process.communicate()
        inside += before < records() < 42
    assert not (folder / STORE).exists() and inside >= 2
    assert command(*line).store == folder
    assert contents(folder) == contents(expected)
    assert not [path for path in tmp_path.rglob("*.tmp")]


@pytest.mark.parametrize("shape", ["gemma3", "llama", "qwen2", "gpt2"])
def test_other_models(small: Line, tmp_path: Path, shape: str) -> None:
    from tests.llms import SHAPES

    folder = SHAPES[shape](tmp_path / "model")
    path = command(*small(tmp_path / "cache", model=folder, tokens=1)).store
    request = Store.open(path).request
    assert (request.bos, request.corpus.separator) == (shape != "qwen2", "<eos>")
    found = json.loads(command("verify", path, "--against-model", 10, "--model", folder, "--json").out)
    assert found["against_model"]["equal"] == 10
    assert (path / "unembedding.safetensors").is_file()


def test_sinks_are_told_with_what_to_do(small: Line, tmp_path: Path) -> None:
    """A model whose BOS embedding is enormous: its row at position 0 dwarfs all others."""
    from safetensors.torch import load_file, save_file

    folder = make_gemma(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BOS_ID] *= 1000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = command(*small(tmp_path / "cache", model=folder))
    assert "warning: layer 2: position 0 is an attention sink" in done.err and "store.cap.0=16" in done.err
    assert Store.open(done.store).record.strata[0].source.outlier_rows > 0


def test_many_layers_get_smaller_blocks(small: Line, tmp_path: Path) -> None:
    line = small(tmp_path, "--set", "store.max_block_bytes=200000", layers=(0, 1, 2, 3), tokens=1)
    paths = [Path(name) for name in command(*line).out.splitlines()]
    assert [Store.open(path).request.block_sequences for path in paths] == [8, 8, 8, 8]
    assert 16 * 32 * 32 * 2 * 8 > 200000 >= 8 * 32 * 32 * 2 * 8
