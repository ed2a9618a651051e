"""Where `pack` and `unpack` write: a folder, or an address of objects.

Both begin with a marker that says what is being written, and end with `store.json` and then without the marker. So what
a kill leaves is no store, and the same command knows it as its own.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from harvest.run.pipeline import lock_store
from shared.errors import ProjectError, UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from shared.files.lease import Lease
from shared.files.object_store import Objects, Taken, address, is_address, local_folder, require_below_bucket
from shared.store.layout import STORE, UNFINISHED
from shared.store.store import Store

AT_ONCE = 8
"""Files that are copied, packed or written at once: each is in memory, a few times over, with up to 128 MiB."""


class FolderTarget:
    """A folder that is being written; its lock is held."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, name: str, data: bytes) -> None:
        """Publish a file that is not changed later."""
        durable.publish_bytes(self._path / name, data)

    def copy(self, name: str, source: Path) -> None:
        """Publish a copy of a file; a large one is not held in memory."""
        durable.publish_file(self._path / name, partial(shutil.copyfile, source))

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Publish records."""
        durable.publish_files({self._path / name: data for name, data in files.items()})


class ObjectTarget:
    """Objects that are being written. Their lease must be held when each of them is begun, whatever parts it has."""

    def __init__(self, objects: Objects, lease: Lease) -> None:
        self._objects, self._lease = objects, lease

    def put(self, name: str, data: bytes) -> None:
        """Write an object that is not changed later. Raises `Stopped` when the lease is lost."""
        self._lease.require()
        self._objects.put(name, data)

    def copy(self, name: str, source: Path) -> None:
        """Write a file as an object, in parts. Raises as `put` does."""
        self._lease.require()
        self._objects.put(name, source)

    def commit(self, files: Mapping[str, bytes]) -> None:
        """Write records, each only over what is there just before. Raises as `put` does, and `ProjectError`."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._commit, files, files.values()))

    def _commit(self, name: str, data: bytes) -> None:
        self._lease.require()
        try:
            if found := self._objects.get_tagged(name):
                self._objects.replace(name, data, found[1])
            else:
                self._objects.create(name, data)
        except Taken as error:
            raise ProjectError(f"{error}; nothing was written over it: run the same command again") from error


Target = FolderTarget | ObjectTarget


@contextmanager
def writing(store: Store, place: Path, what: bytes, needed: Callable[[], int] | None) -> Iterator[Target]:
    """Lock a folder or an address and yield what writes there. It is new, or the same command was killed there.

    `what`: the marker's bytes; `needed`: the bytes that a folder must have room for; none: its room is not checked.
    Raises `UserError` when something else is there, when another process writes it, and when the disk has no room.
    """
    writer = _objects(store, place, what) if is_address(place) else _folder(store, place, what, needed)
    with writer as target:
        yield target


@contextmanager
def _folder(store: Store, path: Path, what: bytes, needed: Callable[[], int] | None) -> Iterator[FolderTarget]:
    path = local_folder(path)
    if store.place in path.resolve().parents:
        raise UserError(f"{path} lies inside the store; choose another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; choose another folder")
    marker = path / UNFINISHED
    with lock_store(path):
        ours = marker.is_file() and marker.read_bytes() == what
        if not ours and path.exists() and any(path.iterdir()):
            raise _exists(str(path), "folder", begun=marker.is_file())
        if needed:
            there = size_of(path) if ours else 0
            durable.require_space(path.parent, max(0, needed() - there), "the store (--force tries anyway)")
        if ours:
            durable.sweep(path)
            (path / STORE).unlink(missing_ok=True)
        durable.publish_bytes(marker, what)
        yield FolderTarget(path)
        marker.unlink()


@contextmanager
def _objects(store: Store, path: Path, what: bytes) -> Iterator[ObjectTarget]:
    shown = address(path)
    require_below_bucket(path)
    if shown.startswith(f"{address(store.place)}/"):
        raise UserError(f"{shown} lies inside the store; choose another address")
    objects = Objects(path)
    with Lease(Objects(path.parent), f"{path.name}.lock", f"store {shown}") as lease:
        target, marker = ObjectTarget(objects, lease), objects.get_tagged(UNFINISHED)
        ours = marker is not None and marker[0] == what
        if not ours and objects.sizes():
            raise _exists(shown, "address", begun=marker is not None)
        if ours:
            objects.delete([STORE])
        target.commit({UNFINISHED: what})
        yield target
        lease.require()
        objects.delete([UNFINISHED])


def _exists(shown: str, kind: str, *, begun: bool) -> UserError:
    left = ", left unfinished by another store, or by this one before it was extended" * begun
    return UserError(f"{shown} exists{left}; choose another {kind}, or remove it")
