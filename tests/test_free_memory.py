"""What memory is left, by the machine and by the control groups of a job or a container."""

from pathlib import Path

import pytest

from train.sweeps.free_memory import free_memory

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
