"""What is known of each latent, against dense mathematics in float64."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file

from shared.errors import UserError
from tests.reported import DEAD, Reported, reported
from train.duplicates.directions import nearest_directions
from train.report.latents import EFFECTS, LEAST_TOGETHER, NEIGHBOURS, peaks, position_0_share

F, O, VOCABULARY = 64, 24, 61


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Blocks of 16 rows of position 0, of which 4 are stored; the other rows are, all of them."""
    found = reported(tmp_path_factory.mktemp("reported"), keep={0: 0.25}, bos_norm=2.0)
    rng = np.random.default_rng(0)
    tensors = {"W_U": rng.normal(size=(VOCABULARY, O)), "final_norm.gain": rng.normal(size=O) + 2}
    save_file({name: t.astype(np.float32) for name, t in tensors.items()}, found.store.path / "unembedding.safetensors")
    found.store.request = found.store.request.model_copy(update={"unembedding": True})
    return found


@pytest.fixture(scope="module")
def table(run: Reported) -> pa.Table:
    return run.table()


def dense(run: Reported, blocks: range, stratum: str) -> np.ndarray:
    """Activations [R, F] on all stored rows of a stratum; 0 where a latent is not active."""
    size = run.store.strata[stratum].stratum.rows
    rows = run.made.values(f"strata/{stratum}/source")[blocks.start * size : blocks.stop * size]
    pre_acts = run.model.pre_acts(run.model.normalised_source(torch.from_numpy(rows))).double().numpy()
    return np.where(pre_acts > run.threshold.numpy(), pre_acts, 0.0)


def test_there_is_a_row_per_latent_and_a_description_per_column(run: Reported, table: pa.Table) -> None:
    assert table["latent"].to_pylist() == list(range(F))
    assert all(field.metadata[b"description"] for field in table.schema)
    for name in ("prefix", "contexts", "density", "density_004-016", "max", "mean", "bin_edges"):
        assert table[name].to_pylist() == run.latents[name].to_pylist()
    assert [f for f in range(F) if not table["max"][f].is_valid] == DEAD


def test_the_share_of_position_0_is_that_of_all_rows_by_their_natural_numbers(run: Reported, table: pa.Table) -> None:
    blocks = run.store.record.training_blocks
    counts = {
        name: (dense(run, blocks, name) > 0).sum(0) * (4.0 if name == "000-001" else 1.0) for name in run.store.strata
    }
    total = sum(counts.values())
    expected = [float(counts["000-001"][f] / total[f]) if total[f] else None for f in range(F)]
    assert table["position_0_share"].to_pylist() == pytest.approx(expected)
    assert any(share for share in expected) and None in expected


def test_without_a_stratum_of_position_0_alone_its_share_is_not_known(run: Reported) -> None:
    assert position_0_share(run.latents.drop_columns("density_000-001"), run.store).null_count == F


def test_neighbours_by_cosine_are_those_of_live_latents(run: Reported, table: pa.Table) -> None:
    W_dec = run.model.W_dec.detach().double()
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    cosines = (W_dec @ W_dec.T).numpy()
    live = [f for f in range(F) if run.latents["max"][f].is_valid]
    for f, (found, values) in enumerate(
        zip(*(table[n].to_pylist() for n in ("nearest_latents", "nearest_cosines")), strict=True)
    ):
        others = sorted((g for g in live if g != f), key=lambda g: -cosines[f, g])[:NEIGHBOURS]
        assert found == (others if f in live else [])
        assert values == pytest.approx([cosines[f, g] for g in found], abs=1e-6)


@pytest.mark.parametrize("block", [1, 5, 1024])
@pytest.mark.parametrize("live", [[], [3], [3, 8], list(range(0, 20, 2))])
def test_few_live_latents_have_few_neighbours(live: list[int], block: int) -> None:
    rows = torch.nn.functional.normalize(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    latents, cosines = nearest_directions(rows, torch.tensor(live, dtype=torch.int64), 3, "torch", block)
    for f in range(20):
        others = sorted((g for g in live if g != f), key=lambda g: -float(rows[f] @ rows[g]))[:3] if f in live else []
        assert latents[f].tolist() == others + [-1] * (3 - len(others))
        assert cosines[f, : len(others)].tolist() == pytest.approx([float(rows[f] @ rows[g]) for g in others], abs=1e-6)


def test_correlations_are_those_of_held_out_rows_without_position_0(run: Reported, table: pa.Table) -> None:
    blocks = run.store.record.report_blocks
    values = np.concatenate([dense(run, blocks, name) for name in run.store.strata if name != "000-001"])
    together = (values > 0).astype(int).T @ (values > 0).astype(int)
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(values.T)
    listed = 0
    for f in range(F):
        others = [g for g in range(F) if g != f and together[f, g] >= LEAST_TOGETHER and r[f, g] > 0]
        others = sorted(others, key=lambda g: -r[f, g])[:NEIGHBOURS]
        assert table["correlated_latents"][f].as_py() == others
        assert table["correlations"][f].as_py() == pytest.approx([r[f, g] for g in others], abs=1e-6)
        listed += len(others)
    assert listed > F


def test_promoted_and_suppressed_tokens_are_those_of_directions_in_the_targets_units(
    run: Reported, table: pa.Table
) -> None:
    from safetensors.numpy import load_file

    tensors = load_file(run.store.path / "unembedding.safetensors")
    scale = float(run.model.target_scale)
    assert abs(scale - 1) > 0.1  # else the test would not see whether it is used
    directions = run.model.W_dec.detach().double().numpy() * scale
    logits = (directions * tensors["final_norm.gain"].astype(float)) @ tensors["W_U"].astype(float).T
    logits -= logits.mean(1, keepdims=True)
    for name, order in (("promoted", np.argsort(-logits, axis=1)), ("suppressed", np.argsort(logits, axis=1))):
        assert table[name].to_pylist() == order[:, :EFFECTS].tolist()
        expected = np.take_along_axis(logits, order[:, :EFFECTS], 1)
        np.testing.assert_allclose(table[f"{name}_effects"].to_pylist(), expected, atol=1e-5)


@pytest.mark.parametrize("changed", [{"unembedding": False}, {"target_hook": "blocks.3.mlp.hook_post"}])
def test_without_an_unembedding_of_the_target_no_tokens_are_told(
    run: Reported, monkeypatch: pytest.MonkeyPatch, changed: dict
) -> None:
    monkeypatch.setattr(run.store, "request", run.store.request.model_copy(update=changed))
    table = run.table()
    names = ("promoted", "promoted_effects", "suppressed", "suppressed_effects")
    assert [table[name].null_count for name in names] == [F] * 4


def test_a_target_that_is_not_as_wide_as_the_residual_stream_is_refused(run: Reported, tmp_path: Path) -> None:
    file = run.store.path / "unembedding.safetensors"
    before = file.read_bytes()
    save_file({"W_U": np.zeros((9, O + 1), np.float32), "final_norm.gain": np.ones(O + 1, np.float32)}, file)
    try:
        with pytest.raises(UserError, match="only where the target is part of the residual stream"):
            run.table()
    finally:
        file.write_bytes(before)


def test_peaks_are_the_tokens_that_the_top_contexts_peak_at(run: Reported, table: pa.Table) -> None:
    at: dict[int, list[int]] = {f: [] for f in range(F)}
    for row in run.contexts.to_pylist():
        if row["kind"] == "top":
            at[row["latent"]].append(row["tokens"][row["peak"]])
    for f, tokens in at.items():  # a Counter keeps the order of equals, which is that of the contexts
        assert table["peaks"][f].as_py() == [token for token, _ in Counter(tokens).most_common()]
    assert peaks(run.contexts.slice(0, 0), 3).to_pylist() == [[], [], []]


def test_promoted_tokens_are_tokens_of_the_tokenizer(run: Reported, monkeypatch: pytest.MonkeyPatch) -> None:
    run.store.tokenizer.mkdir()
    (run.store.tokenizer / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("train.samples.token_effects.known_tokens", lambda file: list(range(10, 40)))
    table = run.table()
    shutil.rmtree(run.store.tokenizer)
    for name in ("promoted", "suppressed"):
        assert {token for row in table[name].to_pylist() for token in row} <= set(range(10, 40))
