"""Faults in a process's file operations: the library of `injector.c`, compiled when it is needed.

Operations are those that change something below one folder, counted over all threads of the process: at the Nth, it is
killed, signalled, or told that the call failed.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("injector.c")
WAYS = {"before": 0, "after": 1, "amid": 2, "fail": 3, "fail from": 4}
KINDS = {
    "o": "open",
    "w": "write",
    "f": "fsync",
    "r": "rename",
    "m": "mkdir",
    "u": "unlink",
    "t": "truncate",
    "a": "allocate",
    "l": "link",
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is to happen, and when."""

    folder: str
    """Operations below it count."""
    kinds: str = ""
    """Those that count, such as `wf`; all, if empty."""
    match: str = ""
    """Part of the path of those that count."""
    at: int = 0
    """The number, from 1, of the one that is hit; 0 for none."""
    way: str = "before"
    """`before`, `after` or `amid` (a write) it: a signal. `fail`: an error, once; `fail from`: there and later."""
    value: int = SIGKILL
    """The signal, or the errno."""
    log: str = ""
    """A file that operations are written to."""

    def arm(self) -> None:
        """Begin counting, in a process that was started with the library."""
        library = ctypes.CDLL(None)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if self.log else -1
        texts = (os.path.realpath(self.folder).encode(), self.kinds.encode(), self.match.encode())
        library.injector_arm(*texts, ctypes.c_long(self.at), WAYS[self.way], int(self.value), log)


@dataclass(frozen=True, slots=True)
class Operation:
    """A line of a log."""

    kind: str
    failed: bool
    path: str
    other: str
    """Of a rename or link, the new name."""
    place: int
    """Of a write, its offset; of a truncation, the size; of an open, whether it truncates."""
    inode: int
    """Of an open, fsync or unlink."""
    data: bytes
    """What was written."""


def missing() -> str | None:
    """Why there can be no library here, or None."""
    if os.uname().sysname != "Linux":
        return "faults are injected with LD_PRELOAD on Linux"
    return None if shutil.which("cc") else "no C compiler (cc) to build the fault injector with"


def library() -> Path:
    """The compiled library, in `build/`."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    path = ROOT / "build" / f"injector-{digest}.so"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        line = ["cc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", temporary, SOURCE, "-ldl", "-lpthread"]
        subprocess.run(list(map(str, line)), check=True)
        temporary.rename(path)
    return path


def read_log(path: Path) -> list[Operation]:
    """The operations of a log, in their order."""
    found, data, start = [], path.read_bytes(), 0
    while start < len(data):
        end = data.index(b"\n", start)
        shown, name, other, place, size = data[start:end].decode().split("\t")
        kind, failed = shown.lower(), shown.isupper()
        count = int(size) if kind == "w" and not failed else 0
        inode = int(size) if kind in "ofu" else 0
        found.append(Operation(kind, failed, name, other, int(place), inode, data[end + 1 : end + 1 + count]))
        start = end + 1 + count
    return found
