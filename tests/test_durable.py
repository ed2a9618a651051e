import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import CorruptData, DiskFull, UserError
from shared.files import durable


class Disk:
    """Records what reaches the disk, in order, and fails the `fail_at`-th of these calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.fail_at: int | None = None
        self.error: BaseException = OSError(errno.EIO, "injected")
        for name in ("fsync", "replace", "rename", "mkdir"):
            monkeypatch.setattr(os, name, self._watch(name, getattr(os, name)))
        monkeypatch.setattr(durable, "open", self._open, raising=False)

    def event(self, name: str, path: Any) -> None:
        self.events.append((name, Path(path).name))
        if self.fail_at == len(self.events):
            raise self.error

    def _watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(first: Any, *args: Any, **kwargs: Any) -> Any:
            self.event(name, os.readlink(f"/proc/self/fd/{first}") if name == "fsync" else first)
            return call(first, *args, **kwargs)

        return watched

    def _open(self, path: Path, mode: str, buffering: int, opener: Any) -> Any:
        file = open(path, mode, buffering=buffering, opener=opener)  # noqa: SIM115
        disk = self

        class Watched:
            def __enter__(self) -> "Watched":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, view: memoryview) -> int:
                disk.event("write", path)
                return file.write(view[: max(1, len(view) // 2)])  # the kernel may write less than it was given

            def fileno(self) -> int:
                return file.fileno()

        return Watched()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def every_failure(disk: Disk, error: BaseException) -> Iterator[int]:
    """Each number of a call to fail, until a run gets by without reaching it."""
    number = 0
    while number < 100:
        number += 1
        disk.events, disk.fail_at, disk.error = [], number, error
        yield number
        if len(disk.events) < number:
            assert number > 3
            return
    raise AssertionError("never finished")


def litter(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*" + durable.TEMPORARY))


# Publishing one file


def test_a_published_file_has_its_bytes_and_no_temporary_beside_it(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    durable.publish_bytes(path, b"first")
    durable.publish_bytes(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_buffers_are_written_one_after_the_other(tmp_path, disk):
    rows = np.arange(12, dtype=np.uint16).reshape(3, 4)
    durable.publish_bytes(tmp_path / "f", [rows, b"tail", memoryview(b"xyz"), b""])
    assert (tmp_path / "f").read_bytes() == rows.tobytes() + b"tailxyz"


@pytest.mark.fault(7)
def test_the_order_is_write_fsync_rename_fsync_folder(tmp_path, disk):
    durable.publish_bytes(tmp_path / "f", b"x")
    assert disk.events == [("write", "f.tmp"), ("fsync", "f.tmp"), ("replace", "f.tmp"), ("fsync", tmp_path.name)]


@pytest.mark.fault(7)
def test_all_files_are_synced_before_the_first_rename(tmp_path, disk):
    durable.publish_files({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    steps = [name for name, _ in disk.events]
    assert steps == ["write", "fsync", "write", "fsync", "replace", "replace", "fsync"]
    assert disk.events[-1] == ("fsync", tmp_path.name)


@pytest.mark.fault(7)
def test_a_new_folder_is_durable_in_its_parent_before_files_are_in_it(tmp_path, disk):
    durable.publish_bytes(tmp_path / "a" / "b" / "f", b"x")
    assert disk.events[:4] == [("mkdir", "a"), ("fsync", tmp_path.name), ("mkdir", "b"), ("fsync", "a")]
    assert disk.events[-1] == ("fsync", "b")


@pytest.mark.fault(14)
def test_a_failure_at_any_call_leaves_the_old_file_or_the_new_one(tmp_path, disk):
    path = tmp_path / "f"
    for number in every_failure(disk, OSError(errno.EIO, "injected")):
        path.write_bytes(b"old")
        try:
            durable.publish_bytes(path, b"new content")
        except OSError as error:
            assert error.errno == errno.EIO
            renamed = ("replace", "f.tmp") in disk.events[: number - 1]
            assert path.read_bytes() == (b"new content" if renamed else b"old")
        else:
            assert path.read_bytes() == b"new content"
        assert litter(tmp_path) == []


@pytest.mark.fault(2)
def test_a_kill_at_any_call_leaves_the_old_file_or_the_new_one_and_sweep_clears_up(tmp_path, disk):
    class Killed(BaseException):
        pass

    path = tmp_path / "f"
    for _ in every_failure(disk, Killed()):
        path.write_bytes(b"old")
        try:
            durable.publish_bytes(path, b"new content")
        except Killed:
            assert path.read_bytes() in (b"old", b"new content")
        durable.sweep(tmp_path)
        assert litter(tmp_path) == []
        assert path.read_bytes() in (b"old", b"new content")


def test_a_failure_among_several_files_leaves_each_whole(tmp_path, disk):
    paths = [tmp_path / "x" / "a", tmp_path / "x" / "b", tmp_path / "y" / "c"]
    for _ in every_failure(disk, OSError(errno.ENOSPC, "injected")):
        try:
            durable.publish_files({path: path.name.encode() * 10 for path in paths})
        except DiskFull:
            pass
        else:
            assert all(path.exists() for path in paths)
        for path in paths:
            assert not path.exists() or path.read_bytes() == path.name.encode() * 10
            path.unlink(missing_ok=True)
        assert litter(tmp_path) == []


@pytest.mark.fault(9)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_full_disk_is_reported_with_path_needed_and_free(tmp_path, disk, monkeypatch, number, at):
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1234)
    disk.fail_at, disk.error = at, OSError(number, "injected", str(tmp_path / "f.tmp") if at == 3 else None)
    with pytest.raises(DiskFull) as error:
        durable.publish_bytes(tmp_path / "f", [b"x" * 4000, np.zeros(500, np.uint16)])
    assert str(tmp_path / "f") in str(error.value)
    assert "5,000 bytes needed, 1,234 bytes free" in str(error.value)
    assert os.strerror(number) in str(error.value)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_other_errors_stay_what_they_are(tmp_path, disk, number):
    disk.fail_at, disk.error = 2, OSError(number, "injected")
    with pytest.raises(OSError, match="injected") as error:
        durable.publish_bytes(tmp_path / "f", b"x")
    assert error.value.errno == number


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)


@pytest.mark.fault(9)
def test_a_real_file_size_limit(tmp_path):
    """The kernel's own refusal, in the middle of a write."""
    (tmp_path / "f").write_bytes(b"old")
    code = """
        import resource, sys
        from pathlib import Path
        from shared.files.durable import publish_bytes
        from shared.errors import DiskFull
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            publish_bytes(Path(sys.argv[1]), bytes(300_000))
        except DiskFull as error:
            print(error)
    """
    done = run(code, tmp_path / "f")
    assert done.returncode == 0, done.stderr
    assert f"disk full while writing {tmp_path / 'f'}" in done.stdout
    assert "300,000 bytes needed" in done.stdout
    assert (tmp_path / "f").read_bytes() == b"old"
    assert litter(tmp_path) == []


# Publishing a folder


def fill(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "a").write_bytes(b"a")
    (folder / "inner" / "b").write_bytes(b"b")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault(7)
def test_a_published_folder_is_synced_from_the_leaves_before_it_is_renamed(tmp_path, disk):
    with durable.publish_folder(tmp_path / "out") as folder:
        fill(folder)
        assert not (tmp_path / "out").exists()
        disk.events = []
    assert contents(tmp_path / "out") == {"a": b"a", "inner/b": b"b"}
    assert disk.events[-2:] == [("rename", "out.tmp"), ("fsync", tmp_path.name)]
    assert disk.events[:-2] == [("fsync", "b"), ("fsync", "inner"), ("fsync", "a"), ("fsync", "out.tmp")]


def test_a_folder_appears_whole_or_not_at_all(tmp_path, disk):
    path = tmp_path / "out"
    for number in every_failure(disk, OSError(errno.ENOSPC, "injected")):
        try:
            with durable.publish_folder(path) as folder:
                fill(folder)
        except (DiskFull, OSError):
            renamed = ("rename", "out.tmp") in disk.events[: number - 1]
            assert path.exists() == renamed
        if path.exists():
            assert contents(path) == {"a": b"a", "inner/b": b"b"}
            for file in path.rglob("*"):
                file.is_file() and file.unlink()
            (path / "inner").rmdir()
            path.rmdir()
        assert litter(tmp_path) == []


def test_a_folder_on_a_full_disk_is_reported(tmp_path):
    with (
        pytest.raises(DiskFull, match=r"disk full while writing .*out: [\d,]+ bytes free"),
        durable.publish_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "injected")
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_filling_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), durable.publish_folder(tmp_path / "out") as folder:
        fill(folder)
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_replaced(tmp_path):
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "stale").write_bytes(b"stale")
    with durable.publish_folder(tmp_path / "out") as folder:
        fill(folder)
    assert contents(tmp_path / "out") == {"a": b"a", "inner/b": b"b"}


def test_a_folder_that_exists_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    with pytest.raises(OSError, match="not empty"), durable.publish_folder(tmp_path / "out") as folder:
        fill(folder)
    assert contents(tmp_path / "out") == {"old": b"old"}
    assert litter(tmp_path) == []


# JSON


def test_json_is_canonical(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"ä": "ö\n"}}
    durable.publish_json(tmp_path / "f", value)
    expected = '{\n  "a": {\n    "ä": "ö\\n"\n  },\n  "b": [\n    1,\n    2.5,\n    null,\n    true\n  ]\n}\n'
    assert (tmp_path / "f").read_text(encoding="utf-8") == expected
    assert durable.read_json(tmp_path / "f") == value
    assert durable.json_bytes({"x": 1, "y": 2}) == durable.json_bytes({"y": 2, "x": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_that_cannot_be_read_back_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.publish_json(tmp_path / "f", value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b'{"a": 1, "b": 2, "a": 1}', "duplicate key 'a'"),
        (b'[{"x": {"b": 2, "b": 3}}]', "duplicate key 'b'"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b'{"a": 1e999}', "number out of range: 1e999"),
        (b'{"a": -1e999}', "number out of range: -1e999"),
        (b"[" * 200_000, ""),
        (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, ""),
        (b"1" * 10_000, ""),
        (b"", ""),
        (b"\x00" * 64, ""),
        (b'{"a": "\xff"}', ""),
        (b'{"a": 1} trailing', ""),
        (b"{'a': 1}", ""),
    ],
)
def test_json_is_read_strictly(tmp_path, text, cause):
    (tmp_path / "f.json").write_bytes(text)
    with pytest.raises(CorruptData) as error:
        durable.read_json(tmp_path / "f.json")
    assert str(error.value).startswith(f"{tmp_path / 'f.json'}: not valid JSON (")
    assert cause in str(error.value)


@pytest.mark.fault(21)
def test_json_cut_off_anywhere_is_noticed(tmp_path):
    whole = durable.json_bytes({"a": [1, {"b": "text"}], "c": 2.5}).rstrip()
    for length in range(len(whole)):
        (tmp_path / "f").write_bytes(whole[:length])
        with pytest.raises(CorruptData):
            durable.read_json(tmp_path / "f")


def test_missing_json_is_not_corrupt(tmp_path):
    with pytest.raises(FileNotFoundError):
        durable.read_json(tmp_path / "none.json")


def test_numbers_survive_json_exactly(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 2**63, -(2**70)]
    durable.publish_json(tmp_path / "f", values)
    assert json.dumps(durable.read_json(tmp_path / "f")) == json.dumps(values)


# Locks, sweeping, space


@pytest.mark.fault(28, 29)
def test_a_second_process_is_told_at_once_and_a_killed_holder_lets_go(tmp_path):
    path = tmp_path / "cache" / "store.lock"
    code = """
        import sys
        from pathlib import Path
        from shared.files.durable import lock
        with lock(Path(sys.argv[1]), "the store"):
            print("held", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(
                UserError, match=rf"^the store is locked: process {holder.pid} \(python\S*\) is using .*cache; wait"
            ),
            durable.lock(path, "the store"),
        ):
            pass
        holder.kill()
    with durable.lock(path, "the store"):
        pass


def test_a_lock_is_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), durable.lock(tmp_path / "lock", "it"):
        _ = 1 / 0
    with durable.lock(tmp_path / "lock", "it"):
        pass


def test_a_lock_where_nothing_can_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(UserError, match=r"cannot write to .*file: .*; choose another folder"),
        durable.lock(tmp_path / "file" / "lock", "it"),
    ):
        pass


def test_sweep_removes_temporaries_of_any_depth_and_nothing_else(tmp_path):
    for name in ("a.tmp", "keep/b.tmp", "keep/c.bin", "d.tmp/e/f.tmp", "d.tmp/g", "tmp", "x.tmp.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    durable.sweep(tmp_path)
    assert sorted(contents(tmp_path)) == ["keep/c.bin", "tmp", "x.tmp.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep", "tmp", "x.tmp.bin"]


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path):
    stat = os.statvfs(tmp_path)
    free = durable.free_bytes(tmp_path / "not" / "yet")
    assert free == pytest.approx(stat.f_bavail * stat.f_frsize, rel=0.05)


@pytest.mark.fault(15)
def test_required_space_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    durable.require_space(tmp_path, 1000, "the store")
    with pytest.raises(UserError) as error:
        durable.require_space(tmp_path, 1001, "the store")
    expected = f"no room for the store in {tmp_path}: it needs 1,001 bytes and 1,000 are free"
    assert str(error.value).startswith(expected)
    assert error.value.exit_code == 2


def test_whether_a_lock_is_held_is_told_without_taking_it_from_anyone(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    assert not durable.is_held(path) and not path.exists()
    for known in (True, False):
        if not known:  # as on a system without a table of locks, or for a holder on another machine
            monkeypatch.setattr(durable, "holders", lambda path: [])
        with durable.lock(path, "it"):
            assert durable.is_held(path)
        assert not durable.is_held(path)


def test_a_lock_that_is_only_asked_about_is_had(tmp_path):
    path = tmp_path / "lock"
    path.touch()
    asking = os.open(path, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.01, os.close, [asking]).start()
    with durable.lock(path, "it"):
        pass
