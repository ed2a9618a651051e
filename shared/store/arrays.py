"""One array of the store and its shard files. Pure; nothing here touches a disk.

An array's rows lie block after block. Every block puts the same number of rows into an array, and a block is one or
more shard files, so a shard file is a pure function of its block's number. A shard file is
`rows in C order | index | crc32c of the index`, the layout of Zarr's `sharding_indexed` codec with one raw inner
chunk after the other: a memory map at offset 0 is exact, and stock readers get partial reads.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from shared.store.strata import QUANTUM

INNER_ROWS = 256
MAX_SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array of the store: its type, and how its rows are cut into shard files."""

    path: str
    """Below the Zarr root, for example `strata/004-016/source`."""
    dtype: str
    """A numpy and Zarr type name."""
    width: int | None
    """Values per row; none for an array of one dimension."""
    rows_per_block: int
    dimension_names: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Raise `ValueError` unless a block is whole inner chunks."""
        if self.rows_per_block < 1 or self.rows_per_block % self.inner_rows:
            raise ValueError(
                f"{self.path}: rows per block must be 1 to {INNER_ROWS} or a multiple of it, got {self.rows_per_block}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return np.dtype(self.dtype).itemsize * (self.width or 1)

    @property
    def inner_rows(self) -> int:
        """Rows per inner chunk."""
        return min(INNER_ROWS, self.rows_per_block)

    @property
    def rows_per_shard(self) -> int:
        """The most rows that divide a block, are a multiple of the inner chunk and stay within `MAX_SHARD_BYTES`."""
        chunks = self.rows_per_block // self.inner_rows
        most = max(1, MAX_SHARD_BYTES // (self.inner_rows * self.row_bytes))
        return self.inner_rows * next(n for n in range(min(chunks, most), 0, -1) if chunks % n == 0)

    @property
    def shards_per_block(self) -> int:
        """Shard files per block."""
        return self.rows_per_block // self.rows_per_shard

    @property
    def payload_bytes(self) -> int:
        """Bytes of rows in one shard file; the index follows."""
        return self.rows_per_shard * self.row_bytes

    @property
    def shard_bytes(self) -> int:
        """Exact size of one shard file."""
        return self.payload_bytes + len(self.footer())

    def shard_path(self, shard: int) -> str:
        """Return a shard file's path below the Zarr root."""
        return f"{self.path}/c/{shard}" + ("" if self.width is None else "/0")

    def block_shards(self, block: int) -> range:
        """Return the numbers of a block's shard files."""
        return range(block * self.shards_per_block, (block + 1) * self.shards_per_block)

    def footer(self) -> bytes:
        """Return the index of a shard file (offset and size of every inner chunk, uint64) and its crc32c."""
        return _footer(self.rows_per_shard // self.inner_rows, self.inner_rows * self.row_bytes)

    def shard_buffers(self, rows: NDArray[Any]) -> list[list[Any]]:
        """Return the buffers of each shard file that together hold one block's `rows`.

        Raises `ValueError` when `rows` is not one block of this array.
        """
        shape = (self.rows_per_block,) if self.width is None else (self.rows_per_block, self.width)
        if rows.shape != shape or rows.dtype != np.dtype(self.dtype):
            raise ValueError(f"{self.path}: a block is {self.dtype} {shape}, got {rows.dtype} {rows.shape}")
        rows = np.ascontiguousarray(rows)
        step, footer = self.rows_per_shard, self.footer()
        return [[rows[i : i + step], footer] for i in range(0, self.rows_per_block, step)]

    def metadata(self, blocks: int) -> dict[str, Any]:
        """Return the array's `zarr.json` when `blocks` blocks are committed."""
        wide = [] if self.width is None else [self.width]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [self.inner_rows, *wide],
            "codecs": [little],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [blocks * self.rows_per_block, *wide],
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.rows_per_shard, *wide]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if np.dtype(self.dtype).kind in "iu" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(self.dimension_names),
            "attributes": dict(self.attributes),
        }


@lru_cache
def _footer(chunks: int, size: int) -> bytes:
    offsets = np.arange(chunks, dtype="<u8") * np.uint64(size)
    index = np.stack([offsets, np.full_like(offsets, size)], axis=1).tobytes()
    return index + google_crc32c.value(index).to_bytes(4, "little")


def group_metadata() -> dict[str, Any]:
    """Return the `zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": {}}


assert QUANTUM % INNER_ROWS == 0, "a block's rows must be whole inner chunks"
