"""Cores and memory that may be used, by the machine and by the control groups of a job or a container."""

import os
from pathlib import Path

import pytest

from shared.resources import free_memory, usable_cores

MIB = 2**20


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 1,000 MiB available."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 9999999 kB\nMemAvailable: {1000 * 1024} kB")
    return tmp_path


def group(folder: Path, version: int, limit: object, used: int = 0, cached: int = 0) -> None:
    limits, use = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes", "memory.usage_in_bytes"
    )  # fmt: skip
    write(folder / limits, limit)
    write(folder / use, used * MIB)
    write(
        folder / "memory.stat", f"anon 7\n{'inactive_file' if version == 2 else 'total_inactive_file'} {cached * MIB}"
    )


def test_without_groups_it_is_what_the_machine_has(machine: Path) -> None:
    assert free_memory(machine) == 1000 * MIB


def test_a_limit_of_the_group_or_of_one_above_it_holds(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/slurm/job_7/step_0")
    groups = machine / "sys/fs/cgroup"
    group(groups / "slurm/job_7/step_0", 2, "max", used=50)
    assert free_memory(machine) == 1000 * MIB
    group(groups / "slurm/job_7", 2, 300 * MIB, used=100, cached=60)
    group(groups / "slurm", 2, 800 * MIB, used=300)
    assert free_memory(machine) == (300 - (100 - 60)) * MIB
    group(groups / "slurm", 2, 350 * MIB, used=300)
    assert free_memory(machine) == 50 * MIB


def test_the_older_groups_are_read_too(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "11:cpu,cpuacct:/job\n4:memory:/job\n0::/")
    group(machine / "sys/fs/cgroup/memory/job", 1, 200 * MIB, used=30, cached=10)
    assert free_memory(machine) == 180 * MIB


def test_in_a_container_the_limit_is_in_the_topmost_folder(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "4:memory:/docker/abc")
    group(machine / "sys/fs/cgroup/memory", 1, 90 * MIB, used=100)
    assert free_memory(machine) == 0


def test_this_machine_has_some() -> None:
    assert free_memory() > 64 * MIB
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


@pytest.fixture
def bound(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 16 cores, 12 of which the process is bound to."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    return machine


def test_without_a_limit_of_time_all_cores_that_the_process_is_bound_to_are_usable(bound: Path) -> None:
    assert usable_cores(bound) == 12
    write(bound / "proc/self/cgroup", "0::/a")
    write(bound / "sys/fs/cgroup/a/cpu.max", "max 100000")
    assert usable_cores(bound) == 12


@pytest.mark.parametrize(
    ("limit", "cores"), [("400000 100000", 4), ("250000 100000", 3), ("50000 100000", 1), ("9900000 100000", 12)]
)
def test_a_limit_of_time_is_rounded_up_to_cores(bound: Path, limit: str, cores: int) -> None:
    write(bound / "proc/self/cgroup", "0::/pod/one")
    write(bound / "sys/fs/cgroup/pod/cpu.max", limit)
    write(bound / "sys/fs/cgroup/pod/one/cpu.max", "max 100000")
    assert usable_cores(bound) == cores


def test_the_older_limit_of_time_is_read_too(bound: Path) -> None:
    write(bound / "proc/self/cgroup", "5:cpuset:/\n4:memory:/docker/a\n2:cpuacct,cpu:/docker/a")
    write(bound / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", -1)
    write(bound / "sys/fs/cgroup/cpu/cpu.cfs_period_us", 100000)
    assert usable_cores(bound) == 12
    write(bound / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", 200000)
    assert usable_cores(bound) == 2
