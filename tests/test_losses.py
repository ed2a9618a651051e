"""Every term against its formula in float64."""

import pytest
import torch

from tests import reference
from train.model import losses
from train.model.activations import jumprelu, relu


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_matryoshka_loss_is_the_mean_of_the_prefix_losses() -> None:
    parts, target = draw(6, 3, 4, seed=0), draw(6, 4, seed=1)
    expected = sum(reference.prefix_loss(parts[:, p], target) for p in range(3)) / 3
    found = losses.matryoshka_weight(6, 3, 4) * (parts - target[:, None]).square().sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-13)


@pytest.mark.fault(34)
def test_the_auxk_loss_is_relative_to_the_residual_and_defined_without_one() -> None:
    predicted, residual = draw(6, 4, seed=0), draw(6, 4, seed=1)
    relative = float(((predicted - residual) ** 2).sum() / (residual**2).sum())
    for count, share in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        found = (
            losses.auxk_weight(residual, torch.arange(10) < count, dead_per_active=4)
            * (predicted - residual).square().sum()
        )
        assert float(found) == pytest.approx(share * relative, rel=1e-13), count
    dead = torch.tensor([False, True])
    assert float(losses.auxk_weight(torch.zeros(6, 4), dead, dead_per_active=1) * torch.zeros(())) == 0.0


def test_jumprelu_gradients_are_the_papers_pseudo_derivatives() -> None:
    values = torch.tensor([0.30, 0.48, 0.52, 0.90], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    out = jumprelu.jumprelu(values, threshold, 0.1)
    assert out.tolist() == [0.0, 0.0, 0.52, 0.90]
    out.backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    assert values.grad is not None and threshold.grad is not None
    assert values.grad.tolist() == [0.0, 0.0, 3.0, 4.0]
    assert threshold.grad.tolist() == pytest.approx([0.0, -2 * 0.5 / 0.1, -3 * 0.5 / 0.1, 0.0])


def test_l0_loss_counts_and_pushes_thresholds_up() -> None:
    values = torch.tensor([0.30, 0.48, 0.52, 0.90], dtype=torch.float64, requires_grad=True)
    threshold = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    loss = jumprelu.l0_loss(values, threshold, 0.1, rows=2)
    assert float(loss) == 1.0
    loss.backward()
    assert threshold.grad is not None
    assert threshold.grad.tolist() == pytest.approx([0.0, -5.0, -5.0, 0.0])
    assert values.grad is None


def test_l1_loss_is_the_mean_row_sum() -> None:
    assert float(relu.l1_loss(torch.tensor([1.0, 2.0, 4.0]), rows=2)) == 3.5


@pytest.mark.parametrize(
    ("settings", "run_rows", "expected"),
    [
        ({}, 1_000_000, 50_000),
        ({}, 10**10, 10_000_000),
        ({"dead_after_share": 1.0}, 5000, 5000),
        ({"dead_after_tokens": 77}, 10**6, 77),
    ],
)
def test_dead_after_is_a_share_of_the_run_or_a_number_of_rows(settings: dict, run_rows: int, expected: int) -> None:
    assert losses.AuxKConfig(**settings).dead_after(run_rows) == expected
