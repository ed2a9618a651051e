"""The planted store holds sums of its dictionary's rows, and the measure of recovery agrees with a plain count."""

from pathlib import Path

import numpy as np
import pytest

from tests.bench.planted import Found, Planted, Shape, Truth, compare, planted_store
from tests.stores import make_strata

SHAPE = Shape(d=24, latents=60, active=4.0, pairs=6, noise=0.0)


def test_rows_are_sums_of_true_directions(tmp_path: Path) -> None:
    store = planted_store(tmp_path / "store", SHAPE, blocks=2, windows=16)
    again, truth = Planted(SHAPE), SHAPE.truth(0)
    strata = make_strata(store.record.request)
    read = dict.fromkeys((s.name for s in strata), 0)
    for _ in range(store.record.blocks):
        for stratum in strata:
            codes = again.codes(stratum.rows)
            again.rng.standard_normal((stratum.rows, SHAPE.d), np.float32)  # the noise, which is 0
            rows = slice(read[stratum.name], read[stratum.name] + stratum.rows)
            read[stratum.name] = rows.stop
            for side, directions in (("source", truth.source), ("target", truth.target)):
                expected = np.zeros((stratum.rows, SHAPE.d))
                for row, latent in zip(*codes.nonzero(), strict=True):
                    expected[row] += codes[row, latent] * directions[latent]
                if stratum.start == 0:
                    expected += again.dense[side]
                stored = store.values(f"strata/{stratum.name}/{side}")[rows]
                np.testing.assert_allclose(stored, expected, atol=0.04)  # bfloat16 of values below 8


def test_codes_have_the_frequencies_and_the_structure_that_they_are_drawn_for() -> None:
    truth, codes = SHAPE.truth(0), Planted(SHAPE).codes(60_000)
    fires = codes > 0
    np.testing.assert_allclose(fires.mean(0), truth.rates, rtol=0.15)
    assert fires.sum(1).mean() == pytest.approx(SHAPE.active, rel=0.02)
    assert truth.rates.max() > 8 * truth.rates.min()
    parent, child = truth.families.T
    assert not (fires[:, child] & ~fires[:, parent]).any()
    correlation = np.atleast_2d(np.corrcoef(codes.T))
    assert all(0.6 < correlation[first, second] < 0.8 for first, second in truth.together)
    assert np.abs(np.einsum("co,co->c", *truth.target[truth.together.T])).max() < 0.7


def test_the_true_dictionary_is_recovered_whole_and_known_duplicates_are_counted() -> None:
    truth = SHAPE.truth(0)
    near = truth.target[[3, 3, 8]] + 0.01
    junk = -truth.target[:2]
    learned = np.concatenate([truth.target, near / np.linalg.norm(near, axis=1, keepdims=True), junk])
    found = compare(learned, truth)
    assert found.mmcs == pytest.approx(1.0)
    assert found == Found(
        recovered=1.0, rare_recovered=1.0, together_recovered=1.0, families_recovered=1.0,
        duplicated=2, spare=3, other=2, mmcs=found.mmcs,
    )  # fmt: skip


def test_the_measure_agrees_with_a_plain_count() -> None:
    truth, rng = SHAPE.truth(0), np.random.default_rng(3)
    learned = truth.target[rng.integers(0, 60, 90)] + 0.1 * rng.normal(size=(90, SHAPE.d))
    learned = (learned / np.linalg.norm(learned, axis=1, keepdims=True)).astype(np.float32)
    found, times, best = compare(learned, truth), [0] * 60, [-1.0] * 60
    for latent in range(60):
        for row in learned:
            cosine = float(np.dot(truth.target[latent], row))
            times[latent] += cosine > 0.9
            best[latent] = max(best[latent], cosine)
    assert found.recovered == sum(n > 0 for n in times) / 60 and 0 < found.recovered < 1
    assert found.duplicated == sum(n > 1 for n in times) > 0
    assert found.spare == sum(n - 1 for n in times if n) and found.mmcs == pytest.approx(np.mean(best))
    assert found.together_recovered == _both(times, truth, "together")
    assert found.families_recovered == _both(times, truth, "families")
    rarest = sorted(range(60), key=lambda latent: truth.rates[latent])[:15]
    assert found.rare_recovered == sum(times[latent] > 0 for latent in rarest) / 15


def _both(times: list[int], truth: Truth, pairs: str) -> float:
    whole = [times[one] > 0 and times[other] > 0 for one, other in getattr(truth, pairs).tolist()]
    return sum(whole) / len(whole)
