"""How much memory this process may still take on Linux: the machine's, within the limits of its control groups.

A job of SLURM or a container may use less than the machine has; beyond its limit, the kernel kills it.
https://docs.kernel.org/admin-guide/cgroup-v2.html
"""

import os
from collections.abc import Iterator
from pathlib import Path

_V2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""The folder of all groups, and in each: its limit, what is used, and in memory.stat what can be dropped of that."""


def free_memory(root: Path = Path("/")) -> int:
    """Return how many bytes are available. `root`: where `proc` and `sys` are."""
    return max(0, min([_of_machine(root), *_of_groups(root)]))


def _of_machine(root: Path) -> int:
    table = root / "proc/meminfo"
    lines = table.read_text().splitlines() if table.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return int(found) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what the group of this process and each group above it have left; nothing for those without a limit."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, *files = _V2 if number == "0" else _V1
        parts = Path(path).parts[1:]
        for depth in range(len(parts) + 1):  # in a container, only the first may be there
            left = _left(root.joinpath(folder, *parts[:depth]), *files)
            if left is not None:
                yield left


def _left(group: Path, limit: str, used: str, droppable: str) -> int | None:
    """Return a group's limit less what it uses, without cached files; nothing where it has none, or does not say."""
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        taken = int((group / used).read_text()) - int(statistics.get(droppable, 0))
        return int((group / limit).read_text()) - taken
    except (OSError, ValueError):  # "max": no limit
        return None
