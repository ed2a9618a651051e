"""A real harvest on disks that are small, full or read-only, with little memory, and before it begins."""

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.files import durable
from tests.faults.cases import Harvest, same
from tests.faults.conftest import Bench
from tests.faults.disk import fill
from tests.faults.inject import ROOT, Fault
from tests.faults.server import Result
from tests.llms import Line, command, refused

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FULL = re.compile(
    r"error: disk full while writing (/\S+): ([\d,]+) bytes needed, ([\d,]+) bytes free \(No space left on device\); "
    "free some space and run .*"
)


@dataclass(frozen=True)
class Disk:
    """A small one that runs of the server have at the folder `inside`, and tests at `outside`."""

    bench: Bench
    inside: Path
    outside: Path

    def harvest(self, *more: object, **changes: int) -> Result:
        """Into the folder `cache` there."""
        case = self.bench.case
        assert isinstance(case, Harvest)
        return self.bench.server.run(*case.first(self.inside / "cache", *more, **changes))

    def ends_the_same(self) -> None:
        """Go on with the harvest, and compare."""
        done = self.harvest()
        assert done.code == 0, done.err
        assert same(self.bench.case.result(self.outside / "cache"), self.bench.whole.result) is None

    def read_only(self) -> None:
        """Let nobody write to it any more."""
        assert not self.bench.server.mount(self.inside, "remount", "ro")


@pytest.fixture
def mounted(harvesting: Bench, tmp_path: Path) -> Callable[..., Disk]:
    """Makes a disk of so many bytes, and inodes if asked for."""

    def mount(size: int, *options: str) -> Disk:
        inside = tmp_path / "disk"
        inside.mkdir()
        if wrong := harvesting.server.mount(inside, f"size={size}", *options):
            pytest.skip(f"a small disk cannot be mounted here: {wrong}")
        return Disk(harvesting, inside, harvesting.server.root / inside.relative_to("/"))

    return mount


@pytest.mark.fault(9)
@pytest.mark.parametrize(
    "leave", [64, pytest.param(160, marks=pytest.mark.exhaustive), pytest.param(224, marks=pytest.mark.exhaustive)]
)
def test_a_disk_that_fills_is_named_with_sizes_and_with_room_the_harvest_resumes(
    mounted: Callable[..., Disk], leave: int
) -> None:
    """`leave`: KiB that are free. A whole store takes 400, most of it in blocks of 4."""
    disk = mounted(8 * 2**20)
    filler = fill(disk.outside, leave * 1024)
    stopped = disk.harvest("--force")
    assert stopped.code == 3, stopped.err
    found = FULL.fullmatch(stopped.err.splitlines()[-1])
    assert found and Path(found[1]).is_relative_to(disk.inside / "cache"), stopped.err
    needed, free = (int(number.replace(",", "")) for number in found.groups()[1:])
    assert 0 < needed < 10**6 and free < leave * 1024
    assert disk.bench.case.wrong(disk.outside / "cache") is None and not list(disk.outside.rglob("*.tmp"))
    filler.unlink()
    disk.ends_the_same()


@pytest.mark.fault(9)
def test_a_disk_without_inodes_is_full_too(mounted: Callable[..., Disk]) -> None:
    disk = mounted(8 * 2**20, "nr_inodes=250")
    files = [disk.outside / str(number) for number in range(150)]
    for path in files:
        path.touch()
    stopped = disk.harvest("--force")
    assert stopped.code == 3 and FULL.fullmatch(stopped.err.splitlines()[-1]), stopped.err
    for path in files:
        path.unlink()
    disk.ends_the_same()


@pytest.mark.fault(9)
def test_a_limit_on_the_size_of_files_is_told_as_a_full_disk(harvesting: Bench) -> None:
    where = harvesting.where
    stopped = harvesting.server.run(*harvesting.case.first(where), limits={"RLIMIT_FSIZE": 20_000})
    assert stopped.code == 3
    assert re.search(r"disk full while writing /\S+: [\d,]+ bytes needed, .*\(File too large\)", stopped.err), (
        stopped.err
    )
    harvesting.ends_the_same(where)


@pytest.mark.fault(9)
def test_a_quota_that_is_used_up_is_told_as_a_full_disk(harvesting: Bench) -> None:
    where = harvesting.where
    fault = Fault(folder=str(where), kinds="w", match="ledger/000001.json", at=1, way="fail from", value=errno.EDQUOT)
    stopped = harvesting.server.run(*harvesting.case.first(where), fault=fault)
    assert stopped.code == 3 and re.search(r"ledger/000001.json: [\d,]+ bytes needed, .* quota exceeded", stopped.err)
    harvesting.ends_the_same(where)


@pytest.mark.fault(15)
def test_a_store_that_would_not_fit_is_refused_before_the_model_is_loaded_and_force_goes_on(
    mounted: Callable[..., Disk],
) -> None:
    disk, tokens = mounted(2**20), 512 * 50
    refused = disk.harvest(tokens=tokens)
    found = re.fullmatch(
        r"error: no room for the store \(--force continues anyway\) in /\S+: it needs ([\d,]+) bytes and ([\d,]+) "
        "are free; free some space, choose another folder, or ask for less\n",
        refused.err,
    )
    assert refused.code == 2 and found, refused.err
    needed, free = (int(number.replace(",", "")) for number in found.groups())
    assert free <= 2**20 < needed
    assert [path.suffix for path in disk.outside.rglob("*")] == ["", ".lock"]  # the cache, and nothing in it
    forced = disk.harvest("--force", tokens=tokens)
    assert forced.code == 3 and FULL.fullmatch(forced.err.splitlines()[-1]), forced.err


@pytest.mark.fault(17)
def test_a_read_only_disk_is_refused_and_an_unfinished_store_that_became_so(mounted: Callable[..., Disk]) -> None:
    disk = mounted(8 * 2**20, "mode=755")
    filler = fill(disk.outside, 160 * 1024)
    assert disk.harvest("--force").code == 3
    filler.unlink()
    disk.read_only()
    case, server = disk.bench.case, disk.bench.server
    assert isinstance(case, Harvest)
    there, new = (server.run(*case.first(disk.inside / name)) for name in ("cache", "another"))
    assert (there.code, new.code) == (2, 2)  # and no line of packing or of passes before the error
    hint = "it is read-only; make it writable, or choose another --cache"
    assert there.err == f"error: cannot write to {disk.inside / 'cache'}: {hint}\n"
    assert (
        new.err == f"error: cannot write to {disk.inside / 'another'}: Read-only file system; choose another folder\n"
    )


@pytest.mark.fault(17)
def test_a_read_only_disk_is_told_before_the_model_is_touched(small: Line, tmp_path: Path) -> None:
    """By the call that fails on one."""

    def refuse(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "make_folder", refuse)
        patch.setattr("harvest.llm.model.probe", lambda *_: pytest.fail("the model was touched"))
        refused(command(*small(tmp_path / "cache")), "cannot write to", "Read-only file system")


ENDLESS = """
import torch
import harvest.llm.model

visit = harvest.llm.model.Model.visit

def too_large(self, ids, positions, take):
    visit(self, ids, positions, take)
    torch.empty(2**60 if {after} else 1)

harvest.llm.model.Model.visit = too_large
"""


@pytest.mark.fault(16)
def test_memory_that_a_pass_cannot_have_is_one_line(tiny: Harvest, tmp_path: Path) -> None:
    program = f"{ENDLESS.format(after=True)}\nfrom harvest.cli import main\nmain()"
    line = [sys.executable, "-c", program, *map(str, tiny.first(tmp_path / "cache"))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: a single window of 32 tokens does not fit on the device")
    assert tiny.wrong(tmp_path / "cache") is None


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    "at", [pytest.param(3, marks=pytest.mark.exhaustive), 9, pytest.param(15, marks=pytest.mark.exhaustive)]
)
def test_the_kernels_kill_for_memory_during_a_pass_is_like_any_other(harvesting: Bench, at: int) -> None:
    """It is SIGKILL to all threads; at the log's row of a block, while passes of the next ones run."""
    where = harvesting.where
    fault = Fault(folder=str(where), kinds="w", match="/c/", at=at, value=signal.SIGKILL)
    assert harvesting.server.run(*harvesting.case.first(where), fault=fault).code == -signal.SIGKILL
    assert harvesting.case.wrong(where) is None
    harvesting.ends_the_same(where)
