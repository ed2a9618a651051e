"""A harvest into object storage, or a repair there: made in a local folder by the one writer, sent block by block.

Shard files are sent first and never change; the record that says they exist comes after them, by a conditional put:
that is the commit. Once a block's record is there, its shard files here give their room back.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from harvest.run.ranks import Ranks
from shared.errors import CorruptData, ProjectError, UserError
from shared.files import durable
from shared.files.lease import Lease, remove_of_dead
from shared.files.object_store import Objects, Tag, Taken, address
from shared.store import packed
from shared.store.checks import read_ledger, read_plan, read_request
from shared.store.layout import (
    ARRAYS,
    LEDGER,
    PLAN,
    REQUEST,
    STATISTICS,
    STORE,
    StoreRequest,
    row_specs,
)
from shared.store.object_rows import is_shard
from shared.store.store import Local, Store

_PREFIX = "harvested-objects-"
_ROWS = f"{ARRAYS}/strata/"


@contextmanager
def writing(cache: Path, names: Sequence[str], *, stand_ins: bool = True) -> Iterator["ObjectCache"]:
    """Hold the leases of the stores of these names, and give a local folder with what is there of them.

    `stand_ins` as in `ObjectCache.pull`. Raises `UserError` when another process writes one, or several processes share
    this harvest.
    """
    if Ranks().size > 1:
        raise UserError(
            f"{address(cache)}: several processes cannot share a harvest into object storage; harvest into a folder "
            "that all of them see, and copy the finished store there"
        )
    with ExitStack() as stack:
        folder = stack.enter_context(packed.own_folder(_PREFIX))
        objects, leases = Objects(cache), {}
        for name in sorted(set(names)):
            leases[name] = stack.enter_context(Lease(objects, f"{name}.lock", f"store {address(cache)}/{name}"))
        found = ObjectCache(cache, folder, names, leases)
        for name in names:
            found.pull(name, stand_ins=stand_ins)
        yield found


@contextmanager
def looking(cache: Path, names: Sequence[str]) -> Iterator[Path]:
    """Give a local folder with the records of the stores of these names, as far as there are some; nothing is held."""
    with packed.own_folder("planned-objects-") as folder:
        found = ObjectCache(cache, folder, names, {})
        for name in names:
            found.pull(name, tokens=False)
        yield folder


def is_finished(path: Path, request: StoreRequest, training_blocks: int) -> bool:
    """Tell whether the store at an address is finished, and holds what is asked for."""
    if STORE not in Objects(path).sizes():
        return False
    try:
        record = Store.open(path, Local(bytes=0)).record  # no row is read: no room is needed
    except CorruptData:  # it is made whole
        return False
    enough = record.plan.exhausted or len(record.training_blocks) >= training_blocks
    return record.request == request and enough


def remove_leases_of_dead(cache: Path, names: Sequence[str]) -> None:
    """Remove leases of finished stores whose holder, a process of this machine, was killed at its last request."""
    objects = Objects(cache)
    for name in names:
        remove_of_dead(objects, f"{name}.lock")


class ObjectCache:
    """The stores that are being made, in `folder`, and their objects."""

    def __init__(self, cache: Path, folder: Path, names: Sequence[str], leases: dict[str, Lease]) -> None:
        self.folder, self._leases = folder, leases
        self._objects = {name: Objects(f"{address(cache)}/{name}") for name in names}
        self._tags: dict[Path, Tag] = {}
        """Of records that are there, by their path here."""
        self._sent: dict[Path, tuple[int, int]] = {}
        """When files that are there were changed here, and their sizes."""

    def pull(self, name: str, *, tokens: bool = True, stand_ins: bool = True) -> None:
        """Bring what there is of a store: its records and `tokens`; rows of its blocks by name and size alone.

        A repair needs no `stand_ins` for rows: it makes blocks again whatever is there of them.
        """
        objects, path = self._objects[name], self.folder / name
        sizes = objects.sizes()
        wanted = {one: sizes[one] for one in sizes if not is_shard(one) or (tokens and not one.startswith(_ROWS))}
        tags = objects.download(wanted, path, tagged=_is_committed)
        for one in wanted:
            if (path / one).is_file():
                self._note(path / one, tags.get(one))
        if stand_ins and (path / PLAN).is_file() and (path / REQUEST).is_file():
            self._stand_in(path, sizes)

    def push(self, path: Path) -> None:
        """Send what is new at `path`, a store's folder here, in the order of a commit. Raises `Stopped`, `UserError`.

        The records come last, one by one, each put only if it is still what it was.
        """
        objects, lease = self._objects[path.name], self._leases[path.name]
        new = [file for file in sorted(path.rglob("*")) if self._is_new(file)]
        groups: list[list[Path]] = [[], [], [], [], []]
        for file in new:
            groups[_turn(str(file.relative_to(path)))].append(file)
        first, tokens, plan, files, last = groups
        self._commit(objects, lease, path, first)
        self._put(objects, lease, path, tokens)
        self._commit(objects, lease, path, plan)
        self._put(objects, lease, path, [file for file in files if not _is_committed(_name(path, file))])
        records = [file for file in files if _is_committed(_name(path, file))]
        self._commit(objects, lease, path, records)
        for file in records:
            self._empty(path, int(file.stem))
        self._commit(objects, lease, path, last)
        if last:
            gone = [one for one in objects.sizes() if Path(one).match(STATISTICS) and not (path / one).exists()]
            objects.delete(gone)

    def _put(self, objects: Objects, lease: Lease, path: Path, files: Sequence[Path]) -> None:
        def one(file: Path) -> None:
            lease.require()
            objects.put(str(file.relative_to(path)), file)
            self._note(file)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, files))

    def _commit(self, objects: Objects, lease: Lease, path: Path, files: Sequence[Path]) -> None:
        for file in files:
            lease.require()
            name, data, tag = str(file.relative_to(path)), file.read_bytes(), self._tags.get(file)
            try:
                self._note(file, objects.replace(name, data, tag) if tag else objects.create(name, data))
            except Taken as error:
                raise ProjectError(f"{error}; nothing was written over it: run the same command again") from error

    def _note(self, file: Path, tag: Tag | None = None) -> None:
        status = file.stat()
        self._sent[file] = status.st_mtime_ns, status.st_size
        if tag:
            self._tags[file] = tag

    def _is_new(self, file: Path) -> bool:
        if not file.is_file() or file.suffix == durable.TEMPORARY:
            return False
        status = file.stat()
        return self._sent.get(file) != (status.st_mtime_ns, status.st_size)

    def _stand_in(self, path: Path, sizes: dict[str, int]) -> None:
        """Make files that stand for the shard files of committed blocks: of their sizes, and empty but for the index.

        The writer asks no more of them than that they are there.
        """
        for record in sorted((path / LEDGER).glob("*.json")):
            self._empty(path, int(record.stem), sizes)

    def _empty(self, path: Path, block: int, sizes: dict[str, int] | None = None) -> None:
        """Give back the room of a block's shard files; those of a block that is elsewhere if they are all there."""
        try:
            record, request, plan = read_ledger(path, block), read_request(path), read_plan(path)
        except CorruptData:
            return  # it is made again
        for spec in row_specs(request, plan.stored_strata, record.d_in, record.d_out):
            for shard in spec.block_shards(block):
                file = path / ARRAYS / spec.shard_path(shard)
                if sizes is None or sizes.get(str(file.relative_to(path))) == spec.shard_bytes:
                    durable.make_sparse(file, spec.payload_bytes)
                    durable.write_at(file, spec.payload_bytes, spec.footer())
                    self._note(file)


def _turn(name: str) -> int:
    """Return when a file is sent: the request, tokens, the plan, what blocks are made of, and `store.json` last."""
    if name in (REQUEST, PLAN, STORE):
        return {REQUEST: 0, PLAN: 2, STORE: 4}[name]
    return 1 if is_shard(name) and not name.startswith(_ROWS) else 3


def _name(path: Path, file: Path) -> str:
    return str(file.relative_to(path))


def _is_committed(name: str) -> bool:
    """Tell whether a file is a record, which is sent by a conditional put."""
    return name in (REQUEST, PLAN, STORE) or (name.startswith(f"{LEDGER}/") and name.endswith(".json"))
