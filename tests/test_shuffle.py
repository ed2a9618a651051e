"""The measured shuffle: against a slow reference, on rows in the order of documents, and after a real harvest."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from harvest.shuffle import independent_variance, measure, variance_ratio
from shared.layout import ARRAYS
from shared.reader import RowReader, RowsConfig
from shared.store import Store
from tests.llms import command, make_gemma, write_jsonl
from tests.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """256 windows of 32 tokens in every block; rows permuted."""
    path = tmp_path_factory.mktemp("shuffle") / "store"
    return Store.open(make_store(path, block_sequences=256, training_blocks=8, held_out_blocks=0).path)


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
    largest = reader.slices()["016-032"]
    assert found.batches == 8 * 256 * 16 // (largest.stop - largest.start) == 62
    for step in range(62):
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
    assert independent_variance(store, reader, "target") == pytest.approx(independent)
    assert found.ratio["target"] == pytest.approx(np.var(means, axis=0, ddof=1).sum() / independent, rel=1e-5)
    assert found.neighbours == pytest.approx(same / pairs)


def test_permuted_rows_are_within_the_limit(store: Store) -> None:
    for rows in (1024, 4096):
        found = measure(store, rows)
        for side in ("source", "target"):
            assert abs(found.ratio[side] - 1) < max(0.1, 4 * found.error[side])
        assert found.neighbours < 0.01 and found.neighbours_expected < 0.01


def test_rows_in_order_of_documents_are_not(tmp_path: Path) -> None:
    """The same rows, sorted so that those that resemble each other lie side by side: every run of 64 is of a kind."""
    made = make_store(tmp_path / "store", block_sequences=256, training_blocks=8, held_out_blocks=0)
    for name in ("016-032",):
        for block in range(8):
            folder, rows = made.path / ARRAYS / "strata" / name, 16 * 256
            files = {
                side: np.memmap(folder / side / "c" / str(block) / "0", np.uint16, "r+")
                for side in ("source", "target")
            }
            widths = {"source": 16, "target": 24}
            source = files["source"][: rows * 16].reshape(rows, 16)
            order = np.argsort((source.astype(np.uint32) << 16).view(np.float32)[:, 0])
            for side, data in files.items():
                part = data[: rows * widths[side]].reshape(rows, widths[side])
                part[:] = part[order]
                data.flush()
    found = measure(Store.open(made.path), 1024)
    assert found.ratio["source"] > 3 * found.error["source"] + 1.5
    assert not found.good


@pytest.mark.parametrize("d", [1, 5])
def test_the_estimator_is_unbiased_within_an_epoch(d: int) -> None:
    """Batches that use up a small population: the plain variance would be far too small."""
    rng, ratios = np.random.default_rng(0), []
    population = rng.normal(size=(60, d))
    for _ in range(2000):
        means = rng.permutation(population).reshape(6, 10, d).mean(axis=1)
        ratios.append(variance_ratio(means, population.var(axis=0).sum() / 10)[0])
    assert np.mean(ratios) == pytest.approx(60 / 59, abs=4 * np.std(ratios) / np.sqrt(2000))


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
