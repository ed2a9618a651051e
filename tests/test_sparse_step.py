"""The sparse operations and their gradients against dense float64 autograd, by every kind of kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import reference
from train.model.kernels import numba_loops, plain
from train.model.kernels.base import Groups, SparseOps
from train.model.kernels.matmul import Matmul
from train.model.kernels.sparse_ops import sparse_ops
from train.model.sparse_latents import SparseLatents

ROOT = Path(__file__).parents[1]
KERNELS = pytest.mark.parametrize("ops", ["plain", "compiled", "dense", "matmul", "triton"], indirect=True)
COMPILED = sparse_ops("compiled")
B, D, O, F, PREFIXES = 13, 7, 5, 24, (3, 6, 12, 24)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters_of_a_step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`W_enc` [D, F], latent by latent in memory, `b_enc` [F] and `W_dec` [F, O]."""
    W_enc, b_enc, W_dec = draw(F, D, seed=1).T, draw(F, seed=2), draw(F, O, seed=3)
    return W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_()


def select(pre_acts: torch.Tensor, n: int) -> SparseLatents:
    return COMPILED.batch_topk(pre_acts, n, torch.zeros(()))[0]


def test_decoding_equals_dense_autograd() -> None:
    W_dec, weights = draw(F, O, seed=3).requires_grad_(), draw(B, len(PREFIXES), O, seed=9)
    group = torch.bucketize(torch.arange(F), torch.tensor(PREFIXES), right=True)
    pre_acts = draw(B, F, seed=1)
    active = select(pre_acts, 4 * B)
    values = active.values.clone().requires_grad_()
    sparse = plain.decode_prefixes(values, W_dec, active, group, len(PREFIXES))
    found = torch.autograd.grad((sparse * weights).sum(), (values, W_dec))

    latents = (pre_acts * reference.top_of_batch(pre_acts, 4 * B)).requires_grad_()
    expected = torch.stack(reference.reconstructions(latents, W_dec, torch.zeros(O), PREFIXES), dim=1)
    grads = torch.autograd.grad((expected * weights).sum(), (latents, W_dec))
    torch.testing.assert_close(sparse, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], grads[0][active.rows, active.latents], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], grads[1], rtol=1e-12, atol=1e-12)


@KERNELS
def test_float32_results_repeat_bit_for_bit(ops: SparseOps) -> None:
    def once() -> list[torch.Tensor]:
        W_dec, pre_acts, y = (draw(*s, seed=3).float() for s in ((F, O), (B, F), (B, O)))
        active, values = select(pre_acts, 5 * B), select(pre_acts, 5 * B).values.requires_grad_()
        W_dec.requires_grad_()
        whole = torch.zeros(F, dtype=torch.int64)
        loss, *rest = ops.prefix_loss(values, W_dec, torch.zeros(1, O), y, active, Groups(whole, 1, 0.1, (F,)))
        loss.backward()
        assert W_dec.grad is not None and values.grad is not None
        return [loss.detach(), *rest, W_dec.grad, values.grad]

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


@KERNELS
@pytest.mark.parametrize(("every_row", "by_prefix"), [(False, True), (True, False)])
@pytest.mark.parametrize(("prefixes", "per_row"), [(PREFIXES, 4), (PREFIXES, 20), ((F,), 4)])
def test_loss_and_gradients_equal_dense_autograd(
    ops: SparseOps, prefixes: tuple[int, ...], every_row: bool, per_row: int, by_prefix: bool
) -> None:
    weight = torch.linspace(0.3, 0.9, len(prefixes)).double() if by_prefix else torch.tensor(0.3).double()
    x, y = draw(B, D, seed=0), draw(B, O, seed=5)
    W_enc, b_enc, W_dec = parameters_of_a_step()
    base = draw(B if every_row else 1, O, seed=6).requires_grad_()
    group = torch.bucketize(torch.arange(F), torch.tensor(prefixes), right=True)
    parameters = (W_enc, b_enc, W_dec, base)

    active = select((x @ W_enc + b_enc).detach(), per_row * B)
    values = ops.encode(x, W_enc, b_enc, active)
    loss, errors, left = ops.prefix_loss(values, W_dec, base, y, active, Groups(group, len(prefixes), weight, prefixes))
    (7 * loss).backward()
    found = [p.grad for p in parameters]

    for p in parameters:
        p.grad = None
    pre_acts = x @ W_enc + b_enc
    latents = pre_acts * reference.top_of_batch(pre_acts.detach(), per_row * B)
    parts = torch.stack(reference.reconstructions(latents, W_dec, torch.zeros(O), prefixes), dim=1) + base[:, None]
    expected = (parts - y[:, None]).square().sum(2)
    (7 * (weight * expected).sum()).backward()

    torch.testing.assert_close(values, pre_acts[active.rows, active.latents], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, (weight * expected).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(errors, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left, (y - parts[:, -1]).detach(), rtol=1e-12, atol=1e-12)
    assert not errors.requires_grad and not left.requires_grad
    for mine, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-12, atol=1e-12)


def test_sums_of_many_pairs_are_shared_and_equal_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's kernels, written over what is there or added to it; latents without a pair keep what is added to."""
    kernels = pytest.importorskip("train.model.kernels.triton_sums")
    monkeypatch.setattr(kernels, "LONG", 4)
    active, table, weights = select(draw(B, F, seed=4), 4 * B), draw(B, O, seed=5), draw(4 * B, seed=6)
    sums, counts = torch.zeros(F, O).double(), torch.zeros(F).double()
    for row, latent, weight in zip(active.rows, active.latents, weights, strict=True):
        sums[latent] += weight * table[row]
        counts[latent] += weight
    pairs = torch.bincount(active.latents, minlength=F)
    assert pairs.max() > 4 and pairs.min() == 0
    for add in (False, True):
        before, alone = draw(F, O, seed=7), draw(F, seed=8)
        out, total = before.clone(), alone.clone()
        asked = {"add": add, "alone": total, "times": torch.tensor(1.0)}
        sparse_ops("triton").sums_by_latent(active, weights, table, out, **asked)  # type: ignore[attr-defined]
        torch.testing.assert_close(out, sums + before * add, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, counts + alone, rtol=1e-12, atol=1e-12)


def test_gradients_are_added_to_those_of_terms_before() -> None:
    """Of terms on any of the parameters, by autograd and by these operations."""
    x, y, active = draw(B, D, seed=0), draw(B, O, seed=5), select(draw(B, F, seed=4), 4 * B)
    group = torch.bucketize(torch.arange(F), torch.tensor(PREFIXES), right=True)

    def gradients(*terms: str) -> list[torch.Tensor]:
        W_enc, b_enc, W_dec = parameters_of_a_step()
        for term in terms:
            if term == "step":
                values, nothing = COMPILED.encode(x, W_enc, b_enc, active), torch.zeros(1, O).double()
                COMPILED.prefix_loss(values, W_dec, nothing, y, active, Groups(group, 4, 0.3))[0].backward()
            else:
                {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec}[term].square().sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (W_enc, b_enc, W_dec)]

    alone = gradients("step")
    for others in (("W_enc",), ("b_enc",), ("W_dec",), ("step",), ("b_enc", "W_dec")):
        expected = [a + b for a, b in zip(alone, gradients(*others), strict=True)]
        for found in (gradients("step", *others), gradients(*others, "step")):
            for mine, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-12)


@KERNELS
def test_no_active_pairs_leave_the_target(ops: SparseOps) -> None:
    x, y, (W_enc, b_enc, W_dec) = draw(B, D, seed=0), draw(B, O, seed=5), parameters_of_a_step()
    b_enc.data.fill_(-1e3)
    active = select((x @ W_enc + b_enc).detach(), 4 * B)
    assert len(active.rows) == 0
    values, nothing = ops.encode(x, W_enc, b_enc, active), torch.zeros(1, O).double()
    loss, errors, left = ops.prefix_loss(
        values, W_dec, nothing, y, active, Groups(torch.zeros(F, dtype=torch.int64), 1, 1.0, (F,))
    )
    torch.testing.assert_close(errors[:, 0], y.square().sum(1))
    loss.backward()
    assert W_enc.grad is not None and W_dec.grad is not None
    assert torch.equal(left, y) and not W_enc.grad.any() and not W_dec.grad.any()


@KERNELS
def test_values_of_pairs_found_in_lower_precision_are_computed_again(ops: SparseOps) -> None:
    x, W_enc, b_enc = draw(B, D, seed=0).float(), draw(D, F, seed=1).float(), draw(F, seed=2).float()
    pre_acts = x @ W_enc + b_enc
    low = pre_acts.bfloat16()
    active, smallest = ops.batch_topk(low, 4 * B, torch.zeros(()))
    assert active.values.dtype == torch.bfloat16 and len(active.rows) == 4 * B
    assert smallest == active.values.min()
    values = ops.encode(x, W_enc.T.contiguous().T, b_enc, active)
    torch.testing.assert_close(values, pre_acts[active.rows, active.latents], rtol=1e-5, atol=1e-5)
    assert not torch.equal(values, active.values.float())
    if not isinstance(ops, Matmul):
        rough = active.with_values(active.values.float())
        torch.testing.assert_close(ops.encode(x, W_enc.T.contiguous().T, b_enc, rough, again=True), values)
    assert ops.row_topk(low, 3, torch.arange(F) > 3).values.dtype == torch.bfloat16


def test_pairs_are_grouped_in_the_order_they_come() -> None:
    keys = np.random.default_rng(0).integers(0, 9, 200)
    order, starts = np.empty_like(keys), np.empty(12, np.int64)
    numba_loops.group(keys, order, starts)
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
    W_enc, W_dec = draw(latents, width, seed=7).float().T.requires_grad_(), draw(latents, width, seed=8).float()
    W_dec.requires_grad_()
    group = torch.bucketize(torch.arange(latents), torch.tensor([24, 48, 96]), right=True)
    found = []
    for active in (select(pre_acts, 8 * rows), COMPILED.row_topk(pre_acts, 9)):
        values = COMPILED.encode(x, W_enc, torch.zeros(latents), active)
        groups, nothing = Groups(group, 3, 0.1), torch.zeros(1, width)
        loss, errors, left = COMPILED.prefix_loss(values, W_dec, nothing, y, active, groups)
        loss.backward()
        found += [active.rows, active.latents, active.values, errors, left]
    assert W_enc.grad is not None and W_dec.grad is not None
    return [*found, W_enc.grad, W_dec.grad]


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """In a process of its own: this one was started with a single thread."""
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


def test_numbas_first_call_leaves_torch_its_threads() -> None:
    """Numba gives OpenMP, and with it torch, as many threads as it has itself when it starts its own."""
    code = """
import torch
torch.get_num_threads()
from train.run.trainer import use_threads
use_threads(1)
print(torch.get_num_threads())
"""
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_it_is_known_whether_the_loops_are_compiled(tmp_path: Path) -> None:
    """By the cache that numba itself writes; in a process of its own, whose cache is elsewhere."""
    code = """
import numpy as np
from train.model.kernels import numba_loops
before = numba_loops.compiled_before()
rows = np.ones((2, 3), np.float32)
numba_loops.adam(rows, rows, rows, rows, rows[:, 0].copy(), False, 1.0, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.1)
print(before, numba_loops.compiled_before())
"""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
