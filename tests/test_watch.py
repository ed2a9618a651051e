"""`train watch`: finished, running, stopped and starting runs, by their files alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from shared.files import durable
from tests.runs import SMALL, rows
from tests.stores import SyntheticStore, make_store
from tests.test_train import popen, rows_so_far, wait_for
from train.live.run_files import CONFIG, LOCK, METRICS, TIMING, USAGE, Lines
from train.live.watch import Watched

FILES = (CONFIG, METRICS, TIMING, USAGE)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


@pytest.fixture
def finished(command, store: SyntheticStore, tmp_path: Path) -> Path:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL, "--set", "log_every=7",
                   "--set", "evaluation.every=20", "--set", "checkpoint.every=10")  # fmt: skip
    assert done.code == 0, done.err
    return done.path


def stop_at(run: Path, step: int) -> Path:
    """Leave what a run that was killed after `step` has: no later rows, checkpoints or counts."""
    for name in (METRICS, TIMING):
        kept = [line for line in (run / name).read_text().splitlines(True) if json.loads(line)["step"] <= step]
        (run / name).write_text("".join(kept))
    record = json.loads((run / USAGE).read_text())
    record["step"], record["components"]["samples"] = step, {"calls": 0, "effect": 0.0, "effect_counts": "latents"}
    (run / USAGE).write_text(json.dumps(record))
    for path in run.glob("checkpoints/step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return run


def contents(run: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.rglob("*") if p.is_file()}


def test_a_finished_run_is_shown_once_and_nothing_is_written(command, finished: Path) -> None:
    before, last = contents(finished), rows(finished)[-1]
    done = command("watch", finished)
    assert (done.code, done.err) == (0, "")
    line, sentence = done.out.splitlines()
    assert sentence == f"{finished} is finished: 40 steps"
    assert line.startswith("train 40/40 steps  ") and "  0:00 left  " in line
    assert f"fvu {last['fvu']:.4f}  l0 {last['l0_training_rule']:.1f}  dead {last['dead_share']:.1%}" in line
    assert f"held-out fvu {last['held_out']['fvu']:.4f}  l0 {last['held_out']['l0']:.1f}" in line
    assert contents(finished) == before


def test_all_of_it_is_in_the_json(command, finished: Path) -> None:
    found = json.loads(command("watch", finished, "--once", "--json").out)
    last, record = rows(finished)[-1], json.loads((finished / USAGE).read_text())
    timing = [json.loads(line) for line in (finished / TIMING).read_text().splitlines()][-1]
    assert (found["state"], found["continue_with"], found["newest_checkpoint"]) == ("finished", None, 40)
    assert found["terms"] == last["terms"] and found["components"] == record["components"]
    assert found["penalty_share"] == sum(last["terms"].get(n, 0) for n in ("mined", "co_activation")) / last["loss"]
    assert found["steps_per_second"] == pytest.approx(40 / timing["seconds"])
    assert found["rows_per_second"] == pytest.approx(timing["rows_per_second"])
    assert (found["step"], found["seconds_left"]) == (40, 0)
    assert found["held_out"] == {"step": 40} | {k: last["held_out"][k] for k in ("fvu", "l0", "dead_share")}
    assert found["taken_bytes"] == sum(p.stat().st_size for p in finished.rglob("*") if p.is_file())


def test_verbose_lines_have_all_figures(command, finished: Path) -> None:
    line = command("watch", finished, "--verbose").out.splitlines()[0]
    for name in ("lr ", "grad_norm ", "loss ", "mined ", "fvu of 001-004 ", "data wait ", "evaluation 2 calls "):
        assert f"  {name}" in line


@pytest.mark.parametrize(
    ("newest", "at"),
    [
        (31, "31"),
        (20, "28 (its newest checkpoint: 20)"),
        (None, "28 (no checkpoint: it will start over)"),
    ],
)
def test_a_stopped_run_says_where_and_how_to_go_on(command, finished: Path, newest: int | None, at: str) -> None:
    stop_at(finished, 28)
    if newest:
        (finished / "checkpoints" / f"step-{newest:06d}").mkdir()
    done = command("watch", finished)
    assert done.code == 0
    assert done.out.splitlines()[-1] == (
        f"{finished} stopped at step {at}; continue with: python -m train resume {finished}"
    )
    found = json.loads(command("watch", finished, "--once", "--json").out)
    assert (found["state"], found["continue_with"]) == ("stopped", f"python -m train resume {finished}")


def test_a_torn_last_line_waits_until_it_is_whole(finished: Path) -> None:
    whole = (finished / METRICS).read_bytes()
    (finished / METRICS).write_bytes(whole[:-10])
    watched = Watched(finished)
    assert [watched.status.step for _ in watched.look()] == [7, 14, 20, 21, 28, 35]
    assert [watched.status.step for _ in watched.look()] == []
    (finished / METRICS).write_bytes(whole)
    assert [watched.status.step for _ in watched.look()] == [40]
    assert watched.status.fvu == [row["fvu"] for row in rows(finished)]


def test_a_run_that_was_resumed_from_an_earlier_step_begins_anew(finished: Path) -> None:
    watched = Watched(finished)
    assert len(list(watched.look())) == 7
    whole = (finished / METRICS).read_bytes()
    (finished / METRICS).write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    assert [watched.status.step for _ in watched.look()] == [7, 14]
    assert len(watched.status.fvu) == 2 and not watched.status.held_out


def test_rows_that_are_none_are_passed_over(finished: Path) -> None:
    with open(finished / METRICS, "ab") as file:
        file.write(b'[1]\n{"fvu": 3}\n\xff\n"text"\n')
    watched = Watched(finished)
    assert [watched.status.step for _ in watched.look()][-1] == 40


def test_a_starting_run_has_no_figures_yet(command, finished: Path) -> None:
    for name in (METRICS, TIMING, USAGE):
        (finished / name).unlink()
    shutil.rmtree(finished / "checkpoints")
    with durable.lock(finished / LOCK, "the run"):
        done = command("watch", finished, "--once")
        *panel, sentence = done.out.splitlines()
        assert "0/40 steps" in panel[1] and "no figures yet" in panel[-2] and max(map(len, panel)) <= 80
        assert sentence == f"{finished} is starting: no figures yet"
    assert "stopped at step 0; continue with" in command("watch", finished).out


@pytest.mark.parametrize("options", [[], ["--once"], ["--json"]])
def test_a_folder_that_is_no_run_is_the_users_error(command, tmp_path: Path, options: list[str]) -> None:
    for path, wrong in ((tmp_path, "it has no config.json"), (tmp_path / "nowhere", "there is no such folder")):
        done = command("watch", path, *options)
        assert (done.code, done.out) == (2, "")
        assert done.err == f"error: {path} is not a run: {wrong}\n"


def test_settings_that_are_none_are_told(command, finished: Path) -> None:
    (finished / CONFIG).write_text('{"settings": {"steps": 40}}')
    done = command("watch", finished)
    assert done.code == 1 and "config.json: not the settings of a run" in done.err


def test_lines_of_a_file_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert list(Lines(tmp_path / "none").read()) == []


def test_watching_imports_no_torch(finished: Path) -> None:
    code = (
        "import sys, train.cli\n"
        "try: train.cli.main(['watch', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'wandb'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, finished], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[1:] == [f"{finished} is finished: 40 steps", "[]"], done.stderr


@pytest.mark.slow
def test_a_running_run_is_followed_to_its_end(command, store: SyntheticStore, tmp_path: Path) -> None:
    run = tmp_path / "one"
    trainer = popen("run", "--store", store.path, "--runs", tmp_path, "--name", "one", "--steps", 3000, *SMALL,
                    "--set", "log_every=50", "--set", "checkpoint.every=1000")  # fmt: skip
    wait_for(lambda: (run / METRICS).exists() and len(rows_so_far(run)) >= 2)
    assert f"{run} is running: step " in command("watch", run, "--once").out
    watcher, objects = popen("watch", run), popen("watch", run, "--json")
    out, err = watcher.communicate(timeout=200)
    assert (watcher.returncode, err) == (0, "")
    assert trainer.wait(60) == 0
    lines = out.splitlines()
    assert lines[-1] == f"{run} is finished: 3,000 steps"
    steps = [int(line.split("/")[0].removeprefix("train ").replace(",", "")) for line in lines[:-1]]
    assert steps == list(range(steps[0], 3001, 50)) and len(steps) > 2
    found = [json.loads(line) for line in objects.communicate(timeout=60)[0].splitlines()]
    assert [one["state"] for one in found][-1] == "finished"
    assert {one["state"] for one in found[:-1]} == {"running"}


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.mark.slow
def test_ctrl_c_leaves_quietly_and_the_trainer_goes_on(command, store: SyntheticStore, tmp_path: Path) -> None:
    run = tmp_path / "one"
    trainer = popen("run", "--store", store.path, "--runs", tmp_path, "--name", "one", "--steps", 10**6, *SMALL)
    wait_for(lambda: (run / METRICS).exists() and len(rows_so_far(run)) >= 2)
    watcher = popen("watch", run)
    assert _stream(watcher.stdout).readline().startswith("train ")
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(30) == 0 and _stream(watcher.stderr).read() == ""
    watcher = popen("watch", run)
    assert _stream(watcher.stdout).readline().startswith("train ")
    assert trainer.poll() is None
    os.kill(trainer.pid, signal.SIGTERM)
    assert trainer.wait(60) == 3
    assert watcher.wait(30) == 0
    assert f"; continue with: python -m train resume {run}" in _stream(watcher.stdout).read().splitlines()[-1]
