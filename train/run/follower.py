"""Processes of one training under `torchrun`: the first leads, the others follow what it tells them at the start."""

import json
import signal
from pathlib import Path

from shared.config import Config, read_record
from shared.console.signals import stop_signals
from shared.console.terminal import Verbosity, with_verbosity
from shared.errors import Stopped
from shared.store.store import Store
from train.model.checkpoint import Checkpoint, read_state
from train.parallel.ranks import Ranks
from train.parallel.required import mine
from train.run.settings import RunConfig
from train.run.trainer import Trainer


class Order(Config):
    """What the first process tells the others: the run that is trained. They read the files that it names."""

    run: Path
    config: RunConfig
    store: Path
    resumed: Path | None
    """The checkpoint that training continues from."""
    has_initial: bool
    """Whether the first process gives weights to start from."""
    inexact: bool


def lead(
    config: RunConfig, run: Path, store: Store, resumed: Checkpoint | None, *, has_initial: bool, inexact: bool = False
) -> Ranks:
    """Start the run in the other processes, if there are any; returns this one among them, which has joined.

    Raises `UserError` where there are others, and they cannot share the run.
    """
    ranks = Ranks()
    mine(config.settings.parallel.shards, ranks.rank, ranks.size)  # raises where they cannot share the run
    if ranks.size > 1:
        order = Order(
            run=run.resolve(),
            config=config,
            store=store.path.resolve(),
            resumed=resumed.path.resolve() if resumed else None,
            has_initial=has_initial,
            inexact=inexact,
        )
        ranks.join()
        ranks.text_from_first(order.model_dump_json())
    return ranks


def follow() -> int:
    """Train with the first process what it leads; returns the exit code. Writes nothing.

    A signal ends this process at once while it waits to be told; in training it is passed to the first one.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a first process that refuses its input never joins
    ranks = Ranks()
    ranks.join()
    order = read_record(Order, json.loads(ranks.text_from_first()), Path("what the first process says"))
    store = Store.open(order.store)
    resumed = Checkpoint(order.resumed, read_state(order.resumed)) if order.resumed else None
    with store.reading(), with_verbosity(Verbosity.QUIET):
        follower = Follower(
            store,
            order.config,
            order.run,
            initial=(lambda _: None) if order.has_initial else None,
            resumed=resumed,
            inexact=order.inexact,
            ranks=ranks,
        )
        code = follower.follow()
    ranks.leave()
    return code


class Follower(Trainer):
    """The state of a run in a process that trains shards of it, and leaves evaluation and files to the first."""

    def follow(self) -> int:
        """Run to the last step, or to where a process is told to stop; returns the exit code."""
        with self._reader, stop_signals() as stop:
            for step in range(self._first, self._settings.steps):
                self._step(step)
                done = step + 1
                stopping, last = self._agree(done, stop)
                self._report(done)
                if last or self._due(done, self._every.checkpoint):
                    self._optimizer.state()  # the first process asks for it, too, and gets what is here
                if stopping and done < self._settings.steps:
                    return Stopped.exit_code
        return 0
