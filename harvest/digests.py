"""SHA-256 of files, and what of them is remembered for this user.

Digests of large files are, since hashing weights takes longer than finding their store. So is where a model's folder
lies, by the digest of its weights: a store has the folder's name alone.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from shared.errors import CorruptData, DiskFull, UserError
from shared.files import durable
from shared.files.untrusted import regular_or_link

SMALLEST = 64 * 2**20
"""Bytes from which on a file's digest is remembered."""
_POINTER = b"version https://git-lfs"
_DIGESTS, _FOLDERS = "digests.json", "model_folders.json"
_SETTLED = 2.0
"""Seconds after which a change of a file shows in its time stamps for certain."""


def file_sha256(path: Path) -> str:
    """Return the digest of a file, in hexadecimal digits.

    A large file that has the size, times and inode it had when it was last hashed is not read again.
    """
    status = path.stat()
    if status.st_size < SMALLEST:
        return _hash(path)
    name, state = str(path.resolve()), [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = _known(_DIGESTS).get(name)
    if isinstance(known, list) and known[:-1] == state:
        return str(known[-1])
    digest = _hash(path)
    if time.time() - status.st_ctime > _SETTLED:
        with suppress(OSError, DiskFull):  # no room or no right to write there costs the next call some seconds
            durable.publish_json(_place(_DIGESTS), {**_known(_DIGESTS), name: [*state, digest]})
    return digest


def remember_folder(weights: str, folder: Path) -> None:
    """Keep where the model whose weights have this digest lies; folders that are gone are forgotten."""
    known = {name: place for name, place in _known(_FOLDERS).items() if isinstance(place, str) and Path(place).is_dir()}
    if known.get(weights) != (now := str(folder.resolve())):
        with suppress(OSError, DiskFull):  # as above: it is asked for next time
            durable.publish_json(_place(_FOLDERS), {**known, weights: now})


def known_folder(weights: str) -> Path | None:
    """Return the folder where a model of these weights was last; none if that is not known, or it is gone."""
    place = _known(_FOLDERS).get(weights)
    return Path(place) if isinstance(place, str) and Path(place).is_dir() else None


def require_content(path: Path) -> None:
    """Raise `UserError` when a file is only the pointer that Git LFS leaves where a large file was not downloaded."""
    with open(path, "rb", opener=regular_or_link) as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path} is a pointer of Git LFS, not the file itself; download it: git lfs pull")


def _hash(path: Path) -> str:
    require_content(path)
    with open(path, "rb", opener=regular_or_link) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _place(name: str) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # as it stands for a user without a home
    return Path(home, "transcoder-cache", name)


def _known(name: str) -> dict[str, object]:
    try:
        found = durable.read_json(_place(name))
    except (OSError, CorruptData):
        return {}
    return found if isinstance(found, dict) else {}
