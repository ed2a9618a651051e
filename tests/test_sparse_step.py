"""The sparse operations and their gradients against dense float64 autograd: torch's own kernels, and compiled loops."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from tests import reference
from train.sparse_step import compiled, loops, plain
from train.sparse_step.plain import decode_prefixes, gather_pre_acts
from train.sparsity import _flat_above, batch_topk

ROOT = Path(__file__).parents[1]
OPERATIONS = pytest.mark.parametrize("ops", [plain, compiled], ids=["plain", "compiled"])
B, D, O, F, PREFIXES = 13, 7, 5, 24, (3, 6, 12, 24)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_values_and_gradients_equal_dense_autograd() -> None:
    x = draw(B, D, seed=0)
    W_enc, b_enc, W_dec = (draw(*s, seed=i).requires_grad_() for i, s in enumerate(((D, F), (F,), (F, O)), 1))
    weights = draw(B, len(PREFIXES), O, seed=9)
    segment = torch.bucketize(torch.arange(F), torch.tensor(PREFIXES), right=True)

    pre_acts = (x @ W_enc + b_enc).detach()
    active, _ = batch_topk(pre_acts, 4 * B, 0.0)
    values = gather_pre_acts(x, W_enc, b_enc, pre_acts, active)
    sparse = decode_prefixes(values, W_dec, active, segment, B, len(PREFIXES))
    (sparse * weights).sum().backward()
    found = [p.grad for p in (W_enc, b_enc, W_dec)]

    for p in (W_enc, b_enc, W_dec):
        p.grad = None
    dense_pre_acts = x @ W_enc + b_enc
    latents = dense_pre_acts * reference.top_of_batch(dense_pre_acts.detach(), 4 * B)
    dense = torch.stack(reference.reconstructions(latents, W_dec, torch.zeros(O), PREFIXES), dim=1)
    (dense * weights).sum().backward()

    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=1e-12)
    for mine, parameter in zip(found, (W_enc, b_enc, W_dec), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-12)


def test_a_batch_without_active_pairs_decodes_to_zero_with_zero_gradients() -> None:
    x, W_enc, b_enc = draw(B, D, seed=0), draw(D, F, seed=1).requires_grad_(), torch.full((F,), -1e3).double()
    W_dec = draw(F, O, seed=2).requires_grad_()
    pre_acts = (x @ W_enc + b_enc).detach()
    active, _ = batch_topk(pre_acts, 4 * B, 0.0)
    values = gather_pre_acts(x, W_enc, b_enc.requires_grad_(), pre_acts, active)
    decoded = decode_prefixes(values, W_dec, active, torch.zeros(F, dtype=torch.int64), B, 1)
    assert torch.equal(decoded, torch.zeros(B, 1, O).double())
    decoded.sum().backward()
    assert not W_enc.grad.any() and not W_dec.grad.any()


def test_float32_results_repeat_bit_for_bit() -> None:
    def once() -> list[torch.Tensor]:
        W_dec, values_of = draw(F, O, seed=3).float().requires_grad_(), draw(B, F, seed=4).float()
        active, _ = batch_topk(values_of, 5 * B, 0.0)
        values = values_of[active.rows, active.latents].requires_grad_()
        out = decode_prefixes(values, W_dec, active, torch.zeros(F, dtype=torch.int64), B, 1)
        out.square().sum().backward()
        return [out.detach(), W_dec.grad, values.grad]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@OPERATIONS
@pytest.mark.parametrize("every_row", [False, True])
@pytest.mark.parametrize("prefixes", [PREFIXES, (F,)])
def test_errors_and_gradients_equal_dense_autograd(ops: ModuleType, prefixes: tuple[int, ...], every_row: bool) -> None:
    x, y = draw(B, D, seed=0), draw(B, O, seed=5)
    W_enc, b_enc, W_dec = (draw(*s, seed=i).requires_grad_() for i, s in enumerate(((D, F), (F,), (F, O)), 1))
    base = draw(B if every_row else 1, O, seed=6).requires_grad_()
    weights = draw(B, len(prefixes), seed=9)
    segment = torch.bucketize(torch.arange(F), torch.tensor(prefixes), right=True)
    parameters = (W_enc, b_enc, W_dec, base)

    pre_acts = (x @ W_enc + b_enc).detach()
    active, _ = batch_topk(pre_acts, 4 * B, 0.0)
    values = ops.gather_pre_acts(x, W_enc, b_enc, pre_acts, active)
    errors, residual = ops.prefix_errors(values, W_dec, base, y, active, segment, len(prefixes))
    (errors * weights).sum().backward()
    found = [p.grad for p in parameters]

    for p in parameters:
        p.grad = None
    dense_pre_acts = x @ W_enc + b_enc
    latents = dense_pre_acts * reference.top_of_batch(dense_pre_acts.detach(), 4 * B)
    dense = torch.stack(reference.reconstructions(latents, W_dec, torch.zeros(O), prefixes), dim=1) + base[:, None]
    expected = (dense - y[:, None]).square().sum(2)
    (expected * weights).sum().backward()

    torch.testing.assert_close(errors, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(residual, (y - dense[:, -1]).detach(), rtol=1e-12, atol=1e-12)
    assert not residual.requires_grad
    for mine, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-12)


def test_gradients_are_added_to_those_of_terms_before() -> None:
    """Of terms on any of the parameters, by autograd and by these operations."""
    x, y, pre_acts = draw(B, D, seed=0), draw(B, O, seed=5), draw(B, F, seed=4)
    active, _ = batch_topk(pre_acts, 4 * B, 0.0)
    segment = torch.bucketize(torch.arange(F), torch.tensor(PREFIXES), right=True)

    def gradients(*terms: str) -> list[torch.Tensor]:
        W_enc, b_enc, W_dec = (draw(*s, seed=i).requires_grad_() for i, s in enumerate(((D, F), (F,), (F, O)), 1))
        for term in terms:
            if term == "step":
                values = compiled.gather_pre_acts(x, W_enc, b_enc, pre_acts, active)
                compiled.prefix_errors(values, W_dec, torch.zeros(1, O).double(), y, active, segment, 4)[
                    0
                ].sum().backward()
            else:
                {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}[term].square().sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (W_enc, b_enc, W_dec)]

    alone = gradients("step")
    for others in (("W_enc",), ("b_enc",), ("W_dec",), ("step",), ("b_enc", "W_dec")):
        expected = [a + b for a, b in zip(alone, gradients(*others), strict=True)]
        for found in (gradients("step", *others), gradients(*others, "step")):
            for mine, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@OPERATIONS
def test_no_active_pairs_leave_the_target(ops: ModuleType) -> None:
    x, y, W_enc = draw(B, D, seed=0), draw(B, O, seed=5), draw(D, F, seed=1).requires_grad_()
    b_enc, W_dec = torch.full((F,), -1e3).double().requires_grad_(), draw(F, O, seed=2).requires_grad_()
    pre_acts = (x @ W_enc + b_enc).detach()
    active, _ = batch_topk(pre_acts, 4 * B, 0.0)
    values = ops.gather_pre_acts(x, W_enc, b_enc, pre_acts, active)
    nothing = torch.zeros(1, O).double()
    errors, residual = ops.prefix_errors(values, W_dec, nothing, y, active, torch.zeros(F, dtype=torch.int64), 1)
    torch.testing.assert_close(errors[:, 0], y.square().sum(1))
    errors.sum().backward()
    assert torch.equal(residual, y) and not W_enc.grad.any() and not W_dec.grad.any()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 64 * 64 + 1])
def test_places_above_a_floor(size: int) -> None:
    flat = np.random.default_rng(size).normal(size=size).astype(np.float32)
    flat[::7] = 0.5
    for floor in (-10.0, 0.5, 1.0, 10.0):
        found = _flat_above(torch.from_numpy(flat), floor)
        assert found.tolist() == np.flatnonzero(flat > np.float32(floor)).tolist()


def test_pairs_are_grouped_in_the_order_they_come() -> None:
    keys = np.random.default_rng(0).integers(0, 9, 200)
    order, starts = np.empty_like(keys), np.empty(12, np.int64)
    loops.group(keys, order, starts)
    assert order.tolist() == np.argsort(keys, kind="stable").tolist()
    assert starts.tolist() == [int((keys < key).sum()) for key in range(12)]


THREADS = """
import numba, torch
from tests.test_sparse_step import step_of_loops
numba.set_num_threads(1)
one = step_of_loops()
numba.set_num_threads(2)
two = step_of_loops()
assert numba.get_num_threads() == 2 and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
print("equal")
"""


def step_of_loops() -> list[torch.Tensor]:
    rows, latents, width = 200, 96, 24
    x, y, pre_acts = (draw(rows, n, seed=i).float() for i, n in enumerate((width, width, latents)))
    W_enc, W_dec = (draw(*s, seed=7).float().requires_grad_() for s in ((width, latents), (latents, width)))
    segment = torch.bucketize(torch.arange(latents), torch.tensor([24, 48, 96]), right=True)
    active, _ = batch_topk(pre_acts, 8 * rows, 0.0)
    values = compiled.gather_pre_acts(x, W_enc, torch.zeros(latents), pre_acts, active)
    errors, _ = compiled.prefix_errors(values, W_dec, torch.zeros(1, width), y, active, segment, 3)
    errors.square().sum().backward()
    return [errors.detach(), W_enc.grad, W_dec.grad]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """In a process of its own: this one was started with a single thread."""
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr
