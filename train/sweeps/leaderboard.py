"""How far the runs of a sweep are, and which is best so far: by their files, as `watch` reads them."""

import math
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from shared.config import Config
from shared.errors import CorruptData
from shared.files.durable import read_json
from train.live.run_files import CONFIG, REPORTS, TIMING, Lines
from train.live.watch import Watched
from train.run.metrics import DIVERGED
from train.sweeps.plan import PlannedRun

State = Literal["waiting", "starting", "running", "stopped", "failed", "diverged", "finished"]


class Standing(Config):
    """One run of a sweep, in `sweep.json`."""

    name: str
    """Of its folder, beside `sweep.json`."""
    differs: dict[str, Any]
    """What the sweep's file says of this run and not of all."""
    rows: str
    """Runs with the same are trained on the same batches."""
    state: State
    said: str | None = None
    """What went wrong."""
    step: int = 0
    """Of the last row of its logs."""
    steps: int
    fvu: float | None = None
    """Of the last evaluation; until there is one, of training rows."""
    l0: float | None = None
    dead_share: float | None = None
    """Latents that did not fire on the held-out rows; until there is an evaluation, in the dead window."""
    pairs_above_0_8: int | None = None
    """Pairs of latents that correlate above 0.8 on the rows of the monitor's last report on training; none: no report
    yet."""
    cpu_seconds: float | None = None
    """Of its training, over all times it was started."""

    @property
    def done(self) -> bool:
        """Whether all its steps are trained and all its files there."""
        return self.state in ("finished", "diverged")


class Leaderboard:
    """The standings of all runs, best first."""

    def __init__(self, runs: Sequence[PlannedRun]) -> None:
        self._runs, self._looking = [_Followed(one) for one in runs], threading.Lock()

    def fail(self, run: Path, said: str) -> None:
        """Note what went wrong with a run."""
        next(one for one in self._runs if one.run.path == run).failed = said

    def standings(self) -> list[Standing]:
        """Read what is new of all runs. The smallest held-out fvu first, those without one last."""
        with self._looking:
            found = [one.standing() for one in self._runs]
        return sorted(found, key=lambda one: (one.state in ("failed", "diverged"), _last(one.fvu), one.name))


class _Followed:
    def __init__(self, run: PlannedRun) -> None:
        self.run, self.failed = run, ""
        self._watched: Watched | None = None
        self._timing, self._cpu = Lines(run.path / TIMING), dict[int, float]()

    def standing(self) -> Standing:
        """Look at the run's files."""
        run = self.run
        head = {"name": run.name, "differs": run.differs, "rows": run.rows[:8], "steps": run.config.settings.steps}
        if not self._watched:
            if not (run.path / CONFIG).is_file():
                return Standing(**head, state="failed" if self.failed else "waiting", said=self.failed or None)
            self._watched = Watched(run.path)
        for _ in self._watched.look():
            pass
        for row in self._timing.read():
            self._cpu[row.get("from_step", 0)] = row.get("cpu_seconds", 0.0)
        status = self._watched.status
        row, held_out = status.row, status.held_out
        figures = held_out or {
            "fvu": row.get("fvu"), "l0": row.get("l0_training_rule"), "dead_share": row.get("dead_share")
        }  # fmt: skip
        state: State = self._watched.state
        if state == "finished" and _last(held_out.get("fvu")) > DIVERGED:
            state = "diverged"
        return Standing(
            **head,
            state="failed" if self.failed and state != "diverged" else state,
            said=self.failed or None,
            step=status.step,
            fvu=figures.get("fvu"),
            l0=figures.get("l0"),
            dead_share=figures.get("dead_share"),
            pairs_above_0_8=_pairs(run.path),
            cpu_seconds=sum(self._cpu.values()) if self._cpu else None,
        )


def table(standings: Sequence[Standing], title: str) -> Table:
    """Return the leaderboard for people."""
    names = list(dict.fromkeys(name for one in standings for name in one.differs))
    found = Table(*names or ["run"], "step", "fvu", "l0", "dead", "pairs > 0.8", "CPU s", "", title=title)
    found.title_justify = "left"
    for one in standings:
        figures = (
            f"{one.step:,}/{one.steps:,}" if one.step < one.steps else f"{one.steps:,}",
            _cell(one.fvu, ".4f"),
            _cell(one.l0, ".1f"),
            _cell(one.dead_share, ".1%"),
            _cell(one.pairs_above_0_8, ",d"),
            _cell(one.cpu_seconds, ",.0f"),
        )
        differs = [_differing(one.differs.get(name)) for name in names] or [one.name]
        found.add_row(*differs, *figures, "" if one.state == "finished" else one.state)
    for column in found.columns[max(len(names), 1) : -1]:
        column.justify = "right"
    return found


def _pairs(run: Path) -> int | None:
    """Return the pairs above 0.8 of the last report on training rows; none where there is no valid one."""
    reports = {path.stem.rpartition("-")[2]: path for path in (run / REPORTS).glob("correlation-*.json")}
    steps = [step for step in reports if step.isdecimal()]
    if not steps:
        return None
    with suppress(OSError, CorruptData, AttributeError, KeyError, TypeError, ValueError):
        last = read_json(reports[max(steps, key=int)])
        return int((last.get("tracked") or last["without_position_0"])["pairs_above"]["0.8"])
    return None


def _last(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _differing(value: Any) -> str:
    return "" if value is None else str(value)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
