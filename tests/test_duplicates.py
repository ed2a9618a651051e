"""Directions and activations that are the same, against dense float64 mathematics."""

import numpy as np
import pytest
import torch

from train.duplicates.co_activation import (
    _dense,
    _Products,
    co_activation_loss,
    correlated_pairs,
    mass,
    measure,
    most_correlated,
    position_loss,
)
from train.duplicates.directions import (
    Pairs,
    chunk,
    close_pairs,
    connected,
    direction_loss,
    nearest,
    nearest_cosines,
)
from train.model.sparse_latents import SparseLatents

F, O, R = 40, 6, 60


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(seed: int = 0) -> torch.Tensor:
    rows = draw(F, O, seed=seed)
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_close_pairs_are_all_above_the_floor_among_the_latents(block: int) -> None:
    W_dec, latents = unit_rows(), torch.arange(3, F, 2)
    pairs, cosines = close_pairs(W_dec, latents, 0.4, "torch", block)
    dense = W_dec @ W_dec.T
    expected = [(i, j) for i in range(F) for j in range(i + 1, F) if dense[i, j] > 0.4 and i % 2 and j % 2 and i > 2]
    assert sorted(zip(*(side.tolist() for side in pairs), strict=True)) == expected and expected
    torch.testing.assert_close(cosines, dense[pairs.first, pairs.second])


def test_a_chunk_is_a_random_part_of_the_live_latents() -> None:
    live = torch.arange(0, 100, 3)
    one, same, other = (chunk(live, 10, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(one) == 10 and torch.isin(one, live).all() and (one.diff() > 0).all()
    assert torch.equal(chunk(live, 1000, torch.Generator()), live)


@pytest.mark.parametrize("unit", [True, False])
def test_the_direction_loss_and_its_gradient_are_the_formulas(unit: bool) -> None:
    pairs, margins = Pairs(torch.tensor([0, 0, 3]), torch.tensor([1, 5, 8])), torch.tensor([-0.5, 0.0, -0.9]).double()
    weights = torch.tensor([1.0, 2.0, 3.0]).double()
    rows = unit_rows() if unit else draw(F, O, seed=0)
    found, expected = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = direction_loss(found, pairs, margins, weights, unit)
    before = draw(F, O, seed=5)
    found.grad = before.clone()
    loss.backward()
    reference = sum(
        w
        * torch.clamp((expected[i] @ expected[j]) / (1 if unit else expected[i].norm() * expected[j].norm()) - m, min=0)
        ** 2
        for i, j, m, w in zip(*pairs, margins, weights, strict=True)
    )
    reference.backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(found.grad - before, expected.grad)


def joins(pairs: int):
    """What terms leave gradients with, those of so many pairs being 1 before."""
    step, nothing = pytest.importorskip("train.model.kernels.triton_step"), torch.zeros(0, dtype=torch.int64)
    active = SparseLatents.of(nothing, nothing, torch.zeros(0), torch.Size((1, F)))
    return step.Joined(torch.zeros(1, 3), active, torch.ones(pairs, dtype=torch.float64))


def test_tritons_loss_of_mined_pairs_is_the_direction_loss_of_those_that_live() -> None:
    """A latent in many pairs gets the rows of all others; pairs of two groups have the other margin."""
    triton_pairs = pytest.importorskip("train.model.kernels.triton_pairs", reason="triton is not installed")
    triton_sums = pytest.importorskip("train.model.kernels.triton_sums")
    W_dec, first = unit_rows().float().requires_grad_(), torch.tensor([0, 0, 0, 3, 7])
    pairs, group, dead = Pairs(first, torch.tensor([1, 5, 8, 8, 9])), torch.arange(F) // 6, torch.arange(F) == 9
    margins = torch.where(group[pairs.first] == group[pairs.second], -0.9, -0.8).double()
    alive = torch.tensor([1.0, 1, 1, 1, 0]).double()
    expected = W_dec.detach().double().requires_grad_()
    (0.5 * direction_loss(expected, pairs, margins, 2 * alive)).backward()
    parts = triton_pairs.partners(*pairs, F)
    joined = joins(0)
    loss = triton_pairs.pair_loss(joined, W_dec, parts, group, dead, (-0.9, -0.8), 0.5)
    nothing = SparseLatents.of(first[:0], first[:0], torch.zeros(0), torch.Size((1, F)))
    found = torch.empty(F, O)
    sums = triton_sums.Sums(nothing.values, torch.zeros(1, O), found, add=False)
    triton_sums.sums_by_latent(nothing, sums, partners=joined.partners[0])
    assert expected.grad is not None
    cosines = (expected.detach() @ expected.detach().T)[pairs.first, pairs.second]
    assert float(loss.detach()) == pytest.approx(float(((cosines - margins).relu().square() * alive).sum()), rel=1e-5)
    torch.testing.assert_close(found.double(), expected.grad, rtol=1e-5, atol=1e-6)
    empty = triton_pairs.partners(first[:0], first[:0], F)
    assert triton_pairs.pair_loss(joined, W_dec, empty, group, dead, (0.3, 0.7), 1.0) == 0
    assert len(joined.partners) == 1


def test_a_pair_counts_for_the_latents_whose_closest_it_is() -> None:
    pairs = Pairs(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]))
    assert nearest(pairs, torch.tensor([0.9, 0.5, 0.7]), 5).tolist() == [2.0, 1.0, 1.0]


def planted() -> tuple[torch.Tensor, SparseLatents]:
    """Activations of which 3 and 7 are the same but for their scale, and 11 and 12 never meet."""
    dense = draw(R, F, seed=2).clamp_min(0) * (draw(R, F, seed=3) > 0.3)
    dense[:, 7] = 2 * dense[:, 3]
    dense[: R // 2, 11], dense[R // 2 :, 12] = 0, 0
    rows, latents = dense.nonzero(as_tuple=True)
    return dense, SparseLatents.of(rows, latents, dense[rows, latents], dense.shape)


def dense_measures(dense: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    on = (dense > 0).double()
    both = on.T @ on
    return np.corrcoef(dense.numpy().T), both, both / (on.sum(0)[:, None] + on.sum(0)[None] - both)


@pytest.mark.parametrize("least", [1, 5])
def test_correlated_pairs_equal_the_dense_correlations(least: int) -> None:
    dense, active = planted()
    (pairs, values, scale), above = correlated_pairs(active, least, partners=F, levels=(0.0, 0.2, 0.9))
    correlation, both, _ = dense_measures(dense)
    expected = {
        (i, j): correlation[i, j]
        for i in range(F)
        for j in range(i + 1, F)
        if both[i, j] >= least and correlation[i, j] > 0
    }
    found = list(zip(*(side.tolist() for side in pairs), strict=True))
    assert found == sorted(expected, key=lambda pair: -expected[pair]) and found[0] == (3, 7)
    assert values.tolist() == pytest.approx([expected[pair] for pair in found])
    deviation = dense.double().std(0, correction=0)
    assert scale.tolist() == pytest.approx([float(deviation[i] * deviation[j]) for i, j in found])
    assert above == {level: sum(r > level for r in expected.values()) for level in (0.0, 0.2, 0.9)}


@pytest.mark.parametrize("least", [1, 5])
def test_the_most_correlated_of_every_latent_are_before_it_and_after_it(least: int) -> None:
    dense, active = planted()
    correlation, both, _ = dense_measures(dense)
    found, values = most_correlated(active, least, partners=3)
    for i in range(F):
        others = [j for j in range(F) if j != i and both[i, j] >= least and correlation[i, j] > 0]
        others = sorted(others, key=lambda j: -correlation[i, j])[:3]
        assert found[i].tolist() == others + [-1] * (3 - len(others))
        assert values[i, : len(others)].tolist() == pytest.approx([correlation[i, j] for j in others])


def test_measures_of_any_pairs_equal_the_dense_ones() -> None:
    dense, active = planted()
    pairs = Pairs(*torch.triu_indices(F, F, 1))
    correlation, both, jaccard = dense_measures(dense)
    found = measure(active, pairs)
    assert found.rows.tolist() == both[pairs].long().tolist()
    np.testing.assert_allclose(found.correlation, correlation[pairs], atol=1e-12)
    torch.testing.assert_close(found.jaccard, jaccard[pairs])


def test_constant_latents_correlate_with_nothing() -> None:
    dense = torch.full((1000, 4), 0.1)
    dense[:, 1], dense[:, 2] = 0.17, torch.rand(1000, generator=torch.Generator().manual_seed(0))
    rows, latents = dense.nonzero(as_tuple=True)
    active = SparseLatents.of(rows, latents, dense[rows, latents], dense.shape)
    (pairs, _, _), above = correlated_pairs(active, 2, levels=(0.5,))
    assert above == {0.5: 0} and not len(pairs.first)
    assert measure(active, Pairs(torch.tensor([0]), torch.tensor([1]))).correlation.tolist() == [0.0]


def test_every_latent_keeps_its_largest_correlations() -> None:
    _, active = planted()
    ((every, _, _), above), ((few, _, _), same) = (correlated_pairs(active, 1, partners=n) for n in (F, 2))
    for latent in range(F):
        assert torch.equal(few.second[few.first == latent], every.second[every.first == latent][:2])
    assert above == same


def test_latents_that_are_never_active_have_no_partner() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    active = SparseLatents.of(nothing, nothing, torch.zeros(0), torch.Size((4, 9)))
    (pairs, _, _), above = correlated_pairs(active, 1)
    assert len(pairs.first) == 0 and set(above.values()) == {0}
    assert measure(active, Pairs(torch.tensor([0]), torch.tensor([3]))).correlation.tolist() == [0.0]


STRENGTH = torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
PAIRS = Pairs(torch.tensor([3, 3, 11, 0]), torch.tensor([7, 9, 12, 39]))


def loss_and_gradient(device: str, values: torch.Tensor, active: SparseLatents) -> tuple[torch.Tensor, torch.Tensor]:
    values = values.clone().requires_grad_()
    if device == "triton":
        triton_pairs = pytest.importorskip("train.model.kernels.triton_pairs", reason="triton is not installed")
        strength = STRENGTH / (len(active.starts) - 1)
        joined = joins(len(values))
        loss = triton_pairs.co_activation(joined, values, active, triton_pairs.together(*PAIRS, strength, F))
        return loss, joined.slopes - 1
    with pytest.MonkeyPatch.context() as patch:
        if device == "any":
            patch.setattr(_Products, "apply", _dense)
        loss = co_activation_loss(values, active, PAIRS, STRENGTH)
    loss.backward()
    assert values.grad is not None
    return loss.detach(), values.grad


@pytest.mark.parametrize("device", ["cpu", "any", "triton"])
def test_the_co_activation_loss_and_its_gradient_are_those_of_dense_products(device: str) -> None:
    dense, active = planted()
    loss, grad = loss_and_gradient(device, active.values, active)
    columns = dense.clone().requires_grad_()
    expected = sum(w * (columns[:, i] * columns[:, j]).sum() for i, j, w in zip(*PAIRS, STRENGTH, strict=True)) / R
    expected.backward()
    assert columns.grad is not None
    assert float(loss) > 0
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, columns.grad[active.rows, active.latents], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", ["cpu", "any", "triton"])
def test_a_pair_of_a_row_and_a_latent_that_is_there_twice_counts_once(device: str) -> None:
    """Fixed numbers of pairs are filled up by pairs with a value of 0, before or behind one that is active."""
    dense, active = planted()
    loss, grad = loss_and_gradient(device, active.values, active)
    again = torch.cat([(active.latents == 7).nonzero().flatten(), torch.arange(len(active.rows))])
    again = again[torch.argsort(active.rows[again] * F + active.latents[again], stable=True)]
    if device != "cpu":  # zeros have no part on any device
        empty = active.values.where(active.latents != 7, 0)
        assert not loss_and_gradient(device, empty, active.with_values(empty))[1][active.latents == 7].any()
    for filled in (again.diff(append=torch.tensor([-1])) == 0, again.diff(prepend=torch.tensor([-1])) == 0):
        twice = SparseLatents.of(active.rows[again], active.latents[again], active.values[again], dense.shape)
        values = twice.values.where(~filled, 0)
        found, more = loss_and_gradient(device, values, twice.with_values(values))
        assert int(filled.sum()) == int((active.latents == 7).sum()) > 3
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(more[~filled], grad)


def test_a_latent_that_is_active_on_no_row_costs_nothing() -> None:
    dense, _ = planted()
    dense[:, 3] = dense[:, 11] = dense[:, 0] = 0
    rows, latents = dense.nonzero(as_tuple=True)
    active = SparseLatents.of(rows, latents, dense[rows, latents], dense.shape)
    loss, grad = loss_and_gradient("cpu", active.values, active)
    assert float(loss) == 0 and not grad.any()


def test_the_position_loss_is_the_excess_activation_at_rows_with_a_weight() -> None:
    dense, active = planted()
    weights, excess = torch.zeros(R).double(), draw(F, seed=9).clamp_min(0)
    weights[:5] = 0.5
    values = active.values.clone().requires_grad_()
    loss = position_loss(values, active, weights, excess)
    loss.backward()
    columns = dense.clone().requires_grad_()
    expected = (columns[:5] * 0.5 * excess).sum() / R
    expected.backward()
    assert columns.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(values.grad, columns.grad[active.rows, active.latents])


def test_mass_is_summed_activation() -> None:
    dense, active = planted()
    weights = draw(R, seed=1).abs()
    torch.testing.assert_close(mass(active, weights), (dense * weights[:, None]).sum(0))


def test_latents_are_connected_through_others() -> None:
    chain = Pairs(torch.arange(0, 1999), torch.arange(1, 2000))
    apart = Pairs(torch.tensor([3005, 3001]), torch.tensor([3009, 3000]))
    assert connected(chain.joined(apart)) == [list(range(2000)), [3000, 3001], [3005, 3009]]
    assert connected(Pairs(*torch.zeros(2, 0).long())) == []


def test_nearest_cosines_are_those_of_the_whole_product() -> None:
    rows = torch.nn.functional.normalize(torch.randn(F, 5, generator=torch.Generator().manual_seed(2)))
    latents = torch.tensor([1, 4, 5, 9, 11])
    cosines = rows[latents].double() @ rows[latents].double().T
    cosines.fill_diagonal_(-1)
    for block in (2, 1024):
        found = nearest_cosines(rows, latents, "torch", block)
        torch.testing.assert_close(found.double(), cosines.amax(1), atol=1e-6, rtol=0)
    assert nearest_cosines(rows, latents[:1], "torch").tolist() == [-1.0]
    assert nearest_cosines(rows, latents[:0], "torch").tolist() == []
