"""A small run with a report, for tests of reports: its settings, how it is made, and what is read of it."""

import json
import subprocess
import sys
from pathlib import Path

from tests.runs import SMALL
from train.report.report_record import Check, Report
from train.report.verdict import verdict

STEPS = 120
OPTIONS = [
    *SMALL,
    "--steps",
    STEPS,
    "--set",
    "evaluation.every=40",
    "--set",
    "log_every=10",
    "--set",
    "monitor.every=20",
    "--set",
    "checkpoint.every=60",
]


def train(*arguments: object) -> None:
    """Run `python -m train ARGUMENTS`."""
    done = subprocess.run([sys.executable, "-m", "train", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read(run: Path) -> Report:
    """The report of `run`."""
    return Report.model_validate(json.loads((run / "report.json").read_text()))


def check(report: Report, name: str) -> Check:
    """What the verdict says of one matter."""
    return next(one for one in verdict(report) if one.name == name)
