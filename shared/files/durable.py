"""Publishing files so that a reader sees the old state or the new one, also after a kill, a full disk or a power cut.

The only module that publishes files, takes locks or measures free space. Nothing is written through a symbolic link,
and no pipe is waited for. The order is: write a temporary file in the
same folder, fsync it, rename it, fsync the folder. A record that says some data exist is published after the data.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from shared.errors import CorruptData, DiskFull, UserError
from shared.files.untrusted import MOST_BYTES, MOST_NESTED, nests_too_deep, read_file, regular

TEMPORARY = ".tmp"
_ASKING_SECONDS = 0.05
_STAYING: list[Path] = []
"""Folders that are not made a second time; see `staying`."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Buffers = bytes | Sequence[Any]
"""One bytes object, or several buffers (bytes, contiguous arrays) that are written one after the other."""


def publish_bytes(path: Path, data: Buffers) -> None:
    """Publish one file. Raises `DiskFull` when there is no room, and then leaves what was there before."""
    publish_files({path: data})


def publish_json(path: Path, value: Any) -> None:
    """Publish `value` as indented JSON with sorted keys: equal values are equal bytes."""
    publish_bytes(path, json_bytes(value))


def publish_files(files: Mapping[Path, Buffers]) -> None:
    """Publish several files; each appears whole or not at all. Folders are made as needed."""
    temporary: list[Path] = []
    try:
        for path, data in files.items():
            make_folder(path.parent)
            temporary.append(path.with_name(path.name + TEMPORARY))
            _write_synced(temporary[-1], data)
        for path in files:
            os.replace(path.with_name(path.name + TEMPORARY), path)
        for folder in sorted({path.parent for path in files}):
            fsync_folder(folder)
    except OSError as error:
        for path in temporary:
            path.unlink(missing_ok=True)
        raise explain(error, next(iter(files)), sum(map(_size, files.values()))) from error


def publish_changed(files: Mapping[Path, bytes]) -> None:
    """Publish those of several small files that do not hold their bytes already."""
    publish_files({p: data for p, data in files.items() if not (p.is_file() and p.read_bytes() == data)})


def publish_file(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Publish the file that `write` makes at the path it is given: for content that is not to be copied in memory.

    Raises `DiskFull`, with the bytes that were `needed` if they are known.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    make_folder(path.parent)
    try:
        temporary.unlink(missing_ok=True)  # `write` would follow a link
        with saving_tensors(temporary):
            write(temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, path, needed) from error


def publish_link(path: Path, source: Path) -> None:
    """Publish `source` under a second name: a hard link, or a copy where there can be none."""

    def link(temporary: Path) -> None:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, temporary)

    publish_file(path, link)


@contextmanager
def saving_tensors(path: Path) -> Iterator[None]:
    """Wrap safetensors' `save_file`: a full disk, which it reports in words, becomes the `OSError` it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # it leaves files that others cannot read


@contextmanager
def publish_folder(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary folder to fill; on leaving, fsync all of it and rename it to `path`, which must not exist.

    Raises `DiskFull`, with the bytes that were `needed` if they are known, and leaves nothing then.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    make_folder(path.parent)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                fsync_file(Path(folder, name))
            fsync_folder(Path(folder))
        os.rename(temporary, path)
        fsync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise explain(error, path, needed) from error
        raise


def remove_folder(path: Path) -> None:
    """Remove a published folder; a kill on the way leaves all of it, or a temporary one that `sweep` removes."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    move(path, temporary)
    shutil.rmtree(temporary)


def reserve(path: Path, size: int) -> None:
    """Have a file of `size` bytes that are really taken, so that removing it makes room. Raises `DiskFull`."""
    if path.is_file() and path.stat().st_size == size:
        return
    make_folder(path.parent)
    try:
        with open(path, "wb", opener=regular) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise explain(error, path, size) from error


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a log, all of it or nothing; not forced to disk. Raises `DiskFull`."""
    try:
        with open(path, "ab", buffering=0, opener=regular) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                _write(file, line)
            except OSError:
                if file.seek(0, os.SEEK_END) != before:
                    file.truncate(before)  # a part of a line would spoil the next one
                raise
    except OSError as error:
        raise explain(error, path, len(line)) from error


def truncate(path: Path, size: int) -> None:
    """Cut a log to its first `size` bytes, durably; that takes no room."""
    with open(path, "r+b", buffering=0, opener=regular) as file:
        file.truncate(size)
        os.fsync(file.fileno())


def make_sparse(path: Path, size: int) -> None:
    """Make an empty file of `size` bytes that takes no room yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", opener=regular) as file:
            file.truncate(size)
    except OSError as error:
        raise explain(error, path) from error


def write_at(path: Path, offset: int, data: bytes) -> None:
    """Write into a file that need not outlive the process. Raises `DiskFull` when there is no room."""
    try:
        with open(path, "r+b", buffering=0, opener=regular) as file:
            file.seek(offset)
            _write(file, data)
    except OSError as error:
        raise explain(error, path, len(data)) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that need not outlive the machine; it appears whole. Raises `DiskFull` when there is no room."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb", buffering=0, opener=regular) as file:
            _write(file, data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, path, len(data)) from error


def move(path: Path, target: Path) -> None:
    """Rename a file or folder within its folder, durably."""
    os.rename(path, target)
    fsync_folder(target.parent)


def json_bytes(value: Any) -> bytes:
    """Return canonical JSON: sorted keys, two-space indent, no NaN, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Parse a JSON file as `parse_json` does: a regular file of at most `most` bytes.

    Raises `CorruptData` when it is not that, and `FileNotFoundError` when it is not there.
    """
    data = read_file(path, most)
    try:
        return parse_json(data)
    except ValueError as error:
        raise CorruptData(f"{path}: not valid JSON ({error}); restore the file or make its folder again") from error


def parse_json(data: bytes) -> Any:
    """Parse JSON strictly: in UTF-8, of bounded nesting.

    Raises `ValueError` when it is not that, and on duplicate keys, NaN, numbers out of range and lone surrogates.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"duplicate key {key[:80]!r}")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"number out of range: {text[:80]}")
        return value

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if nests_too_deep(value):
        raise ValueError(f"nested more than {MOST_NESTED} deep")
    if b"\\ud" in data.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


@contextmanager
def staying(path: Path) -> Iterator[None]:
    """Never make the folder `path` again, in any thread: what would be published below it fails once it is gone.

    For a folder that can be removed or renamed while it is written to: else a part of it would be made in its place.
    """
    _STAYING.append(path)
    try:
        yield
    finally:
        _STAYING.remove(path)


def make_folder(path: Path) -> None:
    """Make `path` and its parents, each one's entry durable in its parent; raises as `staying` says."""
    missing = []
    while not path.is_dir():
        if path in _STAYING:
            raise FileNotFoundError(errno.ENOENT, "removed or renamed meanwhile", str(path))
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_file(path: Path) -> None:
    """Force a file's content to disk."""
    _fsync(path, os.O_RDONLY)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries to disk."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


class Lock:
    """A lock that is held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def share(self) -> None:
        """Let others hold the lock shared, and go on holding it shared, too."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


@contextmanager
def lock(path: Path, what: str, *, shared: bool = False, make: bool = True, wait: bool = False) -> Iterator[Lock]:
    """Hold the lock of the file `path`; the kernel releases it when the holder dies.

    Any number of processes can hold it `shared`, or one alone. A missing file is made if `make` says so. Raises
    `UserError` when another process holds it, unless told to `wait`, and when the file is missing and is not or cannot
    be made.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        descriptor = _open_to_lock(path, make)
        while True:
            if wait:
                fcntl.flock(descriptor, kind)
            else:
                _take(descriptor, kind)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break  # and not a file that its holder has removed since it was opened
            os.close(descriptor)
            descriptor = _open_to_lock(path, make)
    except BlockingIOError as error:
        os.close(descriptor)
        users = ", ".join(holders(path)) or "another process"
        raise UserError(f"{what} is locked: {users} is using {path.parent}; wait for it or stop it") from error
    except OSError as error:
        if not make:
            raise UserError(f"{what} is gone: {path} cannot be opened ({error.strerror})") from error
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose another folder") from error
    try:
        yield Lock(descriptor)
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Tell whether another process holds the lock of the file `path` alone.

    It may be on this machine, or on another one by a shared file system. Makes no file. Where the system's table of
    locks names no holder, the lock is taken shared for a moment, which `lock` waits for.
    """
    if holders(path):
        return True
    try:
        descriptor = regular(path, os.O_RDONLY)
    except (OSError, CorruptData):
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def holders(path: Path) -> list[str]:
    """List who holds a lock of the file `path`, such as `process 4711 (python)`; told by Linux only."""
    table, found = Path("/proc/locks"), []
    try:
        status = path.stat()
    except OSError:  # removed by its holder
        return []
    if not table.exists():
        return []
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in table.read_text().splitlines():
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == place:
            with suppress(OSError):  # the process may have ended
                name = Path("/proc", fields[4], "comm").read_text().strip()
                found.append(f"process {fields[4]} ({name})")
    return found


def _take(descriptor: int, kind: int) -> None:
    """Lock a file. Raises `BlockingIOError` when another process holds it for longer than `is_held` does to ask."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(_ASKING_SECONDS)
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)


def _open_to_lock(path: Path, make: bool) -> int:
    if path.exists() or not make:
        return regular(path, os.O_RDONLY)
    make_folder(path.parent)
    return regular(path, os.O_RDONLY | os.O_CREAT)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left behind, safetensors' own temporary files too.

    Call it only while holding the folder's lock.
    """
    for path in [*folder.rglob("*" + TEMPORARY), *folder.rglob(TEMPORARY + "*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Return the bytes a normal user may still write on the disk of `path` (or of its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise `UserError` when `needed` bytes do not fit on the disk of `path`."""
    free = free_bytes(path)
    if needed > free:
        raise UserError(
            f"no room for {what} in {path}: it needs {needed:,} bytes and {free:,} are free; "
            "free some space, choose another folder, or ask for less"
        )


def explain(error: OSError, path: Path, needed: int | None = None) -> Exception:
    """Return `DiskFull` with path, needed and free bytes when that is what `error` means; otherwise `error`."""
    if error.errno not in _FULL:  # an fsync that fails names no file
        return error if error.filename else OSError(error.errno, error.strerror, str(path))
    size = f"{needed:,} bytes needed, " if needed is not None else ""
    remedy = "raise the limit on the size of files (ulimit -f)" if error.errno == errno.EFBIG else "free some space"
    return DiskFull(
        f"disk full while writing {error.filename or path}: {size}{free_bytes(path.parent):,} bytes free "
        f"({os.strerror(error.errno)}); {remedy} and run it again"
    )


def _size(data: Buffers) -> int:
    return sum(memoryview(part).nbytes for part in _parts(data))


def _parts(data: Buffers) -> Sequence[Any]:
    return [data] if isinstance(data, bytes) else data


def _write_synced(path: Path, data: Buffers) -> None:
    with open(path, "wb", buffering=0, opener=regular) as file:
        for part in _parts(data):
            _write(file, part)
        os.fsync(file.fileno())


def _write(file: Any, data: Any) -> None:
    """Write all of `data`: the system may take less than it is given."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        with suppress(OSError):
            os.close(descriptor)
