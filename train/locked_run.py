"""Opens a checkpoint of a run for a command that writes into the run's folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import UserError
from shared.files import durable
from shared.files.untrusted import refuse_links
from shared.store.store import Local
from train.live.run_files import LOCK
from train.model import checkpoint
from train.run.load_run import LoadedRun, load_run, open_store
from train.run.settings import read_config
from train.run.trainer import use_threads
from train.wandb_sync.sync import FOLDER


@contextmanager
def locked_run(
    run: Path,
    *,
    store: Path | None = None,
    local: Local | None = None,
    step: int | None = None,
    verify: bool = False,
) -> Iterator[LoadedRun]:
    """Hold `run` and its store, and load the checkpoint of `step`, or the newest. Uses as many threads as the run.

    What a killed command left in the folder is removed. `verify`: read all of the store's shard files first, and not
    only some. Raises `UserError` when there is no such run, checkpoint or store, or the run is in use or read-only, and
    `CorruptData`.
    """
    config = read_config(run)
    if not os.access(run, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {run}: it is read-only; make it writable, or copy the run and name the copy")
    refuse_links_in(run)
    found = checkpoint.find(run, step)
    opened = open_store(run, config, store, local, verify=verify)
    with opened.reading(), durable.lock(run / LOCK, f"run {run}"):
        durable.sweep(run)
        use_threads(config.settings.threads)  # first, for the last bits of what follows
        yield load_run(run, store=opened, found=found)


def refuse_links_in(run: Path) -> None:
    """Raise `CorruptData` when something in `run`, which is written to, leads out of it. W&B makes links of its own."""
    refuse_links(run, but_in=(FOLDER,))
