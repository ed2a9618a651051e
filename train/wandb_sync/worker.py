"""`python -m train.wandb_sync.worker RUN PROJECT`: reads the files of RUN once a second and logs them to W&B.

The trainer starts it, and it ends with the trainer, however that ends. It is the only module that imports wandb. What
goes wrong here costs rows of the sync, and they can be synced again: the run's files are the record.
"""

import argparse
import hashlib
import json
import os
import secrets
import sys
import threading
import time
import traceback
from contextlib import ExitStack, suppress
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shared.errors import UserError
from shared.files import durable
from train.live.run_files import CONFIG, LOCK, Row
from train.wandb_sync.log_records import Records
from train.wandb_sync.read_back import steps
from train.wandb_sync.sync import COMPLETE, FOLDER, REPORT, SECONDS, WORKER, kill_marked, unsent

STATE = "sync.json"
_STATE_BEFORE = "mirror.json"
"""What the version before called it: read in this one."""
PERIOD = 1.0
ONLINE_SECONDS = 30.0
"""How long a server may take to answer before the run is synced offline."""
ATTEMPTS = 3
NICENESS = 10
ENVIRONMENT = {
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_STATS": "true",
}
"""The run is what is synced, not this process; set where the user's environment does not say otherwise."""


class Lost(Exception):
    """W&B's files do not hold what was logged; another try would find the same disk."""


class Child:
    """One start of the sync."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._run: Path = arguments.run
        self._folder = self._run / FOLDER
        self._project: str = arguments.project
        self._seconds: float = arguments.seconds
        self._attempt: int = arguments.attempt
        self._complete: bool = arguments.complete
        self._ended = threading.Event()
        self._state: dict[str, Any] = {}
        self._offline = False
        self._wandb: Any = None
        """The W&B run, opened when there is a first row for it."""
        threading.Thread(target=self._watch, daemon=True).start()

    def main(self) -> None:
        """Sync until the trainer ends, and then what is left. Start again, some times, when wandb fails."""
        try:
            with self._locked():
                self._sync()
        except Lost as error:
            _say(str(error))
            self._quit()
        except BaseException:
            _say(traceback.format_exc())
            if self._attempt < ATTEMPTS:
                self._again()
            self._quit()

    def _sync(self) -> None:
        self._open_state()
        if (why := self._why_offline()) is None:
            return
        if why:
            _say(f"offline: {why}")
            self._offline = True
        known = self._written() if self._offline else set()
        records, usage, last, logged = Records(self._run), Row(), int(self._state["step"]), set[int]()
        ended = False
        while not ended:
            ended = self._ended.wait(PERIOD)  # asked before the files are read: all that the trainer left is seen
            complete = ended and self._complete
            for step, row in records.ready(complete):
                last = max(last, step)
                if step <= self._state["step"] or step in known:
                    continue
                run = self._open()
                row |= self._at_the_end(records) if step == records.steps else {}
                run.log(row, step=step, commit=True)  # wandb drops the steps that the server has
                logged.add(step)
            if self._wandb and (now := records.usage()) != usage:
                self._wandb.summary.update(now)
                usage = now
        if self._complete:
            logged |= self._report(records.steps, known)
        if self._wandb:
            self._close()
            if self._offline and (lost := logged - self._written()):
                raise Lost(f"{len(lost)} of {len(logged)} rows are not in {self._folder}: is the disk full?")
        durable.publish_json(self._folder / STATE, self._state | {"step": last})

    def _open(self) -> Any:
        """Return the W&B run; a server that does not answer soon has the sync start again, offline."""
        if self._wandb:
            return self._wandb
        import wandb

        opened = threading.Event()
        if not self._offline:
            threading.Thread(target=self._give_up, args=(opened,), daemon=True).start()
        try:
            self._wandb = wandb.init(
                project=self._state["project"],
                id=self._state["id"],
                name=self._run.name,
                dir=self._run,
                config=json.loads((self._run / CONFIG).read_bytes()),
                mode="offline" if self._offline else "online",
                resume="allow",
            )
        except Exception as error:
            if self._offline:
                raise
            _say(f"W&B cannot be reached: {error}")
            self._again(offline=True)
        opened.set()
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")
        return self._wandb

    def _close(self) -> None:
        import wandb

        self._wandb.finish(exit_code=0 if self._complete else 1)
        wandb.teardown()  # waits for its process, which writes its last rows on the way out

    def _give_up(self, opened: threading.Event) -> None:
        until, ended = time.monotonic() + ONLINE_SECONDS, False
        while not opened.wait(0.1):
            if self._ended.is_set() and not ended:  # enough is left to start again
                until, ended = min(until, time.monotonic() + 0.4 * self._seconds), True
            if time.monotonic() > until:
                _say("W&B has not answered")
                self._again(offline=True)

    def _at_the_end(self, records: Records) -> Row:
        """Return what is written after the last step."""
        import wandb

        histograms = records.histograms().items()
        return records.held_out() | {name: wandb.Histogram(np_histogram=found) for name, found in histograms}

    def _report(self, steps: int, known: set[int]) -> set[int]:
        """Log the plots and the verdict of a report that is not synced yet, as a step after the last one."""
        path = self._folder / REPORT
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None
        if digest == self._state.get("report"):
            return set()
        import plotly.io
        import wandb

        report, number = json.loads(path.read_bytes()), 1 + self._state.get("reports", 0)
        self._state |= {"report": digest, "reports": number}
        if steps + number in known:
            return set()
        plots = {f"report/{name}": wandb.Plotly(plotly.io.from_json(one)) for name, one in report["plots"].items()}
        run = self._open()
        run.log({"step": steps} | plots, step=steps + number, commit=True)
        run.summary.update({f"verdict/{name}": said for name, said in report["verdict"].items()})
        return {steps + number}

    def _open_state(self) -> None:
        """Read the run's identity at W&B, made once, and the step up to which everything is known to be synced."""
        path = self._folder / STATE
        if not path.exists() and (before := self._folder / _STATE_BEFORE).exists():
            durable.publish_json(path, durable.read_json(before))
        if not path.exists():
            durable.publish_json(path, {"id": secrets.token_hex(4), "project": self._project, "step": -1})
        self._state = durable.read_json(path)
        if self._state["project"] != self._project:
            _say(f"the run stays in the project {self._state['project']}; remove {self._folder} to sync it again")

    def _why_offline(self) -> str | None:
        """Tell why the sync is to be offline; empty: it is not; none: there is to be no sync."""
        import wandb

        settings = wandb.setup().settings
        if settings.mode == "disabled":
            _say("W&B is disabled: nothing is synced")
            return None
        if settings.mode in ("offline", "dryrun"):
            return f"W&B's mode is {settings.mode}"
        if before := unsent(self._run):
            return f"rows before these are to be uploaded first, with: wandb sync {before[0].parent}"
        return "" if _has_key(settings) else "there is no API key"

    def _local_files(self) -> list[Path]:
        return sorted(self._folder.glob(f"offline-run-*/run-{self._state['id']}.wandb"))

    def _written(self) -> set[int]:
        return set().union(*(steps(path) for path in self._local_files()))

    def _locked(self) -> ExitStack:
        """Take the lock of the sync: the child of a trainer that was killed may be at its last rows, for a while."""
        stack, until = ExitStack(), time.monotonic() + SECONDS + 2
        while True:
            try:
                stack.enter_context(durable.lock(self._folder / LOCK, "the sync"))
                return stack
            except UserError:
                if time.monotonic() > until:  # it is stopped
                    kill_marked(self._run)
                time.sleep(0.1)

    def _watch(self) -> None:
        """Learn that the trainer has ended, and end in time after it, whatever wandb waits for."""
        self._complete |= os.read(0, 1) == COMPLETE
        while os.read(0, 1):
            continue
        self._ended.set()
        time.sleep(self._seconds)
        _say(f"not finished {self._seconds:g} s after the trainer")
        self._quit()

    def _again(self, offline: bool = False) -> None:
        """Become a fresh process: wandb cannot start twice in one after its own process failed."""
        kill_marked(self._run)
        arguments = [self._run, self._project, f"--seconds={self._seconds}", f"--attempt={self._attempt + 1}"]
        flags = ["--complete"] if self._complete else []
        environment = os.environ | ({"WANDB_MODE": "offline"} if offline else {})
        os.execve(sys.executable, [sys.executable, *WORKER, *map(str, arguments), *flags], environment)

    def _quit(self) -> None:
        kill_marked(self._run)
        os._exit(1)  # past wandb's handlers, which can wait for ever


def _has_key(settings: Any) -> bool:
    if settings.api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = os.environ.get("NETRC") or next((p for p in ("~/.netrc", "~/_netrc") if Path(p).expanduser().exists()), "")
    with suppress(OSError, NetrcParseError):
        hosts = netrc(Path(path).expanduser()).hosts if path else {}
        return not hosts.keys().isdisjoint({urlsplit(settings.base_url).netloc, "api.wandb.ai"})
    return False


def _say(text: str) -> None:
    """Print into the log, if it takes it."""
    with suppress(OSError):
        print(text, flush=True)


def main() -> None:
    """Read the command line and sync."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("project")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--complete", action="store_true")
    os.environ.pop("WANDB_SERVICE", None)  # another process of wandb's, or the one that was killed
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    Child(parser.parse_args()).main()


if __name__ == "__main__":
    main()
