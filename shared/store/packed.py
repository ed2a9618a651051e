"""The packed form of a store: the same hierarchy with compressed chunks, for archives and uploads.

Every shard file is still `chunks | index | crc32c of the index`, its chunks coded by Zarr v3's `blosc` (byte shuffle,
then zstd), so stock readers open a packed store as well. Training reads it through a bounded local folder.
"""

import atexit
import os
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
from numcodecs import Blosc, blosc
from numpy.typing import NDArray

from shared.bounds import Count, FileName
from shared.config import Config
from shared.console.terminal import say
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.store.arrays import ArraySpec
from shared.store.layout import FileRecord

FORMAT_VERSION: Literal[1] = 1
LEVEL = 4
LOCAL_BYTES = 16 * 2**30
PREFIX = "unpacked-store-"
PACK_AGAIN = "pack the store again, or take another copy"
"""For damage of a packed store, which is never repaired."""
_HEADER, _STORED_AS_IS = 16, 0x02
_ENTRY = 16
"""Bytes of a chunk's entry in the index: offset and size."""

blosc.use_threads = False  # the same bytes always, and threads of our own


class PackedRecord(Config):
    """`packed.json`: the shard files as they are, by path below the Zarr root."""

    format_version: Literal[1] = FORMAT_VERSION
    files: dict[FileName, FileRecord]
    unpacked_bytes: Count
    """Of all shard files before packing."""


def pack_shard(spec: ArraySpec, data: bytes) -> bytes:
    """Return a packed shard file from a raw one's bytes."""
    codec, size = _codec(spec), spec.inner_rows * spec.row_bytes
    chunks = [codec.encode(data[i : i + size]) for i in range(0, spec.payload_bytes, size)]
    sizes = np.array([len(chunk) for chunk in chunks], "<u8")
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
    return b"".join([*chunks, index, google_crc32c.value(index).to_bytes(4, "little")])


def unpack_shard(spec: ArraySpec, data: bytes, path: Path | str) -> bytes:
    """Return the raw shard file from a packed one's bytes. Raises `CorruptData` naming `path`."""
    index = read_index(spec, data[-footer_bytes(spec) :], len(data), path)
    chunks = [unpack_chunk(spec, data[offset : offset + size], path) for offset, size in index.tolist()]
    return b"".join([*chunks, spec.footer()])


def unpack_chunk(spec: ArraySpec, chunk: bytes, path: Path | str) -> bytes:
    """Return the rows of one inner chunk. Raises `CorruptData` naming `path`."""
    wanted = spec.inner_rows * spec.row_bytes
    # Blosc's header is checked first: the decoder believes it. Bytes: version, version, flags, item size, then sizes
    # of the rows, of a block and of the chunk, four bytes each.
    size, packed = int.from_bytes(chunk[4:8], "little"), int.from_bytes(chunk[12:16], "little")
    if size != wanted:
        raise CorruptData(f"{path}: a chunk decodes to {size:,} bytes, expected {wanted:,}; pack the store again")
    if len(chunk) < _HEADER or packed != len(chunk) or chunk[3] != _item(spec):
        raise CorruptData(f"{path}: a chunk's header does not match its layout; pack the store again")
    if chunk[2] & _STORED_AS_IS and len(chunk) != _HEADER + wanted:
        raise CorruptData(f"{path}: a chunk stored as it is has {len(chunk):,} bytes; pack the store again")
    try:
        return bytes(_codec(spec).decode(chunk))
    except (RuntimeError, ValueError) as error:
        raise CorruptData(f"{path}: a chunk does not decode ({error}); pack the store again") from error


def read_index(spec: ArraySpec, footer: bytes, size: int, path: Path | str) -> NDArray[np.uint64]:
    """Return offset and size of each chunk [chunks, 2] from the end of a packed shard file of `size` bytes."""
    index = footer[:-4]
    whole = len(footer) == footer_bytes(spec)
    entries = np.frombuffer(index if whole else b"", "<u8").reshape(-1, 2)
    end = size - footer_bytes(spec)
    expected = np.concatenate([np.zeros(1, "<u8"), np.cumsum(entries[:, 1])])
    small = bool((entries[:, 1] <= max(end, 0)).all())  # so that no sum can wrap around
    right = whole and small and (entries[:, 0] == expected[:-1]).all() and int(expected[-1]) == end
    if not right or google_crc32c.value(index).to_bytes(4, "little") != footer[-4:]:
        raise CorruptData(f"{path}: its index does not match its layout; pack the store again")
    return entries


def footer_bytes(spec: ArraySpec) -> int:
    """Return the size of the index and its checksum."""
    return spec.rows_per_shard // spec.inner_rows * _ENTRY + 4


def packed_metadata(spec: ArraySpec, blocks: int) -> dict[str, Any]:
    """Return the array's `zarr.json` in a packed store."""
    metadata = spec.metadata(blocks)
    configuration = {"cname": "zstd", "clevel": LEVEL, "shuffle": "shuffle", "typesize": _item(spec), "blocksize": 0}
    sharding = metadata["codecs"][0]["configuration"]
    sharding["codecs"] = [*sharding["codecs"], {"name": "blosc", "configuration": configuration}]
    return metadata


class LocalFolder:
    """Raw rows of a packed store in a folder of this process, of at most `most` bytes; removed when it ends.

    A shard gets a sparse file of its raw size, into which chunks are decoded when they are first asked for. Before the
    bytes decoded would exceed the bound, the files that were not used for longest are removed; one shard's rows always
    have room. `whole` is what the store takes unpacked, in bytes. `lock` keeps other threads from removing a file.

    Raises `UserError` when the disk has no room for as much as this folder may come to hold.
    """

    def __init__(self, root: Path, whole: int, parent: Path | None = None, most: int = LOCAL_BYTES) -> None:
        self._root, self._most = root, most
        with ExitStack() as stack:
            self.folder = stack.enter_context(own_folder(PREFIX, parent))  # what killed ones left makes room
            what = "unpacked rows (--local-folder, --local-bytes)"
            durable.require_space(self.folder.parent, min(most, whole), what)
            atexit.register(stack.pop_all().close)
        self._shards: OrderedDict[str, _Shard] = OrderedDict()
        self.bytes = self.evicted = 0
        self.lock = threading.Lock()

    def decode(self, spec: ArraySpec, number: int, low: int, high: int, forget: Callable[[], object]) -> None:
        """Have rows `low:high` in the shard's file; `forget` is called when that is removed. Hold `lock` around it."""
        name = spec.shard_path(number)
        if name not in self._shards:
            self._shards[name] = _Shard(spec, self._root / name, self.folder / name, forget)
        shard = self._shards[name]
        self._shards.move_to_end(name)
        chunks = shard.missing(low // spec.inner_rows, -(-high // spec.inner_rows))
        size = len(chunks) * spec.inner_rows * spec.row_bytes
        while self.bytes + size > self._most and len(self._shards) > 1:
            self._evict()
        shard.decode(chunks)
        self.bytes += size

    def _evict(self) -> None:
        _, oldest = self._shards.popitem(last=False)
        oldest.forget()
        oldest.local.unlink()
        self.bytes -= oldest.bytes
        self.evicted += 1
        if self.evicted == 1:
            say(
                f"note: the packed store {self._root.parent} needs more than {self._most:,} bytes unpacked, so parts "
                "of it are decoded again and again: raise --local-bytes, or unpack it"
            )


class _Shard:
    """One shard: which of its chunks are decoded."""

    def __init__(self, spec: ArraySpec, path: Path, local: Path, forget: Callable[[], object]) -> None:
        self._spec, self._path, self.local, self.forget = spec, path, local, forget
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(max(0, size - footer_bytes(spec)))
            self._index = read_index(spec, file.read(), size, path)
        self._done = np.zeros(len(self._index), bool)
        self._chunk = spec.inner_rows * spec.row_bytes
        durable.make_sparse(local, spec.payload_bytes)

    @property
    def bytes(self) -> int:
        """Decoded."""
        return int(self._done.sum()) * self._chunk

    def missing(self, low: int, high: int) -> list[int]:
        """List those of the chunks `low:high` that are not decoded."""
        return [i for i in range(low, high) if not self._done[i]]

    def decode(self, chunks: list[int]) -> None:
        """Decode some chunks."""
        if not chunks:
            return
        with open(self._path, "rb", buffering=0) as file:
            for i in chunks:
                offset, size = (int(value) for value in self._index[i])
                file.seek(offset)
                rows = unpack_chunk(self._spec, file.read(size), self._path)
                durable.write_at(self.local, i * self._chunk, rows)
                self._done[i] = True


@contextmanager
def own_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """Give an empty folder of this process in `parent`, by default the system's for temporary files, until the end.

    Those that killed processes left there, with the same prefix, are removed first.
    """
    parent = parent or Path(tempfile.gettempdir())
    durable.make_folder(parent)
    sweep(parent, prefix)
    folder = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}"
    lock = parent / f"{folder.name}.lock"
    with ExitStack() as stack:
        stack.callback(lock.unlink, missing_ok=True)
        stack.enter_context(durable.lock(lock, f"folder {folder}"))  # before the folder: no sweep comes in between
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.mkdir()
        yield folder


def sweep(parent: Path, prefix: str) -> None:
    """Remove folders of processes that were killed, or have ended: those whose lock nobody holds."""
    for lock in parent.glob(f"{prefix}*.lock"):
        with suppress(UserError, OSError), durable.lock(lock, str(lock)):  # in use, or another user's
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)


def _codec(spec: ArraySpec) -> Blosc:
    return Blosc("zstd", LEVEL, Blosc.SHUFFLE, 0, typesize=_item(spec))


def _item(spec: ArraySpec) -> int:
    return int(np.dtype(spec.dtype).itemsize)
