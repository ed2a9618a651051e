"""Reads back which steps a local W&B file holds: wandb loses rows on a full disk, and reports success.

The file is a log of LevelDB's format after a header of seven bytes: blocks of 32 KiB, in which each chunk has a CRC-32
(of type and data), a length, a type (whole, first, middle, last) and a part of a serialised `Record`.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK, CHUNK = b":W&B\xe1\xbe\x00", 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = range(1, 5)


def steps(path: Path) -> set[int]:
    """Return the steps with a row of history in the file `path`."""
    return {record.history.step.num for record in records(path) if record.WhichOneof("record_type") == "history"}


def records(path: Path) -> Iterator[Any]:
    """Yield the whole records of the file; what is torn is left out."""
    from wandb.proto import wandb_internal_pb2

    for data in _serialised(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def _serialised(data: bytes) -> Iterator[bytes]:
    if not data.startswith(HEADER):  # empty, or of another version
        return
    place = len(HEADER)
    parts: bytes | None = None
    while place + CHUNK.size <= len(data):
        rest = BLOCK - place % BLOCK
        if rest < CHUNK.size:  # too little for a chunk: padding
            place += rest
            continue
        crc, length, kind = CHUNK.unpack_from(data, place)
        body = data[place + CHUNK.size : place + CHUNK.size + length]
        if zlib.crc32(bytes([kind]) + body) != crc:
            place, parts = place + rest, None
            continue
        place += CHUNK.size + length
        if kind in (WHOLE, FIRST):
            parts = body
        elif parts is not None:
            parts += body
        if kind in (WHOLE, LAST) and parts is not None:
            yield parts
            parts = None
