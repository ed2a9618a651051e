"""One fault at every operation of a real command, one run each: what it left, and whether it resumes to the same bytes.

`python -m tests.faults.sweep harvest|train [kill|full|error|signal] [--every N]`. The figures of a sweep of every point
go to docs/benchmarks.md.
"""

import argparse
import errno
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import track

from tests.faults.cases import CASES, Case, same, serving, torn
from tests.faults.inject import KINDS, Fault, Operation, read_log
from tests.faults.power import replay
from tests.faults.server import Result, Server


@dataclass(frozen=True)
class Sweep:
    """A fault, the operations it can come at, and how the command must then end."""

    way: str
    value: int
    kinds: str
    codes: tuple[int, ...]
    """Exit codes."""
    says: str
    """A pattern of what is on stderr."""

    def numbers(self, operations: Sequence[Operation]) -> dict[int, Operation]:
        """The operations it can come at, by their number among those of the same kinds."""
        return dict(enumerate((one for one in operations if one.kind in self.kinds), 1))

    def wrong(self, result: Result) -> str | None:
        """How a run that met the fault should not have ended, or None."""
        if result.code in self.codes and re.search(self.says, result.err):
            return None
        return f"ended with exit code {result.code}: {result.err}"


_ALL = "owfrmutal"
SWEEPS = {
    "kill": Sweep("before", signal.SIGKILL, _ALL, (-signal.SIGKILL,), ""),
    "full": Sweep(
        "fail from",
        errno.ENOSPC,
        "owmtal",
        (2, 3),  # 2: before anything is begun
        r"(?m)^error: (disk full while writing /\S+: ([\d,]+ bytes needed, )?[\d,]+ bytes free"
        r"|cannot write to /\S+: No space left on device)",
    ),
    "error": Sweep("fail", errno.EIO, "fr", (1,), r"(?m)^error: .*: Input/output error"),
    "signal": Sweep("before", signal.SIGTERM, _ALL, (0, 3), ""),
}


@dataclass(frozen=True)
class Point:
    """Where a run meets the fault."""

    number: int
    operation: Operation
    amid: bool = False
    """With half of a write done."""

    def __str__(self) -> str:
        return f"{'amid' if self.amid else 'at'} {self.number}, {KINDS[self.operation.kind]} {self.operation.path}"


class Uninterrupted:
    """A run to its end: what it did, and what it left."""

    def __init__(self, server: Server, case: Case, scratch: Path) -> None:
        self.where, log = scratch / "here", scratch / "log"
        done = server.run(*case.first(self.where), fault=Fault(folder=str(self.where), log=str(log)))
        assert done.code == 0, done.err
        self.operations, self.result = read_log(log), case.result(self.where)
        self.published = replay(self.where, self.operations).published
        assert not torn(self.where, self.published)

    def points(self, sweep: Sweep) -> list[Point]:
        """Every point at which the fault has another effect."""
        found = []
        for number, operation in sweep.numbers(self.operations).items():
            found.append(Point(number, operation))
            if sweep.value == signal.SIGKILL and len(operation.data) > 1:
                found.append(Point(number, operation, amid=True))
        return found


def sample(points: Sequence[Point], count: int) -> list[Point]:
    """`count` points spread over a run, and one more for each kind of operation that is not among them."""
    step = max(1, len(points) // count)
    chosen = list(points[step // 2 :: step])[:count]
    for kind in sorted({point.operation.kind for point in points} - {point.operation.kind for point in chosen}):
        chosen.append(next(point for point in points if point.operation.kind == kind))
    return chosen


def meet(server: Server, case: Case, whole: Uninterrupted, sweep: Sweep, point: Point) -> str | None:
    """Have a run meet the fault at `point`, look at what it left, and resume it. Says what is wrong, or None."""
    where = whole.where
    for way in ("amid", sweep.way) if point.amid else (sweep.way,):
        shutil.rmtree(where, ignore_errors=True)
        fault = Fault(folder=str(where), kinds=sweep.kinds, at=point.number, way=way, value=sweep.value)
        result = server.run(*case.first(where), fault=fault)
        if result.code:  # else a thread took its turn at another place, and this operation is no write
            break
    if found := sweep.wrong(result):
        return found
    if found := case.wrong(where) or torn(where, whole.published):
        return f"left an invalid state: {found}"
    resumed = case.resume(server, where)
    if resumed.code:
        return f"does not resume: exit code {resumed.code}: {resumed.err}"
    found = same(case.result(where), whole.result)
    return f"resumed to another result: {found}" if found else None


def run(stage: str, sweep: Sweep, every: int, scratch: Path) -> tuple[Counter[str], list[str]]:
    """Points by kind of operation, and what went wrong."""
    case, wrong, kinds = CASES[stage](scratch), [], Counter[str]()
    with serving(case, scratch) as server:
        whole = Uninterrupted(server, case, scratch)
        for point in track(whole.points(sweep)[::every], f"faults in {stage}"):
            kinds[KINDS[point.operation.kind]] += 1
            if found := meet(server, case, whole, sweep, point):
                wrong.append(f"{point}: {found}")
                print(wrong[-1], file=sys.stderr, flush=True)
    return kinds, wrong


def main() -> None:
    """Parse, sweep, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=CASES)
    parser.add_argument("sweep", nargs="?", choices=SWEEPS, default="kill")
    parser.add_argument("--every", type=int, default=1, help="take every Nth point only")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sweep-") as scratch:
        kinds, wrong = run(given.stage, SWEEPS[given.sweep], given.every, Path(scratch))
    points = sum(kinds.values())
    print(f"{given.stage}, {given.sweep}: {points} points, {2 * points} runs, {len(wrong)} invalid; {dict(kinds)}")
    if given.every == 1:
        from tests.bench.record import record

        figures: dict[str, tuple[float, str]] = {f"{kind}": (count, "points") for kind, count in sorted(kinds.items())}
        figures |= {"faults, each resumed": (points, "runs"), "invalid states": (len(wrong), "states")}
        name, command = f"{given.sweep} at every operation, {given.stage}", f"{given.stage} {given.sweep}"
        record(name, f"python -m tests.faults.sweep {command}", figures)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
