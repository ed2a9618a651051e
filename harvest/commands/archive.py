"""`pack` and `unpack`: a store with compressed chunks, and back, bit for bit."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar

from harvest.commands.archive_target import AT_ONCE, Target, writing
from harvest.commands.describe import open_records
from shared.console.progress import Progress
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.object_store import is_address
from shared.store.arrays import ArraySpec, group_metadata
from shared.store.checks import buffers_record, fault, read_ledger
from shared.store.layout import ARRAYS, PACKED, PLAN, REQUEST, STORE, FileRecord, moments_path, record_path
from shared.store.packed import PackedRecord, pack_shard, packed_metadata, unpack_shard
from shared.store.store import Store

Shard = tuple[str, ArraySpec]
Item = TypeVar("Item")


def pack(path: Path, target: Path, *, force: bool = False) -> tuple[int, int]:
    """Write the store at `path` as a packed one at `target`; returns the bytes of shard files before and after.

    `path` and `target` are folders or addresses of objects. Shard files go through memory, a few at once.
    Raises `UserError` when `target` holds something else, `CorruptData` on a shard that is not what was written, and of
    objects what `Objects` raises. A rerun after a kill finishes.
    """
    with open_records(path) as store:
        if store.packed:
            raise UserError(f"{store.shown} is packed already")
        return _pack(store, target, force)


def _pack(store: Store, target: Path, force: bool) -> tuple[int, int]:
    raw, size = _raw_records(store), store.shard_bytes
    with store.reading(), _writing(store, target, force) as (out, ledger):
        files: dict[str, FileRecord] = {}

        def one(shard: Shard) -> int:
            name, spec = shard
            packed = pack_shard(spec, fetch_shard(store, name, raw[name]))
            out.put(f"{ARRAYS}/{name}", packed)
            files[name] = buffers_record([packed])
            return spec.shard_bytes

        for_each("pack", _shards(store), size, one, _workers(store, target))
        blocks = store.record.blocks
        metadata = {spec.path: packed_metadata(spec, blocks) for spec in store.arrays()}
        record = PackedRecord(files=dict(sorted(files.items())), unpacked_bytes=size)
        more = {PACKED: durable.json_bytes(record.model_dump(mode="json"))}
        _finish(store, out, metadata, ledger | more)
    return size, sum(file.bytes for file in files.values())


def unpack(path: Path, target: Path, *, force: bool = False) -> int:
    """Write the packed store at `path` as it was before at `target`; returns its shard files' bytes.

    Takes and raises what `pack` does.
    """
    with open_records(path) as store:
        if not store.packed:
            raise UserError(f"{store.shown} is not packed: it has no {PACKED}")
        return _unpack(store, store.packed.files, target, force)


def _unpack(store: Store, packed: Mapping[str, FileRecord], target: Path, force: bool) -> int:
    raw, size = _raw_records(store), store.shard_bytes
    with store.reading(), _writing(store, target, force) as (out, ledger):

        def one(shard: Shard) -> int:
            name, spec = shard
            source = f"{store.shown}/{ARRAYS}/{name}"
            data = unpack_shard(spec, fetch_shard(store, name, packed[name]), source)
            if buffers_record([data]) != raw[name]:
                raise CorruptData(f"{source}: it does not unpack to what the store's records say; take another copy")
            out.put(f"{ARRAYS}/{name}", data)
            return spec.shard_bytes

        for_each("unpack", _shards(store), size, one, _workers(store, target))
        metadata = {spec.path: spec.metadata(store.record.blocks) for spec in store.arrays()}
        _finish(store, out, metadata, ledger)
    return size


def fetch_shard(store: Store, name: str, record: FileRecord) -> bytes:
    """Return a shard file, by its path below the Zarr root. Raises `CorruptData` when it is not as its record says."""
    if store.objects:
        data, wrong = store.objects.get_whole(f"{ARRAYS}/{name}", record)
    else:
        file = store.path / ARRAYS / name
        wrong = fault(file, record)
        data = b"" if wrong else file.read_bytes()
    if wrong:
        raise CorruptData(f"{store.shown}/{ARRAYS}/{name}: {wrong}; {store.remedy}")
    return data


def side_files(store: Store) -> dict[str, FileRecord]:
    """Return the record of each file that both forms of a store have, by path below the store.

    Statistics, the tokenizer, the unembedding and what is known of each block, but no records.
    """
    blocks = range(store.record.blocks)
    return store.record.files | {moments_path(block): read_ledger(store.path, block).moments for block in blocks}


def require_whole(store: Store, name: str, record: FileRecord) -> Path:
    """Return where a side file is. Raises `CorruptData` when it is not as its record says."""
    if wrong := fault(store.path / name, record):
        raise CorruptData(f"{store.shown}/{name}: {wrong}; {store.remedy}")
    return store.path / name


@contextmanager
def _writing(store: Store, place: Path, force: bool) -> Iterator[tuple[Target, dict[str, bytes]]]:
    """Hold the place that is written, with the files that are the same in both forms of a store.

    They come first: an extension that finishes meanwhile removes the statistics. Also gives the ledger's records, as
    they were at that time: those are written last.
    """
    blocks, record, copied = range(store.record.blocks), store.record, side_files(store)
    what = durable.json_bytes({"packed": not store.packed, "store": record.model_dump(mode="json")})

    def needed() -> int:
        return store.shard_bytes + sum(file.bytes for file in copied.values())

    def copy(name: str) -> None:
        target.copy(name, require_whole(store, name, copied[name]))

    with writing(store, place, what, None if force else needed) as target:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(copy, sorted(copied)))
        yield target, {record_path(block): (store.path / record_path(block)).read_bytes() for block in blocks}


def _finish(store: Store, target: Target, metadata: Mapping[str, object], more: Mapping[str, bytes]) -> None:
    """Write the records, and those that differ between the two forms; `store.json` last: without it there is no store.

    Only what the record that was opened names: the store may be extended meanwhile.
    """
    record = store.record
    groups = ["", "strata", *(f"strata/{stratum.name}" for stratum in record.plan.stored_strata)]
    values: dict[str, object] = {f"{ARRAYS}/{group}/zarr.json".replace("//", "/"): group_metadata() for group in groups}
    values |= {f"{ARRAYS}/{array}/zarr.json": value for array, value in metadata.items()}
    values |= {REQUEST: record.request.model_dump(mode="json"), PLAN: record.plan.model_dump(mode="json")}
    target.commit({name: durable.json_bytes(value) for name, value in values.items()} | dict(more))
    target.commit({STORE: durable.json_bytes(record.model_dump(mode="json"))})


def for_each(
    name: str, items: Sequence[Item], size: int, one: Callable[[Item], int], workers: int | None = None
) -> None:
    """Call `one`, which returns the bytes it dealt with, for every item; shows progress to `size`.

    `workers`: threads, by default one for each core, but no more than `AT_ONCE`.
    """
    lock, done = Lock(), 0
    with ThreadPoolExecutor(workers or min(AT_ONCE, os.cpu_count() or 1)) as pool, Progress(name, size, "bytes") as bar:

        def counted(item: Item) -> None:
            nonlocal done
            count = one(item)
            with lock:
                done += count
                bar.update(done)

        futures = [pool.submit(counted, item) for item in items]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _workers(store: Store, target: Path) -> int | None:
    """Return how many shard files are dealt with at once: from and to objects, more than there are cores."""
    return AT_ONCE if store.objects or is_address(target) else None


def _shards(store: Store) -> list[Shard]:
    blocks = store.record.blocks
    return [(spec.shard_path(n), spec) for spec in store.arrays() for n in range(blocks * spec.shards_per_block)]


def _raw_records(store: Store) -> dict[str, FileRecord]:
    """Return the record of every raw shard file, by path below the Zarr root."""
    files = dict(store.record.plan.token_files)
    for block in range(store.record.blocks):
        files |= read_ledger(store.path, block).files
    return files
