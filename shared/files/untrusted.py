"""Opens what strangers may have made: follows no link, waits for no pipe, takes nothing huge."""

import errno
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from shared.errors import CorruptData

MOST_BYTES = 2**24
"""Of a file of metadata; those that name every shard file of a store may be larger."""
MOST_NESTED = 64
"""Levels of lists and objects within each other."""


def regular(path: str | Path, flags: int, *, follow: bool = False) -> int:
    """Open a regular file, as the `opener` of `open`; only with `follow` may `path` be a symbolic link.

    Raises `CorruptData` on anything else, and `OSError` when it is not there or cannot be opened. Waits for nobody.
    """
    link = 0 if follow else os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | link, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise CorruptData(f"{path} is a symbolic link; put the file itself there") from error
        if error.errno == errno.ENXIO:  # a socket, or a pipe that nobody reads
            raise CorruptData(f"{path} is not a regular file; put one there") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptData(f"{path} is not a regular file; put one there")
    return descriptor


regular_or_link = partial(regular, follow=True)


def read_file(path: Path, most: int = MOST_BYTES, *, follow: bool = False) -> bytes:
    """Return the content of a regular file of at most `most` bytes; only with `follow` may `path` be a symbolic link.

    Raises what `regular` raises, and `CorruptData` when the file is larger.
    """
    with open(regular(path, os.O_RDONLY, follow=follow), "rb", buffering=0) as file:
        data = bytearray()
        while len(data) <= most and (chunk := file.read(min(2**22, most + 1 - len(data)))):
            data += chunk
    if len(data) > most:
        raise CorruptData(f"{path}: more than {most:,} bytes, and such a file has fewer; take another copy of it")
    return bytes(data)


def nests_too_deep(value: Any) -> bool:
    """Tell whether lists and objects of `value` lie within each other more than `MOST_NESTED` deep."""
    level = [value]
    for _ in range(MOST_NESTED):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in inner for child in children]
    return any(isinstance(item, dict | list) for item in level)


def refuse_links(folder: Path, but_in: Sequence[str] = ()) -> None:
    """Raise `CorruptData` when anything below `folder` is neither a regular file nor a folder.

    A symbolic link can lead out of the folder, and opening a pipe waits for its writer. `folder` itself may be a link.
    There is nothing below a folder that is not there, or that is removed meanwhile. The folders `but_in`, by their
    names in `folder`, are not looked into.
    """
    left, spared = [os.fspath(folder)], {os.path.join(folder, name) for name in but_in}
    while left:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise CorruptData(f"{entry.path} is a symbolic link; take another copy of {folder}, without links")
                if entry.is_dir(follow_symlinks=False):
                    left += [entry.path] if entry.path not in spared else []
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    raise CorruptData(f"{entry.path} is not a regular file; take another copy of {folder}")
