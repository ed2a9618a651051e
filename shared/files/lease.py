"""The lock of a store in object storage: an object that its holder renews, and others may take once it is not renewed.

Only requests that the storage decides take and keep it: an object is created if it is not there, or replaced if it is
still the one that was seen. No clock is compared with another machine's.
"""

import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from shared.errors import ProjectError, Stopped, UserError, warn
from shared.files.object_store import Objects, Tag, Taken

SECONDS = 30.0
"""A lease that nobody renewed for so long may be taken. It is renewed three times as often."""
_LOOK_SECONDS = 1.0


class Lease:
    """Hold `name`, an object beside the store `what`, while the context is open.

    Entering raises `UserError` when another process holds it. A holder on this machine that is dead is known to be; of
    one elsewhere the object is watched for `SECONDS`, and taken when it was not renewed.
    """

    def __init__(self, objects: Objects, name: str, what: str) -> None:
        self._objects, self._name, self._what = objects, name, what
        self._own: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "process": os.getpid(),
            "key": secrets.token_hex(8),
            "renewed": 0,
        }
        self._tag: Tag = {}
        self._lost, self._at = False, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Self:
        while not self._take():
            pass
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        ours, self._lost = self._is_ours(), True
        if ours:
            self._objects.delete([self._name])

    def require(self) -> None:
        """Raise `Stopped` unless the lease is held: nothing may be committed after that."""
        if not self._is_ours():
            raise Stopped(
                f"{self._what}: its lease was lost, since {self._objects.address} did not answer for "
                f"{SECONDS * 0.8:.0f} s or another process took it; run the same command again to continue"
            )

    def _is_ours(self) -> bool:
        # Others take it after SECONDS without a change; what is left is for the commit that follows.
        return not self._lost and time.monotonic() - self._at < SECONDS * 0.8

    def _data(self) -> bytes:
        return json.dumps(self._own, sort_keys=True).encode()

    def _take(self) -> bool:
        """Try once; returns whether the lease is ours now, and not whether it changed under our eyes."""
        began = time.monotonic()
        try:
            self._tag = self._objects.create(self._name, self._data())
        except Taken:
            if not (found := self._objects.get_tagged(self._name)):
                return False
            self._watch(*found)
            began = time.monotonic()
            try:
                self._tag = self._objects.replace(self._name, self._data(), found[1])
            except Taken:
                return False
        self._at = began
        return True

    def _watch(self, data: bytes, tag: Tag) -> None:
        """Return when the lease may be taken. Raises `UserError` when its holder renews it."""
        host, process, dead = _holder(data)
        if dead:
            return
        warn(
            f"{self._what} is held by process {process} on {host}: waiting up to {SECONDS:.0f} s to see if it is alive"
        )
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            time.sleep(min(_LOOK_SECONDS, SECONDS / 10))
            found = self._objects.get_tagged(self._name)
            if found is None:
                return
            if found[1] != tag:
                raise UserError(
                    f"{self._what} is locked: process {process} on {host} is writing it; wait for it or stop it"
                )

    def _renew(self) -> None:
        while not self._ended.wait(SECONDS / 3):
            began = time.monotonic()
            self._own["renewed"] += 1
            try:
                self._tag = self._objects.replace(self._name, self._data(), self._tag)
                self._at = began
            except Taken:
                self._lost = True
                return
            except (ProjectError, OSError):
                pass  # the next one may get through; `require` looks at the time


def remove_of_dead(objects: Objects, name: str) -> None:
    """Remove a lease that its holder, a process of this machine, was killed before it gave back; leave any other."""
    found = objects.get_tagged(name)
    if found and _holder(found[0])[2]:
        with suppress(Taken):
            objects.replace(name, b"{}", found[1])
            objects.delete([name])


def _holder(data: bytes) -> tuple[str, int, bool]:
    """Return the host and the process of a lease's holder, and whether it is known to be dead."""
    try:
        holder = json.loads(data)
        host, process = str(holder["host"]), int(holder["process"])
        return host, process, holder["machine"] == _machine() and not Path(f"/proc/{process}").exists()
    except (ValueError, KeyError, TypeError):
        return "an unknown machine", 0, False


def _machine() -> str:
    """Return what tells this machine, and this container on it, from others, as far as its processes go."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # like no other
