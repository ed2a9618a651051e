"""What is known of a run: the figures that its panel, its plain lines and `watch` show, from the rows of its logs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.console.panel import Pace, short
from train.live.log_rows import MAY_FIND_NOTHING
from train.live.run_files import Row

PENALTIES = ("orthogonality", "mined", "co_activation", "position")
"""The terms of the diversity loss."""
_ORDER = (
    *("reconstruction", "auxk", "l0", "l1", *PENALTIES),
    *("monitor", "controller", "evaluation", "checkpoint", "samples"),
)
"""Of components: `usage.json` has them in that of the alphabet."""
_MOST_POINTS = 4096


class Status:
    """The newest figures of a run of `steps` steps. What it holds is replaced, never changed: any thread may look."""

    def __init__(self, run: Path, steps: int, batch_rows: int) -> None:
        self.run, self.steps, self.batch_rows = run, steps, batch_rows
        self.row: Row = {}
        """Of metrics.jsonl."""
        self.timing: Row = {}
        """Of timing.jsonl."""
        self.usage: Row = {}
        """`usage.json`."""
        self.held_out: Row = {}
        """The last evaluation, with its step."""
        self.fvu: list[float] = []
        """Of training rows, in every row so far; of a long run, in every other one, or fewer."""
        self.changes = 0

    def add(self, row: Row) -> None:
        """Take over a row of the metrics. One that is not newer than the last starts over: the run was resumed."""
        if row["step"] <= self.step:
            self.held_out, self.fvu = {}, []
        self.row = row
        if "held_out" in row:
            self.held_out = {"step": row["step"], **row["held_out"]}
        self.fvu = [*self.fvu, self.figure("fvu")]
        if len(self.fvu) > _MOST_POINTS:
            self.fvu = self.fvu[::2]
        self.changes += 1

    def update(self, timing: Row, usage: Row) -> None:
        """Take over the last row of timing.jsonl, and `usage.json`; empty ones leave those of before."""
        self.timing, self.usage = timing or self.timing, usage or self.usage
        self.changes += 1

    @property
    def step(self) -> int:
        """That of the last row, 0 before the first."""
        return int(self.row.get("step", 0))

    def figure(self, name: str) -> float:
        """Return one figure of the last row, NaN where it has none."""
        return float(self.row.get(name, math.nan))

    @property
    def pace(self) -> Pace:
        """How far the run was, and how fast it had been, at the last row."""
        seconds, first = self.timing.get("seconds", 0.0), self.timing.get("from_step", 0)
        rate = max(self.timing.get("step", 0) - first, 0) / seconds if seconds else 0.0
        return Pace(done=self.step, total=self.steps, unit="steps", seconds=seconds, rate=rate)

    @property
    def terms(self) -> Mapping[str, float]:
        """The terms of the loss, weighted: means over the steps of the last row."""
        return self.row.get("terms", {})

    def share(self, *terms: str) -> float:
        """Return the share of the loss that `terms` make up."""
        return sum(self.terms.get(name, 0.0) for name in terms) / (self.row.get("loss") or 1.0)

    @property
    def components(self) -> Mapping[str, Row]:
        """What each component that is on has done: terms of the loss first."""
        found = self.usage.get("components", {})
        return {name: found[name] for name in sorted(found, key=_place)}

    @property
    def idle(self) -> dict[str, list[str]]:
        """Components that had no effect yet, by why: they did not run yet, or ran and should have had one."""
        none = {name: one["calls"] for name, one in self.components.items() if not one["effect"]}
        return {
            "not yet": [name for name, calls in none.items() if not calls],
            "no effect": [name for name, calls in none.items() if calls and name not in MAY_FIND_NOTHING],
        }

    def note(self) -> str:
        """Return the headline figures, for the end of a plain line."""
        if not self.row:
            return ""
        parts = [f"fvu {self.figure('fvu'):.4f}", f"l0 {self.figure('l0_training_rule'):.1f}"]
        parts.append(f"dead {self.figure('dead_share'):.1%}")
        if any(name in self.terms for name in PENALTIES):
            parts.append(f"penalty {self.share(*PENALTIES):.2%}")
        if self.held_out:
            parts.append(f"held-out fvu {self.held_out['fvu']:.4f}  l0 {self.held_out['l0']:.1f}")
        return "  ".join([*parts, self.used()])

    def used(self) -> str:
        """Tell how many components that are on did their part so far, and which did not."""
        idle, count = self.idle, len(self.components)
        told = f"{count - sum(map(len, idle.values()))} of {count} components have acted"
        why = "; ".join(f"{said}: {', '.join(names)}" for said, names in idle.items() if names)
        return told + (f" ({why})" if why else "")

    def detail(self) -> str:
        """Return all figures, for the end of a plain line."""
        figures = {name: self.figure(name) for name in ("lr", "grad_norm", "loss")} | dict(self.terms)
        parts = [f"{name} {short(value)}" for name, value in figures.items()]
        strata = {name: part["fvu"] for name, part in self.row.get("strata", {}).items()}
        parts += [f"fvu of {name} {fvu:.4f}" for name, fvu in strata.items() if fvu is not None]
        parts.append(f"data wait {self.timing.get('data_wait_share', 0.0):.1%}")
        calls = [f"{name} {one['calls']:,} calls {short(one['effect'])}" for name, one in self.components.items()]
        return "  ".join([self.note(), *parts, *calls])

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        pace, row = self.pace, self.row
        held_out = {key: self.held_out.get(key) for key in ("step", "fvu", "l0", "dead_share")}
        return {
            "run": str(self.run),
            "step": self.step,
            "steps": self.steps,
            "seconds": pace.seconds,
            "steps_per_second": _finite(pace.rate),
            "rows_per_second": _finite(pace.rate * self.batch_rows),
            "seconds_left": _finite(pace.seconds_left),
            "fvu": row.get("fvu"),
            "l0": row.get("l0_training_rule"),
            "dead_share": row.get("dead_share"),
            "lr": row.get("lr"),
            "loss": row.get("loss"),
            "terms": self.terms,
            "penalty_share": _finite(self.share(*PENALTIES)),
            "data_wait_share": self.timing.get("data_wait_share"),
            "held_out": held_out if self.held_out else None,
            "components": self.components,
        }


def _place(component: str) -> tuple[int, str]:
    return (_ORDER.index(component) if component in _ORDER else len(_ORDER)), component


def _finite(value: float | None) -> float | None:
    """Return a figure that was computed, as JSON can have it."""
    return value if value is None or math.isfinite(value) else None
