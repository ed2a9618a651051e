"""The encoder's product by either library, and the rule that chooses."""

import pytest
import torch

from train.model import blas


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("threads", [1, 3, 50])
def test_both_libraries_give_the_product(threads: int) -> None:
    """The weights lie latent by latent, as a transcoder's; a thread more than rows has nothing to do."""
    bias, x, W = draw(40, seed=0), draw(17, 6, seed=1), draw(40, 6, seed=2).T
    expected = bias + x @ W
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("torch", "numpy"):
            torch.testing.assert_close(blas.addmm(name, bias, x, W), expected, rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("error")
def test_a_nan_passes_through_in_silence_as_by_torch() -> None:
    x = draw(4, 6, seed=1)
    x[2, 3] = float("nan")
    found = blas.addmm("numpy", torch.zeros(8).double(), x, draw(8, 6, seed=2).T)
    assert found[2].isnan().all() and not found[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize(
    ("vendor", "mkl", "expected"),
    [
        ("vendor_id\t: AuthenticAMD", True, "numpy"),
        ("vendor_id\t: GenuineIntel", True, "torch"),
        ("vendor_id\t: AuthenticAMD", False, "torch"),
    ],
)
def test_mkl_is_left_to_its_makers_processors(
    monkeypatch: pytest.MonkeyPatch, vendor: str, mkl: bool, expected: str
) -> None:
    monkeypatch.setattr(blas, "_vendor", lambda: vendor)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert blas.faster_here() == expected
