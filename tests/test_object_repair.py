"""`repair` and `verify --against-model` in object storage: the objects are those of before the damage."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from shared.files import lease
from shared.files.lease import Lease
from shared.files.object_store import Objects
from shared.store.layout import ARRAYS, STORE
from shared.store.store import Store
from tests.imported_rows import imported, pairs, write_npy
from tests.llms import command, contents
from tests.object_server import Bucket

SHARD = f"{ARRAYS}/strata/004-016/source/c/3/0"
TOKENS = f"{ARRAYS}/tokens/c/1/0"


def at(bucket: Bucket) -> dict[str, bytes]:
    """Every object of the store, by path below it."""
    return {path.removeprefix("cache/store/"): data for path, data in bucket.contents("cache/store").items()}


def flip(bucket: Bucket, name: str) -> None:
    data = bytearray(bucket.get(f"cache/store/{name}"))
    data[77] ^= 1
    bucket.put(f"cache/store/{name}", bytes(data))


def remove(bucket: Bucket, *names: str) -> None:
    Objects(f"{bucket.address}/cache/store").delete(names)


@pytest.fixture
def there(bucket: Bucket, finished: Path) -> str:
    return bucket.upload(finished, "cache/store")


@pytest.fixture
def line(there: str, model: Path, text: Path) -> tuple[object, ...]:
    return "repair", there, "--model", model, "--text", text


def harm_blocks(bucket: Bucket) -> None:
    """A flipped bit, a file that is cut short, and a record that is lost with a shard file."""
    flip(bucket, SHARD)
    bucket.put(f"cache/store/{SHARD.replace('/3/', '/1/')}", b"short")
    remove(bucket, SHARD.replace("/3/", "/2/"), "ledger/000002.json")


def harm_others(bucket: Bucket) -> None:
    flip(bucket, TOKENS)
    remove(bucket, "plan.json", f"{ARRAYS}/strata/004-016/zarr.json", "unembedding.safetensors")


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    ("harm", "named"),
    [(harm_blocks, "blocks 1, 2, 3"), (harm_others, "tokens/c/1/0; plan.json; unembedding.safetensors")],
)
def test_what_is_damaged_is_made_again_and_nothing_else(
    line: tuple[object, ...],
    bucket: Bucket,
    finished: Path,
    tmp_path: Path,
    harm: Callable[[Bucket], None],
    named: str,
) -> None:
    harm(bucket)
    assert len(json.loads(command("verify", line[1], "--json").out)["faults"]) == 3
    bucket.proxy.requests.clear()
    done = command(*line)
    assert (done.code, done.out) == (0, f"made again: {named}\n"), done.err
    assert at(bucket) == contents(finished)
    rows = [one for one in bucket.proxy.requests if one.startswith("PUT") and "/strata/" in one and "/c/" in one]
    assert {one.split("/c/")[1][0] for one in rows} == set("123" if harm is harm_blocks else "")
    assert not [name for name in bucket.contents() if name.endswith(".lock")]
    assert not list(tmp_path.glob("harvested-objects-*"))
    bucket.proxy.requests.clear()
    assert json.loads(command(*line, "--json").out) == {"blocks": [], "token_files": [], "others": []}
    assert not [one for one in bucket.proxy.requests if one.startswith("PUT") and ".lock" not in one]


@pytest.mark.fault(64)
def test_a_store_that_does_not_open_is_repaired_although_a_training_run_has_whole_copies(
    line: tuple[object, ...], bucket: Bucket, finished: Path
) -> None:
    assert Store.open(str(line[1])).objects
    bucket.put(f"cache/store/{ARRAYS}/strata/004-016/source/zarr.json", b"{}")
    done = command(*line)
    assert done.code == 0 and done.out.startswith("made again"), done.err
    assert at(bucket) == contents(finished)


@pytest.mark.fault(64)
def test_a_repair_that_cannot_begin_changes_nothing(
    line: tuple[object, ...], bucket: Bucket, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a store that another process writes, that is packed, or that is not there."""
    monkeypatch.setattr(lease, "SECONDS", 6.0)
    flip(bucket, SHARD)
    before = bucket.contents()
    with Lease(Objects(f"{bucket.address}/cache"), "store.lock", "the store"):
        refused = command(*line)
    assert refused.code == 2 and "is locked: process" in refused.err.splitlines()[-1]
    assert bucket.contents() == before
    assert command("pack", finished, tmp_path / "packed").code == 0
    packed = bucket.upload(tmp_path / "packed", "packed")
    for place, cause in ((packed, f"{packed} is a packed store"), (f"{bucket.address}/none", "no store at s3://")):
        refused = command("repair", place, *line[2:])
        assert refused.code == 2 and cause in refused.err.splitlines()[-1], refused.err
        assert "--store" not in refused.err


@pytest.mark.fault(64)
def test_a_repair_that_loses_its_lease_commits_nothing_more_and_another_finishes(
    line: tuple[object, ...], bucket: Bucket, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 3.0)
    remove(bucket, SHARD, "ledger/000003.json")
    with monkeypatch.context() as patch:
        asked = count()
        patch.setattr(Lease, "_is_ours", lambda self: next(asked) < 2)
        done = command(*line)
    assert done.code == 3 and "its lease was lost" in done.err
    assert "ledger/000003.json" not in at(bucket) and STORE in at(bucket)
    bucket.put("cache/store.lock", b"{}")  # of a process that nobody knows
    assert command(*line).code == 0
    assert at(bucket) == contents(finished)


@pytest.mark.fault(64)
def test_an_imported_store_is_repaired_from_its_files(bucket: Bucket, tmp_path: Path) -> None:
    folder = write_npy(tmp_path / "rows", pairs())
    before = imported(folder, tmp_path / "cache").store
    address = bucket.upload(before, "cache/store")
    flip(bucket, SHARD)
    flip(bucket, TOKENS)
    refused = command("repair", address)
    assert refused.code == 2 and f"harvest repair {address} --from PATH" in refused.err
    assert command("repair", address, "--from", folder).code == 0
    assert at(bucket) == contents(before)


def test_rows_are_compared_with_the_models(there: str, model: Path, finished: Path, tmp_path: Path) -> None:
    """The same rows as of the local store, and of it packed."""
    assert command("pack", finished, tmp_path / "packed").code == 0
    said = []
    for place in (finished, there, tmp_path / "packed"):
        done = command("verify", place, "--against-model", 20, "--model", model, "--json")
        assert done.code == 0, done.err
        said.append(json.loads(done.out)["against_model"])
    assert said[0]["rows"] == said[0]["equal"] == 20 and said[0] == said[1] == said[2]
