"""A small disk of its own: a tmpfs in a mount namespace that a helper process holds open; needs no root."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: int, inodes: int = 0) -> Iterator[Path]:
    """A disk of `size` bytes, and of so many `inodes` if given, mounted at `folder`; yields its path for any process.

    Skips the test where the system lets nobody mount one.
    """
    folder.mkdir(parents=True)
    options = f"size={size}" + (f",nr_inodes={inodes}" if inodes else "")
    script = f'mount -t tmpfs -o {options} none "$0" && echo mounted && exec cat'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder)]
    try:
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        pytest.skip("no `unshare` to mount a small disk with")
    with holder:
        assert holder.stdout and holder.stderr
        if holder.stdout.readline() != b"mounted\n":
            pytest.skip(f"a small disk cannot be mounted here: {holder.stderr.read().decode().strip()}")
        yield Path(f"/proc/{holder.pid}/root{folder}")
        holder.kill()


def fill(disk: Path, leave: int = 0) -> Path:
    """Take the room of `disk` but for `leave` bytes, whole pages; returns the file that takes it."""
    path = disk / "filler"
    found = os.statvfs(disk)
    free = found.f_bavail * found.f_frsize
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, (free - leave) // 4096 * 4096))
    return path
