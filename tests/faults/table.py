"""Write docs/reliability.md from the marks of the tests: every promise, and what shows it.

`python -m tests.faults.table`; with `--run`, the tests are run, too, and the page says how many passed, and why others
were skipped. With `--check`, nothing is written: exit code 1 when the page is not what it would be, or a promise has no
test.
"""

import argparse
import io
import sys
from collections.abc import Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.promises import PROMISES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
INTRO = """# Reliability

What is promised when something goes wrong, and the tests that show it. The rule for all of it: a clear error with a
non-zero exit code, or the right answer; never silently wrong data, never a hang, never the loss of the previous good
state.

`make test-faults` runs these tests, and `make test` all but those that show at many more places what others show at
one. Each was first seen failing with its protection taken out, which
`python -m tests.faults.unprotected` repeats. `python -m tests.faults.sweep harvest|train kill` kills a real command at
every operation that changes its folder; [benchmarks.md](benchmarks.md) has the figures. This page is made by
`python -m tests.faults.table`.
"""
HOW = {
    "test_sweeps.py": "operations counted in the process",
    "test_harvest_signals.py": "signals to the process",
    "test_harvest_resources.py": "small disks, limits",
    "test_harvest_data.py": "a model's weights",
    "test_training_data.py": "made stores",
    "test_power.py": "unsynced writes dropped",
    "test_strace.py": "strace",
    "test_checkpoints.py": "small disks, kills, changed files",
    "test_checkpoint_contents.py": "changed files",
    "test_checkpoint_files.py": "changed files",
    "test_old_runs.py": "files of other formats",
    "test_durable.py": "calls that fail",
    "test_wandb_sync.py": "the tracker's process",
    "test_corruption.py": "changed files",
    "test_hostile.py": "hostile files",
    "test_links.py": "links",
    "test_programs.py": "hostile files",
    "test_properties.py": "random input",
    "test_corpus.py": "input files",
    "test_formats.py": "files of other formats",
    "test_requests.py": "changed requests",
    "test_object_storage.py": "kills and failures at requests",
    "test_objects.py": "requests that fail, changed objects",
    "test_lease.py": "changed leases",
    "test_parallel.py": "a killed process",
    "test_ranks.py": "killed processes",
    "test_hub_store.py": "kills, small disks, changed files",
}
"""How faults get in, by file of tests; `input` where a file is not here."""


@dataclass
class Collected:
    """What pytest found, and how it ended."""

    tests: dict[int, dict[str, None]] = field(default_factory=dict)
    """By number, names as `tests/faults/test_x.py::test_y`, each once, in order."""
    outcomes: dict[str, set[str]] = field(default_factory=dict)
    """By name, `passed`, `failed` or why skipped, of all its parameters."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Note the marks."""
        for item in sorted(items, key=lambda one: one.location[:2]):
            name = item.nodeid.partition("[")[0]
            for mark in item.iter_markers("fault"):
                for number in mark.args:
                    self.tests.setdefault(number, {})[name] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ended."""
        name = report.nodeid.partition("[")[0]
        if report.skipped and isinstance(report.longrepr, tuple):
            self.outcomes.setdefault(name, set()).add("skipped: " + report.longrepr[2].removeprefix("Skipped: "))
        elif report.failed or report.when == "call":
            self.outcomes.setdefault(name, set()).add(report.outcome)


def collect(*, run: bool) -> Collected:
    """The marks of all tests; the outcomes, too, if they are to be run."""
    found = Collected()
    options = ["-m", "fault", "-q", "-p", "no:cacheprovider", *(() if run else ("--collect-only",))]
    with nullcontext() if run else redirect_stdout(io.StringIO()) as listing:
        code = pytest.main([*options, str(ROOT / "tests")], plugins=[found])
    if code not in (0, 1):
        sys.exit(f"pytest ended with {code!r}: {listing.getvalue()[-2000:] if listing else ''}")
    return found


def page(found: Collected) -> str:
    """The page."""
    parts = [INTRO]
    columns = ["", "promise", "shown by", "with", *(["result"] if found.outcomes else [])]
    for section, promises in PROMISES.items():
        parts.append(f"## {section}\n")
        parts.append(_row(columns) + "\n" + _row(["---:", *["---"] * (len(columns) - 1)]))
        for number, promise in promises.items():
            tests = list(found.tests.get(number, ()))
            cells = [str(number), promise, "<br>".join(map(_link, tests)), ", ".join(_how(tests))]
            if found.outcomes:
                cells.append("<br>".join(_result(found, tests)))
            parts.append(_row(cells))
        parts.append("")
    return "\n".join(parts)


def without_results(text: str) -> str:
    """A page as it is before its tests are run."""
    lines = text.split("\n")
    if any(line.endswith("| result |") for line in lines):
        lines = [line.rpartition("|")[0].rpartition(" |")[0] + " |" if line.startswith("|") else line for line in lines]
    return "\n".join(lines)


def unshown(found: Collected) -> list[int]:
    """Promises without a test."""
    return [number for promises in PROMISES.values() for number in promises if not found.tests.get(number)]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{Path(path).name}](../{path})::{name}"


def _how(tests: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(HOW.get(Path(test.partition("::")[0]).name, "input") for test in tests)


def _result(found: Collected, tests: Iterable[str]) -> dict[str, None]:
    return dict.fromkeys(", ".join(sorted(found.outcomes.get(test, {"not run"}))) for test in tests)


def main() -> None:
    """Parse, collect, write or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="run the tests, and add a column of results")
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    given = parser.parse_args()
    found = collect(run=given.run)
    text = page(found)
    if given.check and without_results(PAGE.read_text()) != text:
        sys.exit(f"{PAGE} is not up to date: python -m tests.faults.table")
    if not given.check:
        PAGE.write_text(text)
    if missing := unshown(found):
        sys.exit(f"no test shows {missing}")


if __name__ == "__main__":
    main()
