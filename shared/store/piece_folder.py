"""A bounded folder for parts of a store that lies elsewhere, shared by all processes of a machine that read it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from shared.files import durable

_ROOM = "room"
_PAGE = 4096


class Wanted(NamedTuple):
    """A part of a piece, and where it is to be put."""

    piece: str
    offset: int
    """Bytes into the piece."""
    out: memoryview


class PieceFolder:
    """Files that never change, of at most `most` bytes together, in whole pages of the disk.

    Before a file would exceed the bound, those that were added first are removed: rows are read once an epoch, so what
    was read ahead and is still to be read is what came last. Files are read under the shared lock and removed under the
    exclusive one, so that none takes room once it is removed. The file `room` holds the lock, and the bytes taken.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most, self._room = folder, most, folder / _ROOM
        durable.make_folder(folder)

    def has(self, piece: str) -> bool:
        """Tell whether a piece is there; it can be removed right after."""
        return (self._folder / piece).exists()

    def read(self, parts: Iterable[Wanted]) -> list[Wanted]:
        """Fill what can be filled; returns the parts of pieces that are not there."""
        missing = []
        with durable.lock(self._room, f"folder {self._folder}", shared=True, wait=True):
            for part in parts:
                try:
                    with open(self._folder / part.piece, "rb", buffering=0) as file:
                        file.seek(part.offset)
                        read = file.readinto(part.out)
                    if read != len(part.out):
                        missing.append(part)
                except FileNotFoundError:
                    missing.append(part)
        return missing

    def add(self, piece: str, data: bytes) -> None:
        """Keep a piece, unless it alone is over the bound. Raises `DiskFull`."""
        size = -(-len(data) // _PAGE) * _PAGE
        if size > self._most:
            return
        with durable.lock(self._room, f"folder {self._folder}", wait=True):
            if self.has(piece):
                return
            taken = int(self._room.read_bytes() or b"0")
            if taken + size > self._most:
                taken = self._make_room(size)
            durable.write_at(self._room, 0, b"%020d" % (taken + size))  # first: a kill in between counts too much
            durable.write_whole(self._folder / piece, data)

    def _make_room(self, size: int) -> int:
        """Remove the oldest files until an eighth of the bound is free beside `size` bytes; returns the bytes taken."""
        found = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(durable.TEMPORARY):  # of a process that was killed here
                    os.unlink(entry.path)
                elif entry.name != _ROOM:
                    status = entry.stat()
                    found.append((status.st_mtime_ns, -(-status.st_size // _PAGE) * _PAGE, entry.path))
        taken, aim = sum(pages for _, pages, _ in found), max(0, self._most * 7 // 8 - size)
        for _, pages, path in sorted(found):
            if taken <= aim:
                break
            os.unlink(path)
            taken -= pages
        return taken
