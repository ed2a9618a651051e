"""Redundant latents: costs against dense mathematics in float64, and what was planted is found, and nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from shared.store.store import Store
from tests.bench.planted import Shape, planted_store
from tests.bench.redundancy import Dictionary, Noise, dictionary, judge
from tests.reports import check
from tests.runs import Outcome
from train.data.batches import StoreRows
from train.evaluation.evaluate import evaluate_whole
from train.model.sparse_latents import SparseLatents
from train.redundancy.candidates import CORRELATION, COSINE, JACCARD, SUBSET, candidates
from train.redundancy.groups import LARGEST_SHARE
from train.redundancy.held_rows import Array, held_rows
from train.redundancy.measure_redundancy import measure_redundancy
from train.redundancy.single_latent import Group, best_single, lost_by_one
from train.report.report_record import Report

SHAPE = Shape(d=128, latents=80, active=6.0, pairs=8, noise=0.02, context=3.0, together=0.9)


class Planted(NamedTuple):
    rows: StoreRows
    known: Dictionary


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    store = planted_store(tmp_path_factory.mktemp("planted") / "store", SHAPE, blocks=1, windows=128)
    return Planted(StoreRows(Store.open(store.path)), dictionary(SHAPE, Noise()))


class Dense(NamedTuple):
    """Rows of some blocks in float64, pre-activations rounded to float32."""

    x: Array
    y: Array
    weight: Array
    latents: Array
    """[R, F]"""
    pre_acts: Array


def dense(planted: Planted, blocks: range) -> Dense:
    """All rows but those of position 0, as numpy has them."""
    model, store = planted.known.model, planted.rows.store
    parts = [chunk for chunk in planted.rows.chunks(blocks, torch.device("cpu")) if chunk.stratum != "000-001"]
    x, y = (torch.cat([getattr(one, side) for one in parts]).double().numpy() for side in ("source", "target"))
    natural = [store.strata[one.stratum].stratum for one in parts]
    weight = np.concatenate([np.full(len(one.source), s.natural_rows / s.rows)
                             for one, s in zip(parts, natural, strict=True)])  # fmt: skip
    pre_acts = x @ model.W_enc.detach().double().numpy() + model.b_enc.detach().double().numpy()
    pre_acts = pre_acts.astype(np.float32).astype(np.float64)
    return Dense(x, y, weight, pre_acts * (pre_acts > planted.known.threshold.numpy()), pre_acts)


def error(one: Dense, W_dec: Array, latents: Array) -> float:
    return float(one.weight @ np.square(one.y - latents @ W_dec).sum(1))


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("kind", ["copy", "split", "together"])
def test_what_a_single_latent_costs_is_the_error_with_it_in_the_place_of_the_group(
    planted: Planted, kind: str, refit: bool
) -> None:
    model, record = planted.known.model, planted.rows.store.record
    fit, report = (held_rows(model, planted.rows, blocks, planted.known.threshold, 10**9)
                   for blocks in (record.calibration_blocks, record.report_blocks))  # fmt: skip
    on_fit, on_report = (dense(planted, blocks) for blocks in (record.calibration_blocks, record.report_blocks))
    W_dec = model.W_dec.detach().double().numpy()
    members = np.flatnonzero(planted.known.kind == kind)[:2].tolist()
    group = Group(members, model.W_dec.detach()[members], planted.known.threshold.double().numpy()[members])
    pre_acts = (on_fit.pre_acts[:, members], on_report.pre_acts[:, members]) if refit else None
    cost = best_single(group, fit, report, pre_acts)

    single = cost.single
    assert single.refitted <= refit and (kind != "split" or single.refitted == refit)
    values = [one.pre_acts[:, members] @ single.encoder + single.bias for one in (on_fit, on_report)]
    values = [s * (s > single.threshold) for s in values]
    assert (values[0] > 0) @ on_fit.weight <= (on_fit.latents[:, members] > 0).any(1) @ on_fit.weight * (1 + 1e-9)

    without = on_fit.latents.copy()
    without[:, members] = 0
    left = (on_fit.y - without @ W_dec) * np.sqrt(on_fit.weight)[:, None]
    columns = [np.outer(np.sqrt(on_fit.weight) * values[0], row).ravel() for row in W_dec[members]]
    best = np.linalg.lstsq(np.array(columns).T, left.ravel(), rcond=None)[0]
    np.testing.assert_allclose(single.decoder @ W_dec[members], best @ W_dec[members], atol=1e-3)

    without = on_report.latents.copy()
    without[:, members] = 0
    after = error(on_report, np.vstack([W_dec, single.decoder @ W_dec[members]]), np.column_stack([without, values[1]]))
    before = error(on_report, W_dec, on_report.latents)
    explained = [error(on_report, W_dec, np.where(np.arange(len(W_dec)) == one, 0, on_report.latents)) - before
                 for one in members]  # fmt: skip
    np.testing.assert_allclose(report.explained(model.W_dec.detach())[members], explained, rtol=1e-4)
    assert cost.rise == pytest.approx(after - before, abs=1e-4 * min(explained))
    saved = (on_report.latents[:, members] > 0).sum(1) - (values[1] > 0)
    assert cost.freed == pytest.approx(saved @ on_report.weight)
    variance = on_report.weight @ np.square(on_report.y - on_report.weight @ on_report.y / on_report.weight.sum()).sum(
        1
    )
    assert report.total == pytest.approx(variance)


def test_planted_copies_and_splits_are_redundant_and_nothing_else(planted: Planted) -> None:
    before = {name: one.clone() for name, one in planted.known.model.state_dict().items()}
    found = measure_redundancy(planted.known.model, planted.rows, planted.known.threshold)
    judged = judge(found, planted.known)
    assert judged.precision == 1 and judged.wrong == {}
    assert judged.recall["copy"] >= 0.9 and judged.recall["split"] >= 0.9 and judged.pairs > 10
    assert found.redundant == sum(len(one.latents) - 1 for one in found.groups)
    assert all(one.share <= LARGEST_SHARE for one in found.groups)
    merged = found.merged
    assert merged.fvu == pytest.approx(
        evaluate_whole(planted.known.model, planted.rows, planted.known.threshold).fvu
    )  # of all rows
    assert merged.fvu_rise == pytest.approx(sum(one.fvu_rise for one in found.groups), abs=0.1 * merged.fvu)
    assert merged.l0 - merged.l0_after == pytest.approx(sum(one.freed for one in found.groups), rel=1e-3)
    assert merged.l0_at_equal == pytest.approx(merged.l0, rel=0.02) and merged.l0_after < 0.98 * merged.l0
    assert all(torch.equal(one, before[name]) for name, one in planted.known.model.state_dict().items())


def test_latents_that_are_active_together_are_redundant_only_at_a_larger_share(planted: Planted) -> None:
    found = measure_redundancy(planted.known.model, planted.rows, planted.known.threshold, largest_share=0.4)
    assert judge(found, planted.known).wrong["together"] > SHAPE.pairs / 2


def test_what_one_latent_must_lose_is_the_second_singular_value() -> None:
    rng = np.random.default_rng(0)
    values, rows = np.abs(rng.normal(size=(5, 30, 2))), rng.normal(size=(5, 2, 7))
    values[0, :, 1] = 2 * values[0, :, 0]  # one latent loses nothing
    squares, products = values.transpose(0, 2, 1) @ values, rows @ rows.transpose(0, 2, 1)
    expected = [np.linalg.svd(v @ r)[1][1] ** 2 for v, r in zip(values, rows, strict=True)]
    np.testing.assert_allclose(lost_by_one(squares, products), expected, rtol=1e-6, atol=1e-9)


def test_candidates_are_alike_in_one_of_five_ways() -> None:
    rng = np.random.default_rng(1)
    latents = np.abs(rng.normal(size=(200, 12))) * (rng.random((200, 12)) < 0.3)
    latents[:, 1] = latents[:, 0] * (rng.random(200) < 0.9)  # correlated
    latents[:, 3] = (latents[:, 2] > 0) * (rng.random(200) < 0.2)  # a subset
    latents = latents.astype(np.float32)
    directions = rng.normal(size=(2, 12, 20))
    directions[0, 5] = directions[0, 4] + 0.2 * directions[0, 5]
    directions[1, 7] = directions[1, 6] + 0.2 * directions[1, 7]
    W_dec, W_enc = directions / np.linalg.norm(directions, axis=2, keepdims=True)
    judged, least = [one for one in range(12) if one != 9], 4
    rows, columns = torch.from_numpy(latents).nonzero(as_tuple=True)
    active = SparseLatents.of(rows, columns, torch.from_numpy(latents)[rows, columns], torch.Size(latents.shape))
    rows_of = torch.from_numpy(W_dec), torch.from_numpy(W_enc)
    found = candidates(rows_of[0], rows_of[1], active, torch.tensor(judged), least, "torch")

    expected: dict[str, set[tuple[int, int]]] = {name: set() for name in found.found}
    on = latents > 0
    for i in judged:
        for j in judged[judged.index(i) + 1 :]:
            both = int((on[:, i] & on[:, j]).sum())
            r = np.corrcoef(latents[:, i], latents[:, j])[0, 1]
            together = both >= least and r > 0
            measures = {
                "decoder": W_dec[i] @ W_dec[j] > COSINE,
                "encoder": W_enc[i] @ W_enc[j] > COSINE,
                "correlation": together and r > CORRELATION,
                "jaccard": together and both / (on[:, i] | on[:, j]).sum() > JACCARD,
                "subset": together and both > SUBSET * min(on[:, i].sum(), on[:, j].sum()),
            }
            for name, there in measures.items():
                expected[name] |= {(i, j)} if there else set()
    pairs = list(zip(*(side.tolist() for side in found.pairs), strict=True))
    listed = {name: {pairs[at] for at in one.nonzero().squeeze(1).tolist()} for name, one in found.found.items()}
    assert listed == expected
    planted = {"decoder": (4, 5), "encoder": (6, 7), "correlation": (0, 1), "jaccard": (0, 1), "subset": (2, 3)}
    assert all(pair in listed[name] for name, pair in planted.items())


def test_evaluate_and_report_say_what_is_measured(
    reported: Path, report: Report, command: Callable[..., Outcome]
) -> None:
    found = json.loads(command("evaluate", reported, "--redundancy", "--json").out)["redundancy"]
    assert report.redundancy and found == report.redundancy.model_dump(mode="json")
    assert found["live"] > 0 and found["candidates"]["all"]["pairs"] > 0
    said = check(report, "redundancy")
    assert said.figure == found["redundant"] / (found["live"] - found["not_judged"])
    shown = command("evaluate", reported, "--redundancy").out
    assert "redundant latents" in shown and "at equal l0" in shown
    for name in ("report.html", "report.md"):
        assert f"{found['redundant']}" in (reported / name).read_text().split("edundant latents")[-1]


def test_without_redundant_latents_nothing_is_merged(planted: Planted) -> None:
    found = measure_redundancy(planted.known.model, planted.rows, planted.known.threshold, largest_share=-1e9)
    assert found.groups == [] and found.redundant == 0
    assert found.merged.fvu_rise == found.merged.fvu_rise_at_equal_l0 == 0 and found.merged.l0_after == found.merged.l0
