"""Merging while a run trains: planted copies become one latent, what is freed starts anew, and resuming is exact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.store.store import Store
from tests.bench.planted import Shape, planted_store
from tests.bench.redundancy import Noise, dictionary
from tests.runs import SMALL, Outcome, assert_same_run, rows
from tests.stores import SyntheticStore
from train.data.batches import StoreRows
from train.duplicates.diversity import MergeConfig
from train.evaluation.evaluate import calibrate, evaluate_whole
from train.model import checkpoint
from train.model.activations import BatchTopK
from train.redundancy.groups import silence
from train.redundancy.held_rows import held_rows
from train.redundancy.merge_latents import merge_latents, new_latents
from train.run.cadences import merge_steps

SHAPE = Shape(d=128, latents=80, active=6.0, pairs=8, noise=0.02, context=3.0, together=0.9)
MERGE = ["--set", "diversity.merge.at=[0.3, 0.6]", "--set", "diversity.merge.largest_share=1"]


def test_planted_copies_and_splits_are_merged_on_training_rows_and_nothing_else(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", SHAPE, blocks=2, windows=128)
    known, opened = dictionary(SHAPE, Noise()), StoreRows(Store.open(store.path))
    model, blocks = known.model, opened.store.record.training_blocks
    training = held_rows(model, opened, blocks, known.threshold, 10**9)
    model.activation = BatchTopK(k=round(len(training.active.rows) / len(training.weight)))
    before, weights = evaluate_whole(model, opened, calibrate(model, opened)), model.W_dec.detach().clone()

    found = merge_latents(model, opened, blocks, MergeConfig(), seed=0, step=1)
    truth = known.truth.tolist()
    copies = [latent for latent, kind in enumerate(known.kind) if kind in ("copy", "split")]
    assert len(found.freed) >= 0.9 * len(copies) / 2 and {*found.kept, *found.freed} <= set(copies)
    assert sorted(truth[latent] for latent in found.kept) == sorted(truth[latent] for latent in found.freed)
    assert all(kept < freed for kept in found.kept for freed in found.freed if truth[kept] == truth[freed])
    changed = (model.W_dec != weights).any(1).nonzero().squeeze(1).tolist()
    assert changed == sorted([*found.kept, *found.freed])

    now = held_rows(model, opened, opened.store.record.report_blocks, calibrate(model, opened), 10**9)
    assert (now.explained(model.W_dec.detach())[found.freed] > 0).mean() > 0.7  # of use from the start
    silence(model, found.freed)
    after = evaluate_whole(model, opened, calibrate(model, opened))
    assert after.l0 == pytest.approx(before.l0, rel=0.05) and after.fvu < 0.9 * before.fvu  # there is room for others


def test_the_same_arguments_merge_the_same_and_another_step_starts_other_latents(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", SHAPE, blocks=1, windows=64)  # one block: fitted and judged on the same
    opened, found = StoreRows(Store.open(store.path)), []
    blocks = opened.store.record.training_blocks
    for step in (1, 1, 2):
        known = dictionary(SHAPE, Noise())
        known.model.activation = BatchTopK(k=8)
        merged = merge_latents(known.model, opened, blocks, MergeConfig(), seed=0, step=step)
        found.append((merged, known.model.W_dec.detach()))
    (first, weights), (second, again), (third, others) = found
    assert first == second == third and first.freed and torch.equal(weights, again)
    assert not torch.equal(weights[first.freed], others[first.freed])
    assert torch.equal(weights[first.kept], others[first.kept])


def test_new_latents_predict_what_is_left_of_rows_and_of_those_like_them(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", SHAPE, blocks=1, windows=64)
    opened, known = StoreRows(Store.open(store.path)), dictionary(SHAPE, Noise())
    held = held_rows(known.model, opened, opened.store.record.report_blocks, known.threshold, 10**9)
    x, left, weight = held.x.double().numpy(), held.residual.double().numpy(), held.weight
    usual, count = held.active.values.double().mean().item(), len(np.unique(held.active.latents.numpy()))
    for unit in (False, True):
        generator, left_now, drawn = torch.Generator().manual_seed(0), left.copy(), set()
        for encoder, bias, decoder in new_latents(held, 3, 0.2, generator, unit=unit):
            values = x @ encoder.double().numpy() + float(bias)
            at = np.flatnonzero(values > 0.2 + 1e-5)
            assert len(at) == pytest.approx(len(held.active.rows) / count, abs=2)
            assert values[at].mean() == pytest.approx(usual, rel=1e-3)
            cosines = x @ encoder.double().numpy() / np.linalg.norm(x, axis=1) / np.linalg.norm(encoder)
            assert cosines.max() == pytest.approx(1, abs=1e-5)
            drawn.add(int(cosines.argmax()))
            expected = (weight[at] * values[at]) @ left_now[at] / (weight[at] @ values[at] ** 2)
            left_now[at] -= np.outer(values[at], expected)
            expected /= np.linalg.norm(expected) if unit else 1
            np.testing.assert_allclose(decoder, expected, rtol=1e-2, atol=1e-3)
        assert len(drawn) == 3
        assert weight @ np.square(left_now).sum(1) < weight @ np.square(left).sum(1)


@pytest.mark.parametrize(("at", "steps", "expected"), [((0.5, 0.8), 1500, [750, 1200]), ((0.01,), 6, [1]), ((), 9, [])])
def test_steps_are_shares_of_the_run(at: tuple[float, ...], steps: int, expected: list[int]) -> None:
    assert merge_steps(at, steps) == expected


@pytest.mark.parametrize("at", [0.0, 1.0])
def test_a_share_at_an_end_of_the_run_is_refused(at: float) -> None:
    with pytest.raises((UserError, ValueError), match="at"):
        MergeConfig(at=(at,))


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What little a run of a few steps has learned is merged, too."""
    monkeypatch.setattr("train.redundancy.groups.LEAST_ROWS", 2)


@pytest.mark.parametrize("shards", [1, 4])
def test_a_run_that_merges_resumes_bit_for_bit_and_says_what_it_merged(
    command: Callable[..., Outcome], pristine: SyntheticStore, tmp_path: Path, lenient: None, shards: int
) -> None:
    common = ("run", "--store", pristine.path, "--runs", tmp_path, "--steps", 30, *SMALL, *MERGE)
    cadence = (
        "--set",
        "checkpoint.every=7",
        "--set",
        "checkpoint.keep_last=9",
        "--set",
        "log_every=5",
        "--set",
        f"parallel.shards={shards}",
    )
    whole, stopped = (command(*common, *cadence).path for _ in range(2))
    for step in (21, 28, 30):
        shutil.rmtree(checkpoint.folder(stopped, step))
    assert checkpoint.find(stopped).step == 14  # between both merges
    assert command("resume", stopped).code == 0
    assert_same_run(whole, stopped)

    logged = [row.get("merged", {}) for row in rows(whole)]
    assert [list(one) for one in logged] == [[], ["9"], ["9"], ["9", "18"], ["9", "18"], ["9", "18"]]
    merged = logged[-1]
    assert all(freed > 0 for freed in merged.values())
    usage = json.loads((whole / "usage.json").read_text())["components"]["merge"]
    assert (usage["calls"], usage["effect"]) == (2, sum(merged.values()))
    timing = [json.loads(line) for line in (whole / "timing.jsonl").read_text().splitlines()]
    assert "merge_seconds" not in timing[0] and timing[-1]["merge_seconds"] > 0


@pytest.mark.parametrize(("every", "delay"), [(9, 0), (9, 4), (8, 3), (10, 0)])
def test_a_run_resumes_bit_for_bit_from_a_merge_that_meets_a_scan_and_a_report(
    command: Callable[..., Outcome], pristine: SyntheticStore, tmp_path: Path, lenient: None, every: int, delay: int
) -> None:
    values = {
        "diversity.merge.at": [0.45],
        "diversity.merge.largest_share": 1,
        "diversity.mined.cost_share": 1,
        "monitor.cost_share": 1,
        "monitor.every": every,
        "monitor.delay": delay,
        "checkpoint.every": 9,
        "checkpoint.keep_last": 9,
        "samples.rows": 0,
    }
    changes = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    whole = command("run", "--store", pristine.path, "--runs", tmp_path, "--steps", 20, *SMALL, *changes).path
    merged = rows(whole)[-1]["merged"]
    assert list(merged) == ["9"] and merged["9"] > 0

    shutil.copytree(whole, resumed := tmp_path / "resumed")
    for step in (18, 20):
        shutil.rmtree(checkpoint.folder(resumed, step))
    assert checkpoint.find(resumed).step == 9
    assert command("resume", resumed).code == 0
    assert_same_run(whole, resumed)
