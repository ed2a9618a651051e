"""A terminal or a pipe that is gone stops no work."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.llms import ROOT
from tests.runs import SMALL
from tests.stores import SyntheticStore
from train.model import checkpoint


def line(store: Path, runs: Path, steps: int) -> list[str]:
    given = ["run", "--store", store, "--runs", runs, "--name", "run", "--steps", steps, *SMALL]
    return [sys.executable, "-m", "train", *map(str, given)]


@pytest.mark.fault(5)
def test_a_closed_terminal_publishes(pristine: SyntheticStore, tmp_path: Path) -> None:
    """The terminal is really gone: what is written to it afterwards fails."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        line(pristine.path, tmp_path, 100_000),
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # tests may run under nohup, which ignores it
    )
    os.close(theirs)
    began, metrics = time.monotonic(), tmp_path / "run" / "metrics.jsonl"
    os.set_blocking(ours, False)
    while not (metrics.is_file() and metrics.stat().st_size):
        try:
            os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        assert process.poll() is None and time.monotonic() - began < 200
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=100) == 3
    assert checkpoint.find(tmp_path / "run").step > 0
    assert not list((tmp_path / "run").rglob("*.tmp")) and not (tmp_path / "run/checkpoints/reserve").exists()


def test_a_result_that_has_no_room_is_an_error(pristine: SyntheticStore) -> None:
    with open("/dev/full", "w") as full:
        line = [sys.executable, "-m", "harvest", "verify", str(pristine.path), "-q"]
        done = subprocess.run(line, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 1 and "No space left on device" in done.stderr


@pytest.mark.parametrize("gone", [pytest.param("stderr", marks=pytest.mark.exhaustive), "both"])
def test_a_pipe_that_nobody_reads(pristine: SyntheticStore, tmp_path: Path, gone: str) -> None:
    read, write = os.pipe()
    os.close(read)
    out = write if gone == "both" else subprocess.PIPE
    process = subprocess.Popen(line(pristine.path, tmp_path, 3), cwd=ROOT, stdout=out, stderr=write)
    os.close(write)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    assert checkpoint.find(tmp_path / "run").step == 3
    assert said in (None, f"{tmp_path / 'run'}\n".encode())
