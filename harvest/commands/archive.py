"""`pack` and `unpack`: a store with compressed chunks, and back, bit for bit."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TypeVar

from harvest.run.pipeline import lock_store
from shared.console.progress import Progress
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from shared.store.arrays import ArraySpec, group_metadata
from shared.store.checks import buffers_record, fault, read_ledger
from shared.store.layout import ARRAYS, PACKED, PLAN, REQUEST, STORE, FileRecord, moments_path, record_path
from shared.store.packed import PackedRecord, pack_shard, packed_metadata, unpack_shard
from shared.store.store import Store

Shard = tuple[str, ArraySpec]
Item = TypeVar("Item")
_MARKER = "unfinished.json"
_MOST_WORKERS = 8
"""A worker holds a shard of up to 128 MiB a few times over."""


def pack(path: Path, target: Path, *, force: bool = False) -> tuple[int, int]:
    """Write the store at `path` as a packed one at `target`; returns the bytes of shard files before and after.

    Raises `UserError` when `target` holds something else, and `CorruptData` on a shard that is not what was written.
    A rerun after a kill finishes.
    """
    store = Store.open(path)
    if store.packed:
        raise UserError(f"{path} is packed already")
    raw, size = _raw_records(store), store.shard_bytes
    with store.reading(), _target(store, target, force):
        files: dict[str, FileRecord] = {}

        def one(shard: Shard) -> int:
            name, spec = shard
            source = path / ARRAYS / name
            if wrong := fault(source, raw[name]):
                raise CorruptData(f"{source}: {wrong}; repair it with: harvest repair {path}")
            packed = pack_shard(spec, source.read_bytes())
            durable.publish_bytes(target / ARRAYS / name, packed)
            files[name] = buffers_record([packed])
            return spec.shard_bytes

        for_each("pack", _shards(store), size, one)
        blocks = store.record.blocks
        metadata = {spec.path: packed_metadata(spec, blocks) for spec in store.arrays()}
        record = PackedRecord(files=dict(sorted(files.items())), unpacked_bytes=size)
        _finish(store, target, metadata, {PACKED: durable.json_bytes(record.model_dump(mode="json"))})
    return size, sum(file.bytes for file in files.values())


def unpack(path: Path, target: Path, *, force: bool = False) -> int:
    """Write the packed store at `path` as it was before at `target`; returns its shard files' bytes.

    Raises as `pack` does.
    """
    store = Store.open(path)
    if not store.packed:
        raise UserError(f"{path} is not packed: it has no {PACKED}")
    records, raw, size = store.packed.files, _raw_records(store), store.shard_bytes
    with store.reading(), _target(store, target, force):

        def one(shard: Shard) -> int:
            name, spec = shard
            source = path / ARRAYS / name
            if wrong := fault(source, records[name]):
                raise CorruptData(f"{source}: {wrong}; pack the store again, or take another copy")
            data = unpack_shard(spec, source.read_bytes(), source)
            if buffers_record([data]) != raw[name]:
                raise CorruptData(f"{source}: it does not unpack to what the store's records say; take another copy")
            durable.publish_bytes(target / ARRAYS / name, data)
            return spec.shard_bytes

        for_each("unpack", _shards(store), size, one)
        metadata = {spec.path: spec.metadata(store.record.blocks) for spec in store.arrays()}
        _finish(store, target, metadata, {})
    return size


@contextmanager
def _target(store: Store, target: Path, force: bool) -> Iterator[None]:
    """Hold the lock of a folder that is new, or was left by a kill of the same command; it has room for a raw store.

    A marker, there from the first file to the last, says what is being written.
    """
    if store.path.resolve() in target.resolve().parents:
        raise UserError(f"{target} lies inside the store; choose another folder")
    what = {"packed": not store.packed, "store": store.record.model_dump(mode="json")}
    marker, data = target / _MARKER, durable.json_bytes(what)
    with lock_store(target):
        ours = marker.is_file() and marker.read_bytes() == data
        if not ours and target.exists() and any(target.iterdir()):
            left = ", left unfinished by another store, or by this one before it was extended" * marker.is_file()
            raise UserError(f"{target} exists{left}; choose another folder, or remove it")
        if not force:
            needed = store.shard_bytes + sum((store.path / name).stat().st_size for name in _copied(store))
            there = size_of(target) if ours else 0
            durable.require_space(target.parent, max(0, needed - there), "the store (--force tries anyway)")
        if ours:
            durable.sweep(target)
            (target / STORE).unlink(missing_ok=True)
        durable.publish_bytes(marker, data)
        for name in _copied(store):  # first: an extension that finishes meanwhile removes the statistics
            durable.publish_file(target / name, partial(shutil.copyfile, store.path / name))
        yield
        marker.unlink()


def _finish(store: Store, target: Path, metadata: Mapping[str, object], more: Mapping[str, bytes]) -> None:
    """Write the records that differ between the two forms, `store.json` last: without it there is no store.

    Only what the record that was opened names: the store may be extended meanwhile.
    """
    record, root = store.record, target / ARRAYS
    groups = ["", "strata", *(f"strata/{stratum.name}" for stratum in record.plan.stored_strata)]
    values: dict[Path, object] = {root / group / "zarr.json": group_metadata() for group in groups}
    values |= {root / array / "zarr.json": value for array, value in metadata.items()}
    values |= {target / REQUEST: record.request.model_dump(mode="json")}
    values |= {target / PLAN: record.plan.model_dump(mode="json")}
    files = {path: durable.json_bytes(value) for path, value in values.items()}
    durable.publish_files(files | {target / name: data for name, data in more.items()})
    durable.publish_json(target / STORE, record.model_dump(mode="json"))


def _copied(store: Store) -> list[str]:
    """List the files that are the same in both forms of a store, by path below it."""
    ledger = [path(block) for block in range(store.record.blocks) for path in (record_path, moments_path)]
    return sorted([*store.record.files, *ledger])


def for_each(name: str, items: Sequence[Item], size: int, one: Callable[[Item], int]) -> None:
    """Call `one`, which returns the bytes it dealt with, for every item, on all cores; shows progress to `size`."""
    lock, done = Lock(), 0
    with ThreadPoolExecutor(min(_MOST_WORKERS, os.cpu_count() or 1)) as pool, Progress(name, size, "bytes") as bar:

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


def _shards(store: Store) -> list[Shard]:
    blocks = store.record.blocks
    return [(spec.shard_path(n), spec) for spec in store.arrays() for n in range(blocks * spec.shards_per_block)]


def _raw_records(store: Store) -> dict[str, FileRecord]:
    """Return the record of every raw shard file, by path below the Zarr root."""
    files = dict(store.record.plan.token_files)
    for block in range(store.record.blocks):
        files |= read_ledger(store.path, block).files
    return files
