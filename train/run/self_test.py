"""The self-test that comes before a run: synthetic latents go through every component that is on."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.errors import ProjectError
from shared.store.strata import POSITION_0
from train.duplicates.diversity import Diversity
from train.duplicates.monitor import CorrelationMonitor
from train.model.activations import BatchTopK
from train.model.quiet import Quiet
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.redundancy.groups import Judging, find_groups
from train.redundancy.held_rows import HeldRows
from train.redundancy.merge_latents import replace
from train.run.settings import Settings
from train.run.usage import SAMPLES, components
from train.samples.encode import Activations
from train.samples.select import SamplesConfig, select

_SAME, _AT_0 = (5, 6), (9, 10)
"""The planted latents."""


def prove(settings: Settings) -> None:
    """Send planted latents through every component that is on, and see that they move it, and it them.

    Planted: two latents with nearly one decoder row that are active on nearly the same rows, and two that are active at
    position 0 alone. The monitor must list the first two and not the others; a small step down the gradient of each
    term must make smaller what it is there to make smaller; samples must show each sequence once, by its peak, and
    position 0 once. In a small transcoder on CPU, by the code of the run.
    Raises `ProjectError` naming the component.
    """
    rows = 4 * max(settings.monitor.least_together, 16)
    model, step, strata = _planted(settings, rows)
    alive = torch.zeros(model.d_sae, dtype=torch.bool)
    with tempfile.TemporaryDirectory() as folder:
        monitor = CorrelationMonitor(
            Path(folder), settings.monitor.model_copy(update={"every": 1}), model, strata, steps=1
        )
        monitor.add(step, 1)
        report = monitor.report(1, alive)
    keys = {pair.key for pair in report.pairs}
    missed = _SAME not in keys or _AT_0 in keys or report.with_position_0.pairs_above["0.9"] < 2
    if settings.monitor.every and missed:
        raise _inert("monitor")
    whole = settings.diversity.orthogonality.model_copy(update={"rows": model.d_sae})  # a chunk that holds the planted
    config = settings.diversity.model_copy(update={"orthogonality": whole})
    diversity = Diversity(model, config, torch.ones(rows), strata[POSITION_0], settings.seed)
    diversity.follow(report, monitor.correlated)
    terms = diversity.value_terms(step) | diversity.direction_terms(alive, 0)
    for name in components(settings):
        if name in ("orthogonality", "mined"):
            moved, before = _moved(terms, name, model.W_dec), model.W_dec.detach()
            if not _cosine(moved) < _cosine(before):
                raise _inert(f"diversity.{name}", f"; diversity.margin is {settings.diversity.margin}")
        elif name == "co_activation":
            moved, before = _moved(terms, name, step.values), step.values.detach()
            if not _together(step.active, moved) < _together(step.active, before):
                margin = settings.diversity.co_activation.margin
                raise _inert(f"diversity.{name}", f"; diversity.co_activation.margin is {margin}")
        elif name == "position":
            moved, at = _moved(terms, name, step.values), torch.isin(step.active.latents, torch.tensor(_AT_0))
            if not moved[at].sum() < step.values.detach()[at].sum():
                raise _inert(f"diversity.{name}")
        elif name == "quiet":
            sinks = 50 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
            moved = _moved(Quiet(model, settings.quiet, sinks, rows).terms(0), name, model.W_enc)
            if not (sinks @ moved).relu().sum() < (sinks @ model.W_enc.detach()).relu().sum():
                raise _inert(name)
        elif name == "merge" and not _merges(model):
            raise _inert("diversity.merge")
        elif name == SAMPLES and not sampled_rightly(
            step.active, strata[POSITION_0].stop, _SAME[0], _AT_0, settings.samples, settings.seed
        ):
            raise ProjectError("samples are on, and planted latents are sampled wrongly: the run was not started")


def _moved(terms: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """Return `parameter` after a small step down the gradient of a term, as it is where the term gives none."""
    if parameter.grad is not None:
        parameter.grad.zero_()
    if name in terms:
        terms[name].backward()
    value, grad = parameter.detach(), parameter.grad
    if grad is None or not grad.norm() > 0:
        return value
    return value - 1e-3 * value.norm() / grad.norm() * grad


def _cosine(W_dec: Tensor) -> float:
    return float(torch.cosine_similarity(W_dec[_SAME[0]], W_dec[_SAME[1]], dim=0))


def _together(active: SparseLatents, values: Tensor) -> float:
    """Return the summed product of the planted latents' values."""
    dense = torch.zeros(len(active.starts) - 1, active.d_sae)
    dense[active.rows, active.latents] = values
    return float(dense[:, _SAME].prod(1).sum())


def _merges(model: Transcoder) -> bool:
    """Tell whether the planted latents with nearly one decoder row, with one encoder, are merged, and no others."""
    generator = torch.Generator().manual_seed(2)
    x, residual = torch.randn(2, 512, 16, generator=generator)
    threshold, (kept, freed) = torch.full((model.d_sae,), 0.2), _SAME
    with torch.no_grad():
        model.W_enc[:, freed] = model.W_enc[:, kept]
    active = model.select_above(model.pre_acts(x), threshold)
    held = HeldRows(x=x, residual=0.01 * residual, weight=np.ones(len(x)), active=active, total=1.0)
    groups, _ = find_groups(model, Judging.of(model, held, held, threshold))
    merged = replace(model, groups, held, threshold, seed=0, step=1)
    return merged == ([kept], [freed]) and _cosine(model.W_dec.detach()) < 0.9


def _planted(settings: Settings, rows: int) -> tuple[Transcoder, StepOutput, dict[str, slice]]:
    generator, activation = torch.Generator().manual_seed(0), BatchTopK(k=4)
    norm = settings.transcoder.decoder_norm
    config = TranscoderConfig(d_sae=32, prefixes=(16, 32), decoder_norm=norm).resolve(16, activation)
    model = Transcoder(16, 16, config, activation, Normalisation(torch.zeros(16), 1.0, torch.zeros(16), 1.0))
    model.initialise(0)
    model.blas = "numpy" if settings.blas == "numpy" else "torch"
    near, alike = (
        min(1.0, 10 * (1 - margin)) ** 0.5
        for margin in (settings.diversity.margin, settings.diversity.co_activation.margin)
    )  # so that the planted pair lies above margins near 1: its distance from 1 falls with that of the margin
    at_0 = max(2, rows // 4)
    dense = torch.rand(rows, 32, generator=generator) * (torch.rand(rows, 32, generator=generator) > 0.5)
    with torch.no_grad():
        model.W_dec.copy_(torch.randn(model.W_dec.shape, generator=generator))
        model.normalise_decoder()
        model.W_dec[_SAME[1]] = model.W_dec[_SAME[0]] + 0.05 * near * torch.randn(16, generator=generator)
        model.normalise_decoder()
    dense[at_0:, _SAME[0]] = torch.rand(rows - at_0, generator=generator)
    dense[:, _SAME[1]] = dense[:, _SAME[0]] * (1 + 0.1 * alike * torch.rand(rows, generator=generator))
    dense[:, _AT_0] = 0
    dense[:at_0, _AT_0[0]] = 1
    dense[:at_0, _AT_0[1]] = 1
    at, latents = dense.nonzero(as_tuple=True)
    values = dense[at, latents].requires_grad_()
    active, nothing = SparseLatents.of(at, latents, values.detach(), dense.shape), torch.zeros(())
    step = StepOutput(
        terms={},
        errors=torch.zeros(rows, 2),
        target=torch.zeros(rows, 16),
        active=active,
        values=values,
        threshold=nothing,
        pre_acts=dense,
    )
    return model, step, {POSITION_0: slice(0, at_0), "001-004": slice(at_0, rows)}


def _inert(name: str, note: str = "") -> ProjectError:
    return ProjectError(
        f"{name} is on, and planted duplicates do not move it: the run would train without it, so it was not started"
        + note
    )


def sampled_rightly(
    active: SparseLatents, at_0: int, everywhere: int, only_at_0: tuple[int, ...], config: SamplesConfig, seed: int
) -> bool:
    """Sample a batch whose first `at_0` rows are of position 0, of one token, each followed by others of its sequence.

    Samples of the latent that is active `everywhere` must be of different sequences, each the largest of its own, and
    the top the largest of these; latents that are active `only_at_0` must have one.
    """
    context = (len(active.starts) - 1) // at_0
    order, starts = (part.numpy() for part in active.by_latent)
    rows, latents, values = (part.numpy()[order] for part in (active.rows, active.latents, active.values))
    later, after = np.divmod(rows - at_0, context - 1)
    places = np.where(rows < at_0, rows * context, later * context + after + 1)
    rising = np.lexsort((places, latents))
    windows = np.zeros((at_0, context), np.int32)
    planted = Activations(
        first=0,
        tokens=windows,
        documents=windows,
        apart=False,
        strata=("at 0", "later"),
        stratum=np.tile(np.minimum(np.arange(context), 1).astype(np.uint8), at_0),
        starts=starts,
        places=places[rising].astype(np.int32),
        values=values[rising],
    )
    chosen = select(planted, config.model_copy(update={"max_stratum_share": 1.0}), seed)
    mine = slice(starts[everywhere], starts[everywhere + 1])
    dense = np.zeros((at_0, context), np.float32)
    dense.ravel()[planted.places[mine]] = planted.values[mine]
    dense[1:, 0] = 0  # the same row as the first
    largest = dense.max(1)
    pairs = chosen.pairs[chosen.latents == everywhere]
    sequences, top = planted.places[pairs] // context, np.sort(largest)[::-1][: config.top]
    return (
        len(np.unique(sequences)) == len(sequences)
        and np.array_equal(planted.values[pairs], largest[sequences])
        and np.array_equal(planted.values[pairs][: len(top)], top)
        and all(np.count_nonzero(chosen.latents == latent) == 1 for latent in only_at_0)
    )
