"""Objects below an address such as `s3://bucket/prefix`, through obstore.

Credentials, endpoint and region are those that obstore finds in the environment (`AWS_ACCESS_KEY_ID`,
`AWS_ENDPOINT_URL`, ...). Requests that fail are made again, by obstore, with exponential backoff and jitter.
"""

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import CorruptData, ProjectError, Stopped, UserError, cause
from shared.files import durable

if TYPE_CHECKING:
    from obstore.store import S3Store

PART_BYTES = 8 * 2**20
"""Of one request: at 300 kB/s it is answered within `ANSWER_SECONDS`."""
ANSWER_SECONDS = 30
DEADLINE_SECONDS = 180
"""How long one request is made again and again. Below the five minutes for which the signature of one is valid."""
CONNECTIONS = 64
"""Requests at once: at 0.1 s of latency, 300 kB each make 190 MB/s."""
COPY_AGAIN = "copy the store there again, or repair it: harvest repair"
"""For damage of objects that only a repair, or a copy that is whole, can make good."""
Tag = Mapping[str, str]
"""What tells one content of an object from another: its e-tag and its version. Google compares the latter."""
_ADDRESS = re.compile(r"(s3|gs|az)://?(?=[^/])|(file):/+")
"""A `Path` has one of the two slashes."""
_OTHER = re.compile(r"([a-z][a-z0-9]+):/(?=[^/]|/[^/])")


def is_address(path: Path | str) -> bool:
    """Tell whether `path` is the address of objects, not of a local folder; a `file://` one is a local folder.

    Raises `UserError` on one of another kind, such as `http://`.
    """
    found = _ADDRESS.match(os.fspath(path))
    if not found and (other := _OTHER.match(os.fspath(path))):
        raise UserError(f"{other[1]}:// is no address that is known; use s3://, gs://, az:// or file:///, or a folder")
    return bool(found and found[1])


def address(path: Path | str) -> str:
    """Return the address with both slashes, and none at its end."""
    return _ADDRESS.sub(r"\1://", os.fspath(path), count=1).rstrip("/")


def place(path: Path | str) -> Path:
    """Return where a store is: the address of objects as it is, a `file://` one as the folder, a folder resolved."""
    if is_address(path):
        return Path(os.fspath(path))
    return local_folder(path).resolve()


def local_folder(path: Path | str) -> Path:
    """Return a `file://` address as the folder that it names, and any other path as it is."""
    return Path(_ADDRESS.sub("/", os.fspath(path), count=1)) if not is_address(path) else Path(path)


def require_below_bucket(path: Path | str) -> None:
    """Raise `UserError` for the address of a whole bucket: a store has a name in it."""
    if address(path).count("/") < 3:
        raise UserError(f"{address(path)} is a whole bucket; name the store in it: {address(path)}/NAME")


def require_folder(path: Path | str, what: str) -> Path:
    """Return a local folder. Raises `UserError` for an address of objects, which `what` does not read or write."""
    if is_address(path):
        raise UserError(
            f"{address(path)} is in object storage, and {what} works on a local folder: copy it there and back "
            "(aws s3 sync, gsutil rsync, azcopy; objects and files have the same names)"
        )
    return local_folder(path)


@contextmanager
def naming(folder: Path, shown: str) -> Iterator[None]:
    """Have errors name the address `shown`, and not the local folder that stands for it."""
    try:
        yield
    except ProjectError as error:
        raise type(error)(str(error).replace(str(folder), shown)) from error


class Taken(Exception):
    """An object was not written: there is one already, or another than was expected."""


class Objects:
    """The objects below an address, by name. Several threads may use it.

    Raises `UserError` when obstore is not installed, when there is no such bucket, and when access is refused;
    `Stopped` when the service does not answer in time, and `FileNotFoundError` when there is no such object.
    """

    def __init__(self, path: Path | str) -> None:
        self.address = address(path)
        self._store = _connect(self.address)

    def get(self, name: str, size: int | None = None) -> bytes:
        """Return an object; one of a known `size` in several requests at once, if it is large."""
        if size is not None and size > PART_BYTES:
            with ThreadPoolExecutor(8) as pool:
                return b"".join(pool.map(lambda part: self.get_range(name, *part), _parts(size)))
        with self._explained(name):
            return bytes(self._store.get(name).bytes())

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes `start:stop` of an object. Raises `CorruptData` when it does not have them."""
        with self._explained(name):
            found = bytes(self._store.get_range(name, start=start, end=stop))
        if len(found) != stop - start:
            raise CorruptData(f"{self.address}/{name}: it ends before byte {stop:,}; {COPY_AGAIN}")
        return found

    def get_tagged(self, name: str) -> tuple[bytes, Tag] | None:
        """Return an object and its tag, or none where there is no such object."""
        with suppress(FileNotFoundError), self._explained(name):
            found = self._store.get(name)
            return bytes(found.bytes()), _tag(found.meta)
        return None

    def download(
        self, sizes: Mapping[str, int], folder: Path, tagged: Callable[[str], bool] = lambda name: False
    ) -> dict[str, Tag]:
        """Write objects of known sizes to a folder that need not outlive the machine; returns tags of those `tagged`.

        Small ones and `tagged` ones are fetched side by side, and large ones in parts, a few of which are in memory at
        once. One that is not there any more is left out. Raises `CorruptData` on a name that leads out of the folder.
        """
        tags: dict[str, Tag] = {}
        for name in sizes:
            if not (folder / name).resolve().is_relative_to(folder.resolve()):
                raise CorruptData(f"{self.address}: {name!r} is not the name of a store's file; remove it")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)

        def bring(name: str) -> None:
            with suppress(FileNotFoundError):
                if not tagged(name):
                    durable.write_whole(folder / name, self.get(name))
                elif found := self.get_tagged(name):
                    durable.write_whole(folder / name, found[0])
                    tags[name] = found[1]

        large = [name for name, size in sizes.items() if size > PART_BYTES and not tagged(name)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(bring, sizes.keys() - set(large)))
        for name in large:
            with suppress(FileNotFoundError):
                self._download_parts(name, sizes[name], folder / name)
        return tags

    def _download_parts(self, name: str, size: int, path: Path) -> None:
        temporary = path.with_name(path.name + durable.TEMPORARY)
        durable.make_sparse(temporary, size)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda part: durable.write_at(temporary, part[0], self.get_range(name, *part)), _parts(size)))
        durable.move(temporary, path)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Return the size of every object by name, of those below a folder."""
        until = time.monotonic() + DEADLINE_SECONDS
        while True:
            try:
                with self._explained(below):
                    return {one["path"]: one["size"] for page in self._store.list(below or None) for one in page}
            except Stopped as error:  # of requests for lists, obstore does not repeat those whose answer breaks off
                if "body error" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(random.uniform(0.1, 1))

    def age(self, name: str) -> float:
        """Return the seconds since an object was written, by this machine's clock."""
        with self._explained(name):
            return max(0.0, time.time() - self._store.head(name)["last_modified"].timestamp())

    def put(self, name: str, data: bytes | Path) -> None:
        """Write an object, a large one in several requests, over whatever is there."""
        with self._explained(name):
            self._store.put(name, data, chunk_size=PART_BYTES)

    def create(self, name: str, data: bytes) -> Tag:
        """Write an object that is not there yet; returns its tag.

        Raises `Taken` when another is there. One of the same bytes is this one: the answer to its first request was
        lost, or a kill came after it.
        """
        with suppress(Taken):
            return self._put(name, data, "create")
        found = self.get_tagged(name)
        if found is None or found[0] != data:
            raise Taken(f"{self.address}/{name} was written by another process")
        return found[1]

    def replace(self, name: str, data: bytes, tag: Tag) -> Tag:
        """Write an object over the one with the tag `tag`; returns its own. Raises `Taken` when another is there."""
        with suppress(Taken):
            return self._put(name, data, tag)
        found = self.get_tagged(name)
        if found is None or found[0] != data:
            raise Taken(f"{self.address}/{name} was changed by another process")
        return found[1]

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects; those that are not there are removed already."""
        if not names:
            return
        try:
            with self._explained(""):
                self._store.delete(list(names))
        except FileNotFoundError:  # as Azure and Google say of any of them, and others may be left
            if len(names) > 1:
                with ThreadPoolExecutor(8) as pool:
                    list(pool.map(lambda name: self.delete([name]), names))

    def _put(self, name: str, data: bytes, mode: Any) -> Tag:
        with self._explained(name):
            return _tag(self._store.put(name, data, mode=mode, use_multipart=False))

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        from obstore import exceptions

        where = f"{self.address}/{name}" if name else self.address
        refused = exceptions.PermissionDeniedError, exceptions.UnauthenticatedError
        try:
            yield
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            raise Taken(where) from error
        except (exceptions.BaseError, FileNotFoundError) as error:
            status, code = _answer(str(error))
            if code in _NO_BUCKET or _NO_CONTAINER in str(error):
                raise UserError(f"{where}: there is no such bucket; make it, or correct the address") from error
            if isinstance(error, FileNotFoundError):  # whose text is a page
                raise FileNotFoundError(errno.ENOENT, "there is no such object", where) from error
            if status in (401, 403) or isinstance(error, refused):
                raise UserError(
                    f"{where}: access is refused ({_said(error)}); check {self._settings_to_check()}"
                ) from error
            if status == 416:
                raise CorruptData(f"{where}: it is shorter than its records say; {COPY_AGAIN}") from error
            again = status in _TRIED_AGAIN or code == "RequestTimeout"
            if (400 <= status < 500 and not again) or _NO_REGION in str(error):
                raise UserError(
                    f"{where}: the service refuses this ({_said(error)}); check {self._settings_to_check()}"
                ) from error
            raise Stopped(
                f"{where}: no good answer within {DEADLINE_SECONDS} s ({_said(error)}); check the network and "
                f"{self._settings_to_check()}, and run it again"
            ) from error

    def _settings_to_check(self) -> str:
        """Return what to look at when the service refuses, with the names of its environment variables."""
        return f"the credentials and the endpoint ({_VARIABLES[self.address.split(':')[0]]})"


_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, ...",
    "az": "AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY, ...",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, ...",
}
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_NO_CONTAINER = "specified container does not exist"
"""What Azure says in answer to a request for many objects, without a code."""
_NO_REGION = "incorrectly configured region"
"""What obstore says of a redirect."""
_TRIED_AGAIN = (408, 409, 429)
"""Of the answers with a status of 4xx, those after which it makes sense to ask again."""


def _answer(text: str) -> tuple[int, str]:
    """Return status and code of the service's answer, from the text of an error; 0 and nothing where there is none."""
    status, code = re.search(r"status code: (\d{3})", text), re.search(r"<Code>(\w+)</Code>", text)
    return int(status[1]) if status else 0, code[1] if code else ""


def _parts(size: int) -> list[tuple[int, int]]:
    """Return first byte and end of each part of an object."""
    return [(low, min(low + PART_BYTES, size)) for low in range(0, size, PART_BYTES)]


def _tag(found: Any) -> Tag:
    """Return what a conditional put compares, from what is told of an object."""
    return {name: found[name] for name in ("e_tag", "version") if found[name] is not None}


def _said(error: BaseException) -> str:
    status, code = _answer(str(error))
    return f"{status} {code}" if status and code else cause(Exception(str(error).split("Debug source")[0]))


def _connect(where: str) -> "S3Store":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise UserError(f"{where} needs obstore: pip install 'transcoder-cache[objects]'") from error
    backoff = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=15), "base": 2}
    client: Any = {
        "timeout": timedelta(seconds=ANSWER_SECONDS),
        "connect_timeout": timedelta(seconds=5),
        "pool_max_idle_per_host": str(CONNECTIONS),
    }
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint and where.startswith("s3://") and not endpoint.startswith(("http://", "https://")):
        raise UserError(f"AWS_ENDPOINT_URL is {endpoint}, and must begin with http:// or https://: correct it")
    if endpoint.startswith("http://"):  # who gives such an endpoint wants it
        client["allow_http"] = True
    retries: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=DEADLINE_SECONDS), "backoff": backoff}
    try:
        found: Any = from_url(where, client_options=client, retry_config=retries)
    except (BaseError, ValueError) as error:
        raise UserError(f"{where} cannot be reached: {_said(error)}; see docs/object-storage.md") from error
    return found
