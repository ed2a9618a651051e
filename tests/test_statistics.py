import numpy as np
import pytest

from shared.store.statistics import BINS, QUANTILES, Moments, merge, moments_of

BIN = 2 ** (1 / 64)  # bins are 1/64 octave wide


def reference(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population variance in extended precision."""
    exact = rows.astype(np.longdouble)
    return exact.mean(axis=0), exact.var(axis=0)


def heavy_tailed(n: int, d: int = 7, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * rng.lognormal(size=(n, 1)) + rng.normal(size=d)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 2, 100, 4095, 4096, 4097, 10_000])
def test_moments_equal_numpy(n):
    rows = heavy_tailed(n)
    mean, variance = reference(rows)
    moments = moments_of(rows)
    assert moments.rows == n
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.variance, variance, rtol=1e-6, atol=1e-6)
    squared = np.square(rows.astype(np.float64)).sum(axis=1)
    assert moments.mean_squared_norm == pytest.approx(squared.mean(), rel=1e-6)
    assert moments.norms.sum() == n


@pytest.mark.parametrize("cuts", [[], [1], [500], [0, 3, 3, 700, 1000], list(range(0, 1000, 7))])
def test_merged_parts_equal_the_whole(cuts):
    rows = heavy_tailed(1000)
    whole, merged = moments_of(rows), merge([moments_of(part) for part in np.split(rows, cuts)])
    assert merged.rows == 1000
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=2e-6)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=2e-6)
    assert (merged.norms == whole.norms).all()


def test_merging_is_repeatable_and_almost_independent_of_the_order():
    parts = [moments_of(part) for part in np.split(heavy_tailed(999), 9)]
    forth, again, back = merge(parts), merge(parts), merge(parts[::-1])
    assert forth.mean.tobytes() == again.mean.tobytes()
    assert forth.m2.tobytes() == again.m2.tobytes()
    np.testing.assert_allclose(forth.variance, back.variance, rtol=1e-12)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_empty_part_changes_nothing(position):
    parts = [moments_of(part) for part in np.split(heavy_tailed(100), [40])]
    expected = merge(parts)
    merged = merge([*parts[:position], moments_of(np.zeros((0, 7), np.float32)), *parts[position:]])
    np.testing.assert_array_equal(merged.mean, expected.mean)
    np.testing.assert_array_equal(merged.m2, expected.m2)


def test_no_rows_at_all():
    empty = moments_of(np.zeros((0, 3), np.float32))
    for moments in (empty, merge([empty, empty])):
        assert moments.rows == 0
        assert moments.mean.tolist() == moments.variance.tolist() == [0, 0, 0]
        assert moments.mean_squared_norm == moments.mean_to_deviation == moments.norm_quantile(0.5) == 0


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
def test_a_mean_far_above_the_deviation_keeps_its_variance(ratio):
    """The naive E[x^2] - E[x]^2 in fp32 loses all of it from 1e4 on."""
    rng = np.random.default_rng(1)
    rows = (ratio + rng.normal(size=(20_000, 4))).astype(np.float32)
    _, variance = reference(rows)
    merged = merge([moments_of(part) for part in np.split(rows, 8)])
    np.testing.assert_allclose(merged.variance, variance, rtol=1e-5)
    assert merged.mean_to_deviation == pytest.approx(ratio, rel=0.05)


@pytest.mark.fault(34)
def test_constant_rows_have_no_variance():
    rows = np.full((5000, 3), 0.1, np.float32)
    moments = merge([moments_of(rows), moments_of(rows[:7])])
    assert (moments.variance < 1e-12).all()
    np.testing.assert_allclose(moments.mean, np.float64(np.float32(0.1)), rtol=2e-6)
    assert np.isfinite(moments.mean_to_deviation)
    assert moments.mean_to_deviation > 1e5


def test_weights_count_rows_several_times():
    first, second = np.split(heavy_tailed(300), [100])
    weighted = merge([moments_of(first).scaled(3.0), moments_of(second)])
    repeated = moments_of(np.concatenate([first, first, first, second]))
    assert weighted.rows == 500
    np.testing.assert_allclose(weighted.mean, repeated.mean, rtol=2e-6)
    np.testing.assert_allclose(weighted.variance, repeated.variance, rtol=2e-6)
    np.testing.assert_allclose(weighted.norms, repeated.norms)


@pytest.mark.parametrize("share", QUANTILES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_quantiles_are_within_1_1_percent(share, scale):
    rows = heavy_tailed(5000) * np.float32(scale)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    exact = np.quantile(norms, share, method="inverted_cdf")
    assert moments_of(rows).norm_quantile(share) == pytest.approx(exact, rel=0.011)


def test_norms_beyond_the_histogram_fall_into_its_ends():
    rows = np.array([[0.0], [1e-30], [1e30]], np.float32)
    norms = moments_of(rows).norms
    assert (norms[0], norms[-1], norms.sum()) == (2, 1, 3)
    assert len(norms) == BINS


def test_outliers_are_counted():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(10_000, 50)).astype(np.float32)
    rows[:37] *= 30
    moments = merge([moments_of(part) for part in np.split(rows, 4)])
    assert moments.rows_above(10 * moments.norm_quantile(0.5)) == 37


def test_rows_above_counts_whole_bins():
    moments = moments_of(np.array([[1.0], [2.0], [4.0], [8.0]], np.float32))
    assert [moments.rows_above(norm) for norm in (0.5, 1.0, 3.0, 4.0 * BIN**-1.5, 8.0, 100.0)] == [4, 3, 2, 2, 0, 0]


def test_float64_is_kept_throughout():
    moments = moments_of(heavy_tailed(10))
    assert isinstance(moments, Moments)
    assert {moments.mean.dtype, moments.m2.dtype, moments.norms.dtype} == {np.dtype(np.float64)}
