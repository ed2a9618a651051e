"""A store that lies in object storage: its records copied to a local folder, its rows fetched there piece by piece."""

import atexit
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from shared.files.object_store import CONNECTIONS, COPY_AGAIN, Objects, naming
from shared.store import packed
from shared.store.arrays import ArraySpec
from shared.store.checks import MOST_RECORD_BYTES
from shared.store.layout import ARRAYS, STORE, FileRecord
from shared.store.mapped_array import RowArray, RowRun, Rows, Span
from shared.store.piece_folder import PieceFolder, Wanted

AHEAD_BYTES = 2**30
"""Most that is fetched before it is read: what 10 GB/s bring in 0.1 s. At most a quarter of the folder."""
WHOLE_BYTES = 4 * 2**20
"""A shard file of at most so many bytes is fetched whole, and compared with its checksum."""
SMALL_BYTES = 2**17
"""The same where the folder has no room for the whole store: such a file takes no longer than a part of it."""
CELL_BYTES = 2**20
"""Of rows fetched at once where the folder has room for the whole store, so that each is fetched once all the same."""
GAP_BYTES = 2**14
"""Rows of one shard file that lie no further apart are fetched together, with those between: no slower than a request
more. So are parts of a run between which rows are left out."""
_PREFIX = "stored-objects-"


class Piece(NamedTuple):
    """Rows `low:high` of a shard file, which are fetched together."""

    spec: ArraySpec
    shard: int
    low: int
    high: int

    @property
    def name(self) -> str:
        """Its file in the folder."""
        return _flat(self.spec.shard_path(self.shard)) + ("" if self.whole else f"@{self.low}-{self.high}")

    @property
    def whole(self) -> bool:
        """Whether it is all rows of the shard file."""
        return (self.low, self.high) == (0, self.spec.rows_per_shard)


class ObjectRows:
    """The objects of one store, and the folder in which what was fetched of them lies.

    All processes of this machine that read the store share the folder, and the last one removes it. It is named by the
    address and `store.json`, so what it holds never changes. `most`: bytes that it may take, records included.

    Raises what `Objects` raises, and `UserError` where there is no finished store, or no room for the folder.
    """

    def __init__(self, path: Path, parent: Path | None, most: int, *, again: bool = False) -> None:
        """Copy the records that are not there yet, or all of them `again`: they may be of before a repair."""
        self.objects = Objects(path)
        self.address = self.objects.address
        self.sizes = self.objects.sizes()
        if STORE not in self.sizes:
            begun = "; run the same harvest again to finish it" if self.sizes else ", nor anything else"
            raise UserError(f"no finished store at {self.address}: it has no {STORE}{begun}")
        record = self.objects.get(STORE, min(self.sizes[STORE], MOST_RECORD_BYTES))
        key = hashlib.sha256(self.address.encode() + b"\0" + record).hexdigest()[:16]
        parent = parent or Path(tempfile.gettempdir())
        folder, self._held = _host_folder(parent, f"{_PREFIX}{key}")
        self.mirror = folder / "records" / PurePosixPath(self.address).name
        with durable.lock(folder / "filling", f"folder {folder}", wait=True):
            if again or not (self.mirror / STORE).is_file():
                self._copy_records(record)
        self.most = most - size_of(self.mirror)
        self._folder = PieceFolder(folder / "rows", self.most)
        self.folder = folder
        self.ahead_bytes = max(0, min(AHEAD_BYTES, self.most // 4))
        self.fetched = 0
        """Bytes of rows that this process has fetched, as they lie there."""
        self._record: Callable[[ArraySpec, int], FileRecord]
        self._indexes: dict[str, NDArray[np.uint64]] = {}
        self._step = 1
        self.packed = False
        """Whether shard files are packed: whoever has read the records says so."""
        self._lock = threading.Lock()
        self._coming: dict[str, Future[bytes]] = {}
        self._askers = 0
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="objects")

    def close(self) -> None:
        """Give the folder back before the process ends: nothing is read any more."""
        self._pool.shutdown(cancel_futures=True)
        atexit.unregister(self._held.close)
        self._held.close()

    def _copy_records(self, record: bytes) -> None:
        """Copy everything but shard files, `store.json` last."""
        wanted = {name: size for name, size in self.sizes.items() if not is_shard(name) and name != STORE}
        self.mirror.mkdir(parents=True, exist_ok=True)
        self.objects.download(wanted, self.mirror)
        durable.write_whole(self.mirror / STORE, record)

    @property
    def remedy(self) -> str:
        """What to do about damage, for messages."""
        return packed.PACK_AGAIN if self.packed else COPY_AGAIN

    def describe_rows(self, record: Callable[[ArraySpec, int], FileRecord], whole: int) -> None:
        """Learn how to find the record of a shard file, and what all take unpacked, in bytes."""
        self._record, fits = record, whole <= self.most
        self._step = CELL_BYTES if fits else 1
        needed = min(self.most, whole) - size_of(self.folder / "rows")  # other processes may have begun
        durable.require_space(self.folder, needed, "rows of the store (--local-folder, --local-bytes)")

    def check_size(self, name: str, size: int) -> None:
        """Raise `CorruptData` unless a shard file is there with its size."""
        found = self.sizes.get(f"{ARRAYS}/{name}")
        if found is None:
            raise CorruptData(f"{self.address}/{ARRAYS}/{name} is missing; {self.remedy}")
        if found != size:
            raise CorruptData(f"{self.address}/{ARRAYS}/{name}: {found:,} bytes, expected {size:,}; {self.remedy}")

    def fault(self, name: str, record: FileRecord) -> str | None:
        """Tell what is wrong with an object, by size and crc32c, or return None; it is fetched again."""
        data, wrong = self.get_whole(name, record)
        if not wrong and is_shard(name) and len(data) <= WHOLE_BYTES and not self.packed:
            self._folder.add(_flat(name.removeprefix(f"{ARRAYS}/")), data)
        return wrong

    def get_whole(self, name: str, record: FileRecord) -> tuple[bytes, str | None]:
        """Fetch an object, and tell what is wrong with it, by size and crc32c; one of another size is not fetched."""
        found = self.sizes.get(name)
        if found is None:
            return b"", "missing"
        if found != record.bytes:
            return b"", f"{found:,} bytes, ledger says {record.bytes:,}"
        try:
            data = self.objects.get(name, found)
        except FileNotFoundError:  # removed since the objects were listed
            return b"", "missing"
        return data, _wrong(data, record)

    def faults(self, files: Mapping[str, FileRecord]) -> Iterator[tuple[str, str | None]]:
        """Yield each of `files`, by path below the store, with what is wrong or None; a few are in memory at once.

        Small shard files are kept for training, which begins with them.
        """
        with ThreadPoolExecutor(8) as pool:
            yield from zip(files, pool.map(lambda item: self.fault(*item), files.items()), strict=True)

    def naming(self) -> AbstractContextManager[None]:
        """Have errors name the store's address, and not where its records were copied to."""
        return naming(self.mirror, self.address)

    def read(self, parts: list[tuple[Piece, int, memoryview]]) -> None:
        """Fill (piece, bytes into it, place): from the folder, else with what is fetched at once."""
        pieces = {piece.name: piece for piece, _, _ in parts}
        missing = self._folder.read(Wanted(piece.name, offset, out) for piece, offset, out in parts)
        coming = [(part, self._fetch(pieces[part.piece])) for part in missing]
        for part, future in coming:
            part.out[:] = future.result()[part.offset : part.offset + len(part.out)]

    def fetch_ahead(self, pieces: Sequence[Piece]) -> None:
        """Begin to fetch pieces that are not there yet. Raises nothing: reading them does."""
        for piece in pieces:
            if piece.name not in self._coming and not self._folder.has(piece.name):
                self._fetch(piece)

    def start(self) -> None:
        """Count one more who asks for rows ahead."""
        with self._lock:
            self._askers += 1

    def stop(self) -> None:
        """Count one less; fetch nothing more ahead once there is none."""
        with self._lock:
            self._askers -= 1
            if not self._askers:
                self._coming = {name: future for name, future in self._coming.items() if not future.cancel()}

    def pieces(self, spec: ArraySpec, shard: int, low: int, high: int) -> list[Piece]:
        """List what must be fetched for rows `low:high` of a shard file.

        The file, if it is small. Else exactly these rows, or whole inner chunks of a packed store; more of them where
        the folder has room for the whole store.
        """
        if spec.payload_bytes <= (WHOLE_BYTES if self._step > 1 else min(SMALL_BYTES, WHOLE_BYTES)):
            return [Piece(spec, shard, 0, spec.rows_per_shard)]
        inner = spec.inner_rows
        step = inner * max(1, self._step // (inner * spec.row_bytes)) if self.packed or self._step > 1 else 1
        if step == 1:
            return [Piece(spec, shard, low, high)]
        cells = range(low // step * step, high, step)
        return [Piece(spec, shard, cell, min(cell + step, spec.rows_per_shard)) for cell in cells]

    def _fetch(self, piece: Piece) -> Future[bytes]:
        with self._lock:
            found = self._coming.get(piece.name)
            if found is None or found.cancelled():
                found = self._coming[piece.name] = self._pool.submit(self._load, piece)
            return found

    def _load(self, piece: Piece) -> bytes:
        """Return a piece, from the folder where another thread or process was faster."""
        try:
            data = bytearray((piece.high - piece.low) * piece.spec.row_bytes)
            if not self._folder.has(piece.name) or self._folder.read([Wanted(piece.name, 0, memoryview(data))]):
                fetched = self._get(piece)
                self._folder.add(piece.name, fetched)
                return fetched
            return bytes(data)
        finally:
            with self._lock:
                self._coming.pop(piece.name, None)

    def _get(self, piece: Piece) -> bytes:
        name = f"{ARRAYS}/{piece.spec.shard_path(piece.shard)}"
        try:
            return self._rows(piece, name)
        except FileNotFoundError as error:  # removed since the objects were listed
            raise CorruptData(f"{self.address}/{name} is missing; {self.remedy}") from error

    def _rows(self, piece: Piece, name: str) -> bytes:
        spec, path = piece.spec, f"{self.address}/{name}"
        if piece.whole:
            data = self.objects.get(name, self.sizes[name])
            self.fetched += len(data)
            if wrong := _wrong(data, self._record(spec, piece.shard)):
                raise CorruptData(f"{path}: {wrong}; {self.remedy}")
            return (packed.unpack_shard(spec, data, path) if self.packed else data)[: spec.payload_bytes]
        if not self.packed:
            data = self.objects.get_range(name, piece.low * spec.row_bytes, piece.high * spec.row_bytes)
            self.fetched += len(data)
            return data
        entries = self._index(spec, name)[piece.low // spec.inner_rows : -(-piece.high // spec.inner_rows)].tolist()
        start = entries[0][0]
        data = self.objects.get_range(name, start, sum(entries[-1]))
        self.fetched += len(data)
        chunks = (data[offset - start : offset - start + size] for offset, size in entries)
        return b"".join(packed.unpack_chunk(spec, chunk, path) for chunk in chunks)

    def _index(self, spec: ArraySpec, name: str) -> NDArray[np.uint64]:
        """Return offset and size of each chunk of a packed shard file; its index has a checksum of its own."""
        if name not in self._indexes:
            size = self.sizes[name]
            footer = self.objects.get_range(name, max(0, size - packed.footer_bytes(spec)), size)
            self._indexes[name] = packed.read_index(spec, footer, size, f"{self.address}/{name}")
        return self._indexes[name]


class ObjectArray(RowArray):
    """One array of a store in object storage, read as a mapped one is."""

    def __init__(self, objects: ObjectRows, spec: ArraySpec, blocks: int) -> None:
        super().__init__(spec, blocks)
        self._objects = objects

    def gather(self, runs: Sequence[RowRun], out: Rows) -> None:
        """Copy `runs` one after the other into the first rows of `out`; what is not in the folder is waited for."""
        target, at, parts = out.reshape(-1).view(np.uint8).data, 0, []
        size = self.spec.row_bytes
        for spans in self._near(runs):
            pieces = self._pieces(spans)
            for low, high in ((low, high) for _, low, high in spans):
                for piece in (one for one in pieces if one.low < high and low < one.high):
                    first, last = max(low, piece.low), min(high, piece.high)
                    part = target[at : at + (last - first) * size]
                    parts.append((piece, (first - piece.low) * size, part))
                    at += len(part)
        self._objects.read(parts)

    def will_need(self, runs: Sequence[RowRun]) -> None:
        """Begin to fetch `runs`. Raises nothing: reading does."""
        for spans in self._near(runs):
            self._objects.fetch_ahead(self._pieces(spans))

    def _pieces(self, spans: list[Span]) -> list[Piece]:
        (number, low, _), (_, _, high) = spans[0], spans[-1]
        return self._objects.pieces(self.spec, number, low, high)

    def _near(self, runs: Sequence[RowRun]) -> list[list[Span]]:
        """List the parts of `runs`, those that follow one another in a shard file and lie near in one list."""
        found: list[list[Span]] = []
        most = GAP_BYTES // self.spec.row_bytes
        for span in self._spans(runs):
            before, _, end = found[-1][-1] if found else (-1, 0, 0)
            if span[0] == before and 0 <= span[1] - end <= most:
                found[-1].append(span)
            else:
                found.append([span])
        return found


def is_shard(name: str) -> bool:
    """Tell whether an object, by its path below the store, is a shard file."""
    return name.startswith(f"{ARRAYS}/") and not name.endswith("/zarr.json")


def _flat(shard_path: str) -> str:
    return shard_path.replace("/", ".")


def _wrong(data: bytes, record: FileRecord) -> str | None:
    found = f"{google_crc32c.value(data):08x}"
    return None if found == record.crc32c else f"crc32c {found}, ledger says {record.crc32c}"


def _host_folder(parent: Path, name: str) -> tuple[Path, ExitStack]:
    """Return a folder that the processes of this machine share, and what gives it back when the process ends.

    The last process removes it.
    """
    durable.make_folder(parent)
    packed.sweep(parent, _PREFIX)
    folder, lock, stack = parent / name, parent / f"{name}.lock", ExitStack()
    stack.callback(packed.sweep, parent, name)
    stack.enter_context(durable.lock(lock, f"folder {folder}", shared=True, wait=True))
    atexit.register(stack.close)
    folder.mkdir(exist_ok=True)
    return folder, stack
