"""One reader for runs that are trained side by side on the same rows."""

import threading
from typing import Any, Self

from torch import Tensor

from train.data.batches import BatchReader


class SharedBatchReader(BatchReader):
    """A reader from which several threads take batches, each of them every batch, at most a step apart.

    A batch is read once, and kept until the next but one is asked for. The block `with reader:` is entered by each; its
    threads begin with the first and have ended when the last has left.
    """

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._lock, self._users = threading.RLock(), 0
        self._kept: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Self:
        with self._lock:
            if not self._users:
                super().__enter__()
            self._users += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._kept = {}
                super().__exit__()

    def fetch(self, step: int) -> list[Tensor]:
        """Return what the rows of `step` are made of, which nobody may change.

        Raises what reading them raised, to each that asks.
        """
        with self._lock:
            if step not in self._kept:
                found = [one.clone() for one in super().fetch(step)]  # its place is read into again meanwhile
                self._kept = {other: kept for other, kept in self._kept.items() if other == step - 1} | {step: found}
            return list(self._kept[step])
