"""How the request of a store differs from another's."""

from pathlib import Path
from typing import Any

from shared.errors import ProjectError
from shared.store.checks import read_request
from shared.store.layout import REQUEST, StoreRequest

_NAMED = 5


def differences(theirs: StoreRequest, ours: StoreRequest) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by dotted name, with both values."""
    a, b = _flat(theirs.model_dump(mode="json")), _flat(ours.model_dump(mode="json"))
    return {name: (a.get(name), b.get(name)) for name in {**b, **a} if a.get(name) != b.get(name)}


def explain_new(path: Path, request: StoreRequest) -> str | None:
    """Say how the store to be made at `path` differs from the nearest one in its cache; None if there is no other."""
    found: list[tuple[int, str, dict[str, tuple[Any, Any]]]] = []
    for other in path.parent.iterdir() if path.parent.is_dir() else ():
        if other != path and (other / REQUEST).is_file():
            try:
                unlike = differences(read_request(other), request)
            except ProjectError:
                continue  # of another format, or damaged: `ls` says so
            if unlike:  # else a copy under another name
                found.append((len(unlike), other.name, unlike))
    if not found:
        return None
    _, name, unlike = min(found, key=lambda one: one[:2])
    parts = [f"{field} {_short(a)} there, {_short(b)} here" for field, (a, b) in list(unlike.items())[:_NAMED]]
    more = f"; and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
    return f"new store {path.name}; the nearest in the cache is {name}: {'; '.join(parts)}{more}"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."
