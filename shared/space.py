"""Bytes that folders take, and figures that cost something to measure: anew every few seconds, not at every look."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from stat import S_ISREG
from typing import Generic, TypeVar

T = TypeVar("T")


def size_of(*paths: Path) -> int:
    """Bytes of all files below `paths`, one with several names once, and perhaps not what is renamed meanwhile."""
    sizes = {}
    for folder, _, names in (found for path in paths for found in os.walk(path)):
        for name in names:
            with suppress(FileNotFoundError):
                status = os.stat(os.path.join(folder, name))
                sizes[status.st_dev, status.st_ino] = status.st_size if S_ISREG(status.st_mode) else 0
    return sum(sizes.values())


class Measured(Generic[T]):
    """The last value of `measure`, which is called when that is older than `seconds`."""

    def __init__(self, measure: Callable[[], T], seconds: float = 5.0) -> None:
        self._measure, self._seconds = measure, seconds
        self._value, self._at = measure(), time.monotonic()

    def value(self) -> T:
        """The value, measured anew if it is old; one that cannot be measured stays what it was."""
        if time.monotonic() - self._at >= self._seconds:
            self._at = time.monotonic()
            with suppress(OSError):
                self._value = self._measure()
        return self._value
