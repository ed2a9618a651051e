"""Opens a finished store: checks its records and every shard's size and index, and maps its rows.

Reads only what the records name, below the store's own folder. No torch here.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from shared.arrays import ArraySpec, group_metadata
from shared.config import read_record
from shared.durable import Lock, lock, read_json
from shared.errors import CorruptData, UserError
from shared.layout import (
    ARRAYS,
    FORMAT_VERSION,
    PACKED,
    PLAN,
    REQUEST,
    STORE,
    TOKENIZER,
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
    statistics_path,
    store_specs,
    stratum_specs,
    tokens_spec,
)
from shared.packed import LOCAL_BYTES, LocalFolder, PackedRecord, packed_metadata
from shared.strata import Stratum, stratum_ranges

Rows = NDArray[Any]
Run = tuple[int, int]
"""Neighbouring rows of an array, a half-open range."""
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True, kw_only=True)
class SideStatistics:
    """Mean and variance per dimension, float64 [d]."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Where a packed store is decoded while it is read."""

    folder: Path | None = None
    """The system's folder for temporary files, if not given."""
    bytes: int = LOCAL_BYTES
    """At most."""


class MappedArray:
    """One array of the store as memory maps, one per shard file, opened at first use.

    Maps are private and advised `MADV_RANDOM`, so that a run of rows is read and nothing beside it. Those of a packed
    store are of files in a local folder, into which rows are decoded before they are read. Several threads may read.

    Reading raises `CorruptData` when a shard file became shorter than its rows, or a packed chunk does not decode.
    """

    def __init__(self, root: Path, spec: ArraySpec, blocks: int, local: LocalFolder | None = None) -> None:
        self.spec = spec
        self.rows = blocks * spec.rows_per_block
        self._folder, self._local = local.folder if local else root, local
        self._rows_per_shard, self._row_bytes = spec.rows_per_shard, spec.row_bytes  # both take a search
        self._maps: dict[int, tuple[Rows, int]] = {}  # with their addresses

    def shard(self, number: int) -> Rows:
        """The rows of one shard file, a read-only view."""
        return self._rows(number, 0, self._rows_per_shard)

    def read(self, start: int, stop: int, out: Rows) -> None:
        """Copy rows `start:stop` into the first rows of `out`; they may lie in several shard files."""
        self.gather([(start, stop)], out)

    def gather(self, runs: Sequence[Run], out: Rows) -> None:
        """Copy `runs` one after the other into the first rows of `out`; the copies leave other threads the GIL."""
        if not self._local:
            parts = [self._map(number)[0][low:high] for number, low, high in self._spans(runs)]
            if parts:  # one call: half the time where runs are short
                np.concatenate(parts, out=out[: sum(map(len, parts))])
            return
        filled = 0
        for number, low, high in self._spans(runs):  # one by one: a shard takes disk space as long as a part is held
            out[filled : filled + high - low] = self._rows(number, low, high)[low:high]
            filled += high - low

    def will_need(self, runs: Sequence[Run]) -> None:
        """Ask the kernel to read `runs` ahead; does nothing for a packed store. Raises nothing: reading does."""
        if self._local:
            return
        with suppress(CorruptData, OSError):
            for number, low, high in self._spans(runs):
                first = low * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                # Not by mmap's own method: that holds the GIL while the kernel works.
                _madvise(self._map(number)[1] + first, high * self._row_bytes - first, mmap.MADV_WILLNEED)

    def _spans(self, runs: Sequence[Run]) -> list[tuple[int, int, int]]:
        """(shard, first row, past the last row) of the parts of `runs`."""
        size, found = self._rows_per_shard, []
        for start, stop in runs:
            while start < stop:
                number, low = divmod(start, size)
                high = min(size, low + stop - start)
                found.append((number, low, high))
                start += high - low
        return found

    def _rows(self, number: int, low: int, high: int) -> Rows:
        """A shard of which rows `low:high` can be read."""
        if not self._local:
            return self._map(number)[0]
        with self._local.lock:  # a shard is not evicted before it is mapped
            self._local.decode(self.spec, number, low, high, lambda: self._maps.pop(number, None))
            return self._map(number)[0]

    def _map(self, number: int) -> tuple[Rows, int]:
        if found := self._maps.get(number):
            return found
        path = self._folder / self.spec.shard_path(number)
        with open(path, "rb") as file:
            if (size := os.fstat(file.fileno()).st_size) < self.spec.payload_bytes:
                raise CorruptData(
                    f"{path}: {size:,} bytes, its rows take {self.spec.payload_bytes:,}; {_remedy(self.spec, number)}"
                )
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        mapped.madvise(mmap.MADV_RANDOM)
        rows = np.frombuffer(mapped, dtype=self.spec.dtype, count=self.spec.payload_bytes // self._item)
        rows = rows if self.spec.width is None else rows.reshape(-1, self.spec.width)
        self._maps[number] = rows, rows.ctypes.data
        return self._maps[number]

    @property
    def _item(self) -> int:
        return np.dtype(self.spec.dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumRows:
    """The rows of one stratum: arrays over the same rows, block after block."""

    stratum: Stratum
    source: MappedArray
    target: MappedArray
    position: MappedArray
    """As the model counted."""
    sequence: MappedArray
    """Row of `tokens`."""
    offset: MappedArray
    """Column of `tokens`."""


class Store:
    """A finished store, checked and mapped."""

    def __init__(self, path: Path, record: StoreRecord, local: Local | None = None) -> None:
        self.path, self.record, self.request = path, record, record.request
        self.packed = _read_packed(path, self.arrays(), record.blocks) if is_packed(path) else None
        """The packed shard files, of a packed store."""
        self._local_given = local or Local()

    @classmethod
    def open(cls, path: Path, local: Local | None = None) -> "Store":
        """Open the store at `path`; checks its records, and the size and index of every shard file.

        `local` says where the rows of a packed store are decoded; the default `Local()` if not given.

        Raises `UserError` when `path` is no finished store of a format this version reads, or `local` is given for one
        that is not packed, and `CorruptData` when a file is not what the records say.
        """
        while True:
            record = read_store_record(path)
            try:
                return cls._checked(path, record, local)
            except CorruptData:
                if read_store_record(path) == record:
                    raise  # else it was extended meanwhile, and statistics of the shorter store are gone

    @classmethod
    def _checked(cls, path: Path, record: StoreRecord, local: Local | None) -> "Store":
        store = cls(path, record, local)
        if local and not store.packed:
            raise UserError(f"{path} is not packed, so nothing is decoded; leave out --local-folder and --local-bytes")
        _ = store.statistics  # at once: an extension that finishes later removes the file
        _check_records(path, store.record)
        for spec in store.arrays():
            for shard in range(store.record.blocks * spec.shards_per_block):
                if store.packed:
                    check_size(path / ARRAYS / spec.shard_path(shard), store.packed.files[spec.shard_path(shard)])
                else:
                    check_shard(path / ARRAYS, spec, shard)
            expected = (packed_metadata if store.packed else ArraySpec.metadata)(spec, store.record.blocks)
            check_metadata(path / ARRAYS, spec, expected)
        for group in ("", "strata", *(f"strata/{s.name}" for s in store.record.plan.stored_strata)):
            check_group(path / ARRAYS / group / "zarr.json")
        for name, file in store.record.files.items():
            check_size(path / name, file)
        for block in range(store.record.blocks):
            for name in (record_path(block), moments_path(block)):
                if not (path / name).is_file():
                    raise CorruptData(f"{path / name} is missing; repair block {block}: harvest repair {path}")
        return store

    def reading(self) -> AbstractContextManager[Lock]:
        """The readers' lock: the store is not removed while any process holds it. It may be extended."""
        return lock(self.path / REQUEST, f"store {self.path.name}", shared=True, make=False)

    @cached_property
    def _local(self) -> LocalFolder | None:
        given = self._local_given
        return LocalFolder(self.path / ARRAYS, self.shard_bytes, given.folder, given.bytes) if self.packed else None

    @cached_property
    def strata(self) -> dict[str, StratumRows]:
        """Mapped rows by stratum name, in order of position."""
        record, root = self.record, self.path / ARRAYS
        return {
            s.name: StratumRows(
                stratum=s,
                **{
                    name: MappedArray(root, spec, record.blocks, self._local)
                    for name, spec in stratum_specs(self.request, s, record.d_in, record.d_out).items()
                },
            )
            for s in record.plan.stored_strata
        }

    @cached_property
    def tokens(self) -> MappedArray:
        """Token windows [sequences, context]."""
        return MappedArray(self.path / ARRAYS, tokens_spec(self.request), self.record.blocks, self._local)

    @cached_property
    def documents(self) -> MappedArray:
        """The document of each token [sequences, context]."""
        return MappedArray(self.path / ARRAYS, documents_spec(self.request), self.record.blocks, self._local)

    @property
    def tokenizer(self) -> Path:
        """The folder with the tokenizer's files."""
        return self.path / TOKENIZER

    @cached_property
    def statistics(self) -> dict[str, dict[str, SideStatistics]]:
        """By stratum name (or `overall`) and side (`source`, `target`), over the training blocks."""
        name = statistics_path(self.record.blocks)
        path, remedy = self.path / name, f"repair it with: harvest repair {self.path}"
        if name not in self.record.files:
            raise CorruptData(f"{self.path / STORE}: it names no {name}; restore the file")
        if wrong := fault(path, self.record.files[name]):
            raise CorruptData(f"{path}: {wrong}; {remedy}")
        try:
            tensors = load(path.read_bytes())
        except SafetensorError as error:
            raise CorruptData(f"{path}: {error}; {remedy}") from error
        names = ["overall", *(s.name for s in self.record.plan.stored_strata)]
        try:
            return {
                name: {
                    side: SideStatistics(
                        mean=tensors[f"{name}/{side}/mean"], variance=tensors[f"{name}/{side}/variance"]
                    )
                    for side in ("source", "target")
                }
                for name in names
            }
        except KeyError as error:
            raise CorruptData(f"{path}: tensor {error} is missing; {remedy}") from error

    def arrays(self) -> list[ArraySpec]:
        """Every array."""
        return store_specs(self.request, self.record.plan.stored_strata, self.record.d_in, self.record.d_out)

    @property
    def shard_bytes(self) -> int:
        """Of all shard files, unpacked."""
        return self.record.blocks * block_bytes(self.arrays())

    def verify(self) -> Iterator[tuple[str, str | None]]:
        """Read every file once, on all cores, and compare its crc32c with the record.

        Yields (path below the store, what is wrong or None) for each.
        """
        yield from _record_faults(self.path, self.record)
        ledger = dict(self.record.files)
        ledger |= {f"{ARRAYS}/{name}": file for name, file in self.record.plan.token_files.items()}
        for block in range(self.record.blocks):
            try:
                record = read_ledger(self.path, block)
            except CorruptData as error:
                yield record_path(block), str(error)
                continue
            if not belongs(record, self.request, self.record.plan):
                yield record_path(block), "the block is of another plan: of other tokens, or other numbers of rows"
            ledger |= {f"{ARRAYS}/{name}": file for name, file in record.files.items()}
            ledger[moments_path(block)] = record.moments
        if self.packed:
            ledger |= {f"{ARRAYS}/{name}": file for name, file in self.packed.files.items()}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = pool.map(lambda item: fault(self.path / item[0], item[1]), ledger.items())
            yield from zip(ledger, faults, strict=True)


def _check_records(path: Path, record: StoreRecord) -> None:
    """Raise `CorruptData` unless the store's records agree with each other; a longer plan is of an extension begun."""
    for name, wrong in _record_faults(path, record):
        raise CorruptData(f"{path / name}: {wrong}; repair it with: harvest repair {path}")
    planned = record.request.held_out_blocks + record.plan.training_blocks
    for what, found, expected in (
        ("the digest of its request", record.plan.request, record.request.digest),
        ("the number of blocks", record.blocks, planned),
        ("the range of strata", [(s.start, s.stop) for s in record.plan.strata], _ranges(record.request)),
    ):
        if found != expected:
            raise CorruptData(f"{path / STORE}: {what} is {found}, its records say {expected}; restore the file")


def _record_faults(path: Path, record: StoreRecord) -> Iterator[tuple[str, str]]:
    """Which of the records beside `store.json` are not there as they should be."""
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
    """Whether a block was made from the tokens of `plan`, with as many rows of each stratum."""
    sizes = {name: file.bytes for name, file in record.files.items()}
    rows = block_row_files(request, plan.stored_strata, record.d_in, record.d_out, record.block)
    return sizes == rows and record.tokens == block_token_files(plan, request, record.block)


def _read_packed(path: Path, arrays: list[ArraySpec], blocks: int) -> PackedRecord:
    """`packed.json`, which names every shard file and no other."""
    if not (path / PACKED).is_file():
        raise CorruptData(f"{path / PACKED} is missing, and the shard files are packed; take another copy of it")
    record = read_record(PackedRecord, read_json(path / PACKED), path / PACKED)
    known = {spec.shard_path(shard) for spec in arrays for shard in range(blocks * spec.shards_per_block)}
    size = blocks * block_bytes(arrays)
    if record.unpacked_bytes != size:
        raise CorruptData(f"{path / PACKED}: unpacked_bytes is {record.unpacked_bytes}, the store's records say {size}")
    if unlike := known ^ set(record.files):
        raise CorruptData(f"{path / PACKED}: {min(unlike)} is not on both sides; pack the store again")
    return record


def is_packed(path: Path) -> bool:
    """Whether the store at `path` is packed: its record says so, or, if that is lost, the codec of its tokens."""
    metadata = path / ARRAYS / TOKENS / "zarr.json"
    return (path / PACKED).is_file() or (metadata.is_file() and b'"blosc"' in metadata.read_bytes())


def _ranges(request: StoreRequest) -> list[tuple[int, int]]:
    return stratum_ranges(request.edges, request.context_size)


def read_store_record(path: Path) -> StoreRecord:
    """`store.json` of the store at `path`. Raises `UserError` when there is no finished store."""
    if not path.is_dir():
        raise UserError(f"no store at {path}: no such folder; harvest one first, or pass --store FOLDER")
    if not (path / STORE).is_file():
        if (path / REQUEST).is_file():
            raise UserError(f"{path} is unfinished ({progress(path)}); run the same harvest again to finish it")
        raise UserError(f"{path} is not a store: it has no {STORE}; harvest one first, or pass --store FOLDER")
    data = read_json(path / STORE)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        remedy = "upgrade" if version > FORMAT_VERSION else "harvest it again"
        raise UserError(f"{path}: written by format {version}, this reads {FORMAT_VERSION}; {remedy}")
    return read_record(StoreRecord, data, path / STORE)


def read_request(path: Path) -> StoreRequest:
    """`request.json` of the store at `path`."""
    return read_record(StoreRequest, read_json(path / REQUEST), path / REQUEST)


def read_plan(path: Path) -> StorePlan:
    """`plan.json` of the store at `path`."""
    return read_record(StorePlan, read_json(path / PLAN), path / PLAN)


def read_ledger(path: Path, block: int) -> LedgerRecord:
    """A committed block's record. Raises `CorruptData` when it is missing."""
    file = path / record_path(block)
    if not file.is_file():
        raise CorruptData(f"{file} is missing; run the same harvest again to make block {block} anew")
    return read_record(LedgerRecord, read_json(file), file)


def progress(path: Path) -> str:
    """How far an unfinished store has come, in words."""
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
                raise CorruptData(f"{path}: {size:,} bytes, expected {spec.shard_bytes:,}; {_remedy(spec, shard)}")
            file.seek(-len(footer), 2)
            if file.read() != footer:
                raise CorruptData(f"{path}: its index does not match its layout; {_remedy(spec, shard)}")
    except FileNotFoundError as error:
        raise CorruptData(f"{path} is missing; {_remedy(spec, shard)}") from error


def check_metadata(root: Path, spec: ArraySpec, expected: dict[str, Any]) -> None:
    """Raise `CorruptData` unless the array's `zarr.json` is as `expected`; a longer `shape` is allowed."""
    path = root / spec.path / "zarr.json"
    if not path.is_file():
        raise CorruptData(f"{path} is missing; run the same harvest again to write it anew")
    found = read_json(path)
    shape = found.get("shape") if isinstance(found, dict) else None
    if isinstance(shape, list) and shape and isinstance(shape[0], int) and shape[0] >= expected["shape"][0]:
        expected["shape"][0] = shape[0]
    if found != expected:
        wrong = next((k for k in expected if not isinstance(found, dict) or found.get(k) != expected[k]), "keys")
        got = found.get(wrong) if isinstance(found, dict) else found
        raise CorruptData(f"{path}: {wrong} is {got}, the store's records say {expected.get(wrong)}; restore the file")


def check_group(path: Path) -> None:
    """Raise `CorruptData` unless the group's `zarr.json` is there as it was written."""
    if not path.is_file() or read_json(path) != group_metadata():
        raise CorruptData(f"{path} is missing or changed; run the same harvest again to write it anew")


def check_size(path: Path, record: FileRecord) -> None:
    """Raise `CorruptData` unless the file exists with its recorded size."""
    if not path.is_file() or path.is_symlink():
        raise CorruptData(f"{path} is missing; run the same harvest again to write it anew")
    if (size := path.stat().st_size) != record.bytes:
        raise CorruptData(f"{path}: {size:,} bytes, expected {record.bytes:,}; run the same harvest again")


def fault(path: Path, record: FileRecord) -> str | None:
    """What is wrong with a file, by size and crc32c, or None."""
    if path.is_symlink() or not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != record.bytes:
        return f"{size:,} bytes, ledger says {record.bytes:,}"
    found = file_crc32c(path)
    return None if found == record.crc32c else f"crc32c {found}, ledger says {record.crc32c}"


def file_crc32c(path: Path) -> str:
    """crc32c of a file's content, eight hexadecimal digits."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 22):
            value = google_crc32c.extend(value, chunk)
    return f"{value:08x}"


def file_record(path: Path) -> FileRecord:
    """The record of a file as it is."""
    return FileRecord(bytes=path.stat().st_size, crc32c=file_crc32c(path))


def buffers_record(buffers: Sequence[Any]) -> FileRecord:
    """The record of a file that consists of `buffers`, one after the other."""
    value, size = 0, 0
    for part in buffers:
        data = np.frombuffer(part, np.uint8)
        data.flags.writeable = False  # google_crc32c refuses writable buffers
        value, size = google_crc32c.extend(value, data), size + data.nbytes
    return FileRecord(bytes=size, crc32c=f"{value:08x}")


def _remedy(spec: ArraySpec, shard: int) -> str:
    return f"repair block {shard // spec.shards_per_block}: harvest repair STORE"
