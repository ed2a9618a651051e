"""The whole step against a dense float64 reference, for every activation, with and without prefixes and skip."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.errors import UserError
from tests import reference
from train.model.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from train.model.kernels.base import Kernels
from train.model.losses import AuxKConfig
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.latent_counters import Counters
from train.run.metrics import Window
from train.run.optimizer import Optimizer, OptimizerConfig

B, D, O, F, K = 16, 6, 5, 32, 4
PREFIXES = (2, 4, 8, 16, 32)
ACTIVATIONS: dict[str, Activation] = {
    "batchtopk": BatchTopK(k=K),
    "topk": TopK(k=K),
    "jumprelu": JumpReLU(l0_coefficient=0.01, bandwidth=0.3, initial_threshold=0.4),
    "relu": ReLU(l1_coefficient=0.02),
}
NO_DEAD, NO_AUXK = torch.zeros(F, dtype=torch.bool), AuxKConfig()
KERNELS = pytest.mark.parametrize("kernels", ["compiled", "plain", "dense", "matmul"])


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(*latents: int) -> torch.Tensor:
    return torch.isin(torch.arange(F), torch.tensor(latents))


def make(
    activation: Activation, prefixes: tuple[int, ...] = PREFIXES, skip: bool = False, kernels: Kernels = "compiled"
) -> Transcoder:
    config = TranscoderConfig(d_sae=F, prefixes=prefixes, skip=skip).resolve(D, activation)
    model = Transcoder(
        D, O, config, activation, Normalisation(draw(D, seed=70).float(), 2.0, draw(O, seed=71).float(), 0.5)
    )
    model.initialise(seed=3)
    model = model.double()
    model.kernels = kernels
    model.normalise_decoder()
    with torch.no_grad():
        model.b_enc.copy_(0.1 * draw(F, seed=72))
        model.b_dec.copy_(0.1 * draw(O, seed=73))
        if model.W_skip is not None:
            model.W_skip.copy_(0.1 * draw(D, O, seed=74))
    return model


def reference_loss(model: Transcoder, source: torch.Tensor, target: torch.Tensor, dead: torch.Tensor, auxk: AuxKConfig):
    x = (source - model.source_mean) / model.source_scale
    y = (target - model.target_mean) / model.target_scale
    pre_acts = x @ model.W_enc + model.b_enc
    penalty = torch.zeros(())
    match model.activation:
        case BatchTopK(k=k):
            latents = pre_acts * reference.top_of_batch(pre_acts.detach(), k * B)
        case TopK(k=k):
            latents = pre_acts * reference.top_of_rows(pre_acts.detach(), k)
        case JumpReLU() as a:
            latents = pre_acts * (pre_acts > model.thresholds())
            penalty = a.l0_coefficient * (pre_acts > model.thresholds()).double().sum() / B
        case ReLU() as a:
            latents = pre_acts.relu()
            penalty = a.l1_coefficient * latents.sum() / B
    linear = 0.0 if model.W_skip is None else x @ model.W_skip
    parts = reference.reconstructions(latents, model.W_dec, model.b_dec, model.prefixes, linear)
    loss = sum(reference.prefix_loss(part, y) for part in parts) / len(parts) + penalty
    if dead.any():
        rows, latents = slice(0, None, auxk.row_stride), dead.nonzero().squeeze(1)
        loss = loss + auxk.coefficient * reference.auxk_term(
            x[rows], model.W_enc, model.b_enc, model.W_dec, (y - parts[-1])[rows], latents, auxk.k,
            auxk.dead_per_active,
        )  # fmt: skip
    return loss


def gradients(model: Transcoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@KERNELS
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("prefixes", [(F,), PREFIXES])
@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_loss_and_gradients_equal_the_float64_reference(
    kind: str, prefixes: tuple[int, ...], skip: bool, kernels: Kernels
) -> None:
    model = make(ACTIVATIONS[kind], prefixes, skip, kernels)
    source, target = draw(B, D, seed=1) * 2, draw(B, O, seed=2)
    found = model.step(source, target, NO_DEAD, NO_AUXK, 0)
    expected = reference_loss(model, source, target, NO_DEAD, NO_AUXK)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-12)
    mine, theirs = gradients(model, found.loss), gradients(model, expected)
    assert set(mine) - set(theirs) <= {"log_threshold"}  # the reference has no pseudo-derivative; test_losses has it
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


@KERNELS
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("latents", [(1, 5, 9, 20, 31), (5,)])
def test_auxk_equals_the_reference_and_reaches_dead_latents_with_negative_pre_activations(
    latents: tuple[int, ...], stride: int, kernels: Kernels
) -> None:
    """Also when fewer are dead than aux-k may use."""
    model, dead = make(BatchTopK(k=K), kernels=kernels), mask_of(*latents)
    with torch.no_grad():
        model.b_enc[dead] = -50.0
    auxk = AuxKConfig(coefficient=0.5, k=3, row_stride=stride, dead_per_active=2)
    source, target = draw(B, D, seed=1), draw(B, O, seed=2)
    found = model.step(source, target, dead, auxk, 0)
    expected = reference_loss(model, source, target, dead, auxk)
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-12)
    mine, theirs = gradients(model, found.loss), gradients(model, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-10, atol=1e-13, msg=name)
    assert mine["b_enc"][dead].abs().max() > 0


@KERNELS
@pytest.mark.parametrize("latents", [(1, 5, 9), (5,)])
def test_auxk_moves_only_dead_latents(latents: tuple[int, ...], kernels: Kernels) -> None:
    model, dead = make(BatchTopK(k=K), kernels=kernels), mask_of(*latents)
    with torch.no_grad():
        model.b_enc[dead] = -50.0
    source, target = draw(B, D, seed=1), draw(B, O, seed=2)
    with_aux = gradients(model, model.step(source, target, dead, AuxKConfig(row_stride=1), 0).loss)
    without = gradients(model, model.step(source, target, NO_DEAD, AuxKConfig(row_stride=1), 0).loss)
    alive = ~dead
    for name, pick in (("W_enc", (slice(None), alive)), ("b_enc", alive), ("W_dec", alive), ("b_dec", slice(None))):
        torch.testing.assert_close(with_aux[name][pick], without[name][pick], rtol=0, atol=1e-15)


@KERNELS
def test_losses_apart_give_the_gradients_of_their_sum(kernels: Kernels) -> None:
    found = []
    for apart in (False, True):
        model = make(BatchTopK(k=K), kernels=kernels)
        output = model.step(draw(B, D, seed=1), draw(B, O, seed=2), mask_of(3, 7), AuxKConfig(k=3), 1)
        assert len(output.losses) == 2 and float(output.losses[1].detach()) > 0
        for loss in output.losses if apart else [output.loss]:
            loss.backward()
        found.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@KERNELS
def test_auxk_without_a_dead_latent_is_zero(kernels: Kernels) -> None:
    model = make(BatchTopK(k=K), kernels=kernels)
    step = model.step(draw(B, D, seed=1), draw(B, O, seed=2), NO_DEAD, AuxKConfig(coefficient=1.0), 0)
    assert float(step.terms["auxk"]) == 0 and float(step.loss) == float(step.terms["reconstruction"])


@KERNELS
def test_a_step_with_a_product_in_bfloat16_keeps_values_and_gradients_exact(kernels: Kernels) -> None:
    model = make(BatchTopK(k=K), kernels=kernels).float()
    model.product_dtype = torch.bfloat16
    source, target = draw(B, D, seed=1).float(), draw(B, O, seed=2).float()
    found = model.step(source, target, NO_DEAD, NO_AUXK, 0)
    mine = gradients(model, found.loss)
    x, y = model.normalised(source, target)
    mask = torch.zeros(B, F).index_put((found.active.rows, found.active.latents), torch.tensor(1.0))
    latents = (x @ model.W_enc + model.b_enc).relu() * mask
    parts = reference.reconstructions(latents, model.W_dec, model.b_dec, PREFIXES)
    expected = torch.stack([reference.prefix_loss(part, y) for part in parts]).mean()
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-5)
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_prefix_has_its_own_term_in_the_loss() -> None:
    """The decoder rows of group g get a gradient from each prefix that holds them, and from no smaller one."""
    model = make(BatchTopK(k=K))
    source, target = draw(B, D, seed=1), draw(B, O, seed=2)
    whole = gradients(model, model.step(source, target, NO_DEAD, NO_AUXK, 0).loss)["W_dec"]
    x, y = model.normalised(source, target)
    latents = model.pre_acts(x) * reference.top_of_batch(model.pre_acts(x), K * B)
    parts = reference.reconstructions(latents, model.W_dec, model.b_dec, PREFIXES)
    own = [gradients(model, reference.prefix_loss(part, y) / len(PREFIXES))["W_dec"] for part in parts]
    torch.testing.assert_close(whole, sum(own), rtol=1e-10, atol=1e-14)
    used = latents.sum(0) > 0
    for i, size in enumerate(PREFIXES):
        assert not own[i][size:].any()
        assert own[i][:size][used[:size]].abs().sum() > 0
    for low, high in pairwise(PREFIXES):  # a smaller prefix's term really changes what its latents learn
        if used[:low].any():
            assert not torch.allclose(whole[:low], own[-1][:low] * len(PREFIXES))
        assert high > low


def test_no_intermediate_of_the_size_of_the_latents_is_kept_for_the_backward() -> None:
    model = make(BatchTopK(k=K))
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.step(draw(B, D, seed=1), draw(B, O, seed=2), NO_DEAD, NO_AUXK, 0)
    assert kept and all(shape[-2:] != (B, F) for shape in kept)


class _Waits(TorchDispatchMode):
    """Notes operations for which a CUDA device is waited for: their result decides what the program does next."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, torch.Tensor) and t.dtype == torch.bool]
        if name in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal") or (
            name in ("index", "index_put", "index_put_") and masks
        ):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["batchtopk", "topk"])
def test_a_whole_step_on_a_device_waits_for_nothing(kind: str, product_dtype: torch.dtype) -> None:
    model = make(ACTIVATIONS[kind], kernels="plain").float()
    model.product_dtype = product_dtype
    device = torch.device("cpu")
    optimizer, counters = Optimizer(model, OptimizerConfig(), lambda _: 10), Counters(F, B, device)
    window = Window({"000-001": slice(0, 2), "001-004": slice(2, B)}, PREFIXES, O, torch.ones(B, device=device))
    source, target = draw(B, D, seed=1).float(), draw(B, O, seed=2).float()
    with _Waits() as waits:
        for step in range(2):
            output = model.step(source, target, counters.dead(), AuxKConfig(k=3), step)
            _, norm = optimizer.step(output.losses, step)
            counters.update(output)
            window.add(output, norm)
    assert waits.found == []
    with waits:
        window.row()
    assert waits.found


def test_decoder_rows_start_with_unit_norm_and_the_encoder_as_their_scaled_transpose() -> None:
    config = TranscoderConfig(d_sae=F, encoder_scale=0.25).resolve(O, BatchTopK(k=K))
    model = Transcoder(O, O, config, BatchTopK(k=K), Normalisation(torch.zeros(O), 1.0, torch.zeros(O), 1.0))
    model.initialise(seed=0)
    torch.testing.assert_close(model.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(model.W_enc, 0.25 * model.W_dec.T)
    wide = make(BatchTopK(k=K)).float()
    assert wide.W_enc.shape == (D, F)
    torch.testing.assert_close(wide.W_enc.norm(dim=0), torch.ones(F))
    other = make(BatchTopK(k=K))
    other.initialise(seed=4)
    assert not torch.equal(other.W_dec, make(BatchTopK(k=K)).W_dec)


def test_the_parallel_part_of_the_decoder_gradient_is_dropped() -> None:
    model = make(BatchTopK(k=K))
    model.step(draw(B, D, seed=1), draw(B, O, seed=2), NO_DEAD, NO_AUXK, 0).loss.backward()
    model.remove_parallel_gradient()
    assert model.W_dec.grad is not None
    assert (model.W_dec.grad * model.W_dec).sum(1).abs().max() < 1e-15
    assert model.W_dec.grad.abs().max() > 0


@pytest.mark.parametrize("kind", list(ACTIVATIONS))
def test_the_final_selection_is_what_a_late_step_activates(kind: str) -> None:
    model = make(ACTIVATIONS[kind])
    source, target = draw(B, D, seed=1), draw(B, O, seed=2)
    step = model.step(source, target, NO_DEAD, NO_AUXK, 10**6)
    assert step.pre_acts is not None
    final = model.select_final(step.pre_acts)
    active = step.active.positive()
    assert torch.equal(final.rows, active.rows) and torch.equal(final.latents, active.latents)


def test_k_warms_up_linearly() -> None:
    activation = BatchTopK(k=10, k_start=50, k_warmup_steps=4)
    assert [activation.k_at(step) for step in range(6)] == [50, 40, 30, 20, 10, 10]


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("config", "activation", "message"),
    [
        ({"d_sae": 8}, BatchTopK(k=9), "activation.k = 9 is more than d_sae = 8"),
        ({"d_sae": 8}, TopK(k=2, k_start=9), "activation.k_start = 9 is more than d_sae = 8"),
        ({"d_sae": 8, "prefixes": (2, 4)}, BatchTopK(k=1), "must end at d_sae = 8, got [2, 4]"),
        ({"d_sae": 8, "prefixes": (4, 4, 8)}, BatchTopK(k=1), "must rise from 1 up, got [4, 4, 8]"),
        ({"d_sae": 8, "prefixes": (0, 8)}, BatchTopK(k=1), "must rise from 1 up"),
        ({"d_sae": "8y"}, BatchTopK(k=1), "a positive number or a multiple such as 8x, got 8y"),
        ({"d_sae": 0}, BatchTopK(k=1), "a positive number"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_with_both_numbers(config: dict, activation, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("]", r"\]")):
        TranscoderConfig(**config).resolve(D, activation)


def test_an_expansion_factor_multiplies_d_in_and_default_prefixes_halve() -> None:
    config = TranscoderConfig(d_sae="8x").resolve(D, BatchTopK(k=1))
    assert (config.d_sae, config.prefixes) == (48, (3, 6, 12, 24, 48))


@KERNELS
def test_prefixes_weigh_in_the_loss_as_they_are_told(kernels: Kernels) -> None:
    model = make(ACTIVATIONS["batchtopk"], PREFIXES, False, kernels)
    config = TranscoderConfig(d_sae=F, prefixes=PREFIXES, whole_weight=6.0).resolve(D, model.activation)
    zeros = Normalisation(torch.zeros(D), 1.0, torch.zeros(O), 1.0)
    weighs = Transcoder(D, O, config, model.activation, zeros).double()
    weighs.load_state_dict(model.state_dict())
    weighs.kernels, model = kernels, weighs
    given = (1.0, 1.0, 1.0, 1.0, 6.0)  # a mean of 2: shares that float32 holds exactly
    source, target = draw(B, D, seed=1) * 2, draw(B, O, seed=2)
    found = model.step(source, target, NO_DEAD, NO_AUXK, 0)
    x, y = model.normalised(source, target.clone())
    pre_acts = x @ model.W_enc + model.b_enc
    latents = pre_acts * reference.top_of_batch(pre_acts.detach(), K * B)
    parts = reference.reconstructions(latents, model.W_dec, model.b_dec, model.prefixes, 0.0)
    errors = torch.stack([reference.prefix_loss(part, y) for part in parts])
    expected = errors @ torch.tensor(given).double() / sum(given)
    assert float(found.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    mine, theirs = gradients(model, found.loss), gradients(model, expected)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12, msg=name)
