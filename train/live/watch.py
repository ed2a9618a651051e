"""`python -m train watch`: a run as its files tell, running or not. Writes nothing, and takes no lock but to ask."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from shared.config import read_record
from shared.console.panel import duration
from shared.console.terminal import PlainConsole, Verbosity, panel_shown, show_text, shows_panels, verbosity
from shared.errors import CorruptData, warn
from shared.files import durable
from train.live.log_rows import WatchedConfig
from train.live.run_files import LOCK, METRICS, TIMING, Lines, Row, config_file, read_usage
from train.live.status import Status
from train.live.training_panel import RunPanel

State = Literal["starting", "running", "finished", "stopped"]
_SECONDS = 1.0
"""Between two looks at the files."""


class Watched:
    """A run, looked at from outside."""

    def __init__(self, run: Path) -> None:
        """Raise `UserError` when `run` is none."""
        self._run = run
        config = _config(run)
        self.status = Status(run, config.settings.steps, config.settings.rows.batch_rows)
        self._imported = config.imported is not None
        self.store = Path(config.store).name
        """Name of the folder that its store was in when it started."""
        self.state: State = "starting"
        self._said = ""
        self._metrics, self._timing = Lines(run / METRICS), Lines(run / TIMING)
        self._panel = RunPanel(self.status)

    def look(self) -> Iterator[None]:
        """Take in what is new, and yield after each new row of the metrics. At the end, `state` is up to date."""
        held = durable.is_held(self._run / LOCK)  # before the rows: all that an ended trainer wrote is then there
        timing = {row["step"]: row for row in self._timing.read()}
        usage = self._usage()
        for row in self._metrics.read():
            self.status.add(row)
            self.status.update(timing.get(row["step"], {}), usage)
            yield
        self.status.update(next(reversed(timing.values()), {}), usage)
        self.state = self._state(held)

    def _usage(self) -> Row:
        """Return what `usage.json` holds; nothing where there is none yet, or, with a warning, where it is damaged."""
        try:
            found = read_usage(self._run)
        except CorruptData as error:
            if str(error) != self._said:
                warn(f"{error}; it is left out")
            self._said = str(error)
            return {}
        return found.model_dump(mode="json") if found else {}

    def _state(self, held: bool) -> State:
        if self._imported:
            return "finished"
        done = self.status.usage.get("step") == self.status.steps and bool(self.status.components)
        if done and all(one["calls"] for one in self.status.components.values()):
            return "finished"  # also while its report is made, which holds the lock
        if held:
            return "running" if self.status.row else "starting"
        return "stopped"

    @property
    def newest_checkpoint(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        names = (path.name.removeprefix("step-") for path in self._run.glob("checkpoints/step-*"))
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def sentence(self) -> str:
        """Tell the state, and what to do about it."""
        if self._imported:
            return f"{self._run} was imported, and has no training to follow; its figures: train evaluate {self._run}"
        step, newest, steps = self.status.step, self.newest_checkpoint, self.status.steps
        if self.state == "stopped":
            behind = f" (its newest checkpoint: {newest})" if newest else " (no checkpoint: it will start over)"
            at = str(max(step, newest)) + (behind if newest < step else "")
            return f"{self._run} stopped at step {at}; continue with: {self._resume}"
        said = {
            "starting": "starting: no figures yet",
            "running": f"running: step {step:,} of {steps:,}",
            "finished": f"finished: {steps:,} steps",
        }
        return f"{self._run} is {said[self.state]}"

    @property
    def _resume(self) -> str:
        return f"python -m train resume {self._run}"

    def line(self) -> str:
        """Return the newest figures, as the trainer prints them."""
        note = self.status.detail() if verbosity() == Verbosity.VERBOSE else self.status.note()
        return f"train {self.status.pace.line()}  {note}".rstrip()

    def panel(self) -> RenderableType:
        """Draw the panel that the trainer shows."""
        state: str = self.state
        with suppress(OSError):
            age = time.time() - (self._run / METRICS).stat().st_mtime
            state += f", last figures {duration(max(age, 0))} ago" if self.state == "running" else ""
        return self._panel.draw(self.status.pace, state)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        taken, free = self._panel.disk.value()
        return {
            "state": self.state,
            **self.status.as_json(),
            "newest_checkpoint": self.newest_checkpoint or None,
            "taken_bytes": taken,
            "free_bytes": free,
            "continue_with": self._resume if self.state == "stopped" else None,
        }


def watch(run: Path, *, once: bool, as_json: bool) -> None:
    """Show `run` until it finishes or stops, or until Ctrl-C; `once`: as it is now.

    A panel on a terminal and with `once`, else a line for every row of the metrics from now on; `as_json`: an object
    for each.
    Raises `UserError` when `run` is no run.
    """
    watched, panel = Watched(run), not as_json and (once or shows_panels(stderr=False))
    with suppress(KeyboardInterrupt), ExitStack() as shown:
        for _ in watched.look():
            pass
        if panel and once:
            PlainConsole().print(watched.panel())
        elif panel:
            shown.enter_context(panel_shown(watched.panel, stderr=False))

        def show() -> None:
            if as_json:
                print(json.dumps(watched.as_json(), indent=2 if once else None, allow_nan=False), flush=True)
            elif not panel:
                show_text(watched.line())

        show()
        while not once and watched.state in ("starting", "running"):
            time.sleep(_SECONDS)
            for _ in watched.look():
                show()
        shown.close()
        if not as_json:
            show_text(watched.sentence())
        elif not once:
            show()


def _config(run: Path) -> WatchedConfig:
    """Read what is watched of a run's settings. Raises `UserError` when `run` is none."""
    path = config_file(run)
    data = durable.read_json(path)
    try:
        return read_record(WatchedConfig, data, path)
    except CorruptData as error:
        wrong = str(error).removeprefix(f"{path}: ")
        raise CorruptData(f"{path}: not the settings of a run ({wrong})") from error
