"""The records at a store's path: each stands in for one that is lost, and none is believed against another."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from harvest.writer.request_differences import differences
from shared.errors import CorruptData, UserError
from shared.files.untrusted import refuse_links
from shared.store.checks import is_packed, read_plan, read_request, read_store_record
from shared.store.layout import PLAN, REQUEST, STORE, StorePlan, StoreRecord, StoreRequest

R = TypeVar("R", StoreRequest, StorePlan, StoreRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What is at a path, whole or not."""

    request: StoreRequest | None
    """What was asked for, by request.json or, where that is lost, by store.json."""
    plan: StorePlan | None
    """What is planned, by plan.json or, where that is lost or falls behind, by store.json."""
    finished: StoreRecord | None
    """`store.json`: perhaps of fewer blocks than are planned now."""


def read_records(path: Path) -> Records:
    """Read all three. Raises `CorruptData` on a damaged one that nothing stands in for, and on a link in the store."""
    refuse_links(path)
    request, plan = _whole(read_request, path, REQUEST), _whole(read_plan, path, PLAN)
    finished = _whole(read_store_record, path, STORE)
    if finished and request in (None, finished.request):
        longer = plan is not None and plan.continues(finished.plan)
        return Records(request=finished.request, plan=plan if longer else finished.plan, finished=finished)
    if request is None and (path / REQUEST).is_file():
        read_request(path)  # raises
    if plan is None and (path / PLAN).is_file():
        read_plan(path)
    return Records(request=request, plan=plan, finished=None)


def check_request(
    path: Path,
    found: StoreRequest | None,
    request: StoreRequest,
    remedy: str = "choose another --cache, or remove the folder",
) -> None:
    """Raise `UserError` when what was `found` at `path` is not `request`."""
    if found in (None, request):
        return
    assert found is not None
    name, (theirs, ours) = next(iter(differences(found, request).items()))
    raise UserError(f"{path / REQUEST} belongs to another request: {name} is {theirs} there and {ours} here; {remedy}")


def refuse_packed(path: Path) -> None:
    """Raise `UserError` for a packed store, which is only read."""
    if is_packed(path):
        raise UserError(
            f"{path} is a packed store, which is only read; unpack it (harvest unpack {path} FOLDER), or, if it is "
            "damaged, pack the store again"
        )


def _whole(read: Callable[[Path], R], path: Path, name: str) -> R | None:
    """Return a record, if it is there and whole."""
    try:
        return read(path) if (path / name).is_file() else None
    except CorruptData:
        return None
