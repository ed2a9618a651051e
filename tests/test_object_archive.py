"""`pack` and `unpack` from and to object storage: the bytes are those of local folders, whatever requests meet."""

import json
import os
from itertools import count
from pathlib import Path

import pytest

from harvest.commands.describe import verify
from shared.files import lease, object_store
from shared.files.lease import Lease
from shared.files.object_store import Objects
from shared.store.layout import ARRAYS, PACKED, STORE
from shared.store.store import Store
from tests.llms import command, contents
from tests.object_server import Bucket
from tests.stores import SyntheticStore

SHARD = f"{ARRAYS}/strata/004-016/source/c/3/0"


@pytest.fixture(scope="module")
def packed(pristine: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store packed locally."""
    target = tmp_path_factory.mktemp("packed") / "packed"
    assert command("pack", pristine.path, target).code == 0
    return target


@pytest.fixture
def there(bucket: Bucket, pristine: SyntheticStore) -> str:
    return bucket.upload(pristine.path, "cache/store")


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 6.0)


def at(bucket: Bucket, name: str) -> dict[str, bytes]:
    """Every object of a store, by path below it."""
    return {path.removeprefix(f"{name}/"): data for path, data in bucket.contents(name).items()}


@pytest.mark.fault(64)
def test_from_and_to_objects_the_bytes_are_those_of_local_folders(
    there: str, bucket: Bucket, pristine: SyntheticStore, packed: Path, tmp_path: Path
) -> None:
    """Also when some requests are answered with an error although they were done."""
    bucket.proxy.strike("lost", range(3, 300, 19))
    raw, away = contents(pristine.path), f"{bucket.address}/cache/packed"
    done = command("pack", there, away)
    assert (done.code, done.out) == (0, f"{away}\n"), done.err
    assert at(bucket, "cache/packed") == contents(packed)
    assert command("unpack", away, f"{bucket.address}/cache/again").code == 0
    assert at(bucket, "cache/again") == raw
    told = json.loads(command("unpack", away, tmp_path / "again", "--json").out)
    assert told == {"path": str(tmp_path / "again"), "shard_bytes": told["shard_bytes"]}
    assert contents(tmp_path / "again") == raw
    told = json.loads(command("pack", pristine.path, f"{bucket.address}/up", "--json").out)
    assert told["path"] == f"{bucket.address}/up" and told["packed_shard_bytes"] < told["shard_bytes"]
    assert at(bucket, "up") == contents(packed)
    assert not [name for name in bucket.contents() if name.endswith(".lock")]


@pytest.mark.fault(64)
def test_a_record_is_there_only_after_what_it_names(bucket: Bucket, pristine: SyntheticStore) -> None:
    assert command("pack", pristine.path, f"{bucket.address}/packed").code == 0
    puts = [one.split("/packed/")[1] for one in bucket.proxy.requests if one.startswith("PUT") and "/packed/" in one]
    shards = [number for number, name in enumerate(puts) if "/c/" in name]
    assert puts[0] == "unfinished.json" and puts[-1] == STORE and puts.count(STORE) == 1
    records = [number for number, name in enumerate(puts) if name.endswith(".json") and number]
    assert max(shards) < min(records) and PACKED in puts


@pytest.mark.fault(64)
def test_a_service_that_stops_answering_leaves_no_store_and_the_same_command_finishes(
    bucket: Bucket, pristine: SyntheticStore, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("pack", pristine.path, f"{bucket.address}/packed")
    with monkeypatch.context() as patch:
        patch.setattr(object_store, "ANSWER_SECONDS", 1)
        patch.setattr(object_store, "DEADLINE_SECONDS", 1)
        bucket.proxy.strike("500", what="/target/c/2/0")
        assert command(*line).code == 3
    bucket.proxy.strike(None)
    left = at(bucket, "packed")
    assert "unfinished.json" in left and PACKED not in left and STORE not in left
    assert command("info", line[2]).code == 2
    (listed,) = json.loads(command("ls", "--cache", bucket.address, "--json").out)["stores"]
    assert (listed["name"], listed["state"]) == ("packed", "unfinished pack")
    copy = Path(bucket.address) / "copy"
    for name, data in left.items():
        bucket.put(f"copy/{name}", data)
    assert command("rm", copy, "--yes").code == 0 and not at(bucket, "copy")
    other = command("unpack", packed, line[2])
    assert other.code == 2 and "left unfinished by another store" in other.err and at(bucket, "packed") == left
    assert command(*line).code == 0
    assert at(bucket, "packed") == contents(packed)


@pytest.mark.fault(64)
def test_two_do_not_write_one_store(bucket: Bucket, pristine: SyntheticStore, short_leases: None) -> None:
    with Lease(Objects(bucket.address), "packed.lock", "store packed"):
        refused = command("pack", pristine.path, f"{bucket.address}/packed")
    assert refused.code == 2 and "is locked: process" in refused.err.splitlines()[-1]
    assert bucket.contents() == {}


@pytest.mark.fault(64)
def test_a_pack_that_loses_its_lease_writes_nothing_more(
    bucket: Bucket, pristine: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = count()
    monkeypatch.setattr(Lease, "_is_ours", lambda self: next(asked) < 12)
    done = command("pack", pristine.path, f"{bucket.address}/packed")
    assert done.code == 3 and "its lease was lost" in done.err
    assert len(at(bucket, "packed")) == 12 and STORE not in at(bucket, "packed")


@pytest.mark.fault(64)
def test_damaged_objects_are_not_packed(bucket: Bucket, there: str, tmp_path: Path) -> None:
    data = bytearray(bucket.get(f"cache/store/{SHARD}"))
    data[40] ^= 1
    bucket.put(f"cache/store/{SHARD}", bytes(data))
    done = command("pack", there, tmp_path / "out")
    assert done.code == 1 and f"{there}/{SHARD}: crc32c" in done.err and f"harvest repair {there}" in done.err
    assert not (tmp_path / "out" / STORE).exists()


@pytest.mark.fault(64)
def test_damaged_side_files_and_records_are_found_although_a_training_run_has_whole_copies(
    bucket: Bucket, there: str, tmp_path: Path
) -> None:
    """`pack` copies no damaged file, and `verify` opens the store as it is there; both work once it is mended."""
    reading = Store.open(there)
    assert reading.objects is not None
    moments, metadata = "ledger/000001.moments.safetensors", f"{ARRAYS}/strata/004-016/source/zarr.json"
    whole = {name: bucket.get(f"cache/store/{name}") for name in (moments, metadata)}
    bucket.put(f"cache/store/{moments}", whole[moments][:-1] + bytes([whole[moments][-1] ^ 1]))
    done = command("pack", there, tmp_path / "out")
    assert done.code == 1 and f"{there}/{moments}: crc32c" in done.err and f"harvest repair {there}" in done.err
    bucket.put(f"cache/store/{moments}", whole[moments])
    bucket.put(f"cache/store/{metadata}", b"{}")
    verified = command("verify", there)
    assert verified.code == 1 and verified.out.startswith(f".: {there}/{metadata}: "), verified.out
    assert command("info", there).code == command("pack", there, tmp_path / "out").code == 1
    bucket.put(f"cache/store/{metadata}", whole[metadata])
    (reading.objects.mirror / metadata).write_bytes(b"{}")  # as a copy of before a repair
    (reading.objects.mirror / moments).write_bytes(b"")
    for line in (("verify", there), ("info", there), ("pack", there, tmp_path / "out")):
        assert command(*line).code == 0
    assert not list(tmp_path.glob("opened-objects-*"))


def test_a_verify_leaves_no_lock_open_and_removes_what_a_killed_one_left(there: str, tmp_path: Path) -> None:
    litter = tmp_path / "opened-objects-killed"
    litter.mkdir()
    litter.with_name(f"{litter.name}.lock").touch()
    assert verify(Path(there)).faults == {}
    open_files = [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]
    assert not [name for name in open_files if "-objects-" in name and str(tmp_path) in name]
    assert not list(tmp_path.glob("*-objects-*"))


def test_what_cannot_be_written_is_said(bucket: Bucket, there: str, packed: Path) -> None:
    bucket.put("mine/thesis.txt", b"years of work")
    before = bucket.contents()
    for line, cause in (
        (("pack", there, f"{bucket.address}/mine"), "exists; choose another address"),
        (("pack", there, there), "exists; choose another address"),
        (("pack", there, f"{there}/inside"), "lies inside the store"),
        (("pack", there, bucket.address), "is a whole bucket; name the store in it"),
        (("repair", bucket.address), "is a whole bucket; name the store in it"),
        (("rm", bucket.address, "--yes"), "is a whole bucket; name the store in it"),
        (("pack", there, "gcs://bucket/packed"), "gcs:// is no address that is known; use s3://, gs://"),
        (("unpack", there, f"{bucket.address}/new"), "is not packed"),
        (("pack", packed, f"{bucket.address}/new"), "is packed already"),
    ):
        done = command(*line)
        assert done.code == 2 and cause in done.err.splitlines()[-1], done.err
    assert bucket.contents() == before
