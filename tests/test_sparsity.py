"""Selection against sorting everything, by every kind of kernels."""

import math

import pytest
import torch

from tests import reference
from train.model.kernels.base import SparseOps
from train.model.kernels.sparse_ops import sparse_ops
from train.model.sparse_latents import SparseLatents, offsets

COMPILED = sparse_ops("compiled")
KERNELS = pytest.mark.parametrize("ops", ["plain", "compiled", "dense", "triton"], indirect=True)


def mask_of(active: SparseLatents, shape: torch.Size) -> torch.Tensor:
    """The pairs that are active."""
    mask = torch.zeros(shape, dtype=torch.bool)
    on = active.values > 0
    mask[active.rows[on], active.latents[on]] = True
    return mask


def assert_well_formed(active: SparseLatents, pre_acts: torch.Tensor) -> None:
    """Pairs in order, each active one once with its value, and where rows begin."""
    flat = active.rows * active.d_sae + active.latents
    assert (flat.diff() >= 0).all()
    on = active.values > 0
    assert (flat[on].diff() > 0).all()
    assert torch.equal(active.values[on], pre_acts[active.rows[on], active.latents[on]])
    assert active.starts.tolist() == [int((active.rows < row).sum()) for row in range(len(pre_acts) + 1)]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_largest(ops: SparseOps, rows: int, n: int, guess: float) -> None:
    pre_acts = draw(n, rows, 21)
    active, smallest = ops.batch_topk(pre_acts, n, torch.tensor(guess))
    expected = reference.top_of_batch(pre_acts, n)
    assert torch.equal(mask_of(active, pre_acts.shape), expected)
    assert smallest.shape == () and smallest == pre_acts[expected].min()
    assert_well_formed(active, pre_acts)


@KERNELS
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (9, 60), (30, 200), (9, 10_000)])
def test_batch_topk_keeps_the_largest(ops: SparseOps, rows: int, n: int) -> None:
    assert_largest(ops, rows, n, 0.0)


@KERNELS
def test_batch_topk_of_wide_rows(ops: SparseOps) -> None:
    pre_acts = draw(0, 2, 9000)
    active, _ = ops.batch_topk(pre_acts, 300, torch.tensor(0.0))
    assert torch.equal(mask_of(active, pre_acts.shape), reference.top_of_batch(pre_acts, 300))


@pytest.mark.parametrize("rows", [1, 9, 200])
@pytest.mark.parametrize("guess", [0.5, 1.5, 99.0])
@pytest.mark.parametrize("n", [1, 17, 60, 10_000])
def test_compiled_batch_topk_keeps_the_largest_whatever_the_guess(rows: int, guess: float, n: int) -> None:
    assert_largest(COMPILED, rows, n, guess)


@pytest.mark.parametrize("guess", [0.9, 1.6, 99.0, -1.0])
@pytest.mark.parametrize("n", [3, 30])
def test_triton_batch_topk_keeps_the_largest_whatever_the_guess(guess: float, n: int) -> None:
    """Too high, so low that there is no room for what is above it, and in between; in one type and in the other."""
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    assert_largest(sparse_ops("triton"), 5, n, guess)
    low = draw(n, 4, 21).bfloat16()
    active, smallest = sparse_ops("triton").batch_topk(low, n, torch.tensor(guess))
    kept = mask_of(active, low.shape)
    assert int(kept.sum()) == n and smallest == low[kept].min() and not (low[~kept] > smallest).any()
    assert_well_formed(active, low)


def test_compiled_batch_topk_breaks_ties_by_row_order_and_keeps_exactly_n() -> None:
    pre_acts = torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]])
    active, smallest = COMPILED.batch_topk(pre_acts, 4, torch.tensor(0.0))
    assert list(zip(active.rows.tolist(), active.latents.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert smallest == 1.0


@KERNELS
def test_batch_topk_keeps_exactly_n_of_many_ties(ops: SparseOps) -> None:
    pre_acts = draw(0, 30, 40).bfloat16().float().round(decimals=1)
    active, _ = ops.batch_topk(pre_acts, 123, torch.tensor(0.0))
    kept, least = mask_of(active, pre_acts.shape), active.values.min()
    assert int(kept.sum()) == 123 and not (pre_acts[~kept] > least).any()


@KERNELS
def test_batch_topk_of_a_batch_without_positive_entries_has_no_active_pair(ops: SparseOps) -> None:
    active, smallest = ops.batch_topk(-torch.ones(3, 4), 5, torch.tensor(0.0))
    assert not (active.values > 0).any() and smallest == 0


@KERNELS
@pytest.mark.parametrize("k", [1, 4, 21])
@pytest.mark.parametrize("rows", [1, 9, 30])
def test_row_topk_keeps_the_largest_of_each_row(ops: SparseOps, rows: int, k: int) -> None:
    pre_acts = draw(k, rows, 21)
    active = ops.row_topk(pre_acts, k)
    assert torch.equal(mask_of(active, pre_acts.shape), reference.top_of_rows(pre_acts, k))
    assert_well_formed(active, pre_acts)
    assert (active.starts.diff() == k).all()


def test_compiled_row_topk_hands_a_nan_on() -> None:
    pre_acts = draw(0, 70, 12)
    pre_acts[3, 4] = torch.nan
    pre_acts[5] = torch.nan
    active = COMPILED.row_topk(pre_acts, 5)
    assert ((active.latents >= 0) & (active.latents < 12)).all()
    rows_with_nan = active.rows[active.values.isnan()].unique().tolist()
    assert 5 in rows_with_nan and set(rows_with_nan) <= {3, 5}


@KERNELS
def test_one_row(ops: SparseOps) -> None:
    pre_acts = draw(1, 1, 30)
    for active in (ops.row_topk(pre_acts, 6), ops.batch_topk(pre_acts, 6, torch.tensor(0.0))[0]):
        assert torch.equal(mask_of(active, pre_acts.shape), reference.top_of_rows(pre_acts, 6))
        assert active.rows.is_contiguous() and active.latents.is_contiguous()


@KERNELS
def test_row_topk_of_ties_keeps_k(ops: SparseOps) -> None:
    active = ops.row_topk(torch.ones(70, 8), 3)
    assert (active.starts.diff() == 3).all()


@KERNELS
def test_row_topk_among_some_takes_negative_pre_activations_of_these_only(ops: SparseOps) -> None:
    pre_acts = torch.tensor([[9.0, -3.0, -1.0, -2.0], [9.0, -1.0, -5.0, 4.0]])
    active = ops.row_topk(pre_acts, 2, torch.tensor([False, True, True, True]))
    assert list(zip(active.rows.tolist(), active.latents.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 1), (1, 3)]


@KERNELS
@pytest.mark.parametrize("among", [[], [2], [0, 3]])
def test_row_topk_among_fewer_than_k_takes_all_of_them(ops: SparseOps, among: list[int]) -> None:
    pre_acts, mask = draw(0, 5, 4), torch.zeros(4, dtype=torch.bool)
    mask[among] = True
    active = ops.row_topk(pre_acts, 3, mask)
    for row in range(5):
        assert set(among) <= set(active.latents[active.rows == row].tolist())


@KERNELS
@pytest.mark.parametrize("each", [1, 3, 4, 16])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 12])
def test_row_topk_takes_one_for_every_so_many_latents_that_it_is_among(ops: SparseOps, count: int, each: int) -> None:
    pre_acts, mask = draw(count, 7, 20), torch.zeros(20, dtype=torch.bool)
    mask[torch.randperm(20, generator=torch.Generator().manual_seed(each))[:count]] = True
    active = ops.row_topk(pre_acts, 3, mask, each)
    taken = mask[active.latents]
    for row, largest in enumerate(pre_acts.masked_fill(~mask, -torch.inf).argsort(descending=True).tolist()):
        found = active.latents[taken & (active.rows == row)].tolist()
        assert found == sorted(largest[: min(3, math.ceil(count / each))])
    assert torch.equal(active.values[taken], pre_acts[active.rows, active.latents][taken])
    assert (active.starts.diff() == active.starts[1]).all()


@KERNELS
@pytest.mark.parametrize(("rows", "latents"), [(2, 3), (70, 33), (3, 16)])
def test_above_is_strict_and_per_latent(ops: SparseOps, rows: int, latents: int) -> None:
    pre_acts, thresholds = draw(0, rows, latents), draw(1, latents)
    pre_acts[0] = thresholds
    active = ops.above(pre_acts, thresholds)
    assert list(zip(active.rows.tolist(), active.latents.tolist(), strict=True)) == [
        (row, latent) for row in range(rows) for latent in range(latents) if pre_acts[row, latent] > thresholds[latent]
    ]
    assert_well_formed(active.positive(), pre_acts)


@KERNELS
def test_values_that_are_not_numbers_are_not_above(ops: SparseOps) -> None:
    pre_acts = torch.full((3, 20), torch.nan)
    pre_acts[1, 2] = 1
    active = ops.above(pre_acts, torch.zeros(20))
    assert (active.rows.tolist(), active.latents.tolist()) == ([1], [2])


def test_grouping_by_latent_is_a_stable_sort_with_offsets() -> None:
    rows, latents = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 3, 0, 2])
    active = SparseLatents.of(rows, latents, torch.ones(4), torch.Size((3, 5)))
    order, starts = active.by_latent
    assert order.tolist() == [2, 0, 3, 1]
    assert starts.tolist() == [0, 1, 1, 3, 4, 4]


def test_parts_of_the_pairs() -> None:
    pre_acts = draw(3, 12, 10)
    active = sparse_ops("plain").batch_topk(pre_acts, 80, torch.tensor(0.0))[0]
    part, expected = active.slice(slice(3, 9)), mask_of(active, pre_acts.shape)[3:9]
    assert torch.equal(mask_of(part, expected.shape), expected)
    assert_well_formed(part, pre_acts[3:9])
    positive = active.positive()
    assert len(positive.rows) < len(active.rows) and (positive.values > 0).all()
    assert_well_formed(positive, pre_acts)


def test_offsets_count_empty_groups() -> None:
    assert offsets(torch.tensor([1, 1, 4]), 6).tolist() == [0, 0, 2, 2, 2, 3, 3]
