"""How the request of a store differs from another's; stores of the same content under another name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ProjectError
from shared.files.durable import TEMPORARY
from shared.store.checks import is_packed, read_request
from shared.store.layout import REQUEST, STORE, StoreRequest

_NAMED = 5
_ONLY_NAMES = {"label", "model.name", "model.revision", "corpus.name"}
"""Fields of a request that name the store, or say where something was found: what it holds has a digest of its own."""


def differences(theirs: StoreRequest, ours: StoreRequest) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by dotted name, with both values."""
    a, b = _flat(theirs.model_dump(mode="json")), _flat(ours.model_dump(mode="json"))
    return {name: (a.get(name), b.get(name)) for name in {**b, **a} if a.get(name) != b.get(name)}


def find_same(cache: Path, request: StoreRequest) -> tuple[Path, StoreRequest] | None:
    """Find a store in `cache` with the rows of `request`, whatever its folder, its model or its text are called.

    Returns its folder and its own request. Of several, a finished one comes first. Packed ones, which are only read,
    do not count.
    """
    same = [
        (path, theirs)
        for path, theirs in _stores(cache)
        if not is_packed(path) and not differences(theirs, request).keys() - _ONLY_NAMES
    ]
    return min(same, key=lambda one: (not (one[0] / STORE).is_file(), one[0].name), default=None)


def explain_new(path: Path, request: StoreRequest) -> str | None:
    """Say how the store to be made at `path` differs from the nearest one in its cache; None if there is no other."""
    found: list[tuple[int, str, dict[str, tuple[Any, Any]]]] = []
    for other, theirs in _stores(path.parent):
        unlike = differences(theirs, request)
        if other != path and unlike:  # else a copy under another name
            found.append((len(unlike), other.name, unlike))
    if not found:
        return None
    _, name, unlike = min(found, key=lambda one: one[:2])
    parts = [f"{field} {_short(a)} there, {_short(b)} here" for field, (a, b) in list(unlike.items())[:_NAMED]]
    more = f"; and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
    return f"new store {path.name}; the nearest in the cache is {name}: {'; '.join(parts)}{more}"


def _stores(cache: Path) -> Iterator[tuple[Path, StoreRequest]]:
    """Yield the stores in `cache` whose request can be read; of the others `ls` tells what is wrong."""
    for path in cache.iterdir() if cache.is_dir() else ():
        if path.suffix == TEMPORARY:
            continue
        try:
            if (path / REQUEST).is_file():
                yield path, read_request(path)
        except (ProjectError, OSError):
            continue


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
