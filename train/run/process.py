"""What a run takes of the process that trains it: batches, signals, its turn, and CPU time."""

import time
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

from shared.console.signals import stop_signals
from shared.store.store import Store
from train.data.batches import BatchReader
from train.run.memory import keeps_rows
from train.run.settings import RunConfig

R = TypeVar("R", bound=BatchReader)


class OwnProcess:
    """A process that trains one run. `train.sweeps.shared_process` has the form of runs that share one."""

    def reader(self, store: Store, config: RunConfig) -> BatchReader:
        """Return what reads the batches of a run from `store`."""
        return new_reader(BatchReader, store, config, stop=config.settings.steps)

    def stop_signals(self) -> AbstractContextManager[list[int]]:
        """Return a context that yields a list, which signals to stop fill."""
        return stop_signals()

    def wait_for_turn(self, step: int) -> None:
        """Return when `step`, counted from 0, may be trained."""

    def end_of_large_part(self) -> None:
        """Be told that something has ended that takes more memory than a step, such as an evaluation."""

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the run has taken so far, from any start."""
        return time.process_time()


def new_reader(kind: type[R], store: Store, config: RunConfig, runs: int = 1, stop: int | None = None) -> R:
    """Return a reader of this `kind` for a run, or for so many `runs` side by side that have the same rows.

    Nothing is fetched ahead for the step `stop` or later ones.
    """
    settings = config.settings
    return kind(
        store,
        config.training_blocks,
        settings.rows,
        settings.seed,
        torch.device(settings.device),
        settings.source,
        resident=keeps_rows(config, store, runs),
        stop=stop,
    )
