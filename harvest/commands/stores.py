"""The folder that stores are made in: what is there, what is nearest to a request, and removing what is not used."""

import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from shared.console.panel import size
from shared.console.terminal import PlainConsole
from shared.errors import ProjectError, UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from shared.files.object_store import is_address
from shared.store.checks import is_packed, progress, read_plan, read_request, read_store_record
from shared.store.layout import LEDGER, PLAN, REQUEST, STORE, UNFINISHED, StoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A store in the cache, whole or not."""

    name: str
    state: str
    """`complete`, `packed`, `12 of 40 blocks`, `complete; extended: 12 of 40 blocks`, `packing`, `unfinished pack`,
    `damaged: ...`, or `cannot be read: ...`"""
    bytes: int
    """On disk, all files."""
    age_seconds: float
    """Since a file of the store was last published."""
    used_by: list[str]
    """Processes that train from it, and those that write it."""
    model: str = ""
    layer: int | None = None
    hooks: str = ""
    context_size: int | None = None
    storage: str = ""
    """The type of stored rows."""
    tokens: int | None = None
    """To train on."""
    rows: int | None = None
    """To train on, stored."""


def list_stores(cache: Path) -> list[Entry]:
    """List every store in the folder `cache`, by name; no shard is opened. Raises `UserError` when it is a file."""
    if cache.exists() and not cache.is_dir():
        raise UserError(f"{cache} is a file, and stores lie in a folder; pass that with --cache")
    if not cache.is_dir():
        return []
    found = [path for path in sorted(cache.iterdir()) if _holds_store(path)]
    return [describe_entry(path) for path in found if path.suffix != durable.TEMPORARY]


def _holds_store(path: Path) -> bool:
    """Tell whether a folder is a store, as far as one can see: one that cannot be read is listed, too."""
    for name in (REQUEST, UNFINISHED):
        try:
            if stat.S_ISREG((path / name).stat().st_mode):
                return True
        except PermissionError:
            return path.is_dir()
        except OSError:
            continue
    return False


def show(entries: Sequence[Entry], cache: Path) -> None:
    """Print the stores as a table on stdout. It fits 80 columns: words are broken where there is no room for them."""
    console = PlainConsole()
    if not entries:
        console.print(f"no stores in {cache}", highlight=False, soft_wrap=True)
        return
    table = Table("store", "rows", "size", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.no_wrap, column.justify = True, "right"
    for entry in entries:
        rows = "" if entry.rows is None else f"{entry.rows:,}"
        table.add_row(_words(entry), rows, size(entry.bytes))
    console.print(table)
    total = size_of(*(cache / entry.name for entry in entries)) or sum(entry.bytes for entry in entries)
    free = "" if is_address(cache) else f"; {size(durable.free_bytes(cache))} free"
    console.print(f"{len(entries)} store{'s' * (len(entries) != 1)}, {size(total)}{free}", highlight=False)


def _words(entry: Entry) -> str:
    """Return what is said of a store in words, a line each."""
    lines = [entry.name]
    if entry.model:
        layer = "" if entry.layer is None else f", layer {entry.layer}"
        text = "" if entry.tokens is None else f"{entry.tokens:,} tokens, "
        form = f"{text}context {entry.context_size}, {entry.storage}"
        lines += [f"  {entry.model}{layer}", f"  {form}", f"  {entry.hooks}"]
    lines.append(f"  {entry.state}; {_age(entry.age_seconds)} old")
    return "\n".join([*lines, *(f"  used by {user}" for user in entry.used_by)])


def as_json(entries: Sequence[Entry], cache: Path) -> dict[str, Any]:
    """Return plain values."""
    free = durable.free_bytes(cache) if cache.is_dir() else None
    return {"cache": str(cache), "free_bytes": free, "stores": [asdict(entry) for entry in entries]}


def check_removable(path: Path) -> int:
    """Return the size of the store at `path`, in bytes. Raises `UserError` when it is none, or is used or written."""
    with _alone(path):
        return size_of(path)


def remove(path: Path) -> None:
    """Remove the store at `path`. Raises `UserError` when it is none, or when a process uses or writes it.

    It is renamed first: a kill leaves litter, which `sweep` removes, and never a part of a store.
    """
    with _alone(path) as lock:
        path = lock.with_suffix("")
        durable.remove_folder(path)
        lock.unlink()


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """Hold the writers' and the readers' lock of the store at `path`; gives the writers' lock file."""
    if not any((path / name).is_file() for name in (REQUEST, UNFINISHED)):
        raise UserError(f"{path} is not a store: it has no {REQUEST}")
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link to {path.resolve()}; remove that, or the link with rm")
    path = path.resolve()
    lock = path.with_name(f"{path.name}.lock")
    what, read = f"store {path.name}", path / REQUEST
    with durable.lock(lock, what), durable.lock(read, what) if read.is_file() else nullcontext():
        yield lock


def sweep(cache: Path) -> None:
    """Remove what a killed `remove` or harvest left of stores that nobody writes; nothing without a store's lock."""
    for lock in cache.glob("*.lock"):
        store = lock.with_suffix("")
        litter = [cache / f"{store.name}{end}{durable.TEMPORARY}" for end in ("", ".spool")]
        if any(path.exists() for path in litter):
            with suppress(UserError), durable.lock(lock, f"store {store.name}"):  # in use: its writer sweeps
                shutil.rmtree(litter[0], ignore_errors=True)
                litter[1].unlink(missing_ok=True)
                if not store.exists():
                    lock.unlink()


def describe_entry(path: Path) -> Entry:
    """Describe the store at `path` by its records; no shard is opened."""
    users = [_with_run(who) for who in durable.holders(path / REQUEST)]
    writers = [f"{who}, harvesting" for who in durable.holders(path.with_name(f"{path.name}.lock"))]
    times = [path / name for name in (STORE, PLAN, REQUEST, LEDGER, UNFINISHED)]
    newest = max((mtime for file in times if (mtime := _mtime(file))), default=path.lstat().st_mtime)
    common: dict[str, Any] = {"name": path.name, "bytes": size_of(path), "age_seconds": max(0.0, time.time() - newest)}
    if (path / UNFINISHED).is_file() and not (path / STORE).is_file():
        return Entry(**common, state="unfinished pack", used_by=[*users, *writers])
    try:
        request = read_request(path)
        plan = read_plan(path) if (path / PLAN).is_file() else None
        if (path / STORE).is_file():
            record = read_store_record(path)
            growing = plan is not None and plan.training_blocks > record.plan.training_blocks
            state = "packed" if is_packed(path) else "complete"
            state, plan = f"{state}; extended: {progress(path)}" if growing else state, record.plan
        else:
            state = progress(path)
    except ProjectError as error:
        return Entry(**common, state=f"damaged: {error}", used_by=[*users, *writers])
    except OSError as error:  # of a store that another user made, or on a disk that fails
        what = f"cannot be read: {error.filename or path}: {error.strerror}"
        return Entry(**common, state=what, used_by=[*users, *writers])
    return Entry(
        **common,
        state=state,
        used_by=[*users, *writers],
        model=request.model.name,
        layer=request.layer,
        hooks=" -> ".join(hook.removeprefix(f"blocks.{request.layer}.") for hook in _hooks(request)),
        context_size=request.context_size,
        storage=request.storage,
        tokens=plan.training_blocks * request.block_tokens if plan else None,
        rows=sum(stratum.total("stored") for stratum in plan.strata) if plan else None,
    )


def _with_run(who: str) -> str:
    """Add the run that a process trains to its name, where Linux tells: the run's lock is among its open files."""
    for file in Path("/proc", who.split()[1], "fd").glob("*"):
        with suppress(OSError):  # of another user, or closed meanwhile
            lock = file.readlink()
            if lock.name == ".lock" and (lock.parent / "config.json").is_file():
                return f"{who}: run {lock.parent.name}"
    return who


def _mtime(path: Path) -> float | None:
    """Return when `path` was changed; none where it is not there, or cannot be seen."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _hooks(request: StoreRequest) -> tuple[str, str]:
    return request.source_hook, request.target_hook


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
