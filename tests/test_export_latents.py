"""Exports of what latents do, for Neuronpedia and delphi, against dense mathematics in float64."""

import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import train as api
from shared.store.store import Store
from tests.runs import VALUES, Outcome
from tests.stores import BOS, SyntheticStore, make_store
from train.interchange.delphi import LEAST
from train.run.load_run import LoadedRun, load_run
from train.samples import histograms
from train.samples.parquet import paths, read_contexts, read_latents

Command = Callable[..., Outcome]
F, O, VOCABULARY, BARS = 64, 12, 61, 50


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """A store whose unembedding is of its targets' width; blocks of 16 rows of position 0, of which 4 are stored."""
    found = make_store(
        tmp_path_factory.mktemp("latents") / "store", d_in=O, d_out=O, held_out_blocks=4, keep={0: 0.25},
        tokenizer=True, unembedding=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {"W_U": rng.normal(size=(VOCABULARY, O)), "final_norm.gain": rng.normal(size=O) + 2}
    save_file({name: t.astype(np.float32) for name, t in tensors.items()}, found.path / "unembedding.safetensors")
    return found


@pytest.fixture(scope="module")
def run(made: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = api.load_settings("tiny", VALUES | {"steps": 30, "samples.rows": 100_000})
    return api.train(made.path, settings, tmp_path_factory.mktemp("runs") / "My Run_1")


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="module")
def pairs(loaded: LoadedRun, made: SyntheticStore) -> dict[tuple[int, int], np.ndarray]:
    """Latents [F] float64 of every stored training row, by sequence and column of `tokens`; 0 where not active."""
    store, model = loaded.rows.store, loaded.transcoder
    found = dict[tuple[int, int], np.ndarray]()
    for name, part in store.strata.items():
        size, blocks = part.stratum.rows, loaded.training_blocks
        rows = slice(blocks.start * size, blocks.stop * size)
        x = torch.from_numpy(made.values(f"strata/{name}/source")[rows])
        with torch.no_grad():
            pre = model.pre_acts(model.normalised_source(x)).double().numpy()
        latents = np.where(pre > loaded.threshold.double().numpy(), pre, 0.0)
        where = (made.arrays[f"strata/{name}/{one}"][rows] for one in ("sequence", "offset"))
        found |= {(int(s), int(o)): row for s, o, row in zip(*where, latents, strict=True)}
    return found


@pytest.fixture(scope="module")
def neuronpedia(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, agreements = api.export(run, "neuronpedia", tmp_path_factory.mktemp("out") / "neuronpedia")
    assert agreements == ()
    (place,) = path.glob("*/3-my-run-1")
    return place


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


@pytest.fixture(scope="module")
def features(neuronpedia: Path) -> list[dict[str, Any]]:
    return lines(neuronpedia / "features" / "batch-0.jsonl.gz")


def counted(values: np.ndarray, bars: int = BARS) -> tuple[np.ndarray, np.ndarray]:
    """Heights and centres, a value after the other."""
    low, high = values.min(), values.max()
    heights = np.zeros(bars, int)
    for value in values:
        heights[min(int((value - low) / (high - low) * bars), bars - 1) if high > low else 0] += 1
    return heights, low + (high - low) * (np.arange(bars) + 0.5) / bars


def assert_counts(found: list[float], expected: np.ndarray) -> None:
    """The same but for values at the edge of two bars, which float32 may put into the other."""
    assert sum(found) == expected.sum()
    assert np.abs(np.cumsum(found) - np.cumsum(expected)).max() <= 1


def test_every_latent_has_a_line_in_order_with_its_density_and_decoder_row(
    features: list[dict[str, Any]], loaded: LoadedRun
) -> None:
    assert [one["index"] for one in features] == [str(f) for f in range(F)]
    assert len({tuple(sorted(one)) for one in features}) == 1  # the import takes the first line's fields
    density = read_latents(paths(loaded.path, loaded.step)[1])["density"].to_pylist()
    assert [one["frac_nonzero"] for one in features] == density
    directions = (loaded.transcoder.W_dec.detach().double() * loaded.transcoder.target_scale.double()).numpy()
    for one, direction in zip(features, directions, strict=True):
        np.testing.assert_allclose(one["vector"], direction, atol=1e-5 * np.abs(direction).max())
        order = np.argsort(-direction)[:3]
        assert one["neuron_alignment_indices"] == order.tolist()
        np.testing.assert_allclose(
            one["neuron_alignment_l1"], np.abs(direction[order]) / np.abs(direction).sum(), rtol=1e-5
        )
        assert (one["modelId"], one["layer"], one["hookName"]) == ("synthetic", "3-my-run-1", "blocks.3.hook_mlp_out")


def test_histograms_of_activations_are_those_of_all_stored_rows(
    features: list[dict[str, Any]], pairs: dict[tuple[int, int], np.ndarray]
) -> None:
    dense = np.stack(list(pairs.values()))
    assert (dense > 0).any(0).sum() > F // 2
    for f, one in enumerate(features):
        values = dense[:, f][dense[:, f] > 0]
        if not len(values):
            assert one["freq_hist_data_bar_heights"] == [] and one["maxActApprox"] == 0
            continue
        heights, centres = counted(values)
        assert_counts(one["freq_hist_data_bar_heights"], heights)
        np.testing.assert_allclose(one["freq_hist_data_bar_values"], centres, rtol=1e-5, atol=1e-5)
        assert one["maxActApprox"] == pytest.approx(values.max(), rel=1e-5)


def test_histograms_of_logits_are_those_of_the_whole_vocabulary(
    features: list[dict[str, Any]], loaded: LoadedRun, made: SyntheticStore
) -> None:
    tensors = load_file(made.path / "unembedding.safetensors")
    directions = (loaded.transcoder.W_dec.detach().double() * loaded.transcoder.target_scale.double()).numpy()
    known = loaded.rows.store.tokenizer / "tokenizer.json"
    ids = [i for i in sorted(json.loads(known.read_text())["model"]["vocab"].values()) if i < VOCABULARY]
    logits = ((directions * tensors["final_norm.gain"].astype(float)) @ tensors["W_U"].astype(float).T)[:, ids]
    logits -= logits.mean(1, keepdims=True)
    for one, row in zip(features, logits, strict=True):
        heights, centres = counted(row)
        assert_counts(one["logits_hist_data_bar_heights"], heights)
        np.testing.assert_allclose(one["logits_hist_data_bar_values"], centres, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one["pos_values"], np.sort(row)[::-1][:10], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one["neg_values"], np.sort(row)[:10], rtol=1e-4, atol=1e-5)


def test_neighbours_are_those_by_cosine_of_decoder_rows(features: list[dict[str, Any]], loaded: LoadedRun) -> None:
    rows = torch.nn.functional.normalize(loaded.transcoder.W_dec.detach().double(), dim=1).numpy()
    live = [f for f in range(F) if features[f]["maxActApprox"]]
    for f, one in enumerate(features):
        cosines = sorted((float(rows[f] @ rows[g]) for g in live if g != f), reverse=True)[:10] if f in live else []
        np.testing.assert_allclose(one["topkCosSimValues"], cosines, atol=1e-5)
        np.testing.assert_allclose([rows[f] @ rows[g] for g in one["topkCosSimIndices"]], cosines, atol=1e-5)


def test_contexts_are_those_of_the_samples(
    neuronpedia: Path, loaded: LoadedRun, pairs: dict[tuple[int, int], np.ndarray]
) -> None:
    contexts_file, latents_file = paths(loaded.path, loaded.step)
    found, expected = lines(neuronpedia / "activations" / "batch-0.jsonl.gz"), read_contexts(contexts_file).to_pylist()
    edges = read_latents(latents_file)["bin_edges"].to_pylist()
    dense = np.stack(list(pairs.values()))
    assert len({one["id"] for one in found}) == len(found) == len(expected) > F
    for one, row in zip(found, expected, strict=True):
        f, values = row["latent"], [value or 0.0 for value in row["activations"]]
        assert (one["index"], one["tokens"], one["qualifyingTokenIndex"]) == (str(f), row["text"], row["peak"])
        np.testing.assert_allclose(one["values"], values, rtol=1e-6)
        assert one["maxValue"] == pytest.approx(max(values), rel=1e-6) and one["minValue"] == min(values)
        assert one["maxValueTokenIndex"] == values.index(max(values))
        if row["bin"] is None:
            assert (one["binMin"], one["binContains"]) == (-1, -1)
            assert one["binMax"] == pytest.approx(dense[:, f].max(), rel=1e-5)
            continue
        low, high = edges[f][row["bin"] : row["bin"] + 2]
        assert (one["binMin"], one["binMax"]) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
        share = ((dense[:, f] >= low * (1 - 1e-6)) & (dense[:, f] <= high * (1 + 1e-6))).mean()
        assert one["binContains"] == pytest.approx(share, abs=2 / len(dense))


def test_a_value_that_all_have_is_in_the_first_bar() -> None:
    found = histograms.of_activations(np.array([0, 3, 3, 5]), np.array([2, 2, 2, 1, 3], np.float32), 4)
    assert found.heights.tolist() == [[3, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert found.centres[2].tolist() == [1.25, 1.75, 2.25, 2.75]


@pytest.mark.parametrize("block", [1, 2**10, 2**24])
def test_logits_do_not_depend_on_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "_BLOCK_VALUES", block)
    rng = np.random.default_rng(1)
    directions, W, ids = rng.normal(size=(30, 8)), rng.normal(size=(100, 8)), np.arange(100) * 3
    found = histograms.of_logits(torch.from_numpy(directions), ids, W, 5)
    logits = directions @ W.T
    logits -= logits.mean(1, keepdims=True)
    assert (found.promoted == np.argsort(-logits, axis=1)[:, :5] * 3).all()
    assert (found.suppressed == np.argsort(logits, axis=1)[:, :5] * 3).all()
    for f in range(30):
        assert (found.histograms.heights[f] == counted(logits[f])[0]).all()


def test_a_cache_for_delphi_holds_every_active_pair_once(
    command: Command, run: Path, loaded: LoadedRun, pairs: dict[tuple[int, int], np.ndarray], tmp_path: Path
) -> None:
    done = command("export", run, "--format", "delphi", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    place = tmp_path / "out" / "latents" / "layers.3.mlp"
    store = Store.open(loaded.rows.store.path)
    first = loaded.training_blocks.start * store.request.block_sequences
    count = len(loaded.training_blocks) * store.request.block_sequences
    tokens = np.empty((count, store.request.context_size), np.int32)
    store.tokens.read(first, first + count, tokens)
    dense = np.zeros((*tokens.shape, F))
    for (sequence, offset), row in pairs.items():
        dense[sequence - first, offset] = row
    found, files = (
        np.zeros_like(dense),
        sorted(place.glob("*.safetensors"), key=lambda one: int(one.stem.split("_")[0])),
    )
    ends = [tuple(map(int, file.stem.split("_"))) for file in files]
    assert ends[0][0] == 0 and ends[-1][1] == F - 1 and len(files) == 5
    assert all(low[1] + 1 == high[0] for low, high in pairwise(ends))
    for file, (start, end) in zip(files, ends, strict=True):
        part = load_file(file)
        assert part["locations"].dtype == np.uint16 and part["activations"].dtype == np.float16
        assert part["locations"][:, 2].max() <= end - start and len(part["locations"])
        assert ("tokens" in part) == (start == 0)
        at = (*part["locations"][:, :2].astype(int).T, part["locations"][:, 2].astype(int) + start)
        assert not found[at].any()
        found[at] = part["activations"]
    assert (load_file(files[0])["tokens"] == tokens).all() and (tokens[:, 0] == BOS).all()
    expected = np.where(dense > LEAST, dense, 0.0)
    np.testing.assert_allclose(found, expected, rtol=2**-10, atol=1e-7)
    config = json.loads((place / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_tokens"], config["n_splits"]) == (tokens.shape[1], tokens.size, 5)


def test_what_latents_do_cannot_be_exported_without_samples_or_by_prefix(
    command: Command, made: SyntheticStore, run: Path, tmp_path: Path
) -> None:
    settings = api.load_settings("tiny", VALUES | {"steps": 20, "samples.rows": 0})
    bare = api.train(made.path, settings, tmp_path / "bare")
    done = command("export", bare, "--format", "neuronpedia", "--out", tmp_path / "out")
    assert done.code == 2 and f"has no samples of step 20; make them with: python -m train samples {bare}" in done.err
    assert done.err.splitlines()[-1].startswith("error: ") and done.err.count("error:") == 1
    for kind in ("neuronpedia", "delphi"):
        done = command("export", run, "--format", kind, "--prefix", 16, "--out", tmp_path / "out")
        assert done.code == 2 and "--prefix is for formats that hold weights" in done.err
        done = command("export", run, run, "--format", kind, "--out", tmp_path / "out")
        assert done.code == 2 and "takes one run, got 2" in done.err
    assert not (tmp_path / "out").exists()


def test_twice_the_same_bytes(run: Path, neuronpedia: Path, tmp_path: Path) -> None:
    again = api.export(run, "neuronpedia", tmp_path / "out").path / "synthetic" / neuronpedia.name
    for file in (one for one in neuronpedia.rglob("*") if one.is_file()):
        assert (again / file.relative_to(neuronpedia)).read_bytes() == file.read_bytes()
