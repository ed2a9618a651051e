"""A process in which several runs are trained side by side: each in a thread, one step after the other in turn.

Results do not depend on it: a run's state is its own, and its rows are a pure function of its settings and the step.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numba
from threadpoolctl import threadpool_limits

from shared.config import json_digest
from shared.console.process import give_back_freed_memory
from shared.console.signals import stop_signals
from shared.console.terminal import quiet_thread
from shared.store.store import Store
from train.data.batches import BatchReader
from train.data.shared_batches import SharedBatchReader
from train.run.process import OwnProcess, new_reader
from train.run.settings import RunConfig

_LOOK_SECONDS = 0.2
"""Between two looks at signals while runs are trained."""
_NOT_BEGUN = -1
"""The step of a run that is being set up."""


def rows_digest(config: RunConfig, store: Path) -> str:
    """Return what is the same for runs that are trained on the same batches: the store, which rows, their order."""
    settings = config.settings
    seed = settings.seed if settings.rows.seed is None else settings.rows.seed
    return json_digest(
        config.model_dump(mode="json", include={"request", "first_block", "last_block", "exclusion"})
        | {"store": str(store.resolve())}
        | {"rows": settings.rows.model_dump(mode="json") | {"seed": seed}}
        | settings.model_dump(mode="json", include={"source", "device", "resident_rows"})
    )


class SharedProcess:
    """The turns of runs that share a process, and their readers.

    `lanes` of them work at a time, those furthest behind first. None is more than one step ahead of another, so that a
    batch is read once for all. Setting a run up, its evaluations and what follows its last step take its lane as well.
    """

    def __init__(self, runs: Mapping[Path, str], lanes: int, stop: list[int]) -> None:
        """Share the process between `runs`, each with its `rows_digest`. `stop` is filled when all are to stop."""
        self._rows, self._lanes, self.stop = dict(runs), lanes, stop
        self._changed = threading.Condition()
        self._steps = dict.fromkeys(runs, _NOT_BEGUN)
        """The step that each run is at, or waits for."""
        self._working: set[Path] = set()
        self._cpu, self._counted = dict.fromkeys(runs, 0.0), time.process_time()
        self._readers: dict[str, SharedBatchReader] = {}

    def reader(self, run: Path, store: Store, config: RunConfig) -> BatchReader:
        """Return the reader of a run and of all others with its rows."""
        rows = self._rows[run]
        with self._changed:
            if rows not in self._readers:
                sharing = sum(1 for other in self._rows.values() if other == rows)
                self._readers[rows] = new_reader(SharedBatchReader, store, config, sharing)
            return self._readers[rows]

    def take_lane(self, run: Path, step: int = _NOT_BEGUN) -> None:
        """Give the lane of a run to those that are behind, and return when it may go on with `step`."""
        with self._changed:
            self._give_lane(run)
            self._steps[run] = step
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._may_work(run))
            self._count_cpu()
            self._working.add(run)

    def leave(self, run: Path) -> None:
        """Go on without a run that has ended."""
        with self._changed:
            self._give_lane(run)
            del self._steps[run]
            self._changed.notify_all()

    def cpu_seconds(self, run: Path) -> float:
        """Return the CPU seconds of a run: those of the process, in equal parts to the runs that had a lane."""
        with self._changed:
            self._count_cpu()
            return self._cpu[run]

    def _give_lane(self, run: Path) -> None:
        self._count_cpu()
        self._working.discard(run)

    def _may_work(self, run: Path) -> bool:
        waiting = [step for other, step in self._steps.items() if other not in self._working]
        step = self._steps[run]
        return len(self._working) < self._lanes and step == min(waiting) and step <= min(self._steps.values()) + 1

    def _count_cpu(self) -> None:
        now = time.process_time()
        for run in self._working:
            self._cpu[run] += (now - self._counted) / len(self._working)
        self._counted = now


class Place(OwnProcess):
    """The place of one run in a shared process."""

    def __init__(self, shared: SharedProcess, run: Path) -> None:
        self._shared, self._run = shared, run

    def reader(self, store: Store, config: RunConfig) -> BatchReader:
        """Return what reads the batches of all runs with these rows."""
        return self._shared.reader(self._run, store, config)

    def stop_signals(self) -> AbstractContextManager[list[int]]:
        """Return a context that yields the list of all runs: signals reach the main thread alone."""
        return nullcontext(self._shared.stop)

    def wait_for_turn(self, step: int) -> None:
        """Return when `step` may be trained."""
        self._shared.take_lane(self._run, step)

    def end_of_large_part(self) -> None:
        """Give back freed memory: each thread has a heap of its own, of which others have no use."""
        give_back_freed_memory()

    def cpu_seconds(self) -> float:
        """Return the CPU seconds of this run."""
        return self._shared.cpu_seconds(self._run)


Ended = Callable[[Path, Exception | None], None]
"""Told of a run that has ended, and of what it raised."""


def train_side_by_side(
    runs: Mapping[Path, str], train: Callable[[Path, OwnProcess], object], lanes: int, ended: Ended
) -> bool:
    """Train `runs`, each with its `rows_digest`, in a thread each by `train`, and tell of each that it has `ended`.

    `lanes` of them work at a time. Returns whether a signal has stopped them. Raises `KeyboardInterrupt` at a second
    Ctrl-C: threads are then still running.
    """

    def work(run: Path) -> None:
        quiet_thread()
        raised: Exception | None = None
        shared.take_lane(run)
        try:
            if not stop:
                train(run, Place(shared, run))
        except Exception as error:  # what one run meets is no reason for the others to stop
            raised = error
        finally:
            give_back_freed_memory()
            shared.leave(run)
        ended(run, raised)

    with stop_signals() as stop, _one_library_thread(lanes):
        shared = SharedProcess(runs, lanes, stop)
        threads = [threading.Thread(target=work, args=(run,), name=run.name, daemon=True) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(_LOOK_SECONDS)
    return bool(stop)


@contextmanager
def _one_library_thread(lanes: int) -> Iterator[None]:
    """Let several runs compute at a time.

    A run sets the number of BLAS threads to one for its product and back. Another one in the same product would lose
    that in the middle: so it is one throughout.
    """
    if lanes == 1:
        yield
        return
    numba.config.THREADING_LAYER = "threadsafe"
    with threadpool_limits(1, "blas"):
        yield
