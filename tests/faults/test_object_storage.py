"""A harvest into object storage, and a training from it, that are killed at their requests, and go on."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.forks import Ended, Forks
from tests.llms import Line, command, contents
from tests.object_server import SETTINGS, Bucket, Fault
from tests.runs import SMALL, assert_same_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    modules = ("harvest.run.runner", "harvest.llm.model", "harvest.text.tokenize", "train.commands")
    with Forks("torch", *modules) as server:
        yield server


class Killing:
    """Runs commands on a bucket, killed at requests."""

    def __init__(self, forks: Forks, bucket: Bucket, folder: Path) -> None:
        self.forks, self.bucket, self.folder = forks, bucket, folder
        bucket.proxy.parent = forks._process.pid

    def run(self, *arguments: object, at: int | str | None = None, fault: Fault = "kill") -> Ended:
        """Run to the end, or to the request `at`, by its number or a part of its text."""
        numbers = None if isinstance(at, str) else [] if at is None else [at]
        self.bucket.proxy.strike(fault, numbers, at if isinstance(at, str) else "")
        env = {**SETTINGS, "AWS_ENDPOINT_URL": self.bucket.proxy.address, "TMPDIR": str(self.folder)}
        return self.forks.run(*arguments, scratch=self.folder / "said", env={**os.environ, **env})

    def requests(self) -> int:
        """Of the last command."""
        return len(self.bucket.proxy.requests)

    def harvest(self, small: Line, finished: Path, points: Iterable[int], fault: Fault) -> list[str]:
        """Kill a harvest at each of `points`, and finish it; returns what was wrong."""
        found = []
        expected = {f"{finished.name}/{name}": data for name, data in contents(finished).items()}
        for point in points:
            below = f"{fault.replace(' ', '-')}-{point}"
            line = ("harvest", *small(Path(f"{self.bucket.address}/{below}")))
            killed = self.run(*line, at=point, fault=fault)
            if killed.code != -9:
                found.append(f"{point}: ended with {killed.code} {killed.err}")
            left = {name.removeprefix(f"{below}/"): data for name, data in self.bucket.contents(below).items()}
            found += [f"{point}: {one}" for one in invalid(left, expected)]
            resumed = self.run(*line)
            left = {name.removeprefix(f"{below}/"): data for name, data in self.bucket.contents(below).items()}
            if resumed.code or left != expected:
                found.append(
                    f"{point}: resumed to {resumed.code} {resumed.err} {sorted(left.keys() ^ expected.keys())}"
                )
        return found


def invalid(left: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """What a reader must not meet: other bytes than those of the finished store, or a record before what it names."""
    fixed = {name: data for name, data in left.items() if not name.endswith((".lock", "zarr.json"))}
    found = [f"{name} has other bytes" for name, data in fixed.items() if expected.get(name) != data]
    for name, data in fixed.items():
        store = name.split("/")[0]
        if "/ledger/" in name and name.endswith(".json"):
            record = json.loads(data)
            files = [*record["files"], *record["tokens"]]
            needed = [f"{store}/activations.zarr/{file}" for file in files] + [
                name.replace("json", "moments.safetensors")
            ]
        elif name.endswith("/store.json"):
            needed = list(expected)
        else:
            continue
        found += [f"{name} is there, and {file} is not" for file in needed if file not in left]
    return found


@pytest.fixture
def killing(forks: Forks, bucket: Bucket, tmp_path: Path) -> Killing:
    return Killing(forks, bucket, tmp_path)


@pytest.mark.fault(60)
def test_a_harvest_into_object_storage_is_the_local_one(small: Line, finished: Path, killing: Killing) -> None:
    """Also when requests fail on the way; it is found again, listed, planned to extend, and removed."""
    cache = Path(f"{killing.bucket.address}/cache")
    killing.bucket.proxy.strike("lost", range(3, 200, 9))
    made = command(*small(cache))
    assert made.code == 0, made.err
    address = f"{killing.bucket.address}/cache/{finished.name}"
    assert made.out == address + "\n"
    there = {name.removeprefix("cache/"): data for name, data in killing.bucket.contents("cache").items()}
    assert there == {f"{finished.name}/{name}": data for name, data in contents(finished).items()}
    assert not list(killing.folder.glob("harvested-objects-*"))
    killing.bucket.proxy.strike(None)
    again = command(*small(cache))
    assert again.code == 0 and not any(one.startswith("PUT") for one in killing.bucket.proxy.requests)
    listed = json.loads(command("ls", "--cache", cache, "--json").out)["stores"]
    assert [(one["name"], one["state"]) for one in listed] == [(finished.name, "complete")]
    planned = json.loads(command("plan", *small(cache)[1:], "--json").out)["stores"]
    assert planned[0]["blocks"] == planned[0]["committed_blocks"] if "committed_blocks" in planned[0] else planned
    removed = command("rm", address, "--yes")
    assert removed.code == 0 and killing.bucket.contents() == {}, removed.err


@pytest.mark.fault(60)
@pytest.mark.parametrize("fault", [pytest.param("kill", marks=pytest.mark.exhaustive), "kill after"])
def test_a_harvest_that_is_killed_at_a_request_ends_the_same(
    small: Line, finished: Path, killing: Killing, fault: Fault
) -> None:
    """While tokens are sent, a block's shard files, a record, the last files, and when the lease is given back."""
    assert killing.run("harvest", *small(Path(f"{killing.bucket.address}/counted"))).code == 0
    last = killing.requests() - 1
    assert killing.harvest(small, finished, (12, 60, 215, last), fault) == []


@pytest.mark.fault(60)
@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
def test_a_harvest_that_is_killed_at_any_request_ends_the_same(small: Line, finished: Path, killing: Killing) -> None:
    assert killing.run("harvest", *small(Path(f"{killing.bucket.address}/all"))).code == 0
    points = range(killing.requests())
    assert killing.harvest(small, finished, points, "kill") == []


def reading(killing: Killing, finished: Path, points: Iterable[int]) -> None:
    """Kill a training at requests for rows, and resume it."""
    address = killing.bucket.upload(finished, "cache/store")
    line = ("train", "run", "--runs", killing.folder / "runs", "--steps", 6, *SMALL)
    line = (*line, "--set", "checkpoint.every=2")
    assert killing.run(*line, "--store", finished, "--name", "here").code == 0
    for point in points:
        name = f"away-{point}"
        killed = killing.run(*line, "--store", address, "--name", name, at=point)
        assert killed.code == -9, killed.err
        run = killing.folder / "runs" / name
        again = (
            ("train", "resume", run) if (run / "config.json").is_file() else (*line, "--store", address, "--name", name)
        )
        resumed = killing.run(*again)
        assert resumed.code == 0, resumed.err
        assert_same_run(killing.folder / "runs" / "here", run)
        assert not list(killing.folder.glob("stored-objects-*"))


@pytest.mark.fault(61)
def test_a_training_that_is_killed_at_a_request_ends_the_same(killing: Killing, finished: Path) -> None:
    reading(killing, finished, (30,))


@pytest.mark.fault(61)
@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
def test_a_training_that_is_killed_at_any_request_ends_the_same(killing: Killing, finished: Path) -> None:
    address = killing.bucket.upload(finished, "counted/store")
    line = ("train", "run", "--runs", killing.folder / "counted", "--steps", 6, *SMALL, "--store", address)
    assert killing.run(*line).code == 0
    reading(killing, finished, range(killing.requests()))


_FAULTS: tuple[Fault, Fault] = ("kill", "kill after")


def archiving(killing: Killing, source: Path, expected: dict[str, bytes], kind: str, every: bool = False) -> list[str]:
    """Kill `pack` or `unpack` into object storage at requests, and finish it; returns what was wrong."""
    found: list[str] = []
    assert killing.run("harvest", kind, source, f"{killing.bucket.address}/counted").code == 0
    count = killing.requests()
    for point in range(count) if every else (count // 2, count - 4, count - 1):
        name, fault = f"{kind}-{point}", _FAULTS[point % 2]
        line = ("harvest", kind, source, f"{killing.bucket.address}/{name}")
        killed = killing.run(*line, at=point, fault=fault)
        if killed.code != -9:
            found.append(f"{point}: ended with {killed.code} {killed.err}")
        left = killing.bucket.contents(name)
        begun = left.pop(f"{name}/unfinished.json", None)
        whole = {f"{name}/{one}": data for one, data in expected.items()}
        found += [f"{point}: {one}" for one in invalid(left, whole)]
        if not begun and left == whole:  # its last request of all gave the lease back
            continue
        resumed = killing.run(*line)
        left = {one.removeprefix(f"{name}/"): data for one, data in killing.bucket.contents(name).items()}
        if resumed.code or left != expected:
            found.append(f"{point}: resumed to {resumed.code} {resumed.err} {sorted(left.keys() ^ expected.keys())}")
    return found


def repairing(killing: Killing, small: Line, finished: Path, points: Iterable[int | str]) -> list[str]:
    """Kill a repair in object storage at requests, and finish it; returns what was wrong."""
    found: list[str] = []
    address = f"{killing.bucket.address}/cache/store"
    line = ("harvest", "repair", address, "--model", small.model)

    for point in points:
        damage(killing, finished)
        killed = killing.run(*line, at=point)
        if killed.code != -9:
            found.append(f"{point}: ended with {killed.code} {killed.err}")
        resumed = killing.run(*line)
        left = {one.removeprefix("cache/store/"): data for one, data in killing.bucket.contents("cache/store").items()}
        if resumed.code or left != contents(finished):
            found.append(f"{point}: resumed to {resumed.code} {resumed.err}")
    return found


SHARD = "activations.zarr/strata/004-016/source/c/3/0"


def damage(killing: Killing, finished: Path) -> None:
    """Put the store there, with a shard file and a record that are not whole."""
    killing.bucket.upload(finished, "cache/store")
    killing.bucket.put(f"cache/store/{SHARD}", b"")
    killing.bucket.put("cache/store/ledger/000001.json", b"{")


@pytest.fixture(scope="module")
def packed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store packed locally."""
    target = tmp_path_factory.mktemp("packed") / "packed"
    assert command("pack", finished, target).code == 0
    return target


@pytest.mark.fault(64)
@pytest.mark.parametrize("kind", ["pack", pytest.param("unpack", marks=pytest.mark.exhaustive)])
def test_a_pack_into_object_storage_that_is_killed_ends_the_same(
    killing: Killing, finished: Path, packed: Path, kind: str
) -> None:
    source, other = (finished, packed) if kind == "pack" else (packed, finished)
    assert archiving(killing, source, contents(other), kind) == []


@pytest.mark.fault(64)
def test_a_repair_in_object_storage_that_is_killed_ends_the_same(killing: Killing, small: Line, finished: Path) -> None:
    """When one block is made again, and of the other some shard files are sent."""
    put = f"PUT /{killing.bucket.address.removeprefix('s3://')}/cache/store/{SHARD}"
    assert repairing(killing, small, finished, [put]) == []


@pytest.mark.fault(64)
@pytest.mark.exhaustive
@pytest.mark.timeout(6 * 3600)
def test_packs_and_repairs_that_are_killed_at_any_request_end_the_same(
    killing: Killing, small: Line, finished: Path, packed: Path
) -> None:
    assert archiving(killing, finished, contents(packed), "pack", every=True) == []
    damage(killing, finished)
    assert killing.run("harvest", "repair", f"{killing.bucket.address}/cache/store", "--model", small.model).code == 0
    assert repairing(killing, small, finished, range(killing.requests())) == []
