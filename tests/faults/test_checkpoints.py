"""Full disks, kills and damage at checkpoints, through the real commands."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.config import sealed
from tests.faults.disk import fill, small_disk
from tests.runs import SMALL, Outcome, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from train.model import checkpoint
from train.run import saver, trainer

pytestmark = pytest.mark.slow
Command = Callable[..., Outcome]
LARGE = [
    *SMALL,
    *("--set", "transcoder.d_sae=1024", "--set", "checkpoint.every=10", "--set", "log_every=5"),
    *("--set", "monitor.every=0", "--set", "diversity.co_activation.weight=0", "--set", "samples.rows=0"),
]
"""Checkpoints of two thirds of a megabyte, a reserve of twice that; held-out figures after the last step."""
SIZE, RESERVE = 690_000, 1_600_000
STEPS = 60


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


@pytest.fixture(scope="module")
def whole(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that no fault met."""
    runs = tmp_path_factory.mktemp("runs")
    train("run", "--store", store.path, "--runs", runs, "--name", "whole", "--steps", STEPS, *LARGE)
    return runs / "whole"


def train(*arguments: object, code: int = 0, patch: str = "") -> str:
    """Run the real command in a process of its own, after `patch`; returns what it said on stderr."""
    program = f"{patch}\nimport sys\nfrom train.cli import main\nfrom shared.command_line import run\nrun(main)"
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done.stderr


def steps(run: Path) -> list[int]:
    return [checkpoint.number(path) for path in checkpoint.steps(run) if checkpoint.verify(path) is None]


def weights(run: Path, step: int = STEPS) -> list[str]:
    """Digests of the weights and of the optimizer's state."""
    return [digest(checkpoint.folder(run, step) / name) for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()  # a digest, since pytest explains for minutes how bytes differ


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", request.param) as path:
        yield path


def test_the_sizes_that_these_tests_count_on(whole: Path) -> None:
    size = sum(file.stat().st_size for file in checkpoint.folder(whole, STEPS).iterdir())
    assert 0.95 * SIZE < size < SIZE


# Full disks


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("disk", [4 * SIZE], indirect=True)
def test_a_full_disk_costs_old_checkpoints_and_training_goes_on(
    command: Command, store: SyntheticStore, whole: Path, disk: Path
) -> None:
    found = command("run", "--store", store.path, "--runs", disk, "--name", "run", "--steps", STEPS, *LARGE, "--force",
                    "--set", "checkpoint.keep_last=9", "--set", "checkpoint.reserve=false")  # fmt: skip
    assert found.code == 0, found.err
    assert "no checkpoint" not in found.err  # room was made every time
    assert steps(disk / "run") == [30, 40, 50, 60]
    assert weights(disk / "run") == weights(whole)
    assert not list(disk.rglob("*.tmp"))


@pytest.mark.fault(10)
@pytest.mark.parametrize("disk", [2 * SIZE + 100_000], indirect=True)
def test_what_does_not_verify_goes_first(
    command: Command, store: SyntheticStore, whole: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = saver.Saver.save

    def damaged(self: saver.Saver, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        self.wait()
        if step == 10:
            os.truncate(checkpoint.folder(disk / "run", 10) / checkpoint.WEIGHTS, 999)
        self._valid.clear()

    monkeypatch.setattr(saver.Saver, "save", damaged)
    done = command("run", "--store", store.path, "--runs", disk, "--name", "run", "--steps", STEPS, *LARGE, "--force",
                   "--set", "checkpoint.keep_last=1", "--set", "checkpoint.reserve=false")  # fmt: skip
    assert done.code == 0 and "no checkpoint" not in done.err
    assert steps(disk / "run") == [60] and weights(disk / "run") == weights(whole)


@pytest.mark.fault(10, 11, 12)
@pytest.mark.parametrize("disk", [RESERVE + SIZE + 100_000], indirect=True)
def test_the_last_checkpoint_has_the_reserves_room(
    command: Command, store: SyntheticStore, whole: Path, disk: Path
) -> None:
    done = command("run", "--store", store.path, "--runs", disk, "--name", "run", "--steps", STEPS, *LARGE, "--force",
                   "--set", "checkpoint.keep_last=1")  # fmt: skip
    said = done.err
    assert done.code == 0
    warnings = [line for line in said.splitlines() if "no checkpoint of step" in line]
    assert len(warnings) == 4  # 20, 30, 40, 50
    assert "no checkpoint of step 20" in warnings[0] and "the newest is that of step 10" in warnings[0]
    assert "bytes needed" in warnings[0] and "bytes free" in warnings[0] and "training goes on" in warnings[0]
    assert steps(disk / "run") == [60]
    assert (
        load_file(checkpoint.folder(disk / "run", 60) / checkpoint.WEIGHTS).keys()
        == load_file(checkpoint.folder(whole, 60) / checkpoint.WEIGHTS).keys()
    )
    ours, theirs = (load_file(checkpoint.folder(run, 60) / checkpoint.WEIGHTS) for run in (disk / "run", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (disk / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    usage = json.loads((disk / "run" / "usage.json").read_text())["components"]["checkpoint"]
    assert usage["calls"] == 6 and usage["effect"] == 2


@pytest.mark.fault(11)
@pytest.mark.parametrize("disk", [SIZE + 200_000], indirect=True)
def test_with_nowhere_to_go_the_last_checkpoint_is_an_error_and_the_one_before_is_there(
    command: Command, store: SyntheticStore, whole: Path, disk: Path
) -> None:
    done = command("run", "--store", store.path, "--runs", disk, "--name", "run", "--steps", STEPS, *LARGE, "--force")
    said = done.err
    assert done.code == 3
    assert "warning: disk full" in said and "has no room set aside" in said
    last = said.splitlines()[-1]
    assert last.startswith(
        f"error: no checkpoint of step 60 of {disk / 'run'}, the newest is that of step 10: disk full"
    )
    assert "bytes needed" in last and "bytes free" in last
    assert last.endswith(f"continue with: python -m train resume {disk / 'run'}")
    assert steps(disk / "run") == [10]
    assert command("evaluate", disk / "run").code == 0
    assert not list(disk.rglob("*.tmp"))


@pytest.mark.fault(11)
@pytest.mark.parametrize("disk", [SIZE + 200_000], indirect=True)
def test_the_fallback_folder_takes_it_and_resume_brings_it_home(
    command: Command, store: SyntheticStore, whole: Path, disk: Path, tmp_path: Path
) -> None:
    elsewhere, run = tmp_path / "elsewhere", disk / "run"
    elsewhere.mkdir()
    done = command("run", "--store", store.path, "--runs", disk, "--name", "run", "--steps", STEPS, *LARGE, "--force",
                   "--fallback-dir", elsewhere)  # fmt: skip
    said = done.err
    assert done.code == 0
    assert f"the checkpoint of step 60 is in {elsewhere / 'run'}" in said
    assert f"python -m train resume {run} --fallback-dir {elsewhere}" in said
    assert steps(run) == [10] and steps(elsewhere / "run") == [50, 60]
    assert weights(elsewhere / "run") == weights(whole)
    figures = json.loads(command("evaluate", elsewhere / "run", "--json").out)
    assert figures == json.loads(command("evaluate", whole, "--json").out)

    full = command("resume", run, "--fallback-dir", elsewhere)
    assert full.code == 0 and f"what has no room stays in {elsewhere / 'run'}" in full.err
    assert "is finished: 60 steps" in full.err and steps(run) == [10]
    checkpoint_of(run, 10, remove=True)
    assert command("resume", run, "--fallback-dir", elsewhere).code == 0
    assert steps(run) == [60] and steps(elsewhere / "run") == [50]


@pytest.mark.fault(11)
def test_a_fallback_folder_of_another_run_is_refused(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    for runs, seed in ((tmp_path / "runs", 0), (other, 1)):
        command("run", "--store", store.path, "--runs", runs, "--name", "run", "--steps", 10, "--seed", seed, *LARGE)
    refused = command("resume", tmp_path / "runs" / "run", "--fallback-dir", other)
    assert refused.code == 2 and "is not of this run" in refused.err
    refused = command("run", "--store", store.path, "--runs", tmp_path / "more", "--name", "run", "--steps", 10, *LARGE,
                      "--fallback-dir", other)  # fmt: skip
    assert refused.code == 2 and "is not of this run" in refused.err and not (tmp_path / "more").exists()
    refused = command("resume", tmp_path / "runs" / "run", "--fallback-dir", tmp_path / "none")
    assert refused.code == 2 and "none: no such folder" in refused.err


@pytest.mark.fault(12)
@pytest.mark.parametrize("disk", [8 * 2**20], indirect=True)
def test_rows_and_reports_that_have_no_room_cost_a_warning_each(
    command: Command, store: SyntheticStore, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--store", store.path, "--name", "run", "--steps", 80, *SMALL, "--set", "log_every=1",
                 "--set", "monitor.every=20", "--set", "samples.rows=2000"]  # fmt: skip
    command("run", "--runs", tmp_path, *arguments)
    at_step(monkeypatch, 30, lambda run: fill(disk))
    done = command("run", "--runs", disk, *arguments)
    said = done.err
    assert done.code == 0
    kept, all_rows = rows(disk / "run"), rows(tmp_path / "run")
    assert 30 <= len(kept) < 80 and kept == all_rows[: len(kept)]  # no torn line among them
    assert said.count("metrics.jsonl: disk full") == 1
    assert f"warning: {80 - len(kept)} rows of {disk / 'run' / 'metrics.jsonl'} were lost" in said
    assert said.count("training goes on, reports are lost") == 1
    assert weights_of(disk / "run", 80) == weights_of(tmp_path / "run", 80)


def weights_of(run: Path, step: int) -> str:
    return digest(checkpoint.folder(run, step) / checkpoint.WEIGHTS)


@pytest.mark.fault(12)
def test_a_torn_last_line_is_dropped_by_resume(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    arguments = ("--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL, "--set", "checkpoint.every=20")
    for name in ("whole", "torn"):
        command("run", *arguments, "--name", name, "--set", "log_every=3")
    torn = tmp_path / "torn"
    checkpoint_of(torn, 40, remove=True)
    log = torn / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert command("resume", torn).code == 0
    assert_same_run(tmp_path / "whole", torn)


def checkpoint_of(run: Path, step: int, *, remove: bool = False) -> Path:
    path = checkpoint.folder(run, step)
    if remove:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return path


@pytest.mark.fault(14)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_an_error_of_the_disk_costs_that_checkpoint(
    command: Command,
    store: SyntheticStore,
    whole: Path,
    tmp_path: Path,
    call: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first argument of both leads to the checkpoint's temporary folder."""
    real = getattr(os, call)

    def failing(first: Any, *rest: Any) -> Any:
        name = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
        if any(f"step-0000{step}.tmp" in name for step in broken):
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        return real(first, *rest)

    monkeypatch.setattr(os, call, failing)
    arguments = ["run", "--store", store.path, "--runs", tmp_path, "--steps", STEPS, *LARGE]
    broken = [20, 30]
    done = command(*arguments, "--name", "run")
    assert done.code == 0
    warnings = [line for line in done.err.splitlines() if line.startswith("warning: no checkpoint of step")]
    assert len(warnings) == 2 and "step 20 of" in warnings[0] and "newest is that of step 10" in warnings[0]
    assert "Input/output error; training goes on" in warnings[0]
    assert weights_of(tmp_path / "run", 60) == weights_of(whole, 60)

    broken = [60]
    done = command(*arguments, "--name", "last")
    assert done.code == 1 and done.err.splitlines()[-1].startswith("error: no checkpoint of step 60")
    assert steps(tmp_path / "last") == [40, 50] and not list(tmp_path.rglob("*.tmp"))


# Kills and signals


@pytest.mark.fault(6)
@pytest.mark.parametrize("where", ["before the rename", pytest.param("after the rename", marks=pytest.mark.exhaustive)])
def test_a_kill_while_old_checkpoints_are_removed_leaves_valid_ones(
    command: Command, store: SyntheticStore, whole: Path, tmp_path: Path, where: str
) -> None:
    """Between publishing and removing, and when the folder that goes has been renamed."""
    function = "remove_folder" if where == "before the rename" else "shutil.rmtree"
    condition = "True" if where == "before the rename" else "str(path).endswith('step-000010.tmp') and path.exists()"
    patch = (
        "import os, shutil\n"
        "from shared.files import durable\n"
        f"def killed(path, *rest, real=durable.{function}, **more):\n"
        f"    if {condition}: os.kill(os.getpid(), 9)\n"
        "    return real(path, *rest, **more)\n"
        f"durable.{function} = killed"
    )
    train("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", STEPS, *LARGE, patch=patch,
          code=-signal.SIGKILL)  # fmt: skip
    run = tmp_path / "run"
    assert steps(run) == ([10, 20, 30] if where == "before the rename" else [20, 30])
    assert command("resume", run).code == 0
    assert steps(run) == [50, 60] and weights(run) == weights(whole)
    assert not list(run.rglob("*.tmp"))


@pytest.mark.fault(6)
def test_what_a_kill_kept_from_being_removed_goes_when_the_run_is_resumed(
    command: Command, store: SyntheticStore, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    old = checkpoint.folder(run, 40)
    shutil.copytree(checkpoint.folder(run, 50), old)
    state = json.loads((old / checkpoint.STATE).read_text())
    (old / checkpoint.STATE).write_text(json.dumps(sealed(state | {"step": 40})))
    assert steps(run) == [40, 50, 60]
    assert command("resume", run).code == 0
    assert steps(run) == [50, 60]


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_a_signal_finishes_the_step_and_publishes(
    command: Command,
    store: SyntheticStore,
    whole: Path,
    tmp_path: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_step(monkeypatch, 24, lambda run: signal.raise_signal(number))
    run = tmp_path / "run"
    done = command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", STEPS, *LARGE)
    assert done.code == 3
    assert done.err.splitlines()[-1] == f"error: stopped at step 25; continue with: python -m train resume {run}"
    assert steps(run)[-1] == 25
    monkeypatch.undo()
    assert command("resume", run).code == 0
    assert_same_run(whole, run)


@pytest.mark.fault(5)
def test_a_second_interrupt_exits_at_once(
    command: Command, store: SyntheticStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(run: trainer.Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 24, twice)
    run = tmp_path / "run"
    done = command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", STEPS, *LARGE)
    assert done.code == 3
    assert done.err.splitlines()[-1] == f"error: stopped at once; continue with: python -m train resume {run}"
    assert steps(run)[-1] in (10, 20)  # the second may have been on its way
    for thread in threading.enumerate():  # ends with a process; this one goes on
        if thread.name == "checkpoint":
            thread.join()
    monkeypatch.undo()
    assert command("resume", run).code == 0
    assert_same_run(whole, run)


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[trainer.Trainer], object]) -> None:
    """Do `act` at the start of step `number`, counted from 0."""
    real = trainer.Trainer._step

    def step(self: trainer.Trainer, done: int) -> Any:
        if done == number:
            act(self)
        return real(self, done)

    monkeypatch.setattr(trainer.Trainer, "_step", step)


@pytest.mark.fault(8)
def test_torn_newest_checkpoints_are_skipped_with_a_warning_each(
    command: Command, store: SyntheticStore, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", STEPS, *LARGE,
            "--set", "checkpoint.keep_last=9")  # fmt: skip
    (checkpoint_of(run, 60) / checkpoint.STATE).write_bytes(b'{"format_version": 4')
    (checkpoint_of(run, 50) / checkpoint.OPTIMIZER).write_bytes(b"")
    flipped = bytearray((checkpoint_of(run, 40) / checkpoint.WEIGHTS).read_bytes())
    flipped[-7] ^= 4
    (checkpoint_of(run, 40) / checkpoint.WEIGHTS).write_bytes(flipped)
    listed = json.loads(command("checkpoints", run, "--json").out)
    assert [(one["step"], one["wrong"] is None) for one in listed] == [
        (10, True), (20, True), (30, True), (40, False), (50, False), (60, False),
    ]  # fmt: skip
    table = command("checkpoints", run).out
    assert "step 40: " in table and "crc32c" in table and "step 50: " in table and "0 bytes" in table
    done = command("resume", run)
    assert done.code == 0
    skipped = [line for line in done.err.splitlines() if line.startswith("warning: skipped a checkpoint")]
    assert [name for line in skipped for name in ("step-000060", "step-000050", "step-000040") if name in line] == [
        "step-000060", "step-000050", "step-000040",
    ]  # fmt: skip
    assert_same_run(whole, run)


@pytest.mark.fault(35)
def test_nothing_is_published_after_a_loss_that_is_not_finite(
    command: Command, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 14, lambda run: run._transcoder.W_dec.data[3].fill_(float("nan")))
    done = command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", STEPS, *LARGE)
    assert done.code == 1
    assert "is not finite at step 15" in done.err and "nothing was published since" in done.err
    assert steps(tmp_path / "run") == [10]


@pytest.mark.fault(15)
def test_checkpoints_that_would_not_fit_are_refused_with_what_the_policy_takes(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 6 * 2**20) as disk:
        arguments = ["run", "--store", store.path, "--runs", disk, "--steps", STEPS, *LARGE]
        refused = command(*arguments, "--set", "checkpoint.keep_last=6")
        assert refused.code == 2 and "no room for checkpoints" in refused.err and "--force" in refused.err
        assert list(disk.iterdir()) == []
        assert command(*arguments, "--set", "checkpoint.keep_last=1").code == 0
