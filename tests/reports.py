"""A small run with a report, for tests of reports: its settings, how it is made, and what is read of it."""

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest.mock import patch

from shared import command_line
from tests.runs import SMALL
from train.cli import main
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
    """Run `python -m train ARGUMENTS` in this process, which has imported what it needs."""
    said = io.StringIO()
    with (
        patch.object(sys, "argv", ["train", *map(str, arguments)]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(said),
    ):
        try:
            command_line.run(main)
        except SystemExit as stop:
            assert not stop.code, said.getvalue()


def read(run: Path) -> Report:
    """The report of `run`."""
    return Report.model_validate(json.loads((run / "report.json").read_text()))


def check(report: Report, name: str) -> Check:
    """What the verdict says of one matter."""
    return next(one for one in verdict(report) if one.name == name)
