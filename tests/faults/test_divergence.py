"""A training that diverges: said when it happens, at its end and in its report; the run and its files are there."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reports import read
from tests.runs import SMALL, Outcome, rows
from tests.stores import SyntheticStore

Command = Callable[..., Outcome]
CADENCE = ["--set", "log_every=2", "--set", "checkpoint.every=4", "--set", "evaluation.every=4"]
WILD = ["--set", "optimizer.lr=1000", "--set", "optimizer.warmup_steps=0"]


@pytest.mark.fault(57)
def test_a_training_that_diverges_says_so_at_once_at_its_end_and_in_its_report(
    command: Command, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = command(
        "run", "--store", synthetic.path, "--runs", tmp_path, "--name", "run", "--steps", 12, *SMALL, *CADENCE, *WILD
    )
    assert done.code == 1 and done.out == ""
    first = next(row for row in rows(run) if row["fvu"] > 10)
    last = rows(run)[-1]["held_out"]["fvu"]
    assert last > 10
    warnings = [line for line in done.err.splitlines() if "the training diverges" in line]
    assert warnings == [
        f"warning: step {first['step']}: fvu is {first['fvu']:,.1f}, and the mean alone leaves 1: "
        "the training diverges; lower optimizer.lr"
    ]
    said = (
        f"error: {run} has diverged: its held-out fvu at step 12 is {last:,.1f}, and the mean alone leaves 1; "
        "lower optimizer.lr"
    )
    assert done.err.splitlines()[-1] == said
    again = command("resume", run)  # nothing is left to do, and it is still no result
    assert again.code == 1 and again.err.splitlines()[-1] == said
    assert command("report", run).code == 0
    check = next(one for one in read(run).verdict if one.name == "reconstruction")
    assert check.state == "bad" and check.said.startswith("The training diverged; lower optimizer.lr. ")


@pytest.mark.fault(57)
def test_a_training_that_only_begins_badly_is_no_error(
    command: Command, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    given = ["run", "--store", synthetic.path, "--runs", tmp_path, "--name", "run", "--steps", 12, *SMALL, *CADENCE]
    done = command(*given)
    assert done.code == 0 and "diverge" not in done.err
