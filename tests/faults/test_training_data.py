"""Rows that are degenerate, batches at the limits of a store, and several trainers of one store; real runs."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.faults.inject import ROOT
from tests.runs import SMALL, Outcome, assert_same_run, rows
from tests.stores import Array, make_store

Command = Callable[..., Outcome]
Rows = dict[str, NDArray[np.float32]]


def constant(tokens: Array, positions: Array, of_document: Array | float) -> Rows:
    """One and the same row on both sides."""
    return {"source": np.full((len(tokens), 16), 3.0, np.float32), "target": np.full((len(tokens), 24), -2, np.float32)}


def zeros(tokens: Array, positions: Array, of_document: Array | float) -> Rows:
    """Nothing but zeros."""
    return {side: np.zeros((len(tokens), width), np.float32) for side, width in (("source", 16), ("target", 24))}


def negative(tokens: Array, positions: Array, of_document: Array | float) -> Rows:
    """Values below zero that a linear map explains."""
    source = -1.0 - np.abs(np.sin(tokens[:, None] * np.arange(1, 17) + positions[:, None]))
    return {
        "source": source.astype(np.float32),
        "target": -(np.repeat(source, 2, axis=1)[:, :24].astype(np.float32) ** 2),
    }


def constant_target(tokens: Array, positions: Array, of_document: Array | float) -> Rows:
    """Sources that vary, and targets that do not."""
    return {**negative(tokens, positions, of_document), "target": np.full((len(tokens), 24), 5.0, np.float32)}


def figures(value: object) -> list[float]:
    """All numbers in a row of metrics."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in figures(one)]
    if isinstance(value, list):
        return [number for one in value for number in figures(one)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.fault(34)
@pytest.mark.parametrize("draw", [constant, zeros, negative, constant_target])
def test_degenerate_rows_have_defined_results(command: Command, tmp_path: Path, draw: Callable[..., Rows]) -> None:
    store = make_store(tmp_path / "store", draw=draw, tokenizer=True).path
    done = command("run", "--store", store, "--runs", tmp_path / "runs", "--steps", 30, *SMALL, "--set", "log_every=5")
    assert done.code == 0, done.err
    found = rows(done.path)
    assert [row["step"] for row in found] == [5, 10, 15, 20, 25, 30]
    assert all(math.isfinite(number) for row in found for number in figures(row))
    last = found[-1]
    if draw is negative:
        assert 0 < last["fvu"] < found[0]["fvu"]
    else:  # the target's mean is all there is: fvu is 0 where nothing is added to it, and 1 where anything is
        expected = 1.0 if draw is constant_target else 0.0
        assert (last["fvu"], last["held_out"]["fvu"]) == (expected, expected)


@pytest.mark.slow
@pytest.mark.fault(41)
def test_batches_of_one_row_and_of_all_rows(command: Command, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", training_blocks=1)
    every = sum(stratum.rows for stratum in store.record.plan.stored_strata)
    for batch in (1, every):
        size = ["--set", f"rows.batch_rows={batch}"]
        done = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 6, *SMALL, *size)
        assert done.code == 0, done.err
        (last,) = rows(done.path)
        assert (last["step"], last["rows"]) == (6, 6 * batch) and all(map(math.isfinite, figures(last)))
    more = ["--set", f"rows.batch_rows={every + 1}"]
    done = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 6, *SMALL, *more)
    assert done.code == 2
    assert f"rows.batch_rows = {every + 1:,} is more than the store's {every:,} training rows" in done.err


TOGETHER = """
import time
from pathlib import Path
from train.run.trainer import Trainer

train = Trainer.train

def when_all_are_here(self):
    Path({folder!r}, str(self._path.name)).touch()
    while len(list(Path({folder!r}).iterdir())) < {count}:
        time.sleep(0.05)
    train(self)

Trainer.train = when_all_are_here
from shared.command_line import run
from train.cli import main
run(main)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.fault(31)
def test_eight_trainers_at_once_get_what_each_gets_alone(command: Command, tmp_path: Path) -> None:
    """They begin their first step together; seeds differ between pairs."""
    store, here = make_store(tmp_path / "store", tokenizer=True).path, tmp_path / "here"
    here.mkdir()
    program = TOGETHER.format(folder=str(here), count=8)
    options = [*SMALL, "--steps", 60, "--set", "checkpoint.every=20", "--set", "log_every=10"]
    processes = []
    for number in range(8):
        given = ["run", "--store", store, "--runs", tmp_path, "--name", f"r{number}", "--seed", number // 2, *options]
        line = [sys.executable, "-c", program, *map(str, given)]
        processes.append(subprocess.Popen(line, cwd=ROOT, stdout=-1, stderr=-1, text=True))
    for process in processes:
        _, err = process.communicate(timeout=480)
        assert process.returncode == 0, err
    for seed in range(4):
        alone = ["run", "--store", store, "--runs", tmp_path, "--name", f"alone{seed}", "--seed", seed, *options]
        assert command(*alone).code == 0
        for number in (2 * seed, 2 * seed + 1):
            assert_same_run(tmp_path / f"alone{seed}", tmp_path / f"r{number}")
            usage = [
                json.loads((tmp_path / name / "usage.json").read_text()) for name in (f"alone{seed}", f"r{number}")
            ]
            assert usage[0] == usage[1]
