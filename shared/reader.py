"""Which rows of a store a training step sees: a pure function of (store, pinned blocks, mixture, seed, step).

Resuming needs the step alone, and two experiments with one seed see the same rows in the same order. No torch here.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared.config import Config
from shared.errors import UserError
from shared.keyed import permutation
from shared.store import Run, Store, StratumRows
from shared.strata import Stratum

MOST_RUN_ROWS = 64
AHEAD = 2
"""Steps whose rows are read before they are needed; the kernel is asked for theirs as many steps earlier."""


class RowsConfig(Config):
    """Which rows a batch is made of."""

    batch_rows: int = Field(1024, ge=1)
    """Rows per step."""
    alpha: float = Field(1.0, ge=0)
    """A stratum's share of a batch is proportional to (rows the model computed)^alpha: 1 natural, 0 uniform."""
    max_bos_batch_share: float = Field(1 / 256, ge=0, le=1)
    """Most of a batch that may come from position 0."""
    run_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Neighbouring rows that are read together. 64 keep a cold disk as fast as reading in order; `auto` is fewer where
    blocks hold fewer than 252 windows, so that a run's rows still come from enough of them."""

    def resolve(self, block_sequences: int) -> "RowsConfig":
        """With a number of `run_rows` for a store whose blocks hold `block_sequences` windows.

        Runs of r rows from blocks of W windows raise the variance of batch means by (r - 1) rho / W, rho being the
        share of variance that a window decides: by 0.1 at most where rho is at most 0.4.
        """
        found = min(MOST_RUN_ROWS, 1 + block_sequences // 4) if self.run_rows == "auto" else self.run_rows
        return self.model_copy(update={"run_rows": found})


def rows_per_stratum(strata: Sequence[Stratum], config: RowsConfig) -> list[int]:
    """Rows of a batch that each stratum gives; they add up to `batch_rows`.

    Proportional to natural_rows^alpha by largest remainder; the stratum that is position 0 alone is capped first.
    Raises `UserError` when the cap leaves no stratum to fill the batch.
    """
    weights = np.array([float(s.natural_rows) ** config.alpha for s in strata])
    counts = _largest_remainder(weights, config.batch_rows)
    bos = next((i for i, s in enumerate(strata) if (s.start, s.stop) == (0, 1)), None)
    cap = int(config.max_bos_batch_share * config.batch_rows)
    if bos is None or counts[bos] <= cap:
        return counts
    if len(strata) == 1 and cap < config.batch_rows:
        raise UserError("the store holds position 0 only; raise rows.max_bos_batch_share to 1 to train on it")
    weights[bos] = 0
    counts = _largest_remainder(weights, config.batch_rows - cap)
    counts[bos] = cap
    return counts


def _largest_remainder(weights: NDArray[np.float64], total: int) -> list[int]:
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return [int(count) for count in counts]


class RowStream:
    """An endless stream over the rows of one stratum: every epoch is a keyed permutation of its runs."""

    def __init__(self, rows: int, run_rows: int, *key: int | str) -> None:
        self.rows = rows
        self._run = min(run_rows, rows)
        self._key = key
        self._epochs: dict[int, tuple[NDArray[Any], int]] = {}

    def runs(self, start: int, count: int, base: int = 0) -> list[Run]:
        """The rows that make up positions `start : start + count` of the stream, whose first row is `base`."""
        found: list[Run] = []
        while count:
            epoch, offset = divmod(start, self.rows)
            taken = min(count, self.rows - offset)
            found += self._runs_of_epoch(epoch, offset, offset + taken, base)
            start, count = start + taken, count - taken
        return found

    def _runs_of_epoch(self, epoch: int, start: int, stop: int, base: int) -> Iterator[Run]:
        order, short_slot = self._order(epoch)
        (first, skipped), (last, place) = self._slot(start, short_slot), self._slot(stop - 1, short_slot)
        lows = [base + run * self._run for run in order[first : last + 1].tolist()]
        highs = [low + self._run for low in lows]
        if first <= short_slot <= last:
            highs[short_slot - first] = base + self.rows
        highs[-1] = lows[-1] + place + 1
        lows[0] += skipped
        return zip(lows, highs, strict=True)

    def _slot(self, offset: int, short_slot: int) -> tuple[int, int]:
        """The run in which an epoch's `offset` falls, and its place there. Only the last of the rows can be short."""
        short = self.rows % self._run
        after = offset >= short_slot * self._run + short
        return divmod(offset + (self._run - short if after and short else 0), self._run)

    def _order(self, epoch: int) -> tuple[NDArray[Any], int]:
        """The epoch's runs in their order, and where the short one is among them; their number where none is."""
        known = self._epochs
        if epoch not in known:
            full, short = divmod(self.rows, self._run)
            order = permutation(full + bool(short), *self._key, epoch)
            order = order.astype(np.uint32) if len(order) < 2**32 else order  # short runs of a large store are many
            known = {e: found for e, found in known.items() if e == epoch - 1}
            known[epoch] = order, int(np.flatnonzero(order == full)[0]) if short else len(order)
            self._epochs = known  # whole, at the end: two threads may ask
        return known[epoch]


class RowReader:
    """The batches of a store's pinned range of training blocks, as rows of its arrays.

    `arrays` are those that `will_need` asks for.
    """

    def __init__(
        self,
        store: Store,
        blocks: range,
        config: RowsConfig,
        seed: int,
        arrays: Sequence[str] = ("source", "target"),
    ) -> None:
        self.store, self.blocks, self.arrays = store, blocks, arrays
        found = config.resolve(store.request.block_sequences).run_rows
        assert isinstance(found, int)
        self.run_rows = found
        self._strata = list(store.strata.values())
        self.counts = rows_per_stratum([s.stratum for s in self._strata], config)
        self._streams = [
            RowStream(len(blocks) * s.stratum.rows, self.run_rows, "rows", seed, s.stratum.name) for s in self._strata
        ]
        self._found: dict[int, list[tuple[StratumRows, list[Run], int]]] = {}

    def read(self, step: int, array: str, out: NDArray[Any]) -> NDArray[Any]:
        """Fill `out` [B, ...] with the rows of `step`, counted from 0, of an array such as `source`, and return it."""
        for stratum, runs, at in self._runs(step):
            getattr(stratum, array).gather(runs, out[at:])
        return out

    def will_need(self, step: int) -> None:
        """Ask the kernel to read the rows of `step` ahead."""
        for stratum, runs, _ in self._runs(step):
            for array in self.arrays:
                getattr(stratum, array).will_need(runs)

    def slices(self) -> dict[str, slice]:
        """Where each stratum's rows lie in every batch."""
        edges = pairwise(int(edge) for edge in np.cumsum([0, *self.counts]))
        return {
            s.stratum.name: slice(low, high) for s, (low, high) in zip(self._strata, edges, strict=True) if high > low
        }

    def epochs(self, step: int) -> dict[str, float]:
        """How often each stratum's rows have been seen before `step`."""
        return {
            s.stratum.name: step * count / stream.rows
            for s, count, stream in zip(self._strata, self.counts, self._streams, strict=True)
        }

    def describe(self, step: int) -> str:
        """Which rows of the store make up `step`, for an error message."""
        return ", ".join(f"{s.stratum.name} {low}:{high}" for s, low, high, _ in self.runs(step))

    def runs(self, step: int) -> Iterator[tuple[StratumRows, int, int, int]]:
        """(stratum, first row, past the last row, place in the batch) of every run of `step`."""
        for stratum, runs, at in self._runs(step):
            for low, high in runs:
                yield stratum, low, high, at
                at += high - low

    def _runs(self, step: int) -> list[tuple[StratumRows, list[Run], int]]:
        """The runs of every stratum, and the first one's place in the batch; asked for ahead and once per array."""
        known = self._found
        if step not in known:
            known = {other: runs for other, runs in known.items() if abs(other - step) <= AHEAD}
            known[step] = self._find_runs(step)
            self._found = known  # whole, at the end: two threads may ask
        return known[step]

    def _find_runs(self, step: int) -> list[tuple[StratumRows, list[Run], int]]:
        found, at = [], 0
        for stratum, stream, count in zip(self._strata, self._streams, self.counts, strict=True):
            runs = stream.runs(step * count, count, self.blocks.start * stratum.stratum.rows)
            found.append((stratum, runs, at))
            at += count
        return found
