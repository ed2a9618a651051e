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
from shared.files.object_store import Objects, Taken, address, is_address, local_folder
from shared.store.layout import STORE
from shared.store.store import Store

AT_ONCE = 8
"""Files that are copied at once, and records that are written."""
_MARKER = "unfinished.json"


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
    """Objects that are being written; their lease is held, and asked for before every request that writes."""

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
        """Write records, each only if it is still what it was. Raises as `put` does, and `ProjectError`."""
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
    """Hold a folder or an address that is new, or was left by a kill of the same command, and give it.

    `what`: the marker's bytes; `needed`: the bytes that a folder must have room for, if that is to be looked at.
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
    marker = path / _MARKER
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
    if shown.count("/") < 3:
        raise UserError(f"{shown} is a whole bucket; name the store in it: {shown}/NAME")
    if shown.startswith(f"{address(store.place)}/"):
        raise UserError(f"{shown} lies inside the store; choose another address")
    objects = Objects(path)
    with Lease(Objects(path.parent), f"{path.name}.lock", f"store {shown}") as lease:
        target, marker = ObjectTarget(objects, lease), objects.get_tagged(_MARKER)
        ours = marker is not None and marker[0] == what
        if not ours and objects.sizes():
            raise _exists(shown, "address", begun=marker is not None)
        if ours:
            objects.delete([STORE])
        target.commit({_MARKER: what})
        yield target
        lease.require()
        objects.delete([_MARKER])


def _exists(shown: str, kind: str, *, begun: bool) -> UserError:
    left = ", left unfinished by another store, or by this one before it was extended" * begun
    return UserError(f"{shown} exists{left}; choose another {kind}, or remove it")
