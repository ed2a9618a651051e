"""The cores and the memory that this process may use: the machine's, within the limits of a job or a container.

On Linux these limits are those of control groups: https://docs.kernel.org/admin-guide/cgroup-v2.html. A process that
takes more memory is killed, and one with more threads than its share of time has cores waits at every barrier.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_ROOT = Path("/")


class _Files(NamedTuple):
    """The folder of all control groups, and names of files and statistics in each."""

    folder: str
    memory_limit: str
    memory_used: str
    droppable: str


_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1_MEMORY = _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V1_CPU = "sys/fs/cgroup/cpu"


def usable_cores(root: Path = _ROOT) -> int:
    """Return the number of cores: those that the process is bound to, or fewer if its time is limited; at least 1.

    `root`: where `proc` and `sys` are.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [_read(group / "cpu.max") for group in _groups(root, "", _V2.folder)]
    older = _groups(root, "cpu", _V1_CPU)
    shares += [f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}" for group in older]
    return max(1, min([bound, *(math.ceil(share) for one in shares if (share := _share(one)))]))


def free_memory(root: Path = _ROOT) -> int:
    """Return how many bytes are available. Cached files count as available. `root`: where `proc` and `sys` are."""
    left = [_left(group, _V2) for group in _groups(root, "", _V2.folder)]
    left += [_left(group, _V1_MEMORY) for group in _groups(root, "memory", _V1_MEMORY.folder)]
    return max(0, min([_memory_of_machine(root), *(one for one in left if one is not None)]))


def _memory_of_machine(root: Path) -> int:
    found = next((line for line in _read(root / "proc/meminfo").splitlines() if line.startswith("MemAvailable:")), "")
    return int(found.split()[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path, controller: str, folder: str) -> Iterator[Path]:
    """Yield the folders of all groups, down to that of this process. In a container only the first may be there.

    `controller`: of the older groups; empty for those of version 2.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and (number == "0") == (not controller):
            parts = Path(path).parts[1:]
            yield from (root.joinpath(folder, *parts[:depth]) for depth in range(len(parts) + 1))


def _share(text: str) -> float | None:
    """Return the cores that a limit `USED PERIOD` of time amounts to; nothing where there is none."""
    try:
        used, period = (int(word) for word in text.split())
    except ValueError:  # "max", or a group without that file
        return None
    return used / period if used > 0 and period > 0 else None


def _left(group: Path, files: _Files) -> int | None:
    """Return a group's limit less what it uses, without cached files; nothing where it has none, or does not say."""
    try:
        statistics = dict(line.split() for line in _read(group / "memory.stat").splitlines())
        taken = int(_read(group / files.memory_used)) - int(statistics.get(files.droppable, 0))
        return int(_read(group / files.memory_limit)) - taken
    except ValueError:  # "max", or a group without these files
        return None


def _read(path: Path) -> str:
    """Return a file's text; nothing where it is not there, or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
