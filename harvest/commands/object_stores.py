"""The stores of a cache in object storage: listed, and removed."""

import json
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from harvest.commands.stores import Entry, describe_entry
from shared.errors import UserError
from shared.files import durable
from shared.files.lease import Lease
from shared.files.object_store import Objects, address, require_below_bucket
from shared.store.layout import LEDGER, PACKED, PLAN, REQUEST, STORE, UNFINISHED


def list_object_stores(cache: Path) -> list[Entry]:
    """List every store below an address, by name. Of its objects only the records are fetched."""
    objects, sizes = Objects(cache), defaultdict[str, dict[str, int]](dict)
    for path, size in objects.sizes().items():
        name, _, rest = path.partition("/")
        sizes[name][rest] = size
    stores = {name: found for name, found in sorted(sizes.items()) if {REQUEST, UNFINISHED} & found.keys()}
    return [_entry(objects, name, found) for name, found in stores.items()]


def _entry(objects: Objects, name: str, sizes: dict[str, int]) -> Entry:
    """Describe a store by a folder that has its records, and empty files for those of its blocks."""
    with tempfile.TemporaryDirectory() as folder:
        path, age = Path(folder) / Path(name).name, float("inf")
        for record in (REQUEST, PLAN, STORE, PACKED, UNFINISHED):
            if record in sizes:
                durable.publish_bytes(path / record, objects.get(f"{name}/{record}"))
                age = min(age, objects.age(f"{name}/{record}"))
        for block in sizes:
            if Path(block).parent == Path(LEDGER):
                durable.publish_bytes(path / LEDGER / Path(block).name, b"")
        found = describe_entry(path)
    holder = objects.get_tagged(f"{name}.lock")
    return replace(found, bytes=sum(sizes.values()), age_seconds=age, used_by=[_holder(holder[0])] if holder else [])


def _holder(data: bytes) -> str:
    try:
        lease = json.loads(data)
        return f"process {int(lease['process'])} on {lease['host']}, writing (or killed)"
    except (ValueError, KeyError, TypeError):
        return "another process"


def size_of_object_store(path: Path) -> int:
    """Return the bytes of the store at an address. Raises `UserError` when there is none."""
    require_below_bucket(path)
    sizes = Objects(path).sizes()
    if not {REQUEST, STORE, UNFINISHED} & sizes.keys():
        raise UserError(f"{address(path)} is not a store: it has no {REQUEST}")
    return sum(sizes.values())


def remove_object_store(path: Path) -> None:
    """Remove the store at an address: `store.json` first, so that a part of it is never taken for a finished one.

    Raises `UserError` when a process writes it. Who trains from it is not known there.
    """
    size_of_object_store(path)
    objects = Objects(path)
    with Lease(Objects(path.parent), f"{path.name}.lock", f"store {address(path)}"):
        names = sorted(objects.sizes())
        for part in ([STORE], [name for name in names if name.startswith(f"{LEDGER}/")], names):
            objects.delete([name for name in part if name in names and name not in (REQUEST, UNFINISHED)])
        objects.delete([REQUEST, UNFINISHED])  # last: what a kill left can be removed again
