"""Reads the records of a store and checks files against them: sizes, checksums, shard indexes, Zarr metadata.

Reads only what the records name, below the store's own folder. No torch here.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from shared.config import brief, read_record
from shared.errors import CorruptData, UserError
from shared.files.durable import read_json
from shared.files.untrusted import MOST_BYTES, read_file
from shared.store import packed
from shared.store.arrays import ArraySpec, group_metadata
from shared.store.layout import (
    ARRAYS,
    FORMAT_VERSION,
    PACKED,
    PLAN,
    REQUEST,
    STORE,
    TOKENS,
    FileRecord,
    LedgerRecord,
    StorePlan,
    StoreRecord,
    StoreRequest,
    block_bytes,
    block_row_files,
    block_token_files,
    documents_spec,
    moments_path,
    record_path,
    row_specs,
    tokens_spec,
)
from shared.store.packed import PackedRecord
from shared.store.strata import stratum_ranges

MOST_RECORD_BYTES = 2**28
"""Of a record that names shard files of every block."""


def check_records(path: Path, record: StoreRecord) -> None:
    """Raise `CorruptData` unless the store's records agree with each other; a longer plan is of an extension begun."""
    for name, wrong in record_faults(path, record):
        raise CorruptData(f"{path / name}: {wrong}; repair it with: harvest repair {path}")
    planned = record.request.held_out_blocks + record.plan.training_blocks
    for what, found, expected in (
        ("the digest of its request", record.plan.request, record.request.digest),
        ("the number of blocks", record.blocks, planned),
        ("the range of strata", [(s.start, s.stop) for s in record.plan.strata], _ranges(record.request)),
    ):
        if found != expected:
            raise CorruptData(f"{path / STORE}: {what} is {found}, its records say {expected}; restore the file")
    tokens = {
        spec.shard_path(shard): spec.shard_bytes
        for spec in (tokens_spec(record.request), documents_spec(record.request))
        for shard in range(record.blocks * spec.shards_per_block)
    }
    if tokens != {name: file.bytes for name, file in record.plan.token_files.items()}:
        raise CorruptData(f"{path / STORE}: token_files are not those of its {record.blocks} blocks; restore the file")


def record_faults(path: Path, record: StoreRecord) -> Iterator[tuple[str, str]]:
    """Yield each record beside `store.json` that is not there as it should be, with what is wrong."""
    for name, good in (
        (REQUEST, lambda: read_request(path) == record.request),
        (PLAN, lambda: read_plan(path).continues(record.plan)),
    ):
        try:
            if not (path / name).is_file() or not good():
                yield name, "missing or of another store"
        except CorruptData as error:
            yield name, str(error)


def belongs(record: LedgerRecord, request: StoreRequest, plan: StorePlan) -> bool:
    """Tell whether a block was made from the tokens of `plan`, with as many rows of each stratum."""
    specs = row_specs(request, plan.stored_strata, record.d_in, record.d_out)
    if len(record.files) != sum(spec.shards_per_block for spec in specs):  # before as many names are made
        return False
    sizes = {name: file.bytes for name, file in record.files.items()}
    rows = block_row_files(request, plan.stored_strata, record.d_in, record.d_out, record.block)
    return sizes == rows and record.tokens == block_token_files(plan, request, record.block)


def read_packed(path: Path, arrays: list[ArraySpec], blocks: int) -> PackedRecord:
    """Read `packed.json`, which names every shard file and no other."""
    if not (path / PACKED).is_file():
        raise CorruptData(f"{path / PACKED} is missing, and the shard files are packed; take another copy of it")
    data = read_json(path / PACKED, MOST_RECORD_BYTES)
    check_version(path, data, packed.FORMAT_VERSION, "pack the store again")
    record = read_record(PackedRecord, data, path / PACKED)
    size = blocks * block_bytes(arrays)
    if record.unpacked_bytes != size:
        raise CorruptData(f"{path / PACKED}: unpacked_bytes is {record.unpacked_bytes}, the store's records say {size}")
    known = set()
    for name in (spec.shard_path(shard) for spec in arrays for shard in range(blocks * spec.shards_per_block)):
        if name not in record.files:  # at the first: a store can claim more files than there is room for names
            raise CorruptData(f"{path / PACKED}: {name} is missing; pack the store again")
        known.add(name)
    if unknown := record.files.keys() - known:
        raise CorruptData(f"{path / PACKED}: {min(unknown)} is not a file of the store; pack the store again")
    return record


def is_packed(path: Path) -> bool:
    """Tell whether the store at `path` is packed: its record says so, or, if that is lost, the codec of its tokens."""
    metadata = path / ARRAYS / TOKENS / "zarr.json"
    return (path / PACKED).is_file() or (metadata.is_file() and b'"blosc"' in read_file(metadata))


def _ranges(request: StoreRequest) -> list[tuple[int, int]]:
    return stratum_ranges(request.edges, request.context_size)


def read_store_record(path: Path) -> StoreRecord:
    """Read `store.json` of the store at `path`. Raises `UserError` when there is no finished store."""
    if not path.is_dir():
        raise UserError(f"no store at {path}: no such folder; harvest one first, or name another")
    if not (path / STORE).is_file():
        if (path / REQUEST).is_file():
            raise UserError(f"{path} is unfinished ({progress(path)}); run the same harvest again to finish it")
        raise UserError(f"{path} is not a store: it has no {STORE}; harvest one first, or name another")
    data = read_json(path / STORE, MOST_RECORD_BYTES)
    check_version(path, data, FORMAT_VERSION, "harvest it again")
    return read_record(StoreRecord, data, path / STORE)


def check_version(path: Path, data: Any, current: int, remedy: str) -> None:
    """Raise `UserError` when the record `data` says that it has another format; `remedy` is for an older one."""
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != current:
        remedy = "upgrade" if version > current else remedy
        raise UserError(f"{path}: written by format {brief(version)}, this reads {current}; {remedy}")


def read_request(path: Path) -> StoreRequest:
    """Read `request.json` of the store at `path`."""
    data = read_json(path / REQUEST)
    check_version(path / REQUEST, data, FORMAT_VERSION, "harvest it again")
    return read_record(StoreRequest, data, path / REQUEST)


def read_plan(path: Path) -> StorePlan:
    """Read `plan.json` of the store at `path`."""
    return read_record(StorePlan, read_json(path / PLAN, MOST_RECORD_BYTES), path / PLAN)


def read_ledger(path: Path, block: int) -> LedgerRecord:
    """Read a committed block's record. Raises `CorruptData` when it is missing."""
    file = path / record_path(block)
    if not file.is_file():
        raise CorruptData(f"{file} is missing; run the same harvest to make block {block} again")
    record = read_record(LedgerRecord, read_json(file), file)
    if record.block != block:
        raise CorruptData(f"{file} is of block {record.block}; run the same harvest to make block {block} again")
    return record


def progress(path: Path) -> str:
    """Tell how far an unfinished store has come, in words."""
    if not (path / PLAN).is_file():
        return "packing"
    blocks = read_request(path).held_out_blocks + read_plan(path).training_blocks
    return f"{sum((path / record_path(block)).is_file() for block in range(blocks))} of {blocks} blocks"


def check_shard(root: Path, spec: ArraySpec, shard: int) -> None:
    """Raise `CorruptData` unless the shard file has its exact size and index."""
    path, footer = root / spec.shard_path(shard), spec.footer()
    if path.is_symlink():
        raise CorruptData(f"{path} is a symbolic link; a store holds regular files only")
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, 2)
            if size != spec.shard_bytes:
                raise CorruptData(f"{path}: {size:,} bytes, expected {spec.shard_bytes:,}; {remedy(spec, shard)}")
            file.seek(-len(footer), 2)
            if file.read() != footer:
                raise CorruptData(f"{path}: its index does not match its layout; {remedy(spec, shard)}")
    except FileNotFoundError as error:
        raise CorruptData(f"{path} is missing; {remedy(spec, shard)}") from error


def check_metadata(root: Path, spec: ArraySpec, expected: dict[str, Any]) -> None:
    """Raise `CorruptData` unless the array's `zarr.json` is as `expected`; a longer `shape` is allowed."""
    path = root / spec.path / "zarr.json"
    if not path.is_file():
        raise CorruptData(f"{path} is missing; run the same harvest to write it again")
    found = read_json(path)
    shape = found.get("shape") if isinstance(found, dict) else None
    if isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] >= expected["shape"][0]:
        expected["shape"][0] = shape[0]
    if found != expected:
        wrong = next((k for k in expected if not isinstance(found, dict) or found.get(k) != expected[k]), "keys")
        got = found.get(wrong) if isinstance(found, dict) else found
        says = brief(expected.get(wrong))
        raise CorruptData(f"{path}: {wrong} is {brief(got)}, the store's records say {says}; restore the file")


def check_group(path: Path) -> None:
    """Raise `CorruptData` unless the group's `zarr.json` is there as it was written."""
    if not path.is_file() or read_json(path) != group_metadata():
        raise CorruptData(f"{path} is missing or changed; run the same harvest to write it again")


def check_size(path: Path, record: FileRecord, remedy: str = "run the same harvest again") -> None:
    """Raise `CorruptData` unless the file exists with its recorded size."""
    if not path.is_file() or path.is_symlink():
        raise CorruptData(f"{path} is missing; {remedy}")
    if (size := path.stat().st_size) != record.bytes:
        raise CorruptData(f"{path}: {size:,} bytes, expected {record.bytes:,}; {remedy}")


def check_side_files(path: Path, record: StoreRecord) -> None:
    """Raise `CorruptData` unless the files beside the Zarr hierarchy are there, and what is known of each block."""
    for name, file in record.files.items():
        check_size(path / name, file)
    for block in range(record.blocks):
        for name in (record_path(block), moments_path(block)):
            if not (path / name).is_file():
                raise CorruptData(f"{path / name} is missing; repair block {block}: harvest repair {path}")


def read_vectors(path: Path, widths: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Read the float64 vectors of a safetensors file that has those of `widths` and no others, all of them finite.

    Raises `CorruptData` naming the tensor that is not so; one named `.../variance` must not be negative.
    """
    try:
        found = load(read_file(path, 8 * sum(widths.values()) + MOST_BYTES))
    except (SafetensorError, KeyError, ValueError) as error:  # a type that numpy does not know is a KeyError
        raise CorruptData(f"{path}: {error}") from error
    if odd := sorted(set(found) ^ set(widths)):
        raise CorruptData(f"{path}: tensor {brief(odd[0])} is {'missing' if odd[0] in widths else 'not expected'}")
    for name, d in widths.items():
        values = found[name]
        if values.dtype != np.float64 or values.shape != (d,):
            raise CorruptData(f"{path}: tensor {name!r} is {values.dtype} {list(values.shape)}, expected float64 [{d}]")
        if not np.isfinite(values).all() or (name.endswith("/variance") and (values < 0).any()):
            raise CorruptData(f"{path}: tensor {name!r} holds NaN, infinity or a negative variance")
    return found


def fault(path: Path, record: FileRecord) -> str | None:
    """Tell what is wrong with a file, by size and crc32c, or return None."""
    if path.is_symlink() or not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != record.bytes:
        return f"{size:,} bytes, ledger says {record.bytes:,}"
    found = file_crc32c(path)
    return None if found == record.crc32c else f"crc32c {found}, ledger says {record.crc32c}"


def file_crc32c(path: Path) -> str:
    """Return the crc32c of a file's content, eight hexadecimal digits."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            value = google_crc32c.extend(value, chunk)
    return f"{value:08x}"


def file_record(path: Path) -> FileRecord:
    """Return the record of a file as it is."""
    return FileRecord(bytes=path.stat().st_size, crc32c=file_crc32c(path))


def buffers_record(buffers: Sequence[Any]) -> FileRecord:
    """Return the record of a file that consists of `buffers`, one after the other."""
    value, size = 0, 0
    for part in buffers:
        data = np.frombuffer(part, np.uint8)
        data.flags.writeable = False  # google_crc32c refuses writable buffers
        value, size = google_crc32c.extend(value, data), size + data.nbytes
    return FileRecord(bytes=size, crc32c=f"{value:08x}")


def remedy(spec: ArraySpec, shard: int, store: Path | str = "STORE") -> str:
    """Tell what to do about a damaged shard file, in words."""
    return f"repair block {shard // spec.shards_per_block}: harvest repair {store}"
