"""`push` and `pull`: a packed store as a data set on the Hugging Face hub.

Both go on where they were stopped: files that are there with the right checksum are not sent again. The checksums are
the hub's own: SHA-256 of large files, git's SHA-1 of small ones.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from harvest.commands.archive import fetch_shard, for_each, require_whole, side_files
from harvest.commands.archive_target import AT_ONCE
from harvest.commands.describe import open_records
from harvest.commands.store_card import store_card
from harvest.run.pipeline import lock_store
from shared.console.terminal import say
from shared.errors import CorruptData, DiskFull, ProjectError, UserError
from shared.files import durable
from shared.hub import check_licence, explain, require_name, require_token
from shared.store.checks import MOST_RECORD_BYTES, fault, is_packed, read_packed, read_request, read_store_record
from shared.store.layout import (
    ARRAYS,
    PACKED,
    PLAN,
    REQUEST,
    STORE,
    FileRecord,
    StoreRecord,
    moments_path,
    record_path,
    store_specs,
)
from shared.store.object_rows import is_shard
from shared.store.packed import PackedRecord
from shared.store.store import Store

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
COMMIT_BYTES, COMMIT_FILES = 2**31, 100
"""At most of one commit: a push that is killed sends at most that much again."""
_DOWNLOADS = "pull"
"""Below a store that is being pulled: what was not checked yet."""
_RECORDS = (REQUEST, PLAN, PACKED, STORE)
Fetch = Callable[[str], Path]
"""Has a file of the repository, by its path there, below a folder of its own."""


def push(path: Path, name: str, *, public: bool = False, licence: str | None = None) -> str:
    """Upload the packed store at `path` as the data set `name`, OWNER/NAME; returns its address.

    `path` is a folder or an address of objects, whose files are fetched for one commit at a time.
    One that is made is private, unless `public`. Rows come first and the records in one last commit, so that the
    repository holds a whole store at any time, or none. `licence`: the hub's name of one, for the card.

    Raises `UserError` when the store is not packed, there is no token, or the repository holds something else;
    `CorruptData` on a file that is not what was written; and `ProjectError` when the hub refuses or is out of reach.
    A rerun goes on.
    """
    require_name("push", name)
    require_token("push")
    check_licence(licence)
    with open_records(path) as store:
        if not store.packed:
            raise UserError(
                f"{store.shown} is not packed; pack it first, and push the folder: harvest pack {store.shown} FOLDER"
            )
        return _push(store, _files(store.record, store.packed), name, public, licence)


def _push(store: Store, files: Mapping[str, int | None], name: str, public: bool, licence: str | None) -> str:
    with store.reading(), _one_line(f"push {name}", store.place):
        api = _api()
        url = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True)
        there = _listing(api, name, "main")
        _refuse_another(store, name, there)
        send = partial(_send, api, name)
        if REQUEST not in there:
            send(store.path, [REQUEST], f"Begin {store.request.folder}")
        last = [file for file in files if file in _RECORDS or file.endswith("/zarr.json")]
        rows = [file for file in files if file not in last]
        missing = _not_there(store, rows, there)
        parts = list(_commits(missing, files))
        for number, part in enumerate(parts, 1):
            size = sum(files[file] or 0 for file in part)
            say(f"part {number} of {len(parts)}: {len(part)} files, {size:,} bytes")
            with _here(store, part) as root:
                send(root, part, f"Rows, part {number} of {len(parts)}")
        last = [file for file in last if not _same(store.path / file, there.get(file))]
        if last:
            send(store.path, last, f"Finish {store.request.folder}", store_card(store, name, licence))
    return str(url)


def pull(name: str, cache: Path, *, revision: str | None = None, force: bool = False) -> Path:
    """Have the packed store of the data set `name`, OWNER/NAME, in the folder `cache`; returns its path.

    Every file is compared with the hub's checksum before it is in its place, and so are those that are there already:
    a rerun goes on after a kill, and fetches again what was damaged since. `revision`: a branch, tag or commit.

    Raises `UserError` when the repository holds no store, the folder holds something else, or the disk has no room
    (unless `force`), `CorruptData` when what came is not what the hub says, and `ProjectError` when the hub refuses or
    is out of reach.
    """
    require_name("pull", name)
    with _one_line(f"pull {name}", cache):
        api = _api()
        commit = str(api.dataset_info(name, revision=revision).sha)
        there = _listing(api, name, commit)
        if absent := [file for file in _RECORDS if file not in there]:
            raise UserError(f"{name} holds no whole packed store: it has no {absent[0]}; see what was pushed there")
        fetch = partial(_download, name, commit, there)
        with TemporaryDirectory() as folder:
            target = cache / read_request(fetch(Path(folder), REQUEST).parent).folder
        with lock_store(target):
            _pull_into(target, there, partial(fetch, target / _DOWNLOADS), force)
    Store.open(target)
    return target


def _pull_into(target: Path, there: "Mapping[str, RepoFile]", download: "Fetch", force: bool) -> None:
    """Fetch what a store lacks, its records last, `store.json` after all others."""
    _refuse_other_folder(target, there[STORE])
    downloads = target / _DOWNLOADS
    durable.make_folder(downloads)
    for file in _RECORDS:
        download(file)
    record = read_store_record(downloads)
    specs = store_specs(record.request, record.plan.stored_strata, record.d_in, record.d_out)
    files = _files(record, read_packed(downloads, specs, record.blocks))
    for file, size in files.items():
        if file not in there or (size is not None and there[file].size != size):
            raise CorruptData(f"{file} is not there as {PACKED} and {STORE} say; see what was pushed there")
        if size is None and there[file].size > MOST_RECORD_BYTES:
            raise CorruptData(f"{file} has {there[file].size:,} bytes, and such a file has fewer")
    first = [file for file in files if file not in _RECORDS]
    missing = [file for file in first if not _same(target / file, there[file])]
    needed = sum(there[file].size for file in missing)
    if not force:
        durable.require_space(target, needed, "the store (--force tries anyway)")

    def fetch(file: str) -> int:
        durable.publish_link(target / file, download(file))
        (downloads / file).unlink()
        return there[file].size

    for_each("pull", missing, needed, fetch)
    for file in _RECORDS:
        if not _same(target / file, there[file]):  # readers hold a lock of the request that is there
            durable.publish_link(target / file, downloads / file)
    durable.remove_folder(downloads)


def _files(record: StoreRecord, packed: PackedRecord) -> dict[str, int | None]:
    """Return the bytes of every file of a packed store, where its records say them; by path below the store."""
    strata = (f"strata/{stratum.name}" for stratum in record.plan.stored_strata)
    arrays = (spec.path for spec in store_specs(record.request, record.plan.stored_strata, record.d_in, record.d_out))
    found: dict[str, int | None] = {f"{ARRAYS}/{name}": file.bytes for name, file in packed.files.items()}
    found |= {name: file.bytes for name, file in record.files.items()}
    found |= {path(block): None for block in range(record.blocks) for path in (record_path, moments_path)}
    found |= {f"{ARRAYS}/{group}zarr.json": None for group in ("", *(f"{g}/" for g in ("strata", *strata, *arrays)))}
    return found | dict.fromkeys(_RECORDS)


def _checksums(store: Store) -> dict[str, FileRecord]:
    """Return the record of every file that is none itself, by path below the store."""
    assert store.packed is not None
    return {f"{ARRAYS}/{name}": file for name, file in store.packed.files.items()} | side_files(store)


def _not_there(store: Store, files: Sequence[str], there: "Mapping[str, RepoFile]") -> list[str]:
    """List the files that the repository lacks; raise `CorruptData` on one of them that is damaged.

    Objects that it lacks are not looked at: they are checked when they are fetched to be sent.
    """
    records = _checksums(store)
    missing: list[str] = []

    def check(file: str) -> int:
        if store.objects and file not in there:
            missing.append(file)
            return store.bytes_of(file)
        with _here(store, [file]) as root:
            if not _same(root / file, there.get(file)):
                if file in records and (wrong := fault(root / file, records[file])):
                    raise CorruptData(f"{store.shown}/{file}: {wrong}; {store.remedy}")
                missing.append(file)
        return store.bytes_of(file)

    for_each("check", files, sum(store.bytes_of(file) for file in files), check, AT_ONCE if store.objects else None)
    return sorted(missing)


@contextmanager
def _here(store: Store, files: Sequence[str]) -> Iterator[Path]:
    """Give a folder that has some files of a store: its own, or of objects one with those that are fetched.

    Raises `CorruptData` when one of objects is not as its record says.
    """
    if not store.objects:
        yield store.path
        return
    records = _checksums(store)
    with TemporaryDirectory(dir=store.objects.folder) as folder:

        def bring(file: str) -> None:
            if is_shard(file):
                name = file.removeprefix(f"{ARRAYS}/")
                durable.publish_bytes(Path(folder, file), fetch_shard(store, name, records[file]))
            else:
                source = require_whole(store, file, records[file]) if file in records else store.path / file
                durable.publish_link(Path(folder, file), source)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(bring, files))
        yield Path(folder)


def _commits(missing: Sequence[str], files: Mapping[str, int | None]) -> Iterator[list[str]]:
    """Yield the files of each commit."""
    part: list[str] = []
    for file in missing:
        if len(part) == COMMIT_FILES or sum(files[one] or 0 for one in part) > COMMIT_BYTES:
            yield part
            part = []
        part.append(file)
    if part:
        yield part


def _send(api: "HfApi", name: str, root: Path, files: Sequence[str], message: str, card: str | None = None) -> None:
    """Commit some files, and a card if there is one."""
    from huggingface_hub import CommitOperationAdd

    added = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=root / file) for file in files]
    if card is not None:
        added.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    api.create_commit(name, added, commit_message=message, repo_type="dataset")


def _refuse_another(store: Store, name: str, there: "Mapping[str, RepoFile]") -> None:
    """Raise `UserError` when the repository holds anything but this store, a part of it, or it before it grew."""
    if REQUEST in there:
        if not _same(store.path / REQUEST, there[REQUEST]):
            raise UserError(f"{name} holds another store: its {REQUEST} differs; push to another name")
    elif others := sorted(there.keys() - {CARD, ".gitattributes"}):
        raise UserError(f"{name} holds other files, such as {others[0]}; push to another name")


def _refuse_other_folder(target: Path, record: "RepoFile") -> None:
    """Raise `UserError` unless `target` is new, a part of a pull, or the same store packed."""
    remedy = "pull into another folder with --cache, or remove it"
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; {remedy}")
    if (target / STORE).is_file():
        if not is_packed(target):
            raise UserError(f"{target} is there already, unpacked; {remedy}")
        if not _same(target / STORE, record):
            raise UserError(f"{target} holds another number of blocks than the repository; {remedy}")
    elif target.exists() and any(target.iterdir()) and not (target / _DOWNLOADS).is_dir():
        raise UserError(f"{target} is there already, and no part of a pull; {remedy}")


def _download(name: str, commit: str, there: "Mapping[str, RepoFile]", folder: Path, file: str) -> Path:
    """Fetch a file to its path below `folder`, and compare it with the hub's checksum; a part that is there stays."""
    from huggingface_hub import hf_hub_download

    if file in _RECORDS and there[file].size > MOST_RECORD_BYTES:
        raise CorruptData(f"{file} has {there[file].size:,} bytes, and such a file has fewer")
    path = folder / file
    if not _same(path, there[file]):
        path.unlink(missing_ok=True)
        hf_hub_download(name, file, repo_type="dataset", revision=commit, local_dir=folder)
        if not _same(path, there[file]):
            path.unlink(missing_ok=True)
            raise CorruptData(f"{file} did not arrive as the hub has it: its checksum differs; run it again")
    return path


def _listing(api: "HfApi", name: str, revision: str) -> "dict[str, RepoFile]":
    """Return what the repository holds, by path."""
    from huggingface_hub.hf_api import RepoFile

    found = api.list_repo_tree(name, recursive=True, revision=revision, repo_type="dataset")
    return {one.path: one for one in found if isinstance(one, RepoFile)}


def _same(path: Path, there: "RepoFile | None") -> bool:
    """Tell whether a file is there, and has the size and checksum of the hub's."""
    if there is None or path.is_symlink() or not path.is_file() or (size := path.stat().st_size) != there.size:
        return False
    large = there.lfs is not None
    digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest() == (there.lfs.sha256 if there.lfs else there.blob_id)


def _api() -> "HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # ours counts bytes of the store
    return HfApi()


@contextmanager
def _one_line(what: str, folder: Path) -> Iterator[None]:
    """Turn whatever the hub's library raises into one line; `folder` is where it writes."""
    try:
        yield
    except ProjectError:
        raise
    except Exception as error:  # of the library, the network and the token's file: of many kinds
        if isinstance(error, OSError) and isinstance(full := durable.explain(error, folder), DiskFull):
            raise full from error
        raise ProjectError(f"{what}: {explain(error)}; run it again to go on") from error
