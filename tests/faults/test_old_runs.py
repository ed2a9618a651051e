"""A run of format 3 is read for ever: `fixtures/run-format-3` was written by the code before format 4.

Its store was `make_store(path, d_in=4, d_out=4)`, its options were 30 steps of 48 rows with 16 latents and k = 2.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runs import Outcome, rows
from tests.stores import make_store
from train.model import checkpoint

FIXTURE = Path(__file__).parent / "fixtures" / "run-format-3"
FVU = {20: 1.7829015, 30: 1.7493864}
"""Held out, as that code reported them; it was stopped at step 20 of 30."""


@pytest.mark.fault(24)
def test_a_run_of_format_3_is_listed_evaluated_and_resumed(command: Callable[..., Outcome], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURE, run)
    store = make_store(tmp_path / "store", d_in=4, d_out=4)
    (listed,) = json.loads(command("checkpoints", run, "--json").out)
    assert (listed["step"], listed["wrong"], listed["arithmetic"]) == (20, None, {"threads": "1"})
    evaluated = command("evaluate", run, "--store", store.path, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["fvu"] == pytest.approx(FVU[20], rel=1e-5)
    resumed = command("resume", run, "--store", store.path)
    assert resumed.code == 0, resumed.err
    assert rows(run)[-1]["held_out"]["fvu"] == pytest.approx(FVU[30], rel=1e-5)
    assert checkpoint.find(run).state.format_version == checkpoint.FORMAT_VERSION
