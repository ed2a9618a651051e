"""Held-out figures against the formulas over all rows at once, in float64."""

import math
from pathlib import Path

import pytest
import torch

from shared.store.store import Store
from tests import reference
from tests.stores import make_store
from train.data.batches import StoreRows
from train.evaluation import linear_baseline
from train.evaluation.evaluate import Sums, calibrate, evaluate, natural_weights, ratio
from train.model.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig

CPU = torch.device("cpu")
F, K, PREFIXES = 64, 6, (4, 16, 64)


def make_model(store: Store, activation: Activation) -> Transcoder:
    overall = store.statistics["overall"]
    normalisation = Normalisation(
        torch.from_numpy(overall["source"].mean).float(), 1.5, torch.from_numpy(overall["target"].mean).float(), 0.7
    )
    config = TranscoderConfig(d_sae=F, prefixes=PREFIXES).resolve(store.record.d_in, activation)
    model = Transcoder(store.record.d_in, store.record.d_out, config, activation, normalisation)
    model.initialise(1)
    return model


def rows_of(model: Transcoder, store: Store, blocks: range) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Normalised rows of each stratum in float64."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for chunk in StoreRows(store, 10**9).chunks(blocks, CPU):
        x, y = model.normalised(chunk.source, chunk.target)
        found[chunk.stratum] = x.double(), y.double()
    return found


def dense(
    model: Transcoder, x: torch.Tensor, threshold: torch.Tensor, prefix: int
) -> tuple[torch.Tensor, torch.Tensor]:
    pre_acts = x @ model.W_enc.detach().double() + model.b_enc.detach().double()
    latents = (pre_acts * (pre_acts > threshold))[:, :prefix]
    return latents @ model.W_dec.detach().double()[:prefix] + model.b_dec.detach().double(), latents


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(make_store(tmp_path / "store", keep={0: 0.5, 4: 0.3, 16: 0.6}, held_out_blocks=4).path)


def test_fvu_explained_variance_and_l0_equal_the_formulas_at_natural_frequencies(store: Store) -> None:
    model, threshold = make_model(store, BatchTopK(k=K)), torch.full((F,), 0.8)
    found = evaluate(model, StoreRows(store, 37), threshold, seed=0)
    rows, weights = rows_of(model, store, store.record.report_blocks), natural_weights(store)
    assert weights["000-001"] == 0 and weights["004-016"] > 1
    for i, size in enumerate(PREFIXES):
        error = total = unexplained = 0.0
        n = sum(weights[name] * len(x) for name, (x, _) in rows.items())
        mean_y = sum(weights[name] * y.sum(0) for name, (_, y) in rows.items()) / n
        residuals = {name: y - dense(model, x, threshold, size)[0] for name, (x, y) in rows.items()}
        mean_r = sum(weights[name] * r.sum(0) for name, r in residuals.items()) / n
        for name, (_, y) in rows.items():
            error += weights[name] * float((residuals[name] ** 2).sum())
            total += weights[name] * float(((y - mean_y) ** 2).sum())
            unexplained += weights[name] * float(((residuals[name] - mean_r) ** 2).sum())
        part = list(found.prefixes.values())[i]
        assert part.fvu == pytest.approx(error / total, rel=1e-5)
        assert part.explained_variance == pytest.approx(1 - unexplained / total, rel=1e-5)
    assert (found.fvu, found.l0) == (found.prefixes[64].fvu, found.prefixes[64].l0)
    fired = torch.zeros(F, dtype=torch.bool)
    for name, (x, y) in rows.items():
        guess, latents = dense(model, x, threshold, F)
        fired |= (latents > 0).any(0)
        if name != "000-001":  # one constant row: no variance
            assert found.strata[name].fvu == pytest.approx(reference.fvu(y, guess), rel=1e-5)
        assert found.strata[name].l0 == pytest.approx(float((latents > 0).sum(1).double().mean()))
        for size, of_stratum in found.strata[name].prefixes.items():
            assert of_stratum.l0 == pytest.approx(float((latents[:, :size] > 0).sum(1).double().mean()))
    assert found.dead_share == pytest.approx(1 - float(fired.double().mean()))
    assert found.rows == sum(len(x) for x, _ in rows.values())


def test_an_autoencoder_of_the_targets_is_measured_on_targets_alone(store: Store) -> None:
    activation = BatchTopK(k=K)
    mean = torch.from_numpy(store.statistics["overall"]["target"].mean).float()
    config = TranscoderConfig(d_sae=F, prefixes=PREFIXES).resolve(24, activation)
    model = Transcoder(24, 24, config, activation, Normalisation(mean, 0.7, mean, 0.7))
    model.initialise(1)
    threshold = calibrate(model, StoreRows(store, 37, "target"))
    found = evaluate(model, StoreRows(store, 37, "target"), threshold, seed=0)
    weights, error, total, blocks = natural_weights(store), 0.0, 0.0, store.record.report_blocks
    rows = {c.stratum: ((c.target - mean) / 0.7).double() for c in StoreRows(store, 10**9).chunks(blocks, CPU)}
    n = sum(weights[name] * len(y) for name, y in rows.items())
    mean_y = sum(weights[name] * y.sum(0) for name, y in rows.items()) / n
    for name, y in rows.items():
        error += weights[name] * float((y - dense(model, y, threshold, F)[0]).square().sum())
        total += weights[name] * float((y - mean_y).square().sum())
    assert found.fvu == pytest.approx(error / total, rel=1e-5)
    assert found.l0_training_rule == pytest.approx(K, rel=0.15)
    assert linear_baseline.linear_map_fvu(StoreRows(store, 50, "target"), CPU) == pytest.approx(0, abs=1e-9)


def test_the_calibrated_threshold_gives_k_active_latents_on_the_calibration_blocks(store: Store) -> None:
    for activation in (BatchTopK(k=K), TopK(k=K)):
        model = make_model(store, activation)
        threshold = calibrate(model, StoreRows(store, 37))
        assert threshold.dtype == torch.float32 and (threshold == threshold[0]).all()
        weights, rows = natural_weights(store), rows_of(model, store, store.record.calibration_blocks)
        n = sum(weights[name] * len(x) for name, (x, _) in rows.items())
        active = sum(weights[s] * float((dense(model, x, threshold, F)[1] > 0).sum()) for s, (x, _) in rows.items())
        assert active / n == pytest.approx(K, abs=2 * max(weights.values()) / n)


def test_a_share_of_the_calibration_rows_is_the_first_of_every_stratum_at_the_same_weights(store: Store) -> None:
    model, weights = make_model(store, BatchTopK(k=K)), natural_weights(store)
    whole = {
        name: rows for name, rows in rows_of(model, store, store.record.calibration_blocks).items() if weights[name]
    }
    share = 100 / sum(len(x) for x, _ in whole.values())
    taken = {name: math.ceil(share * len(x)) for name, (x, _) in whole.items()}
    threshold = calibrate(model, StoreRows(store, 37), most=100)
    n = active = 0.0
    for name, (x, _) in whole.items():
        weight = weights[name] * len(x) / taken[name]
        n += weight * taken[name]
        active += weight * float((dense(model, x[: taken[name]], threshold, F)[1] > 0).sum())
    assert active / n == pytest.approx(K, abs=4 * max(weights.values()) * len(x) / taken[name] / n)
    assert not torch.equal(threshold, calibrate(model, StoreRows(store, 37)))
    assert torch.equal(calibrate(model, StoreRows(store, 37), most=10**6), calibrate(model, StoreRows(store, 37)))


def test_other_activations_bring_their_own_thresholds(store: Store) -> None:
    jump = make_model(store, JumpReLU(initial_threshold=0.25))
    torch.testing.assert_close(calibrate(jump, StoreRows(store, 64)), torch.full((F,), 0.25))
    assert not calibrate(make_model(store, ReLU()), StoreRows(store, 64)).any()


def test_the_training_rule_is_k_per_row_and_reported_beside_the_threshold(store: Store) -> None:
    model = make_model(store, TopK(k=K))
    found = evaluate(model, StoreRows(store, 64), torch.full((F,), 0.2), seed=0)
    assert found.l0_training_rule == pytest.approx(K)
    assert found.l0 > K + 1
    batch = evaluate(make_model(store, BatchTopK(k=K)), StoreRows(store, 64), torch.full((F,), 0.2), seed=0)
    assert batch.l0_training_rule == pytest.approx(K, rel=0.15)


def test_evaluation_changes_nothing(store: Store) -> None:
    model = make_model(store, BatchTopK(k=K))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    guess = model._guess
    first = evaluate(model, StoreRows(store, 64), calibrate(model, StoreRows(store, 64)), seed=0)
    assert first == evaluate(model, StoreRows(store, 64), calibrate(model, StoreRows(store, 64)), seed=0)
    assert model._guess == guess and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("error", "total", "expected"), [(1.0, 4.0, 0.25), (0.0, 0.0, 0.0), (2.0, 1e-13, 1.0)])
def test_a_quotient_without_variance_is_defined(error: float, total: float, expected: float) -> None:
    assert ratio(error, total, 1.0) == expected


def test_a_stratum_whose_target_is_constant_has_no_fvu(store: Store) -> None:
    """Position 0 of the store is one row; what of it is not explained is its relative error."""
    model = make_model(store, BatchTopK(k=K))
    rows = StoreRows(store, 37)
    found = evaluate(model, rows, calibrate(model, rows), seed=0).strata
    at_0 = found.pop("000-001")
    assert (at_0.fvu, at_0.explained_variance) == (None, None) and (at_0.relative_error or 0) > 0
    assert {part.fvu for part in at_0.prefixes.values()} == {None}
    assert all(part.fvu is not None and part.explained_variance is not None for part in found.values())


def test_a_constant_target_has_fvu_0_or_1(store: Store) -> None:
    constant = torch.full((5, 3), 7.1)
    exact = Sums.of(constant, constant.unsqueeze(1), torch.zeros(1)).part(0)
    assert (exact.fvu, exact.explained_variance) == (0.0, 1.0)
    off = Sums.of(constant, constant.unsqueeze(1) + 1, torch.zeros(1)).part(0)
    assert (off.fvu, off.explained_variance) == (1.0, 1.0)  # a constant error is no unexplained variance


def test_the_linear_map_is_the_weighted_least_squares_fit(store: Store) -> None:
    model, weights = make_model(store, BatchTopK(k=K)), natural_weights(store)

    def stack(blocks: range) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = [(x, y, weights[s]) for s, (x, y) in rows_of(model, store, blocks).items() if weights[s]]
        w = torch.cat([torch.full((len(x), 1), weight).double() for x, _, weight in rows])
        return torch.cat([x for x, _, _ in rows]), torch.cat([y for _, y, _ in rows]), w

    x, y, w = stack(store.record.training_blocks)
    fit = torch.linalg.lstsq(w.sqrt() * torch.cat([x, torch.ones(len(x), 1)], 1), w.sqrt() * y).solution
    x, y, w = stack(store.record.report_blocks)
    error = y - torch.cat([x, torch.ones(len(x), 1)], 1) @ fit
    expected = float((w * error**2).sum() / (w * (y - (w * y).sum(0) / w.sum()) ** 2).sum())
    assert linear_baseline.linear_map_fvu(StoreRows(store, 50), CPU) == pytest.approx(expected, rel=1e-6)
