"""The measured shuffle: against a slow reference, on rows in the order of documents, and after a real harvest."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harvest.commands.shuffle_quality import Shuffle, measure, shuffled_share, variance_ratio
from shared.store.reader import RowReader, RowsConfig
from shared.store.store import Store
from tests.llms import command, make_gemma, write_jsonl
from tests.stores import DocumentLayout, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """256 windows of 32 tokens in every block; rows permuted."""
    path = tmp_path_factory.mktemp("shuffle") / "store"
    return Store.open(make_store(path, block_sequences=256, training_blocks=24, held_out_blocks=0).path)


def batch(reader: RowReader, store: Store, step: int, rows: int) -> dict[str, np.ndarray]:
    bits = reader.read(step, "target", np.empty((rows, store.record.d_out), np.uint16))
    return {
        "target": (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64),
        "sequence": reader.read(step, "sequence", np.empty(rows, np.uint32)),
        "offset": reader.read(step, "offset", np.empty(rows, np.uint16)),
    }


def test_figures_equal_a_slow_reference(store: Store) -> None:
    found = measure(store, 1024, seed=1)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=1024), 1)
    documents = np.empty((store.documents.rows, 32), np.int32)
    store.documents.read(0, store.documents.rows, documents)
    means, same, pairs = [], 0, 0
    for step in range(found.batches):
        rows = batch(reader, store, step, 1024)
        means.append(rows["target"].mean(0))
        for place in reader.slices().values():
            owner = [documents[s, t] for s, t in zip(rows["sequence"][place], rows["offset"][place], strict=True)]
            same += sum(a == b for a, b in pairwise(owner))
            pairs += len(owner) - 1
    independent = 0.0
    for name, place in reader.slices().items():
        count = place.stop - place.start
        independent += (count / 1024) ** 2 * store.statistics[name]["target"].variance.sum() / count
    assert found.batches == 186  # an epoch: rows that share one are independent but for a part in thousands
    assert found.ratio["target"] == pytest.approx(np.var(means, axis=0, ddof=1).sum() / independent, rel=1e-3)
    assert found.neighbours == pytest.approx(same / pairs)


@pytest.mark.parametrize(
    ("training_blocks", "settings", "batches"),
    [(8, {}, 128), (8, {"keep": {16: 0.02}}, 128), (1, {}, 128), (24, {}, 186)],
    ids=["two epochs", "forty epochs of the largest", "a store of two batches", "one epoch"],
)
def test_stores_of_every_size_are_measured(tmp_path: Path, training_blocks: int, settings: dict, batches: int) -> None:
    made = make_store(tmp_path / "store", block_sequences=256, training_blocks=training_blocks, **settings)
    found = measure(Store.open(made.path), 1024)
    assert found.batches == batches
    for side in ("source", "target"):
        assert abs(found.ratio[side] - 1) < 4 * found.error[side]
        assert 0 < found.error[side] < 0.15


def test_permuted_rows_are_within_the_limit(store: Store) -> None:
    for rows in (1024, 4096):
        found = measure(store, rows)
        for side in ("source", "target"):
            assert abs(found.ratio[side] - 1) < max(0.1, 4 * found.error[side])
        assert found.neighbours < 0.01 and found.neighbours_expected < 0.01


def measured(path: Path, *, shuffled: bool, deviation: float) -> Shuffle:
    """The shuffle of a store of documents of five windows each."""
    layout = DocumentLayout(tokens=160, deviation=deviation, shuffled=shuffled)
    sizes: dict[str, Any] = {
        "d_in": 64,
        "d_out": 64,
        "block_sequences": 256,
        "training_blocks": 24,
        "held_out_blocks": 0,
    }
    return measure(Store.open(make_store(path, **sizes, documents=layout).path), 1024)


def test_rows_in_order_of_documents_are_found_out(tmp_path: Path) -> None:
    """A run of 64 rows is of one document or two, which decides half of each row's variance."""
    found = measured(tmp_path / "store", shuffled=False, deviation=1.04)
    assert found.neighbours > 0.95 and found.neighbours_expected < 0.01
    assert found.ratio["source"] > 15 and found.ratio["target"] > 10 and not found.good


def test_the_same_documents_shuffled_are_within_the_limit(tmp_path: Path) -> None:
    """Windows permuted over the store, and rows within blocks: of a run's other 63 rows, 63 / 256 are of a window."""
    found = measured(tmp_path / "store", shuffled=True, deviation=0.5)
    decided = 0.5**2 / (0.5**2 + 1.04**2)
    assert found.ratio["source"] == pytest.approx(1 + decided * 63 / 256, abs=4 * found.error["source"])
    assert found.neighbours < 0.01 and found.good


def test_runs_are_shorter_where_blocks_are_small(tmp_path: Path) -> None:
    """Blocks of 16 windows, as of many layers at once: 64 rows of a run come from 16 windows, 5 rows from nearly 5.

    The expectation is an upper bound: rows of a block are drawn without replacement, and batches end within runs.
    """
    layout = DocumentLayout(tokens=160, deviation=0.7, shuffled=True)
    sizes: dict[str, Any] = {
        "d_in": 64,
        "d_out": 64,
        "block_sequences": 16,
        "training_blocks": 384,
        "held_out_blocks": 0,
    }
    store = Store.open(make_store(tmp_path / "store", **sizes, documents=layout).path)
    decided = 0.7**2 / (0.7**2 + 1.04**2)
    long, short = measure(store, 1024, run_rows=64), measure(store, 1024)
    assert (long.run_rows, short.run_rows) == (64, 5)
    assert long.ratio["source"] == pytest.approx(1 + decided * 63 / 16, rel=0.15)
    assert short.ratio["source"] == pytest.approx(1 + decided * 4 / 16, rel=0.05)
    assert not long.good and short.good
    assert 3 <= long.better_run_rows <= 6 and short.better_run_rows == 5
    assert measure(store, 1024, run_rows=long.better_run_rows).good


@pytest.mark.parametrize(
    ("count", "rows", "batches"),
    [(10, 60, 6), (10, 60, 4), (7, 20, 9), (30, 20, 5), (1, 2, 7)],
    ids=["an epoch", "part of one", "batches across epochs", "several epochs a batch", "single rows"],
)
def test_uniform_shuffles_have_the_ratio_one(count: int, rows: int, batches: int) -> None:
    """Streams of permutations, drawn many times: small populations, where the plain variance would be far off."""
    rng, ratios = np.random.default_rng(0), []
    population = rng.normal(size=(rows, 3))
    shuffled = population.var(axis=0).sum() * shuffled_share(count, rows, batches)
    for _ in range(2000):
        stream = np.concatenate([rng.permutation(population) for _ in range(-(-count * batches // rows))])
        means = stream[: count * batches].reshape(batches, count, 3).mean(axis=1)
        ratios.append(variance_ratio(means, shuffled)[0])
    assert np.mean(ratios) == pytest.approx(1, abs=4 * np.std(ratios) / np.sqrt(2000))


def test_within_an_epoch_the_measure_is_that_of_independent_rows() -> None:
    assert shuffled_share(10, 60, 6) == pytest.approx(1 / 10 * 60 / 59)
    assert shuffled_share(10, 60, 3) == pytest.approx(1 / 10 * 60 / 59)


def test_the_error_is_the_spread_of_the_ratio() -> None:
    rng = np.random.default_rng(0)
    found = np.array([variance_ratio(rng.normal(size=(128, 4)), 4.0) for _ in range(500)])
    assert found[:, 0].mean() == pytest.approx(1, abs=0.02)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.1)


def test_batches_that_are_whole_epochs_have_the_ratio_one() -> None:
    assert shuffled_share(20, 20, 5) == shuffled_share(40, 20, 5) == shuffled_share(3, 1, 5) == 0


def test_constant_rows_have_the_ratio_one() -> None:
    assert variance_ratio(np.ones((5, 3)), 0.0) == (1.0, 0.0)


@pytest.mark.slow
def test_a_corpus_that_drifts_is_shuffled_all_the_same(tmp_path: Path) -> None:
    """Documents whose words change slowly along the file, read in their order."""
    rng, words = np.random.default_rng(0), [f"w{i:03d}" for i in range(200)]
    rows = [
        {"text": " ".join(words[int(i / 6 + rng.integers(0, 12)) % 200] for _ in range(rng.integers(40, 200)))}
        for i in range(1200)
    ]
    model = make_gemma(tmp_path / "model")
    text = write_jsonl(tmp_path / "drift.jsonl", rows)
    sizes = ("windows.context_size=64", "store.block_sequences=256", "store.held_out_blocks=1", "text.streaming=true")
    line = ["run", "--model", model, "--text", text, "--cache", tmp_path / "cache"]
    line += ["--layer", 2, "--tokens", 8 * 64 * 256]
    path = command(*line, *(part for size in sizes for part in ("--set", size))).store
    done = command("info", path, "--shuffle", "--json")
    by_size = {found["batch_rows"]: found for found in json.loads(done.out)["shuffle"]}
    assert sorted(by_size) == [1024, 4096]
    for found in by_size.values():
        assert found["good"] and max(found["ratio"].values()) <= 1.10
        assert found["neighbours"] < 0.05
    assert "variance at most 1.10 times that of independent rows: yes" in command("info", path, "--shuffle").out
    assert command("info", path, "--run-rows", 8).code == 2
