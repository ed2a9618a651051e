"""The sparse operations and their gradients against dense float64 autograd."""

import torch

from tests import reference
from train.sparse_step import decode_prefixes, gather_pre_acts
from train.sparsity import batch_topk

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
