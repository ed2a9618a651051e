"""Signals to a real harvest: what it still does, what it says, and how it ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.store.layout import LEDGER, STORE
from tests.faults.cases import Harvest
from tests.faults.conftest import Bench
from tests.faults.inject import ROOT, Fault
from tests.faults.sweep import SWEEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STUCK = """
import time
from pathlib import Path
from harvest.run.block_rows import HostRows

def stuck(*arguments):
    Path({mark!r}).touch()
    time.sleep(600)

HostRows.take = stuck
"""
"""Passes that never end."""


def start(patch: str, arguments: list[object]) -> "subprocess.Popen[str]":
    """The real command in a process of its own, after `patch`."""
    program = f"{patch}\nfrom harvest.cli import main\nmain()"
    line = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_a_signal_while_a_block_is_written_commits_it_and_says_how_to_go_on(
    harvesting: Bench, number: signal.Signals
) -> None:
    where = harvesting.where
    fault = Fault(folder=str(where), kinds="w", match="c/0", at=9, value=number)  # after tokens: rows of block 0
    stopped = harvesting.server.run(*harvesting.case.first(where), fault=fault)
    assert stopped.code == 3
    (store,) = (path for path in where.iterdir() if path.is_dir())
    committed = len(list((store / LEDGER).glob("*.json")))
    assert (store / LEDGER / "000000.json").exists() and not (store / STORE).exists()
    last = stopped.err.splitlines()[-1]
    assert last == f"error: stopped with {3 - committed} of 3 blocks to go; run the same command again to continue"
    assert not list(where.rglob("*.tmp"))
    harvesting.ends_the_same(where)


@pytest.mark.fault(5)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive), signal.SIGUSR1]
)
def test_a_signal_while_tokens_are_packed_stops_at_once(harvesting: Bench, number: signal.Signals) -> None:
    where = harvesting.where
    fault = Fault(folder=str(where), kinds="w", match="spool", at=1, value=number)
    stopped = harvesting.server.run(*harvesting.case.first(where), fault=fault)
    assert stopped.code == 3
    assert stopped.err.splitlines()[-1] == "error: stopped; run the same command again to continue"
    assert not list(where.rglob("*.tmp")) and not list(where.rglob("*.json"))
    harvesting.ends_the_same(where)


@pytest.mark.fault(5)
def test_a_second_ctrl_c_ends_a_harvest_whose_passes_take_long(tiny: Harvest, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    process = start(STUCK.format(mark=str(mark)), tiny.first(tmp_path / "cache"))
    wait_for(mark, process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)  # the pass is waited for
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.splitlines()[-1] == "error: stopped at once; run the same command again to continue"


@pytest.mark.fault(28)
def test_a_second_harvester_is_told_at_once_who_the_first_is(harvesting: Bench, tmp_path: Path) -> None:
    where, mark = harvesting.where, tmp_path / "mark"
    first = start(STUCK.format(mark=str(mark)), harvesting.case.first(where))
    try:
        wait_for(mark, first)
        second = harvesting.server.run(*harvesting.case.first(where))
    finally:
        first.kill()
        first.communicate()
    assert second.code == 2
    assert second.err.splitlines()[-1].endswith(
        f"process {first.pid} (python) is using {where}; wait for it or stop it"
    )
    harvesting.ends_the_same(where)


def test_the_sweep_of_signals_reaches_every_kind_of_operation(harvesting: Bench) -> None:
    kinds = {point.operation.kind for point in harvesting.whole.points(SWEEPS["signal"])}
    assert kinds >= set("owfrmut")
