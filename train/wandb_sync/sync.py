"""The trainer's side of the sync: starts the child, and ends it with the training, within a bound."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

from shared.console.terminal import say
from shared.errors import CorruptData, warn
from shared.files.untrusted import regular

SECONDS = 10.0
"""How long the trainer waits at its end, at most."""
FOLDER, LOG, REPORT = "wandb", "sync.log", "report.json"
"""`REPORT` holds what is synced of the run's report: its plots as Plotly's JSON by id, and the verdict by name."""
WORKER = ("-P", "-m", "train.wandb_sync.worker")
"""How it is started: not with the current folder on its path, which may have a `train.py` of its own."""
MARK = "TRANSCODER_CACHE_SYNC"
"""The environment variable that the child and all that it starts have: the run's path."""
COMPLETE = b"."
"""What is sent when the training came to its end; the end of the pipe alone says that it stopped on the way."""


@contextmanager
def synced(run: Path, project: str | None) -> Iterator[None]:
    """Sync `run` to the W&B project while the block trains; without a project, nothing is done.

    Raises nothing of its own: where the sync cannot start or finish there is one line of warning.
    """
    child = _start(run, project) if project else None
    complete = False
    try:
        yield
        complete = True
    finally:
        if child:
            _end(child, run, complete)


def kill_marked(run: Path) -> None:
    """Kill every process of the sync of `run` but this one, also those that are stopped or have lost their parent.

    They are found where there is a /proc. Elsewhere wandb's own process ends after its parent, unless it is stopped.
    """
    for _ in range(20):  # a process that was just starting another one shows it in the next round
        found = marked(run)
        if not found:
            return
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def marked(run: Path) -> list[int]:
    """List the living processes of the sync of `run`, this one left out."""
    wanted, found = os.fsencode(f"{MARK}={run.resolve()}"), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [process for process in found if process != os.getpid()]


def unsent(run: Path) -> list[Path]:
    """List what was synced offline and is not uploaded, oldest first."""
    found = sorted((run / FOLDER).glob("offline-run-*/run-*.wandb"))
    return [path for path in found if not path.with_name(path.name + ".synced").exists()]


def _start(run: Path, project: str) -> subprocess.Popen[bytes] | None:
    spec = find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder called wandb is no package
        warn("wandb is not installed, and the run is not synced: pip install 'transcoder-cache[wandb]'")
        return None
    folder = run.resolve() / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        with open(folder / LOG, "ab", opener=regular) as log:
            return subprocess.Popen(
                [sys.executable, *WORKER, str(run.resolve()), project, f"--seconds={SECONDS}"],
                stdin=subprocess.PIPE,  # held open: its end is how the child learns that the trainer is gone
                stdout=log,
                stderr=log,
                start_new_session=True,  # a Ctrl-C is not for it
                env=os.environ | {MARK: str(run.resolve()), "PYTHONPATH": os.pathsep.join(_paths())},
            )
    except CorruptData as error:
        warn(f"the run is not synced to W&B: {error}")
        return None
    except OSError as error:
        warn(f"the run is not synced to W&B: {error.filename or folder}: {error.strerror}")
        return None


def _paths() -> list[str]:
    """List where the worker finds this project, and what the environment says."""
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]


def _end(child: subprocess.Popen[bytes], run: Path, complete: bool) -> None:
    assert child.stdin is not None
    try:
        with suppress(BrokenPipeError), child.stdin as pipe:
            pipe.write(COMPLETE if complete else b"")
        code = child.wait(timeout=SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(child.pid, signal.SIGKILL)
        code = -1
    kill_marked(run)
    with suppress(subprocess.TimeoutExpired):
        child.wait(timeout=1)
    kinds = {"offline-run-*": unsent(run), "run-*": list((run / FOLDER).glob("run-*"))}
    kind = next((kind for kind, there in kinds.items() if there), None)
    upload = f"with: wandb sync {run / FOLDER}/{kind}"
    if code:
        warn(
            f"the sync with W&B did not finish (see {run / FOLDER / LOG}); the run itself is unaffected. Sync the rest "
            f"with: python -m train resume {run} --wandb" + (f"; upload what is on disk {upload}" if kind else "")
        )
    elif kind == "offline-run-*":
        say(f"synced offline; upload it {upload}")
