"""docs/reliability.md is what the marks say, and every promise has a test."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.inject import ROOT
from tests.faults.promises import PROMISES
from tests.faults.protections import PROTECTIONS
from tests.faults.table import Collected, page, unshown, without_results


@pytest.mark.slow
def test_every_promise_has_a_test_and_the_page_is_up_to_date() -> None:
    line = [sys.executable, "-m", "tests.faults.table", "--check"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_promises_are_numbered_in_order() -> None:
    numbers = [number for promises in PROMISES.values() for number in promises]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_promise_without_a_test_is_told_and_links_lead_somewhere() -> None:
    last = max(number for promises in PROMISES.values() for number in promises)
    found = Collected(tests={n: {"tests/faults/test_table.py::test_x": None} for n in range(1, last)})
    assert unshown(found) == [last]
    assert "[test_table.py](../tests/faults/test_table.py)::test_x" in page(found)
    assert (Path(ROOT, "docs") / "../tests/faults/test_table.py").is_file()


def test_results_are_of_all_parameters_with_reasons() -> None:
    found = Collected(tests={1: {"a::b": None, "c::d": None}})
    found.outcomes = {"a::b": {"passed", "skipped: no disk"}, "c::d": {"passed"}}
    row = next(line for line in page(found).splitlines() if line.startswith("| 1 |"))
    assert row.endswith("| passed, skipped: no disk<br>passed |")
    assert without_results(page(found)) == page(Collected(tests=found.tests)) != page(found)


def test_protections_are_where_they_were() -> None:
    """`python -m tests.faults.unprotected` takes them out."""
    for one in PROTECTIONS:
        assert Path(ROOT, one.file).read_text().count(one.text) == 1, one
        for test in one.tests:
            path, _, name = test.partition("::")
            assert f"def {name}(" in Path(ROOT, path).read_text(), test
