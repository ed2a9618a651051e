"""What a power cut leaves of a real harvest and a real run, and whether that goes on.

The states come from the log of operations and a model of the worst that a file system may do; and, where images can be
mounted, from one that does what it does.
"""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.cases import owned_by_root, same, torn
from tests.faults.conftest import Bench
from tests.faults.inject import Fault
from tests.faults.power import Disk, Tree, write
from tests.faults.sweep import SWEEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def states(bench: Bench, every: int) -> Iterator[tuple[int, Tree]]:
    """What a power cut may leave after every Nth operation, none twice."""
    disk, seen = Disk(bench.whole.where), set()
    for number, operation in enumerate(bench.whole.operations, 1):
        disk.apply(operation)
        if number % every and number < len(bench.whole.operations):
            continue
        for tree in disk.left():
            if (key := hash(tuple(tree.items()))) not in seen:
                seen.add(key)
                yield number, tree


def check(bench: Bench, every: int, resumed: int) -> None:
    """Published things verify or are absent in all states, and some states, spread over the run, are gone on with."""
    found = list(states(bench, every))
    assert len(found) > 50
    for number, tree in found:
        where = bench.where
        write(tree, where)
        wrong = bench.case.wrong(where) or torn(where, bench.whole.published)
        assert wrong is None, f"after operation {number}: {wrong}"
    for number, tree in found[:: max(1, len(found) // resumed)]:
        where = bench.where
        write(tree, where)
        done = bench.case.resume(bench.server, where)
        assert done.code == 0, f"after operation {number}: {done.err}"
        wrong = same(bench.case.result(where), bench.whole.result)
        assert wrong is None, f"after operation {number}: {wrong}"


@pytest.mark.fault(7)
@pytest.mark.exhaustive
def test_a_power_cut_in_a_harvest(harvesting: Bench) -> None:
    check(harvesting, every=9, resumed=10)


@pytest.mark.fault(7)
def test_a_power_cut_in_a_training_run(training: Bench) -> None:
    check(training, every=2, resumed=12)


def test_the_model_of_a_disk_ends_as_the_real_one(harvesting: Bench, training: Bench) -> None:
    for bench in (harvesting, training):
        disk = Disk(bench.whole.where)
        for operation in bench.whole.operations:
            disk.apply(operation)
        where = bench.where
        write(disk.now(), where)
        assert same(bench.case.result(where), bench.whole.result) is None


@pytest.fixture
def image(harvesting: Bench, tmp_path: Path) -> Iterator[Callable[[Path, Path], None]]:
    """Mounts an image for the server's runs, and for tests; unmounted at the end."""
    if not owned_by_root():
        pytest.skip("only root may mount an image of a file system")
    mounted: list[Path] = []

    def on_server(*line: object) -> str:
        names = ["nsenter", "--target", str(harvesting.server.pid), "--mount"]
        done = subprocess.run([*names, *map(str, line)], capture_output=True, text=True)
        return done.stderr.strip() if done.returncode else ""

    def mount(file: Path, folder: Path) -> None:
        folder.mkdir()
        if wrong := on_server("mount", "-o", "loop", file, folder):
            pytest.skip(f"an image cannot be mounted here: {wrong}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        assert not on_server("umount", folder)


@pytest.mark.fault(7)
def test_images_of_a_mounted_file_system_are_what_a_power_cut_leaves(
    harvesting: Bench, tmp_path: Path, image: Callable[[Path, Path], None]
) -> None:
    """A harvest on ext4 is killed, and the image copied before the kernel writes back what was not forced to disk."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("no mkfs.ext4 to make an image with")
    points = harvesting.whole.points(SWEEPS["kill"])
    for turn, point in enumerate(points[40 :: len(points) // 5]):
        file, copy = tmp_path / f"{turn}.img", tmp_path / f"{turn}-cut.img"
        with open(file, "wb") as empty:
            empty.truncate(32 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", file], check=True)
        image(file, tmp_path / f"{turn}")
        inside = tmp_path / f"{turn}" / "cache"
        fault = Fault(folder=str(inside), at=point.number)
        killed = harvesting.server.run(*harvesting.case.first(inside, "--force"), fault=fault)
        assert killed.code == -9, killed.err
        shutil.copyfile(file, copy)
        image(copy, tmp_path / f"{turn}-cut")
        left = tmp_path / f"{turn}-cut" / "cache"
        outside = harvesting.server.root / left.relative_to("/")
        assert harvesting.case.wrong(outside) is None
        done = harvesting.server.run(*harvesting.case.first(left, "--force"))
        assert done.code == 0, done.err
        assert same(harvesting.case.result(outside), harvesting.whole.result) is None
