"""A store in object storage is read as a local one: same rows, same training, whatever requests meet."""

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from obstore.exceptions import GenericError
from obstore.store import LocalStore

from harvest.commands.recompute import random_places
from harvest.run.object_cache import is_finished
from shared.errors import CorruptData, Stopped, UserError
from shared.files import object_store
from shared.files.disk_usage import size_of
from shared.files.object_store import Objects, Taken, address, is_address, local_folder
from shared.store import object_rows, piece_folder
from shared.store.layout import ARRAYS
from shared.store.reader import RowsConfig
from shared.store.store import Local, Store
from tests.llms import command as harvest
from tests.llms import contents
from tests.object_server import Bucket, Fault
from tests.runs import SMALL, Outcome, assert_same_run
from tests.stores import SyntheticStore
from train.data.batches import batches

SHARD = f"{ARRAYS}/strata/004-016/source/c/3/0"


@pytest.fixture
def there(bucket: Bucket, pristine: SyntheticStore) -> str:
    return bucket.upload(pristine.path, "cache/store")


@pytest.fixture
def by_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shard file is small enough to be fetched whole."""
    monkeypatch.setattr(object_rows, "WHOLE_BYTES", 0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are given up early."""
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(object_store, "DEADLINE_SECONDS", 3)


def assert_same_rows(store: Store, pristine: SyntheticStore) -> None:
    """Runs of every array, within and across shard files."""
    for name, expected in pristine.arrays.items():
        path = name.split("/")
        array = getattr(store.strata[path[1]], path[2]) if path[0] == "strata" else getattr(store, name)
        runs = [(3, 9), (len(expected) - 5, len(expected)), (len(expected) // 2 - 2, len(expected) // 2 + 2)]
        out = np.empty_like(expected[:15])
        array.gather(runs, out)
        assert (out == np.concatenate([expected[low:high] for low, high in runs])).all(), name


@pytest.mark.parametrize("whole", [True, False])
def test_rows_are_those_of_the_local_store(
    there: str, pristine: SyntheticStore, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        monkeypatch.setattr(object_rows, "WHOLE_BYTES", 0)
    store = Store.open(there)
    assert_same_rows(store, pristine)
    assert address(store.place) == there
    assert (
        store.strata["004-016"].source.shard(1) == Store.open(pristine.path).strata["004-016"].source.shard(1)
    ).all()


def test_of_a_store_that_is_larger_than_the_folder_the_rows_asked_for_are_fetched_near_ones_together(
    there: str,
    bucket: Bucket,
    pristine: SyntheticStore,
    tmp_path: Path,
    by_ranges: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of rows 3:9, 12:15 and 24:30, with a gap of three rows allowed, 3:15 and 24:30 are."""
    store = Store.open(there)
    assert store.objects
    records = size_of(store.objects.mirror)
    bounded = Store.open(there, Local(folder=tmp_path / "other", bytes=records + 8192))
    array, expected = bounded.strata["004-016"].source, pristine.arrays["strata/004-016/source"]
    assert bounded.objects and array.spec.rows_per_shard >= 30
    monkeypatch.setattr(object_rows, "GAP_BYTES", 3 * array.spec.row_bytes)
    runs, out = [(3, 9), (12, 15), (24, 30)], np.empty((15, array.spec.width or 1), array.spec.dtype)
    before = len(bucket.proxy.requests)
    array.will_need(runs)
    array.gather(runs, out)
    assert (out == np.concatenate([expected[low:high] for low, high in runs])).all()
    assert bounded.objects.fetched == 18 * array.spec.row_bytes
    assert len(bucket.proxy.requests) == before + 2


def test_packed_stores_are_read_there_too(bucket: Bucket, pristine: SyntheticStore, tmp_path: Path) -> None:
    assert harvest("pack", pristine.path, tmp_path / "packed").code == 0
    store = Store.open(bucket.upload(tmp_path / "packed", "packed"))
    assert_same_rows(store, pristine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_rows, "WHOLE_BYTES", 0)
        assert_same_rows(Store.open(f"{bucket.address}/packed", Local(folder=tmp_path / "new")), pristine)


@pytest.mark.fault(61)
@pytest.mark.parametrize("bound", [None, 60_000])
def test_training_gives_the_same_bytes_and_the_folder_keeps_its_bound(
    there: str,
    pristine: SyntheticStore,
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_ranges: None,
    bound: int | None,
) -> None:
    sizes: list[int] = []
    add = piece_folder.PieceFolder.add

    def measured(folder: piece_folder.PieceFolder, piece: str, data: bytes) -> None:
        add(folder, piece, data)
        sizes.append(sum(-(-path.stat().st_size // 4096) * 4096 for path in folder._folder.iterdir()))

    monkeypatch.setattr(piece_folder.PieceFolder, "add", measured)
    line = ("run", "--runs", tmp_path / "runs", "--steps", 4, *SMALL)
    here = command(*line, "--store", pristine.path, "--name", "here")
    most = size_of(pristine.path) if bound else 0
    local = ("--local-bytes", most + bound) if bound else ()
    away = command(*line, "--store", there, "--name", "away", *local)
    assert (here.code, away.code) == (0, 0), away.err
    assert_same_run(here.path, away.path)
    assert json.loads((away.path / "timing.jsonl").read_text().splitlines()[-1])["data_wait"] >= 0
    assert sizes and (not bound or max(sizes) <= most + bound)
    assert command("evaluate", away.path).code == 0  # the run knows where its store is


@pytest.mark.fault(61)
@pytest.mark.parametrize("fault", ["500", "cut", "silent"])
def test_requests_that_fail_are_made_again(
    there: str, bucket: Bucket, pristine: SyntheticStore, quick: None, fault: Fault
) -> None:
    bucket.proxy.strike(fault, range(0, 400, 40))
    assert_same_rows(Store.open(there), pristine)
    assert len(bucket.proxy.requests) > 40


@pytest.mark.fault(61)
@pytest.mark.parametrize("fault", ["500", "silent"])
def test_a_service_that_does_not_answer_is_an_error_that_names_it(
    there: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(object_store, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(object_store, "DEADLINE_SECONDS", 1)
    store = Store.open(there)
    bucket.proxy.strike(fault)
    with pytest.raises(Stopped, match=rf"{there}/\S+: no good answer within 1 s .*check the network"):
        store.strata["004-016"].source.shard(0)


@pytest.mark.fault(61)
def test_damaged_objects_are_found_on_arrival(
    there: str, bucket: Bucket, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    data = bytearray(bucket.get(f"cache/store/{SHARD}"))
    data[40] ^= 1
    bucket.put(f"cache/store/{SHARD}", bytes(data))
    with pytest.raises(CorruptData, match=rf"{there}/{SHARD}: crc32c"):
        Store.open(there).strata["004-016"].source.shard(3)
    verified = harvest("verify", there)
    assert verified.code == 1 and verified.out.startswith(f"{SHARD}: crc32c")
    trained = command("run", "--store", there, "--runs", tmp_path / "runs", "--steps", 2, *SMALL)
    assert trained.code == 1 and f"{there}/{SHARD}: crc32c" in trained.err
    bucket.put(f"cache/store/{SHARD}", bytes(data[:-1]))
    with pytest.raises(CorruptData, match=rf"{there}/{SHARD}: [\d,]+ bytes, expected"):
        Store.open(there)


def test_readers_of_one_machine_share_what_is_fetched(there: str, pristine: SyntheticStore) -> None:
    first, second = Store.open(there), Store.open(there)
    assert_same_rows(first, pristine)
    assert_same_rows(second, pristine)
    assert first.objects and second.objects
    assert first.objects.folder == second.objects.folder
    assert first.objects.fetched > 0 == second.objects.fetched


def test_rows_are_asked_for_ahead_and_none_after_the_last_step(
    there: str, bucket: Bucket, by_ranges: None, tmp_path: Path
) -> None:
    store = Store.open(there, Local(folder=tmp_path / "ahead"))
    found: Iterator[object] = batches(store, 2, rows=RowsConfig(batch_rows=16))
    list(found)
    before = len(bucket.proxy.requests)
    list(batches(store, 2, rows=RowsConfig(batch_rows=16)))
    assert len(bucket.proxy.requests) == before  # all rows are there, and files are checked once


def test_what_is_asked_for_ahead_is_fetched_although_another_reader_ends(
    there: str, by_ranges: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of an evaluation does in the middle of a training."""
    store = Store.open(there, Local(folder=tmp_path / "two"))
    assert store.objects
    objects, answer = store.objects, threading.Event()
    get = objects.objects.get_range
    monkeypatch.setattr(objects.objects, "get_range", lambda *given: answer.wait(20) and get(*given))
    monkeypatch.setattr(objects, "_pool", ThreadPoolExecutor(1))
    array = store.strata["004-016"].source
    pieces = [piece for shard in range(4) for piece in objects.pieces(array.spec, shard, 0, 8)]
    objects.start()
    objects.start()
    objects.fetch_ahead(pieces)
    objects.stop()
    assert len(objects._coming) == len(pieces) > 1
    objects.stop()
    assert len(objects._coming) == 1  # the one that is on its way
    answer.set()
    objects.fetch_ahead(pieces)
    objects.read([(piece, 0, memoryview(bytearray(8))) for piece in pieces])
    assert all(objects._folder.has(piece.name) for piece in pieces)


def test_what_cannot_be_read_is_said(
    bucket: Bucket, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no name is that of a store in the cache
    with pytest.raises(UserError, match="no finished store at s3://.*/nothing: it has no store.json, nor anything"):
        Store.open(f"{bucket.address}/nothing")
    with pytest.raises(UserError, match="there is no such bucket"):
        Store.open("s3://no-such-bucket-anywhere/store")
    bucket.proxy.strike("403")
    for asks in (Objects(there).sizes, lambda: Objects(there).get("store.json"), lambda: Store.open(there)):
        with pytest.raises(
            UserError, match=r"access is refused \(403 InvalidAccessKeyId\); check .* \(AWS_ACCESS_KEY_ID"
        ):
            asks()
    bucket.proxy.strike(None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "obstore.store", None)
        with pytest.raises(UserError, match=r"needs obstore: pip install 'transcoder-cache\[objects\]'"):
            Store.open(there)


def test_what_the_environment_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
        monkeypatch.delenv(name)
    refused = harvest("info", "az://container/store")
    assert refused.code == 2 and "az://container/store cannot be reached: " in refused.err, refused.err
    assert "Account must be specified" in refused.err and len(refused.err.splitlines()) == 1
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    refused = harvest("info", "s3://bucket/store")
    assert refused.code == 2 and "AWS_ENDPOINT_URL is localhost:9000, and must begin with http://" in refused.err


@pytest.mark.fault(61)
def test_an_object_that_was_removed_meanwhile_is_named_in_one_line(
    there: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading its rows is an error that names it, and `verify` goes on to the other files."""
    store, wanted = Store.open(there, Local(folder=tmp_path / "rows")), f"cache/store/{SHARD}"
    listed = Objects.sizes
    Objects(bucket.address).delete([wanted])
    with pytest.raises(CorruptData, match=f"{there}/{SHARD} is missing; copy the store there again"):
        store.strata["004-016"].source.shard(3)
    monkeypatch.setattr(Objects, "sizes", lambda self: listed(self) | {SHARD: store.bytes_of(SHARD)})
    done = harvest("verify", there)
    assert done.code == 1 and done.out == f"{SHARD}: missing\n", done.err
    with pytest.raises(FileNotFoundError, match="there is no such object"):
        Objects(there).get(SHARD)


def test_a_full_disk_hides_no_store_of_which_no_row_is_read(
    there: str, bucket: Bucket, pristine: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harvest knows that it is finished, and any other trouble than that it is not there is told."""
    monkeypatch.setattr("shared.files.durable.free_bytes", lambda _: 0)
    assert harvest("info", there).code == 0
    request, blocks = pristine.record.request, len(pristine.record.training_blocks)
    assert is_finished(Path(there), request, blocks)
    assert not is_finished(Path(there), request, blocks + 1)
    assert not is_finished(Path(f"{bucket.address}/none"), request, blocks)
    with pytest.raises(UserError, match="there is no such bucket"):
        is_finished(Path("s3://no-such-bucket-anywhere/store"), request, blocks)


def test_a_name_is_looked_for_in_the_cache_in_object_storage(
    there: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRANSCODER_CACHE", f"{bucket.address}/cache")
    assert json.loads(harvest("info", "store", "--json").out)["path"] == there


def test_objects_that_are_not_there_are_removed_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the service says that they are not there, as Azure, Google and a local folder do."""
    monkeypatch.setattr(object_store, "_connect", lambda _: LocalStore(tmp_path))
    objects = Objects("az://box/store")
    for name in ("a", "c", "d"):
        (tmp_path / name).write_bytes(b"1")
    objects.delete(["lost", "a", "b", "c"])
    objects.delete(["lost"])
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    ("text", "raised", "said"),
    [
        (
            "GET x in 2.416ms - Server returned non-2xx status code: 503 Slow Down: <Code>SlowDown</Code>",
            Stopped,
            "503",
        ),
        ("GET x - Server returned non-2xx status code: 416 : <Code>InvalidRange</Code>", CorruptData, "shorter than"),
        (
            "List - Server returned non-2xx status code: 404 : <Code>ContainerNotFound</Code>",
            UserError,
            "no such bucket",
        ),
        ("Bulk delete failed: The specified container does not exist.", UserError, "no such bucket"),
        (
            "List - Server returned non-2xx status code: 403 : <Code>AuthorizationFailure</Code>",
            UserError,
            "is refused",
        ),
        ("PUT - Server returned non-2xx status code: 400 : <Code>InvalidUri</Code>", UserError, r"\(400 InvalidUri\)"),
        (
            "Received redirect without LOCATION, this normally indicates an incorrectly configured region",
            UserError,
            "red",
        ),
        ("PUT - Server returned non-2xx status code: 400 : <Code>RequestTimeout</Code>", Stopped, "400 RequestTimeout"),
        (
            "error sending request: connection refused",
            Stopped,
            r"check the network and the cred.* \(AZURE_STORAGE_ACC",
        ),
    ],
)
def test_an_error_of_the_service_is_told_by_its_kind(
    text: str, raised: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that asking again will not mend is the user's to mend, and the job is not requeued for it."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    objects = Objects("az://box/store")
    with pytest.raises(raised, match=said), objects._explained("name"):
        raise GenericError(text)


def test_large_objects_are_downloaded_in_parts_and_none_to_another_place(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 1000)
    files = {"folder/large": os.urandom(10_500), "small": b"a", "folder/record": os.urandom(2000)}
    for name, data in files.items():
        bucket.put(name, data)
    sizes = {name: len(data) for name, data in files.items()}
    tags = Objects(bucket.address).download(
        {**sizes, "gone": 1}, tmp_path / "here", tagged=lambda name: name == "folder/record"
    )
    assert contents(tmp_path / "here") == files
    assert sum("large" in one for one in bucket.proxy.requests) == 11
    assert tags.keys() == {"folder/record"}
    Objects(bucket.address).replace("folder/record", b"b", tags["folder/record"])
    with pytest.raises(CorruptData, match="'../away' is not the name of a store's file"):
        Objects(bucket.address).download({"../away": 1}, tmp_path / "here")


def test_rows_to_recompute_are_read_together(
    there: str, bucket: Bucket, pristine: SyntheticStore, tmp_path: Path, by_ranges: None
) -> None:
    """Not row by row, which would be thousands of requests one after the other."""
    records = size_of(Path(Store.open(there).path))
    store = Store.open(there, Local(folder=tmp_path / "rows", bytes=records + 8192))
    before = len(bucket.proxy.requests)
    places = random_places(store, 10**6, 0)
    assert len(bucket.proxy.requests) - before < 200 < len(places)
    for place in places[:: len(places) // 20]:
        name = f"strata/{place.stratum}"
        assert place.sequence == pristine.arrays[f"{name}/sequence"][place.row]
        assert place.offset == pristine.arrays[f"{name}/offset"][place.row]


def test_a_store_at_a_file_address_is_the_local_one(pristine: SyntheticStore) -> None:
    store = Store.open(f"file://{pristine.path}")
    assert store.place == pristine.path.resolve() and store.objects is None
    assert [is_address(one) for one in ("s3://b/x", Path("gs://b"), "az:/b/x", "file:///x", "cache", "s3:")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    assert local_folder(Path("file:///a/b")) == Path("/a/b")


def test_info_describes_it(there: str) -> None:
    told = harvest("info", there, "--json")
    assert told.code == 0 and json.loads(told.out)["path"] == there


def test_an_object_is_created_and_replaced_only_as_it_was_seen(bucket: Bucket) -> None:
    objects = Objects(bucket.address)
    first = objects.create("one", b"a")
    assert objects.create("one", b"a") == first  # a request whose answer was lost
    with pytest.raises(Taken):
        objects.create("one", b"b")
    second = objects.replace("one", b"c", first)
    with pytest.raises(Taken):
        objects.replace("one", b"d", first)
    bucket.proxy.strike("lost", [0])
    objects.replace("one", b"e", second)
    assert bucket.get("one") == b"e"
