"""Bytes that folders take, and figures that cost something to measure: every few seconds, not at every look."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Generic, TypeVar

T = TypeVar("T")


def size_of(*paths: Path) -> int:
    """Return the bytes of all files below `paths`.

    A file with several names counts once. One that is renamed meanwhile may be missed.
    """
    sizes = {}
    for folder, _, names in (found for path in paths for found in os.walk(path)):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size if S_ISREG(status.st_mode) else 0
    return sum(sizes.values())


class Measured(Generic[T]):
    """The last value of `measure`, which is called when that is older than `seconds`."""

    def __init__(self, measure: Callable[[], T], seconds: float = 10.0) -> None:
        self._measure, self._seconds = measure, seconds
        self._found: tuple[float, T] | None = None

    def value(self) -> T:
        """Return the value, measured again if it is old; what cannot be measured any more stays as it was."""
        now = time.monotonic()
        if self._found is None:
            self._found = now, self._measure()
        elif now - self._found[0] >= self._seconds:
            with suppress(OSError):
                self._found = now, self._measure()
        return self._found[1]
