"""A server of runs, and the uninterrupted run, for each stage: made once, when a test first asks for them."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import inject
from tests.faults.cases import CASES, Case, Harvest, same, serving
from tests.faults.server import Result, Server
from tests.faults.sweep import Sweep, Uninterrupted, meet, sample


@dataclass(frozen=True)
class Bench:
    """A stage, ready to meet faults."""

    case: Case
    server: Server
    whole: Uninterrupted

    @property
    def where(self) -> Path:
        """The folder of the run, emptied."""
        shutil.rmtree(self.whole.where, ignore_errors=True)
        return self.whole.where

    def meets(self, sweep: Sweep, points: int, also: str = "/.tmp") -> list[str]:
        """What goes wrong at some points of a sweep, and at those of a path, such as safetensors' own files."""
        every = self.whole.points(sweep)
        chosen = sample(every, points) + [point for point in every if also in point.operation.path][:4]
        found = {str(point): meet(self.server, self.case, self.whole, sweep, point) for point in chosen}
        return [f"{point}: {wrong}" for point, wrong in found.items() if wrong]

    def ends_the_same(self, where: Path) -> Result:
        """Resume in `where`, and compare with the uninterrupted run."""
        done = self.case.resume(self.server, where)
        assert done.code == 0, done.err
        assert same(self.case.result(where), self.whole.result) is None
        return done


def _bench(stage: str, scratch: Path) -> Iterator[Bench]:
    if reason := inject.missing():
        pytest.skip(reason)
    case = CASES[stage](scratch)
    with serving(case, scratch) as server:
        yield Bench(case, server, Uninterrupted(server, case, scratch))


@pytest.fixture(scope="session")
def harvesting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _bench("harvest", tmp_path_factory.mktemp("harvesting"))


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from _bench("train", tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def tiny(harvesting: Bench) -> Harvest:
    """The small harvest's inputs."""
    assert isinstance(harvesting.case, Harvest)
    return harvesting.case
