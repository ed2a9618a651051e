"""Kernels of a step against float64, on the device that they run on: what the interpreter and the CPU cannot show.

Every check is a relative error, norm of the difference over norm of the reference, with a limit. Memory that kernels
are given is NaN before, so that what they leave unwritten shows. Legend as in `gpu_setup`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from shared.store.store import Store
from tests import reference
from tests.bench.gpu_setup import Shape, Step, make_step
from tests.bench.record import SMOKE, sized
from train.model.kernels.base import Groups, Kernels, SparseOps
from train.model.kernels.matmul import Matmul
from train.model.kernels.sparse_ops import sparse_ops
from train.model.sparse_latents import SparseLatents

FORMS: tuple[Kernels, ...] = tuple(form for form in get_args(Kernels) if form != "compiled")
"""Those that run on CUDA."""
WIDTHS = sized(((512, 2304, 4096, 48), (130, 576, 1000, 7)), ((8, 16, 32, 4),))
"""Rows, width, latents and active latents per row; the second has no power of two."""
SHAPE = sized(Shape(512, 4096), Shape(16, 32))
"""Of whole steps."""
EXACT, SUMS, UPDATE = 0.0, 2e-5, 1e-3
"""Limits: of what is selected, of sums in float32, and of a move by Adam, which divides by small numbers."""
LOW = 2e-2
"""Limit of what is made from products in bfloat16 or TF32."""


class Check(NamedTuple):
    """One comparison."""

    name: str
    error: float
    limit: float

    @property
    def of(self) -> str:
        """What it is a check of."""
        return "an update" if self.name.startswith("update") else "a sum"

    @property
    def holds(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


class Case(NamedTuple):
    """Rows and weights of one batch."""

    x: Tensor
    y: Tensor
    rows: Tensor
    """[F, D] the encoder's columns, as they lie in memory"""
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int


def groups(store: Store, device: str) -> Iterator[tuple[str, Callable[[], Iterator[Check]]]]:
    """Name every form that runs on the device, and the step of a run, with their checks.

    This project's own kernels come last: a fault of the device, after which it computes nothing more, is most likely
    theirs.
    """
    for form in sorted(FORMS, key=lambda form: form == "triton"):
        if form == "triton":
            yield "step, auto", partial(_of_settings, store, device, [])
        for size in WIDTHS:
            for name, case in list(cases(*size, device))[sized(0, 2) :]:
                yield f"{form}, width {size[1]:,}, {name}", partial(_of_form, form, case)
        if not SMOKE:  # that of Triton's interpreter takes long
            yield f"step, kernels={form}", partial(_of_settings, store, device, [f"kernels={form}"])
    yield "triton, pairs of decoder rows", partial(_of_pairs, device)
    if not SMOKE:
        yield "triton, steps as a CUDA graph", partial(_of_graph, store, device)


def _of_pairs(device: str) -> Iterator[Check]:
    """Check the loss of close decoder rows, one of them in many pairs, and its gradient."""
    from train.model.kernels.triton_pairs import pair_loss, partners
    from train.model.kernels.triton_step import Joined
    from train.model.kernels.triton_sums import Sums, sums_by_latent

    F, O = WIDTHS[0][2], WIDTHS[0][1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(F, O, generator=generator)
    rows = (rows / rows.norm(dim=1, keepdim=True)).to(device)
    first = torch.cat([torch.zeros(F - 1, dtype=torch.int64), torch.arange(1, F - 1)]).to(device)
    second = torch.cat([torch.arange(1, F), torch.arange(2, F)]).to(device)
    group, dead = torch.arange(F, device=device) // (F // 4), torch.arange(F, device=device) % 5 == 4
    W_dec, leaf = nn.Parameter(rows.clone()), rows.double().requires_grad_()
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    active = SparseLatents.of(nothing, nothing, rows.new_zeros(0), torch.Size((1, F)))
    joined, gradient = Joined(rows.new_zeros(1, 3), active, active.values), torch.empty_like(rows)
    loss = pair_loss(joined, W_dec, partners(first, second, F), group, dead, (-0.5, 0.0), 0.25)
    no_pairs = Sums(active.values, rows.new_zeros(1, O), gradient, False)
    sums_by_latent(active, no_pairs, partners=joined.partners[0])
    margins = torch.where(group[first] == group[second], -0.5, 0.0)
    excess = ((leaf[first] * leaf[second]).sum(1) - margins).relu().where(~(dead[first] | dead[second]), 0.0)
    expected = 0.5 * excess.square().sum()
    expected.backward()
    yield Check("loss", _error(loss, expected), SUMS)
    yield Check("gradient of W_dec", _error(gradient, _given(leaf.grad)), SUMS)


def _of_graph(store: Store, device: str) -> Iterator[Check]:
    """Check that steps which are replayed leave the weights that single operations leave, bit for bit."""
    made = [make_step(store, SHAPE, device, ["kernels=triton", f"step_graph={one}"]) for one in ("on", "off")]
    for step in made:
        for number in range(6):
            step(number)
    yield Check("steps that were replayed", abs(made[0].graph.replayed - 5), EXACT)
    for name, weights in made[0].model.named_parameters():
        yield Check(name, _error(weights, made[1].model.get_parameter(name)), EXACT)


def _of_form(form: Kernels, case: Case) -> Iterator[Check]:
    return _of_ops(sparse_ops(form), case)


def _of_settings(store: Store, device: str, changes: list[str]) -> Iterator[Check]:
    # Without a warm-up, whose first moves are as small as the weights' last bits.
    return _of_step(make_step(store, SHAPE, device, ["optimizer.warmup_share=0", *changes]))


def cases(B: int, D: int, F: int, k: int, device: str) -> Iterator[tuple[str, Case]]:
    """Weights that are random; that leave half of the pairs wanted positive; that have a latent on every row."""
    generator = torch.Generator().manual_seed(B + F)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, y, rows, W_dec = draw(B, D), draw(B, D), draw(F, D) / D**0.5, draw(F, D) / D**0.5
    b_enc, b_dec = 0.1 * draw(F), draw(D)
    case = Case(x, y, rows, b_enc, W_dec, b_dec, k)
    yield "random", case
    largest = (x @ rows.T + b_enc).flatten().sort(descending=True).values
    half = largest[k * B // 2 :][:2].mean()  # between two of them: no pre-activation is near 0
    yield "few positive", case._replace(b_enc=b_enc - half)
    crowded = b_enc.clone()
    crowded[F // 3] = 8.0
    yield "one latent on every row", case._replace(b_enc=crowded)


def _of_ops(ops: SparseOps, case: Case) -> Iterator[Check]:
    B, F = len(case.x), len(case.rows)
    pre_acts = case.x @ case.rows.T + case.b_enc
    poison(case.x)
    active, smallest = ops.batch_topk(pre_acts, case.k * B, torch.zeros((), device=case.x.device))
    largest = pre_acts.double().relu().flatten().sort(descending=True).values[: case.k * B]
    yield Check("batch_topk, values", _error(_sorted(active.values.relu(), len(largest)), largest), EXACT)
    yield Check("batch_topk, places", _error(_at(pre_acts, active).relu(), active.values.relu()), EXACT)
    yield Check("batch_topk, least", _error(smallest, largest[largest > 0].min()), EXACT)
    dead = torch.arange(F, device=case.x.device) % 4 == 0
    rowwise = ops.row_topk(pre_acts, case.k, dead)
    best = pre_acts.double().masked_fill(~dead, -torch.inf).sort(1, descending=True).values[:, : case.k]
    yield Check("row_topk", _error(_sorted(rowwise.values, B * case.k), best.flatten().sort(descending=True)[0]), EXACT)
    above = ops.above(pre_acts, case.b_enc + 1)
    yield Check("above", _error(_dense(above), pre_acts.where(pre_acts > case.b_enc + 1, 0.0)), EXACT)
    yield from _of_gradients(ops, case, active)


def _of_gradients(ops: SparseOps, case: Case, active: SparseLatents) -> Iterator[Check]:
    """Check errors and gradients of the pairs that were selected."""
    F, prefixes = len(case.rows), [len(case.rows) // n for n in (16, 8, 4, 2, 1)]
    group = torch.bucketize(torch.arange(F), torch.tensor(prefixes), right=True).to(case.x.device)
    weight = 1 / (case.y.numel() * len(prefixes))
    sums = LOW if isinstance(ops, Matmul) else SUMS  # all of its products are in TF32

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        poison(case.x)
        rows, b_enc, W_dec, b_dec = _leaves(case, torch.float32)
        W_enc = nn.Parameter(rows.detach().T)
        values = ops.encode(case.x, W_enc, b_enc, active).relu()
        base, groups = b_dec.unsqueeze(0), Groups(group, len(prefixes), weight, tuple(prefixes))
        loss, errors, left = ops.prefix_loss(values, W_dec, base, case.y, active, groups)
        loss.backward()
        grads = {"W_enc": W_enc.grad.T, "b_enc": b_enc.grad, "W_dec": W_dec.grad, "b_dec": b_dec.grad}  # type: ignore[union-attr]
        return {"loss": loss, "errors": errors, "left": left}, grads  # type: ignore[return-value]

    rows, b_enc, W_dec, b_dec = _leaves(case, torch.float64)
    x, y = case.x.double(), case.y.double()
    latents = (x @ rows.T + b_enc).relu() * _mask(active, (len(x), F))
    parts = reference.reconstructions(latents, W_dec, b_dec, prefixes)
    errors = torch.stack([(part - y).square().sum(1) for part in parts], 1)
    (weight * errors.sum()).backward()
    expected = {"loss": weight * errors.sum(), "errors": errors, "left": y - parts[-1]}
    found, grads = run()
    for name, value in expected.items():
        yield Check(name, _error(found[name], value), sums)
    for name, leaf in zip(grads, (rows, b_enc, W_dec, b_dec), strict=True):
        assert leaf.grad is not None
        yield Check(f"gradient of {name}", _error(grads[name], leaf.grad), sums)
    again = run()[1]
    yield Check("gradients, repeated", max(_error(again[name], grads[name]) for name in grads), EXACT)


def _of_step(step: Step) -> Iterator[Check]:
    """Check a whole step: selection, the gradients of what it selected, and the update."""
    model, auxk = step.model, step.auxk.model_copy(update={"coefficient": 0.0})
    source, target = step.batches[0]
    before = {name: one.detach().double().clone() for name, one in model.named_parameters()}

    def loss() -> tuple[Tensor, SparseLatents]:
        poison(source)
        output = model.step(source, target, step.dead, auxk, 0)
        return output.loss, output.active

    model.zero_grad(set_to_none=True)
    found, active = loss()
    found.backward()
    grads = {name: _given(one.grad).double().clone() for name, one in model.named_parameters()}
    low = SUMS if step.config.settings.product_dtype == "float32" else LOW
    sums = LOW if step.config.settings.kernels == "matmul" else SUMS
    leaves = {name: one.clone().requires_grad_() for name, one in before.items()}
    x, y = (one.double() for one in model.normalised(source, target))
    pre_acts = x @ leaves["W_enc"] + leaves["b_enc"]
    latents = pre_acts.relu() * _mask(active, pre_acts.shape)
    parts = reference.reconstructions(latents, leaves["W_dec"], leaves["b_dec"], model.prefixes)
    expected = torch.stack([reference.prefix_loss(part, y) for part in parts]).mean()
    expected.backward()
    largest = pre_acts.detach().relu().flatten().sort(descending=True).values[: len(active.values)]
    chosen = pre_acts.detach()[active.rows, active.latents].relu().sort(descending=True).values
    yield Check("selected values, against those of float64", _error(chosen, largest), low)
    yield Check("loss", _error(found, expected), sums)
    for name, leaf in leaves.items():
        yield Check(f"gradient of {name}", _error(grads[name], _given(leaf.grad)), sums)
    lr, _ = step.optimizer.step([loss()[0]], 0)
    moved = _adam(before, grads, lr, step)
    for name, parameter in model.named_parameters():
        yield Check(f"update of {name}", _error(parameter - before[name], moved[name] - before[name]), UPDATE)
    step(1)  # aux-k, which the checks above leave out, and an update from moments that are not 0
    finite = all(bool(torch.isfinite(one).all()) for one in model.parameters())
    yield Check("a step with aux-k leaves finite weights", 0.0 if finite else float("nan"), EXACT)


def _adam(before: dict[str, Tensor], grads: dict[str, Tensor], lr: float, step: Step) -> dict[str, Tensor]:
    """Make the first step of Adam in float64, with what is done before it and after."""
    settings = step.config.settings.optimizer
    grads = dict(grads)
    if step.model.has_unit_decoder:
        rows = before["W_dec"]
        grads["W_dec"] = grads["W_dec"] - rows * (grads["W_dec"] * rows).sum(1, keepdim=True)
    norm = torch.stack([one.square().sum() for one in grads.values()]).sum().sqrt()
    scale = torch.clamp((settings.max_grad_norm or torch.inf) / (norm + 1e-6), max=1.0)
    moved = {}
    for name, grad in grads.items():
        grad = grad * scale
        moved[name] = before[name] - lr * settings.rate_of(name) * grad / (grad.abs() + settings.eps)
    if step.model.has_unit_decoder:
        moved["W_dec"] = moved["W_dec"] / moved["W_dec"].norm(dim=1, keepdim=True)
    return moved


def poison(like: Tensor) -> None:
    """Leave NaN in memory that is given out next, in blocks of up to eight times the size of `like`."""
    kept = [torch.full((8 * like.numel() // 4**n,), torch.nan, device=like.device) for n in range(6)]
    del kept


def _leaves(case: Case, dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(one.to(dtype, copy=True)) for one in (case.rows, case.b_enc, case.W_dec, case.b_dec)]


def _error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error; 0 for two that are equal."""
    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        return torch.nan
    difference, whole = float((found - expected).norm()), float(expected.norm())
    return difference / whole if difference else 0.0


def _sorted(values: Tensor, count: int) -> Tensor:
    """Return values, falling, with zeros up to `count`."""
    return nn.functional.pad(values.sort(descending=True).values, (0, count - len(values)))


def _at(pre_acts: Tensor, active: SparseLatents) -> Tensor:
    return torch.where(active.values > 0, pre_acts[active.rows, active.latents], 0.0)


def _dense(active: SparseLatents) -> Tensor:
    shape = len(active.starts) - 1, active.d_sae
    return active.values.new_zeros(shape).index_put((active.rows, active.latents), active.values, accumulate=True)


def _mask(active: SparseLatents, shape: Sequence[int]) -> Tensor:
    ones = torch.ones_like(active.values, dtype=torch.float64)
    return ones.new_zeros(*shape).index_put((active.rows, active.latents), ones)


def _given(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def show(where: str, check: Check) -> str:
    """Return a line of the table."""
    return f"{'ok  ' if check.holds else 'FAIL'} {check.error:9.2e} of {check.limit:7.0e}  {where}: {check.name}"
