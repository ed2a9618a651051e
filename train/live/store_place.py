"""Where the store of a run is: where it was when the run started, or where it was given after it was moved.

Nothing here imports torch.
"""

from pathlib import Path

from pydantic import ConfigDict

from shared.config import Config, read_record
from shared.errors import UserError
from shared.files.durable import publish_json, read_json
from shared.files.object_store import is_address
from train.live.run_files import config_file

PLACE = "store_place.json"


class _Started(Config):
    """What is read here of `config.json`."""

    model_config = ConfigDict(extra="ignore")
    store: Path


class StorePlace(Config):
    """`store_place.json` of a run: where its store is, after it was moved."""

    store: Path


def moved_store(run: Path) -> Path | None:
    """Return where the store of `run` was given last; none: never. Raises `CorruptData` when the record is damaged."""
    path = run / PLACE
    return read_record(StorePlace, read_json(path), path).store if path.is_file() else None


def keep_store_place(run: Path, store: Path) -> None:
    """Keep that the store of `run` is at `store` now."""
    publish_json(run / PLACE, StorePlace(store=store).model_dump(mode="json"))


def store_of_run(run: Path) -> Path:
    """Return where the store of `run` is. Raises `UserError` when either is not there, and `CorruptData`."""
    path = config_file(run)
    return require_store(moved_store(run) or read_record(_Started, read_json(path), path).store)


def require_store(store: Path) -> Path:
    """Return the place of a run's store. Raises `UserError` when it is a folder that is not there."""
    if not is_address(store) and not store.is_dir():
        raise UserError(f"no store at {store}: no such folder; if it was moved, say where it is: --store STORE")
    return store
