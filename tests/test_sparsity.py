"""Selection against sorting everything."""

import pytest
import torch

from tests import reference
from train import sparsity


def mask_of(active: sparsity.Active, shape: torch.Size) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[active.rows, active.latents] = True
    return mask


def assert_sorted(active: sparsity.Active) -> None:
    flat = active.rows * active.d_sae + active.latents
    assert (flat.diff() > 0).all()


@pytest.mark.parametrize("guess", [0.0, 0.5, 1.5, 99.0])
@pytest.mark.parametrize("n", [1, 17, 60, 10_000])
def test_batch_topk_keeps_the_largest_whatever_the_guess(guess: float, n: int) -> None:
    pre_acts = torch.randn(9, 21, generator=torch.Generator().manual_seed(n))
    active, smallest = sparsity.batch_topk(pre_acts, n, guess)
    expected = reference.top_of_batch(pre_acts, n)
    assert torch.equal(mask_of(active, pre_acts.shape), expected)
    assert smallest == pre_acts[expected].min()
    assert_sorted(active)


def test_batch_topk_breaks_ties_by_row_order_and_keeps_exactly_n() -> None:
    pre_acts = torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]])
    active, smallest = sparsity.batch_topk(pre_acts, 4, 0.0)
    assert list(zip(active.rows.tolist(), active.latents.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 2), (1, 1)]
    assert smallest == 1.0


def test_batch_topk_of_a_batch_without_positive_entries_is_empty() -> None:
    active, smallest = sparsity.batch_topk(-torch.ones(3, 4), 5, 0.0)
    assert len(active.rows) == 0 and smallest == 0


@pytest.mark.parametrize("k", [1, 4, 21])
def test_topk_keeps_the_largest_of_each_row(k: int) -> None:
    pre_acts = torch.randn(9, 21, generator=torch.Generator().manual_seed(k))
    active = sparsity.topk(pre_acts, k)
    assert torch.equal(mask_of(active, pre_acts.shape), reference.top_of_rows(pre_acts, k))
    assert_sorted(active)


def test_above_is_strict_and_per_latent() -> None:
    pre_acts = torch.tensor([[0.5, 0.5, 0.7], [0.6, 0.4, 0.9]])
    active = sparsity.above(pre_acts, torch.tensor([0.5, 0.4, 0.8]))
    assert torch.equal(mask_of(active, pre_acts.shape), torch.tensor([[False, True, False], [True, False, True]]))


def test_dead_topk_takes_negative_pre_activations_of_dead_latents_only() -> None:
    pre_acts = torch.tensor([[9.0, -3.0, -1.0, -2.0], [9.0, -1.0, -5.0, 4.0]])
    active = sparsity.dead_topk(pre_acts, torch.tensor([1, 2, 3]), 2)
    assert list(zip(active.rows.tolist(), active.latents.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 1), (1, 3)]


def test_grouping_by_latent_is_a_stable_sort_with_offsets() -> None:
    active = sparsity.Active(torch.tensor([0, 0, 1, 2]), torch.tensor([2, 3, 0, 2]), 5)
    order, starts = active.by_latent
    assert order.tolist() == [2, 0, 3, 1]
    assert starts.tolist() == [0, 1, 1, 3, 4, 4]
