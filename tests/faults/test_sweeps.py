"""Faults at operations spread over a real run; `python -m tests.faults.sweep` takes every one."""

import signal

import pytest

from tests.faults.conftest import Bench
from tests.faults.inject import Fault
from tests.faults.sweep import SWEEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.fault(1, 2)
@pytest.mark.exhaustive
def test_a_harvest_killed_at_any_operation_resumes_to_the_same_store(harvesting: Bench) -> None:
    assert harvesting.meets(SWEEPS["kill"], 20) == []


@pytest.mark.fault(9)
@pytest.mark.exhaustive
def test_a_disk_that_fills_at_any_write_of_a_harvest_is_named_and_it_resumes(harvesting: Bench) -> None:
    assert harvesting.meets(SWEEPS["full"], 12) == []


@pytest.mark.fault(14)
@pytest.mark.exhaustive
def test_an_fsync_or_rename_that_fails_in_a_harvest_publishes_nothing(harvesting: Bench) -> None:
    assert harvesting.meets(SWEEPS["error"], 12) == []


@pytest.mark.fault(5)
@pytest.mark.exhaustive
def test_a_signal_at_any_operation_of_a_harvest_stops_it_in_good_order(harvesting: Bench) -> None:
    assert harvesting.meets(SWEEPS["signal"], 10) == []


@pytest.mark.fault(4, 6)
@pytest.mark.exhaustive
def test_a_training_killed_at_any_operation_resumes_to_the_same_run(training: Bench) -> None:
    assert training.meets(SWEEPS["kill"], 20, also="config.json") == []


@pytest.mark.fault(1)
@pytest.mark.parametrize("first", [30, 200])
def test_a_harvest_killed_again_and_again_ends_the_same(harvesting: Bench, first: int) -> None:
    """Every resume is killed a little later than the one before it."""
    where, kills = harvesting.where, 0
    for number in range(first, first + 300, 60):
        fault = Fault(folder=str(where), at=number)
        killed = harvesting.server.run(*harvesting.case.first(where), fault=fault)
        kills += killed.code == -signal.SIGKILL
        assert killed.code in (0, -signal.SIGKILL), killed.err
        assert harvesting.case.wrong(where) is None
    assert kills >= 2
    harvesting.ends_the_same(where)
