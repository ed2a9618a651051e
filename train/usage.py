"""`usage.json`: what every component that is on has done, so that nothing configured goes unused.

Before the first step, `prove` sends planted latents through the code that the run will use. While it runs, components
are counted. After the last step, one that never ran is a failure, and one that found nothing to do is a note.
"""

import sys
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from shared import durable
from shared.config import Config, read_record
from shared.errors import DiskFull, ProjectError
from shared.strata import POSITION_0
from shared.terminal import say
from train.checkpoint import fitting
from train.duplicates.diversity import Diversity
from train.duplicates.monitor import CorrelationMonitor
from train.quiet import Quiet
from train.samples.proof import sampled_rightly
from train.settings import Settings
from train.sparsity import Active
from train.transcoder import BatchTopK, JumpReLU, Normalisation, ReLU, Step, Transcoder, TranscoderConfig

USAGE = "usage.json"
SAMPLES = "samples"
"""The component that has no state: it runs after the last checkpoint."""


class Component(Config):
    """What one component has done."""

    calls: int
    """Steps of which it was part; or reports, evaluations or checkpoints that it made."""
    effect: float
    """What came of it, in total."""
    effect_counts: str
    """What `effect` counts."""


class UsageRecord(Config):
    """`usage.json`."""

    schema_version: Literal[1] = 1
    step: int
    components: dict[str, Component]
    rows: dict[str, int]
    """Rows drawn from every stratum."""
    notes: list[str]


def components(settings: Settings) -> dict[str, str]:
    """Which components the settings switch on, and what the effect of each counts."""
    diversity, term = settings.diversity, "weighted loss, summed over steps"
    wanted = {
        "reconstruction": True,
        "auxk": settings.auxk.coefficient > 0,
        "quiet": settings.quiet.weight > 0,
        "l0": isinstance(settings.activation, JumpReLU),
        "l1": isinstance(settings.activation, ReLU),
        "orthogonality": diversity.orthogonality.weight > 0,
        "mined": diversity.mined.weight > 0,
        "co_activation": diversity.co_activation.weight > 0,
        "position": diversity.position.weight > 0,
    }
    found = {name: term for name, on in wanted.items() if on}
    return found | {
        **({"monitor": "pairs listed in reports"} if settings.monitor.every else {}),
        **({"controller": "reports that moved a weight"} if diversity.controller.on else {}),
        "evaluation": "held-out rows",
        "checkpoint": "checkpoints published",
        **({SAMPLES: "latents with samples"} if settings.samples.rows else {}),
    }


class Usage:
    """The counts of a run: state that a resumed run continues from."""

    def __init__(self, run: Path, settings: Settings, strata: dict[str, slice]) -> None:
        self._path, self._strata, self._counted = run / USAGE, strata, components(settings)
        self._calls, self._effect = dict.fromkeys(self._counted, 0), dict.fromkeys(self._counted, 0.0)
        self._kept = [name for name in self._counted if name != SAMPLES]
        self.lost = 0

    def call(self, *names: str, effect: float = 0.0) -> None:
        """Count one call of each component, and its effect, if that is known already."""
        for name in names:
            self._calls[name] += 1
            self._effect[name] += effect

    def take_back(self, name: str) -> None:
        """Of a call that was counted before it failed: it had no effect."""
        self._effect[name] -= 1

    def effects(self, terms: dict[str, float], steps: int) -> None:
        """Add the terms of a row of the metrics, which are means over `steps`."""
        for name, value in terms.items():
            self._effect[name] += value * steps

    def publish(self, step: int) -> UsageRecord:
        """Write the file as of `step`. A full disk costs the file and one warning, never the run."""
        record = UsageRecord(
            step=step,
            components={
                name: Component(calls=self._calls[name], effect=self._effect[name], effect_counts=counts)
                for name, counts in self._counted.items()
            },
            rows={name: step * (rows.stop - rows.start) for name, rows in self._strata.items()},
            notes=[
                f"{name} ran and found nothing to do: its effect ({counts}) is 0"
                for name, counts in self._counted.items()
                if self._calls[name] and not self._effect[name]
            ],
        )
        try:
            durable.publish_json(self._path, record.model_dump(mode="json"))
        except (DiskFull, OSError) as error:
            if not self.lost:
                print(f"warning: {error}; training goes on, {USAGE} is not up to date", file=sys.stderr)
            self.lost += 1
        return record

    def finished(self, step: int) -> bool:
        """Whether the file has been published after the last step, with all that follows it."""
        if not self._path.is_file():
            return False
        record = read_record(UsageRecord, durable.read_json(self._path), self._path)
        return record.step == step and all(component.calls for component in record.components.values())

    def finish(self, step: int) -> None:
        """Publish after the last step. Raises `ProjectError` when a component that is on never ran."""
        record = self.publish(step)
        for note in record.notes:
            say(f"note: {note}")
        if unused := [name for name, component in record.components.items() if not component.calls]:
            raise ProjectError(f"configured, and never ran in {step} steps: {', '.join(unused)} ({self._path})")

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {
            "usage.calls": torch.tensor([self._calls[name] for name in self._kept]),
            "usage.effect": torch.tensor([self._effect[name] for name in self._kept], dtype=torch.float64),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        for name, counts in (("calls", self._calls), ("effect", self._effect)):
            like = self.state()[f"usage.{name}"]
            counts |= dict(zip(self._kept, fitting(tensors, f"usage.{name}", like).tolist(), strict=True))


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
    missed = _SAME not in keys or _BOS in keys or report.with_position_0.pairs_above["0.9"] < 2
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
                raise _inert(f"diversity.{name}")
        elif name == "co_activation":
            moved, before = _moved(terms, name, step.values), step.values.detach()
            if not _together(step.active, moved) < _together(step.active, before):
                raise _inert(f"diversity.{name}")
        elif name == "position":
            moved, at = _moved(terms, name, step.values), torch.isin(step.active.latents, torch.tensor(_BOS))
            if not moved[at].sum() < step.values.detach()[at].sum():
                raise _inert(f"diversity.{name}")
        elif name == "quiet":
            sinks = 50 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
            moved = _moved(Quiet(model, settings.quiet, sinks, rows).terms(0), name, model.W_enc)
            if not (sinks @ moved).relu().sum() < (sinks @ model.W_enc.detach()).relu().sum():
                raise _inert(name)
        elif name == SAMPLES and not sampled_rightly(
            step.active, strata[POSITION_0].stop, _SAME[0], _BOS, settings.samples, settings.seed
        ):
            raise ProjectError("samples are on, and planted latents are sampled wrongly: the run was not started")


def _moved(terms: dict[str, Tensor], name: str, parameter: Tensor) -> Tensor:
    """`parameter` after a small step down the gradient of a term, as it is where the term gives none."""
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


def _together(active: Active, values: Tensor) -> float:
    """The summed product of the planted latents' values."""
    dense = torch.zeros(len(active.starts) - 1, active.d_sae)
    dense[active.rows, active.latents] = values
    return float(dense[:, _SAME].prod(1).sum())


_SAME, _BOS = (5, 6), (9, 10)
"""The planted latents."""


def _planted(settings: Settings, rows: int) -> tuple[Transcoder, Step, dict[str, slice]]:
    generator, activation = torch.Generator().manual_seed(0), BatchTopK(k=4)
    config = TranscoderConfig(d_sae=32, prefixes=(16, 32)).resolve(16, activation)
    model = Transcoder(16, 16, config, activation, Normalisation(torch.zeros(16), 1.0, torch.zeros(16), 1.0))
    model.initialise(0)
    model.blas = "numpy" if settings.blas == "numpy" else "torch"
    bos = max(2, rows // 4)
    dense = torch.rand(rows, 32, generator=generator) * (torch.rand(rows, 32, generator=generator) > 0.5)
    with torch.no_grad():
        model.W_dec[_SAME[1]] = model.W_dec[_SAME[0]] + 0.05 * torch.randn(16, generator=generator)
        model.normalise_decoder()
    dense[bos:, _SAME[0]] = torch.rand(rows - bos, generator=generator)
    dense[:, _SAME[1]] = dense[:, _SAME[0]] * (1 + 0.1 * torch.rand(rows, generator=generator))
    dense[:, _BOS] = 0
    dense[:bos, _BOS[0]] = 1
    dense[:bos, _BOS[1]] = 1
    at, latents = dense.nonzero(as_tuple=True)
    values = dense[at, latents].requires_grad_()
    active, nothing = Active.of(at, latents, values.detach(), dense.shape), torch.zeros(())
    step = Step(
        loss=nothing,
        terms={},
        errors=torch.zeros(rows, 2),
        target=torch.zeros(rows, 16),
        active=active,
        values=values,
        threshold=nothing,
        pre_acts=dense,
    )
    return model, step, {POSITION_0: slice(0, bos), "001-004": slice(bos, rows)}


def _inert(name: str) -> ProjectError:
    return ProjectError(
        f"{name} is on, and planted duplicates do not move it: the run would train without it, so it was not started"
    )
