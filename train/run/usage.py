"""`usage.json`: what every component that is on has done, so that nothing configured goes unused.

Before the first step, `prove` sends planted latents through the code that the run will use. While it runs, components
are counted. After the last step, one that never ran is a failure, and one that found nothing to do is a note.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from shared.config import sealed
from shared.console.terminal import say
from shared.errors import CorruptData, DiskFull, ProjectError, warn
from shared.files import durable
from train.live.log_rows import Component, UsageRecord
from train.live.run_files import USAGE, read_usage
from train.model.saved_tensors import fitting
from train.run.settings import Settings

SAMPLES = "samples"
"""The component that has no state: it runs after the last checkpoint."""


def components(settings: Settings) -> dict[str, str]:
    """Return which components the settings switch on, and what the effect of each counts."""
    diversity, term = settings.diversity, "weighted loss, summed over steps"
    wanted = {
        "reconstruction": True,
        "auxk": settings.auxk.coefficient > 0,
        "quiet": settings.quiet.weight > 0,
        **({settings.activation.penalty_name: True} if settings.activation.penalty_name else {}),
        "orthogonality": diversity.orthogonality.weight > 0,
        "mined": diversity.mined.weight > 0,
        "co_activation": diversity.co_activation.weight > 0,
        "position": diversity.position.weight > 0,
    }
    found = {name: term for name, on in wanted.items() if on}
    return found | {
        **({"monitor": "pairs listed in reports"} if settings.monitor.every else {}),
        **({"merge": "latents merged into others"} if diversity.merge.at else {}),
        **({"controller": "reports that moved a weight"} if diversity.controller.on else {}),
        "evaluation": "held-out rows",
        "checkpoint": "checkpoints published",
        **({SAMPLES: "latents with samples"} if settings.samples.rows else {}),
    }


def usage_of(run: Path) -> UsageRecord | None:
    """Read `usage.json` of a run; none: it is not there, or, with a warning, it is damaged."""
    try:
        return read_usage(run)
    except CorruptData as error:
        warn(f"{error}; it is left out")
        return None


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
        """Take back the effect of a call that was counted before it failed: it had none."""
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
            durable.publish_json(self._path, sealed(record.model_dump(mode="json")))
        except (DiskFull, OSError) as error:
            if not self.lost:
                warn(f"{error}; training goes on, {USAGE} is not up to date")
            self.lost += 1
        return record

    def finished(self, step: int) -> bool:
        """Tell whether the file has been published after the last step, with all that follows it."""
        record = usage_of(self._path.parent)
        return (
            record is not None
            and record.step == step
            and all(component.calls for component in record.components.values())
        )

    def finish(self, step: int) -> None:
        """Publish after the last step. Raises `ProjectError` when a component that is on never ran."""
        record = self.publish(step)
        for note in record.notes:
            say(f"note: {note}")
        if unused := [name for name, component in record.components.items() if not component.calls]:
            raise ProjectError(f"configured, and never ran in {step} steps: {', '.join(unused)} ({self._path})")

    def state(self) -> dict[str, Tensor]:
        """Return the counts, for a checkpoint."""
        return {
            "usage.calls": torch.tensor([self._calls[name] for name in self._kept]),
            "usage.effect": torch.tensor([self._effect[name] for name in self._kept], dtype=torch.float64),
        }

    def warn_if_missing(self) -> None:
        """Warn where the file is not there, of a run that has written rows."""
        if not os.path.lexists(self._path):
            warn(f"{self._path} is missing; it is written again, from the checkpoint")

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over a saved state."""
        for name, counts in (("calls", self._calls), ("effect", self._effect)):
            like = self.state()[f"usage.{name}"]
            counts |= dict(zip(self._kept, fitting(tensors, f"usage.{name}", like).tolist(), strict=True))
