"""The update against Adam written out in float64, and what surrounds it."""

from typing import Any, Literal

import pytest
import torch

from shared.errors import UserError
from train.duplicates.diversity import DiversityConfig
from train.model.activations import BatchTopK, JumpReLU, ReLU, TopK
from train.model.kernels.base import Kernels
from train.model.losses import AuxKConfig
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.optimizer import CompiledAdam, Optimizer, OptimizerConfig, TorchAdam, TritonAdam

KINDS = pytest.mark.parametrize("kind", [TorchAdam, CompiledAdam, TritonAdam])
D, O, F = 6, 5, 24
NO_DEAD = torch.zeros(F, dtype=torch.bool)


def make(decoder_norm: Literal["unit", "free"] = "unit") -> Transcoder:
    activation = BatchTopK(k=4)
    config = TranscoderConfig(d_sae=F, decoder_norm=decoder_norm).resolve(D, activation)
    model = Transcoder(D, O, config, activation, Normalisation(torch.zeros(D), 1.0, torch.zeros(O), 1.0))
    model.initialise(0)
    return model


def optimizer_of(kind: type, model: Transcoder, config: OptimizerConfig, steps: int) -> Optimizer:
    """With the one kind of Adam or the other: the one of the model's kernels."""
    if kind is TritonAdam:
        pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    kernels: Kernels = "compiled" if kind is CompiledAdam else "triton" if kind is TritonAdam else "plain"
    model.kernels = kernels
    optimizer = Optimizer(model, config, lambda _: steps)
    model.kernels = "compiled" if kind is TritonAdam else model.kernels  # its Adam alone is in the interpreter
    assert isinstance(optimizer._adam, kind)
    return optimizer


def loss_of(model: Transcoder, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    source, target = torch.randn(32, D, generator=generator), torch.randn(32, O, generator=generator)
    return model.step(source, target, NO_DEAD, AuxKConfig(), 0).loss


@KINDS
@pytest.mark.parametrize(("decoder_rate", "norm"), [(1.0, "unit"), (4.0, "unit"), (2.0, "free")])
def test_three_steps_equal_adam_written_out(kind: type, decoder_rate: float, norm: Literal["unit", "free"]) -> None:
    config = OptimizerConfig(lr=0.01, decoder_rate=decoder_rate, warmup_steps=1, decay_share=0.5, max_grad_norm=0.05)
    model, plain = make(norm), make(norm)
    optimizer = optimizer_of(kind, model, config, steps=4)
    moments = {
        name: (torch.zeros_like(p).double(), torch.zeros_like(p).double()) for name, p in plain.named_parameters()
    }
    for step in range(3):
        optimizer.step([loss_of(model, step)], step)

        plain.zero_grad(set_to_none=True)
        loss_of(plain, step).backward()
        grads = {name: p.grad.double() for name, p in plain.named_parameters() if p.grad is not None}
        W_dec = plain.W_dec.detach().double()
        if norm == "unit":
            grads["W_dec"] -= (grads["W_dec"] * W_dec).sum(1, keepdim=True) * W_dec
        total = torch.stack([(g**2).sum() for g in grads.values()]).sum().sqrt()
        scale = min(1.0, 0.05 / float(total))
        lr = 0.01 * [0.5, 1.0, 1.0][step]
        with torch.no_grad():
            for name, p in plain.named_parameters():
                m, v = moments[name]
                m.mul_(0.9).add_(0.1 * scale * grads[name])
                v.mul_(0.999).add_(0.001 * (scale * grads[name]) ** 2)
                update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                p.copy_(p.double() - lr * (decoder_rate if name == "W_dec" else 1) * update)
            if norm == "unit":
                plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
        for name, p in plain.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=2e-5, atol=2e-6, msg=name)


@KINDS
def test_decoder_rows_have_unit_norm_after_every_step(kind: type) -> None:
    model = make()
    optimizer = optimizer_of(kind, model, OptimizerConfig(lr=0.5), steps=10)
    for step in range(3):
        optimizer.step([loss_of(model, step)], step)
        torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F))


@KINDS
def test_decoder_rows_of_free_norm_start_at_zero_and_grow(kind: type) -> None:
    model, unit = make("free"), make()
    assert not model.W_dec.any() and torch.equal(model.W_enc, unit.W_enc)
    optimizer = optimizer_of(kind, model, OptimizerConfig(lr=0.01), steps=10)
    for step in range(6):
        optimizer.step([loss_of(model, step)], step)
    norms = model.W_dec.detach().norm(dim=1)
    assert (norms > 0).all() and norms.std() > 1e-3
    torch.testing.assert_close(model.unit_decoder() * norms[:, None], model.W_dec.detach())
    model.W_dec.data[3] = 0
    assert not model.unit_decoder()[3].any()


def test_a_free_norm_is_chosen_where_k_is_fixed_and_refused_under_an_l1_penalty() -> None:
    auto = TranscoderConfig(d_sae=F, decoder_norm="auto")
    found = [auto.resolve(D, kind).decoder_norm for kind in (BatchTopK(k=4), TopK(k=4), JumpReLU(), ReLU())]
    assert found == ["free", "free", "unit", "unit"]
    with pytest.raises(UserError, match=r"decoder_norm = free and activation.kind = relu: .* use --set transcoder"):
        TranscoderConfig(d_sae=F, decoder_norm="free").resolve(D, ReLU())


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=3, decay_share=0.2)
    assert [config.lr_at(step, 20) for step in (0, 1, 3, 10, 16, 17, 19)] == [0.25, 0.5, 1.0, 1.0, 1.0, 0.75, 0.25]
    assert OptimizerConfig(lr=1.0, decay_share=0).lr_at(19, 20) == 1.0


@KINDS
@pytest.mark.parametrize("limit", [1e-3, None])
def test_the_reported_norm_is_the_one_before_clipping(kind: type, limit: float | None) -> None:
    model = make()
    optimizer = optimizer_of(kind, model, OptimizerConfig(max_grad_norm=limit, beta1=0.75), steps=1)
    _, norm = optimizer.step([loss_of(model, 0)], 0)
    moments = [value / 0.25 for name, value in optimizer.state().items() if name.endswith("exp_avg")]
    after = torch.stack([(gradient**2).sum() for gradient in moments]).sum().sqrt()
    assert float(norm) > 1e-2
    assert float(after) == pytest.approx(limit or float(norm), rel=1e-3)


@KINDS
def test_saved_moments_continue_bit_for_bit(kind: type) -> None:
    whole, first = make(), make()
    straight = optimizer_of(kind, whole, OptimizerConfig(), steps=6)
    for step in range(6):
        straight.step([loss_of(whole, step)], step)

    before = optimizer_of(kind, first, OptimizerConfig(), steps=6)
    for step in range(3):
        before.step([loss_of(first, step)], step)
    second = make()
    second.load_state_dict(first.state_dict())
    after = optimizer_of(kind, second, OptimizerConfig(), steps=6)
    after.load({name: tensor.contiguous() for name, tensor in before.state().items()})
    for step in range(3, 6):
        after.step([loss_of(second, step)], step)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_follows_the_width_and_warm_ups_the_run() -> None:
    for d_in, lr in ((128, 5.6e-3), (576, 5.6e-3), (2304, 1.4e-3)):
        found = OptimizerConfig(lr="auto", warmup_share=0.02).resolve(5000, d_in, unit_decoder=True)
        assert found.lr == pytest.approx(lr, rel=1e-2) and found.warmup_steps == 100
    assert found.resolve(5000, 128, unit_decoder=True) == found  # what is resolved stays
    free = OptimizerConfig(lr="auto", decoder_rate="auto").resolve(10, 128, unit_decoder=False)
    unit = OptimizerConfig(lr="auto", decoder_rate="auto").resolve(10, 128, unit_decoder=True)
    assert (free.lr, free.decoder_rate, unit.lr, unit.decoder_rate) == (5.6e-3, 1.0, 5.6e-3, 4.0)
    given = OptimizerConfig(lr=1e-3, warmup_steps=7, warmup_share=0.5).resolve(10, 4, unit_decoder=True)
    assert (given.lr, given.warmup_steps) == (1e-3, 7)
    with pytest.raises(UserError, match="optimizer.warmup_steps = 11, and the run has 10 steps"):
        OptimizerConfig(warmup_steps=11).resolve(10, 4, unit_decoder=True)
    activation = BatchTopK(k=5, k_start="3x", k_warmup_share=0.2).resolve(50)
    assert [activation.k_at(step) for step in (0, 5, 10, 49)] == [15, 10, 5, 5] and activation.most_active(64) == 15
    with pytest.raises(UserError, match="activation.k_warmup_steps = 51"):
        BatchTopK(k_warmup_steps=51).resolve(50)
    with pytest.raises(UserError, match="activation.k_warmup_share = 1, and the run has 50 steps"):
        BatchTopK(k_start="3x", k_warmup_share=1).resolve(50)
    with pytest.raises(UserError, match="optimizer.warmup_steps = 10, and the run has 10 steps"):
        OptimizerConfig(warmup_steps=10).resolve(10, 4, unit_decoder=True)
    with pytest.raises(UserError, match="activation.k_start must be a positive number or a multiple such as 3x"):
        BatchTopK(k_start="x").resolve(50)
    with pytest.raises(UserError, match="multiple such as 3x, got ²x"):
        BatchTopK(k_start="²x").resolve(50)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"k_start": 96}, "activation.k_start = 96, and no warm-up leads from it to k = 32"),
        ({"k_start": "3x", "k_warmup_steps": 0, "k_warmup_share": 0.2}, "activation.k_start = 3x, and no warm-up"),
        ({"k_start": "3x", "k_warmup_share": 0.001}, "no warm-up .*k_warmup_share = 0.001 of 100 steps is less than 1"),
        ({"k_warmup_share": 0.2}, r"a warm-up of k \(0.2 by activation.k_warmup_share .* nothing to start from"),
        ({"k_warmup_steps": 9}, r"a warm-up of k \(9 by"),
    ],
)
def test_a_warm_up_of_k_needs_a_start_and_a_length(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        BatchTopK(**settings).resolve(100)


def test_a_start_that_is_k_is_no_warm_up() -> None:
    assert BatchTopK(k=8, k_start="1x").resolve(100).k_at(0) == 8


def test_a_run_of_one_step_has_k_and_no_start() -> None:
    activation = BatchTopK(k=8, k_start="3x", k_warmup_share=0.85).resolve(1)
    assert (activation.k_start, activation.k_at(0), activation.most_active(64)) == (None, 8, 8)


def test_the_last_step_of_every_warm_up_that_is_taken_has_k() -> None:
    for steps in range(1, 60):
        for share in (0.0, 0.15, 0.5, 0.9, 0.99):
            asked = BatchTopK(k=8, k_start="3x" if share else None, k_warmup_share=share)
            if share and steps > 1 and round(share * steps) == 0:
                with pytest.raises(UserError, match="no warm-up leads from it"):
                    asked.resolve(steps)
            else:
                assert asked.resolve(steps).k_at(steps - 1) == 8


def test_numbers_above_d_sae_and_latents_that_never_die_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert AuxKConfig(k=64, dead_per_active=1).resolve(32, 1000).k == 32
    assert "auxk.k = 64 is more than d_sae = 32: 32 is taken" in capsys.readouterr().err
    rows = DiversityConfig.model_validate({"orthogonality": {"weight": 1}}).resolve(32).orthogonality.rows
    assert rows == 32 and "diversity.orthogonality.rows = 1,024 is more than d_sae = 32" in capsys.readouterr().err
    AuxKConfig(dead_after_tokens=1000).resolve(64, 1000)
    assert "auxk.dead_after_tokens = 1,000 is no less than the 1,000 rows of the run" in capsys.readouterr().err
    for quiet in (AuxKConfig(), AuxKConfig(coefficient=0, k=999)):
        assert quiet.resolve(2048, 1000) == quiet
    assert AuxKConfig().resolve(64, 1000).k == 4  # with all of them dead
    assert DiversityConfig().resolve(32) == DiversityConfig() and not capsys.readouterr().err


@pytest.mark.parametrize("kind", [TorchAdam, TritonAdam])
def test_what_a_product_in_bfloat16_reads_follows_the_weights(kind: type) -> None:
    """Triton's kernel writes it; after all else that writes weights, a checkpoint for one, it is cast anew.

    Triton's interpreter rounds to bfloat16 toward 0, the compiled kernel to the nearest.
    """
    model = make()
    model.product_dtype = torch.bfloat16
    optimizer = optimizer_of(kind, model, OptimizerConfig(lr=0.1), steps=10)
    for step in range(3):
        optimizer.step([loss_of(model, step)], step)
        read = model._low if kind is TritonAdam else model.low_weights()
        assert read is not None
        for low, weight in zip(read, (model.b_enc, model.W_enc), strict=True):
            torch.testing.assert_close(low.float(), weight.detach(), rtol=2**-7, atol=0)
    model.load_state_dict(make().state_dict())
    read = model.low_weights()
    assert read is not None and torch.equal(read[1], make().W_enc.bfloat16())
    model.product_dtype = torch.float32
    assert model.low_weights() is None


@KINDS
def test_latents_that_start_anew_have_no_direction_and_steps_as_long_as_others(kind: type) -> None:
    model, new = make(), torch.tensor([3, 20])
    optimizer = optimizer_of(kind, model, OptimizerConfig(lr=0.01), steps=4)
    for step in range(2):
        optimizer.step([loss_of(model, step)], step)
    before = {name: one.clone() for name, one in optimizer.state().items()}
    optimizer.start_anew(new)
    others = torch.ones(F, dtype=torch.bool)
    others[new] = False
    for name, after in optimizer.state().items():
        parameter, _, moment = name.partition(".")
        dim = {"W_enc": 1, "b_enc": 0, "W_dec": 0}.get(parameter)
        if dim is None or moment == "step":
            assert torch.equal(after, before[name])
            continue
        after, was = after.movedim(dim, 0), before[name].movedim(dim, 0)
        assert torch.equal(after[others], was[others])
        expected = torch.zeros_like(was[0]) if moment == "exp_avg" else was.mean(0)
        assert (was[new] != expected).any() and torch.equal(after[new], expected.expand_as(after[new]))
