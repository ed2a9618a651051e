"""A step of Triton's kernels with the terms that join its loss, against dense autograd in float64."""

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch

from train.duplicates.directions import Pairs
from train.model.activations import BatchTopK
from train.model.losses import AuxKConfig
from train.model.step_output import StepOutput
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.latent_counters import Counters
from train.run.metrics import Window
from train.run.optimizer import Optimizer, OptimizerConfig

triton_pairs = pytest.importorskip("train.model.kernels.triton_pairs", reason="triton is not installed")
triton_kernels = pytest.importorskip("train.model.kernels.triton_kernels")
triton_quiet = pytest.importorskip("train.model.kernels.triton_quiet")
triton_sums = pytest.importorskip("train.model.kernels.triton_sums")
B, D, O, F, K = 9, 7, 5, 24, 3
PREFIXES = (6, 12, 24)
PAIRS = Pairs(torch.tensor([0, 0, 3, 7, 11]), torch.tensor([1, 5, 8, 8, 9]))
CORRELATED, STRENGTH = Pairs(torch.tensor([2, 2, 4]), torch.tensor([3, 4, 20])), torch.tensor([0.5, 1.0, 2.0]).double()
SILENT, TIMES = torch.tensor([1, 5, 2, 8]), torch.tensor([[1.0], [0.25], [0.5], [1.0]])
"""Rows of the batch on which latents are to be silent, and what the bias counts there; three are looked at"""
AUXK = AuxKConfig(coefficient=0.5, k=2, row_stride=3, dead_per_active=2)
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
FIELDS = tuple(one.name for one in dataclasses.fields(StepOutput))


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(kernels: str) -> Transcoder:
    activation = BatchTopK(k=K)
    config = TranscoderConfig(d_sae=F, prefixes=PREFIXES, whole_weight=2.0).resolve(D, activation)
    still = Normalisation(torch.zeros(D), 1.0, torch.zeros(O), 1.0)
    model = Transcoder(D, O, config, activation, still).double()
    model.initialise(0)
    with torch.no_grad():
        model.b_enc.copy_(0.1 * draw(F, seed=1))
        model.b_dec.copy_(draw(O, seed=2))
    model.kernels = kernels  # type: ignore[assignment]
    return model


def step(model: Transcoder, dead: torch.Tensor, number: torch.Tensor | None = None):
    """One step with the terms that join its loss, as a run has them; returns its losses and all terms."""
    source, target, strength = (one.to(model.W_dec) for one in (draw(B, D, seed=3), draw(B, O, seed=4), STRENGTH))
    output = model.step(source, target, dead, AUXK, 4, number=number)
    silent, times = 2 * source[SILENT], TIMES.to(source)
    group, margins, factor = model.group, (-0.9, -0.8), 0.05
    if output.joined:
        pairs = triton_pairs.partners(*PAIRS, F)
        mined = triton_pairs.pair_loss(output.joined, model.W_dec, pairs, group, dead, margins, factor)
        pairs = triton_pairs.together(*CORRELATED, strength, F)
        together = triton_pairs.co_activation(output.joined, output.values, output.active, pairs)
        sides = output.joined, model.W_enc, model.b_enc, silent, times
        return output.losses, output, mined, together, triton_quiet.quiet_loss(*sides, torch.tensor(5), 3, 0.125)
    limit = torch.where(group[PAIRS.first] == group[PAIRS.second], *margins)
    alive = ~(dead[PAIRS.first] | dead[PAIRS.second])
    cosines = (model.W_dec[PAIRS.first] * model.W_dec[PAIRS.second]).sum(1)
    mined = (2 * factor * alive * (cosines - limit).relu().square()).sum()
    dense = output.values.new_zeros(B, F).index_put((output.active.rows, output.active.latents), output.values)
    together = (strength * (dense[:, CORRELATED.first] * dense[:, CORRELATED.second]).sum(0)).sum()
    looked_at = [3, 0, 1]  # from 5 * 3 on, modulo 4
    quiet = 0.125 * model.positive_sum(silent[looked_at], times[looked_at])
    first, *others = output.losses
    return (first + together + mined + quiet, *others), output, mined, together, quiet


@pytest.fixture(params=["some dead", "none dead", "long sums"])
def dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.Tensor]:
    if request.param == "long sums":
        monkeypatch.setattr(triton_sums, "LONG", 2)
        monkeypatch.setattr(triton_kernels, "_INNER", 4)  # rows of the encoder are read in parts
    yield torch.arange(F) % 5 == (9 if request.param == "none dead" else 1)


@pytest.mark.parametrize("again", [True, False], ids=["values again", "values as selected"])
def test_gradients_with_terms_that_join_are_those_of_the_sum_of_all_terms(dead: torch.Tensor, again: bool) -> None:
    mine, theirs = make("triton"), make("dense")
    mine.tf32 = again  # on CPU that alone comes of it
    found, expected = step(mine, dead, torch.tensor(4)), step(theirs, dead)
    for one, other in zip(found[2:], expected[2:], strict=True):
        assert float(other.detach()) > 0
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)
    for name in ("reconstruction", "auxk"):
        torch.testing.assert_close(found[1].terms[name], expected[1].terms[name], rtol=1e-10, atol=1e-12)
    for losses in (found[0], expected[0]):
        for loss in losses:
            loss.backward()
    for name in NAMES:
        mine_grad, their_grad = getattr(mine, name).grad, getattr(theirs, name).grad
        torch.testing.assert_close(mine_grad, their_grad, rtol=1e-9, atol=1e-12, msg=name)


def test_the_norm_noted_with_gradients_is_that_of_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the part along decoder rows; what autograd adds to a gradient later has it read again."""
    kernels = pytest.importorskip("train.model.kernels.triton_adam")
    read, row_squares = list[int](), kernels.row_squares

    def watched(grad: torch.Tensor, *given: object) -> None:
        read.append(len(grad))
        row_squares(grad, *given)

    monkeypatch.setattr(kernels, "row_squares", watched)
    dead = torch.arange(F) % 5 == 1
    for more in (False, True):
        model = make("triton").float()
        optimizer = Optimizer(model, OptimizerConfig(lr=0.01, max_grad_norm=1e-3), lambda _: 10)
        losses = step(model, dead)[0]
        if more:
            losses = (*losses, model.W_dec.square().sum() + (2 * model.W_dec[:, 0]).sum())
        found = float(optimizer.step(losses, 0)[1])
        grads = {name: getattr(model, name).grad.double() for name in NAMES}
        rows = make("triton").W_dec.detach()
        grads["W_dec"] -= (grads["W_dec"] * rows).sum(1, keepdim=True) * rows
        assert found == pytest.approx(float(sum(grad.square().sum() for grad in grads.values())) ** 0.5, rel=1e-5)
        assert read == ([F] if more else [])
        assert not model.gradient_norms


def test_counters_and_metrics_are_those_of_a_step_whose_terms_do_not_join() -> None:
    """Of three steps; outliers are a stratum of their own, and a term that is not finite is noted with its step."""
    strata, weights, outliers = {"a": slice(0, 4), "b": slice(4, B)}, torch.ones(B), torch.arange(B) % 4 == 1
    found: list[tuple[Window, Counters, torch.Tensor]] = []
    for joins in (True, False):
        model, counters, bad = make("triton").float(), Counters(F, 12, torch.device("cpu")), torch.tensor(99)
        window = Window(strata, PREFIXES, O, weights, outliers=True)
        for number in range(3):
            _, output, mined, *_ = step(model, counters.dead(), torch.tensor(number))
            output = output.with_terms({"mined": mined} if number else {}).detached()
            if not joins:
                output = StepOutput(**{name: getattr(output, name) for name in FIELDS if name != "joined"})
            norm = torch.tensor(0.5 if number < 2 else torch.inf)
            counters.update(output)
            window.add(output, norm, outliers, (bad, torch.tensor(number)))
            model.W_enc.data *= -1
        found.append((window, counters, bad))
    (mine, my_counters, bad), (theirs, their_counters, _) = found
    assert int(bad) == 2
    assert torch.equal(my_counters.rows_since_fired, their_counters.rows_since_fired)
    assert torch.equal(my_counters.dead(), their_counters.dead()) and my_counters.dead().any()
    assert int(my_counters.rows_since_fired.max()) > 0 == int(my_counters.rows_since_fired.min())
    torch.testing.assert_close(my_counters.threshold, their_counters.threshold)
    expected = theirs.state()
    assert mine.state().keys() == expected.keys() and "window.terms.mined" in expected
    for name, value in mine.state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_rows_are_found_checked_and_normalised() -> None:
    """From bfloat16 as from float32; a row that is too long or not finite is noted with the first such step."""
    rows = pytest.importorskip("train.model.kernels.triton_rows")
    tables, means = (
        (3 * draw(12, D, seed=1), 2 * draw(12, O, seed=3)),
        (draw(D, seed=2).float(), draw(O, seed=4).float()),
    )
    scales = torch.tensor(1.7), torch.tensor(0.6)
    places, longest, number = torch.tensor([11, 0, 5, 5]), torch.full((4,), 100.0).double(), torch.tensor(7)

    def sides(stored):
        return [rows.Stored(*side, longest) for side in zip(stored, means, scales, strict=True)]

    for dtype in (torch.float32, torch.bfloat16):
        stored, bad = [table.to(dtype) for table in tables], torch.tensor(99)
        read = [table.float().double()[places] for table in stored]
        over = read[0] / (read[0].square().mean(1, keepdim=True) + 0.1).sqrt()
        here = [table[places] for table in stored]
        for found, source in (
            (rows.prepared(*sides(stored), places, bad, number), read[0]),
            (rows.prepared(*sides(here), None, bad, number, 0.1), over),
        ):
            for mine, theirs, mean, scale in zip(found, (source, read[1]), means, scales, strict=True):
                torch.testing.assert_close(mine.double(), (theirs - mean) / scale, rtol=1e-6, atol=1e-6)
        assert int(bad) == 99
        for side, wrong in itertools.product((0, 1), (torch.nan, torch.inf, 1e3)):
            damaged = [table.clone() for table in stored]
            damaged[side][5, 2] = wrong
            for step_number, expected in ((7, 7), (9, 7), (3, 3)):
                rows.prepared(*sides(damaged), places, bad, torch.tensor(step_number))
                assert int(bad) == expected
            bad.fill_(99)
