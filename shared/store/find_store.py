"""Finds the store that a command's argument means: a folder, or a name in the cache."""

import os
from pathlib import Path

from shared.errors import UserError
from shared.files.durable import TEMPORARY
from shared.files.object_store import is_address
from shared.store.layout import REQUEST

CACHE_VARIABLE, CACHE = "TRANSCODER_CACHE", Path("cache")
"""What names the folder that stores are made in, and that folder where nothing does."""
_MOST_LISTED = 20


def cache_folder() -> Path:
    """Return the folder that stores are made in, by the environment."""
    return Path(os.environ.get(CACHE_VARIABLE) or CACHE)


def find_store(given: Path, cache: Path | None = None) -> Path:
    """Return the folder of the store that `given` means: itself, or where there is no such folder, its name in `cache`.

    `cache`: by default that of the environment; of one in object storage every name is taken for a store's. What is
    neither is returned as it is, and what opens it says so; only a folder of stores raises `UserError`, with their
    names, and so does a name that is no store's where others are.
    """
    if (given / REQUEST).exists():
        return given
    if given.is_dir():
        if inside := stores_in(given):
            raise UserError(f"{given} is a folder of stores; name one of them: {_listed(inside)}")
        return given
    place = cache or cache_folder()
    if len(given.parts) != 1 or given.exists():
        return given
    if is_address(place):
        return place / given
    if (place / given).is_dir():
        return place / given
    if known := stores_in(place):
        raise UserError(f"no store {given} here or in {place}; its stores: {_listed(known)}")
    return given


def stores_in(folder: Path) -> list[str]:
    """List the names of the stores in a folder, finished or not, but for what is being removed."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix != TEMPORARY and (path / REQUEST).is_file())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more
