"""Trainers with a sync in W&B, as processes: to start, to stop on the way, and what their sync holds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.wandb_sync.read_back import records
from train.wandb_sync.sync import FOLDER, marked

ROOT = Path(__file__).parent.parent
UNAFFECTED = "warning: the sync with W&B did not finish"
TRAINER = """
import runpy, sys
from train.wandb_sync import sync as process
process.SECONDS = float(sys.argv.pop(1))
runpy.run_module("train", run_name="__main__", alter_sys=True)
assert "wandb" not in sys.modules
"""
"""`python -m train` that waits this many seconds for its sync, and that must not have imported wandb."""


def trainer(*args: object, seconds: float, env: Mapping[str, str], prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    """`python -m train ARGS`."""
    command = [*prefix, sys.executable, "-c", TRAINER, str(seconds), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(env), cwd=ROOT)


def environment(folder: Path) -> dict[str, str]:
    """One in which wandb finds no key, and writes nothing outside of `folder`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    places = {name: str(folder / name) for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
    return kept | places | {"NETRC": str(folder / "netrc"), "PYTHONPATH": str(ROOT)}


def wait_for(condition: Callable[[], object], process: subprocess.Popen | None = None) -> None:
    """Until it holds; fails when `process` ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process is None or process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def core(run: Path) -> int:
    """The process that wandb started for the sync of `run`."""
    return next(pid for pid in marked(run) if Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core")


def child(run: Path) -> int:
    """The sync's own process."""
    return next(pid for pid in marked(run) if "train.wandb_sync.worker" in Path(f"/proc/{pid}/cmdline").read_text())


def paused_while_synced(process: subprocess.Popen, run: Path, rows: int = 3) -> None:
    """Stop the trainer after some rows of metrics, and wait until its sync has logged any."""
    paused_after(process, run, rows)
    wait_for(lambda: files(run), process)


def paused_after(process: subprocess.Popen, run: Path, rows: int) -> None:
    """Stop the trainer after some rows of metrics."""
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(lines(run / "metrics.jsonl")) >= rows, process)
    process.send_signal(signal.SIGSTOP)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def files(run: Path) -> list[Path]:
    """What W&B wrote for `run`, oldest first."""
    return sorted((run / FOLDER).glob("offline-run-*/run-*.wandb"))


def histories(run: Path) -> list[dict]:
    """All rows of history that the sync of `run` holds on disk, file by file."""
    found = []
    for path in files(run):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items})
    return found


def summaries(run: Path) -> dict:
    """The last summary of the run."""
    found: dict[str, Any] = {}
    for path in files(run):
        for record in records(path):
            if record.WhichOneof("record_type") == "summary":
                items = record.summary.update
                found |= {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}
    return found
