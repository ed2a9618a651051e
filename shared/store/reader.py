"""Which rows of a store a training step sees: a pure function of (store, pinned blocks, mixture, seed, step).

Resuming needs the step alone, and two experiments with one seed see the same rows in the same order. No torch here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from shared.check_settings import Unfit
from shared.config import RenamedConfig
from shared.keyed import permutation
from shared.store.mapped_array import RowRun
from shared.store.outliers import Exclusion
from shared.store.statistics import OUTLIER_RATIO
from shared.store.store import Store, StratumRows
from shared.store.strata import Stratum

MOST_RUN_ROWS = 64
AHEAD = 2
"""Steps whose rows are read before they are needed; the kernel is asked for theirs as many steps earlier. What is in
object storage is asked for earlier, by bytes."""


class RowsConfig(RenamedConfig):
    """Which rows a batch is made of."""

    renamed = {"max_bos_batch_share": "max_position_0_batch_share"}

    batch_rows: int = Field(1024, ge=1)
    """Rows per step."""
    alpha: float = Field(1.0, ge=0)
    """A stratum's share of a batch is proportional to (rows that the model computed)^alpha: 1 is natural, 0 uniform."""
    outlier_ratio: float = Field(OUTLIER_RATIO, ge=0)
    """A row is an outlier if the norm of its source or its target is over this many times the median of positions after
    0; 0: no row is. dictionary_learning and SAEDashboard use 10; SAELens and sparsify have no such limit."""
    outliers: Literal["leave_out", "train"] = "leave_out"
    """Whether training leaves outliers out. A few attention sinks can dominate the loss and the gradient's norm, and
    take a tenth of the latents; dictionary_learning also leaves them out."""
    position_0: Literal["auto", "leave_out", "train"] = "auto"
    """Whether training leaves position 0 out. `auto` does if its rows are outliers or all the same, as they are when
    every window starts with BOS. dictionary_learning and Gemma Scope leave BOS out; SAELens can."""
    max_position_0_batch_share: float = Field(1 / 256, ge=0, le=1)
    """Largest share of a batch that may come from position 0, if it is trained on."""
    blocks: int | None = Field(None, ge=1)
    """Use only this many of the store's training blocks, from the first; none: all. Windows are shuffled over the
    store, so fewer blocks are a smaller sample of the same text."""
    seed: int | None = Field(None, ge=0, lt=2**63)
    """Seed of the order of rows; none: the run's `seed`. Runs with several seeds and one `rows.seed` train on the same
    batches. Recorded in the run."""
    run_rows: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Number of neighbouring rows that are read together. With 64, reading from a cold disk is as fast as reading in
    order. `auto` takes fewer if blocks hold fewer than 252 windows, so that the rows still come from enough windows."""

    def training_blocks(self, store: Store) -> range:
        """Return the blocks that are trained on. Raises `Unfit` when the store has fewer than asked for."""
        there = store.record.training_blocks
        if self.blocks and self.blocks > len(there):
            said = f"rows.blocks = {self.blocks:,}, and the store has {len(there):,} blocks to train on; lower it"
            raise Unfit(said, "rows.blocks")
        return there[: self.blocks]

    def exclusion(self, store: Store, *, figures: bool) -> Exclusion:
        """Return which rows of `store` are left out; `figures`: whether outliers are left out of figures, too."""
        return store.exclusion_at(
            self.outlier_ratio,
            training=self.outliers == "leave_out",
            figures=figures,
            position_0=self.position_0 == "leave_out" or (self.position_0 == "auto" and store.position_0_is_odd),
        )

    def resolve(self, block_sequences: int) -> "RowsConfig":
        """Return the settings with a number of `run_rows` for a store whose blocks hold `block_sequences` windows.

        Runs of r rows from blocks of W windows raise the variance of batch means by (r - 1) rho / W, rho being the
        share of variance that a window decides: by 0.1 at most where rho is at most 0.4.
        """
        found = min(MOST_RUN_ROWS, 1 + block_sequences // 4) if self.run_rows == "auto" else self.run_rows
        return self.model_copy(update={"run_rows": found})


def rows_per_stratum(strata: Sequence[Stratum], config: RowsConfig) -> list[int]:
    """Return the rows of a batch that each stratum gives; they add up to `batch_rows`.

    Proportional to natural_rows^alpha by largest remainder, none for a stratum without natural rows; the stratum that
    is position 0 alone is capped first.
    Raises `Unfit` when the cap leaves no stratum to fill the batch.
    """
    weights = np.array([float(s.natural_rows) ** config.alpha if s.natural_rows else 0.0 for s in strata])
    if not weights.any():
        said = "every row of the store is left out of training; set rows.outliers or rows.position_0 to train"
        raise Unfit(said, "rows.outliers", "rows.position_0", "rows.outlier_ratio")
    counts = _largest_remainder(weights, config.batch_rows)
    at_0 = next((i for i, s in enumerate(strata) if s.is_position_0), None)
    cap = int(config.max_position_0_batch_share * config.batch_rows)
    if at_0 is None or counts[at_0] <= cap:
        return counts
    if len(strata) == 1 and cap < config.batch_rows:
        said = "the store holds position 0 only; raise rows.max_position_0_batch_share to 1 to train on it"
        raise Unfit(said, "rows.max_position_0_batch_share")
    weights[at_0] = 0
    counts = _largest_remainder(weights, config.batch_rows - cap)
    counts[at_0] = cap
    return counts


def _largest_remainder(weights: NDArray[np.float64], total: int) -> list[int]:
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(int)
    for i in np.argsort(counts - exact, kind="stable")[: total - counts.sum()]:
        counts[i] += 1
    return [int(count) for count in counts]


def training_strata(store: Store, blocks: range) -> list[Stratum]:
    """Return the store's strata with the natural rows that are not left out of training on `blocks`."""
    exclusion, found = store.exclusion, []
    for name, part in store.strata.items():
        stratum, left = part.stratum, 1.0
        if exclusion and exclusion.position_0 and stratum.is_position_0:
            left = 0.0
        elif exclusion and exclusion.training:
            left = 1 - len(_within(store.outliers[name], blocks, stratum.rows)) / (len(blocks) * stratum.rows)
        found.append(replace(stratum, natural_rows=stratum.natural_rows * left))
    return found


def _within(rows: NDArray[np.int64], blocks: range, per_block: int) -> NDArray[np.int64]:
    """Return the `rows` of `blocks`, counted from their first."""
    first = blocks.start * per_block
    low, high = np.searchsorted(rows, [first, blocks.stop * per_block])
    return rows[low:high] - first


class RowStream:
    """An endless stream over the rows of one stratum: every epoch is a keyed permutation of its runs.

    Runs are of the rows that are left when those in `without` [n], rising, are left out.
    """

    def __init__(self, rows: int, run_rows: int, *key: int | str, without: NDArray[np.int64] | None = None) -> None:
        self._without = np.zeros(0, np.int64) if without is None else without
        self._shifts = self._without - np.arange(len(self._without))
        """Where each row that is left out would be among those that are not."""
        self.rows = rows - len(self._without)
        self._run = min(run_rows, self.rows)
        self._key = key
        self._epochs: dict[int, tuple[NDArray[Any], int]] = {}

    def runs(self, start: int, count: int, base: int = 0) -> list[RowRun]:
        """Return the rows that make up positions `start : start + count` of the stream, whose first row is `base`."""
        found: list[RowRun] = []
        while count:
            epoch, offset = divmod(start, self.rows)
            taken = min(count, self.rows - offset)
            for low, high in self._runs_of_epoch(epoch, offset, offset + taken):
                found += ((base + first, base + last) for first, last in self._stored(low, high))
            start, count = start + taken, count - taken
        return found

    def _stored(self, low: int, high: int) -> list[RowRun]:
        """List the stored rows that are `low:high` of those not left out; more than one run where some lie between."""
        if not len(self._without):
            return [(low, high)]
        first, last = np.searchsorted(self._shifts, [low, high - 1], side="right")
        between = self._without[first:last].tolist()
        starts, stops = [low + int(first), *(row + 1 for row in between)], [*between, high + int(last)]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if stop > start]

    def _runs_of_epoch(self, epoch: int, start: int, stop: int) -> Iterator[RowRun]:
        order, short_slot = self._order(epoch)
        (first, skipped), (last, place) = self._slot(start, short_slot), self._slot(stop - 1, short_slot)
        lows = [run * self._run for run in order[first : last + 1].tolist()]
        highs = [low + self._run for low in lows]
        if first <= short_slot <= last:
            highs[short_slot - first] = self.rows
        highs[-1] = lows[-1] + place + 1
        lows[0] += skipped
        return zip(lows, highs, strict=True)

    def _slot(self, offset: int, short_slot: int) -> tuple[int, int]:
        """Find the run in which an epoch's `offset` falls, and its place there.

        Only the last of the rows can be short.
        """
        short = self.rows % self._run
        after = offset >= short_slot * self._run + short
        return divmod(offset + (self._run - short if after and short else 0), self._run)

    def _order(self, epoch: int) -> tuple[NDArray[Any], int]:
        """Return the epoch's runs in their order, and where the short one is among them; their number where none is."""
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

    `arrays` are those that `will_need` asks for. The order is that of `config.seed`, where it has one, and of `seed`.
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
        used = training_strata(store, blocks)
        self.natural_rows = [stratum.natural_rows for stratum in used]
        """By stratum, rows of a training block that the batches stand for."""
        self.counts = rows_per_stratum(used, config)
        seed = seed if config.seed is None else config.seed
        self._streams = [
            RowStream(
                len(blocks) * s.stratum.rows,
                self.run_rows,
                "rows",
                seed,
                s.stratum.name,
                without=self._left_out(s.stratum),
            )
            for s in self._strata
        ]
        self._found: dict[int, list[tuple[StratumRows, list[RowRun], int]]] = {}
        self.ahead = AHEAD
        """Steps for whose rows is asked before they are read; by bytes, where they are fetched from object storage."""
        if store.objects:
            most = max(self.steps_per_epoch().values())
            self.ahead = max(AHEAD, min(store.objects.ahead_bytes // self._batch_bytes, most))

    @property
    def _batch_bytes(self) -> int:
        arrays = [getattr(part, name) for part in self._strata[:1] for name in self.arrays]
        return sum(self.counts) * sum(array.spec.row_bytes for array in arrays)

    def _left_out(self, stratum: Stratum) -> NDArray[np.int64] | None:
        """Return the rows of the pinned blocks that no batch has, counted from their first."""
        if not (self.store.exclusion and self.store.exclusion.training):
            return None
        return _within(self.store.outliers[stratum.name], self.blocks, stratum.rows)

    @property
    def has_outliers(self) -> bool:
        """Whether batches can hold rows that are outliers."""
        return any(
            count and len(_within(self.store.outliers[s.stratum.name], self.blocks, s.stratum.rows))
            for s, count in zip(self._strata, self.counts, strict=True)
        ) and not (self.store.exclusion and self.store.exclusion.training)

    def outliers(self, step: int) -> NDArray[np.bool_]:  # [B]
        """Tell which rows of `step` are outliers."""
        found = np.zeros(sum(self.counts), bool)
        for stratum, low, high, at in self.runs(step):
            rows = self.store.outliers[stratum.stratum.name]
            first, last = np.searchsorted(rows, [low, high])
            found[rows[first:last] - low + at] = True
        return found

    def read(self, step: int, array: str, out: NDArray[Any]) -> NDArray[Any]:
        """Fill `out` [B, ...] with the rows of `step`, counted from 0, of an array such as `source`, and return it."""
        for stratum, runs, at in self._runs(step):
            getattr(stratum, array).gather(runs, out[at:])
        return out

    def check_norms(self, step: int, side: str, norms: NDArray[np.float64]) -> None:
        """Raise `CorruptData` as `Store.check_norms`; `norms` [B] are of the rows of `step`."""
        for stratum, runs, at in self._runs(step):
            rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(low, high) for low, high in runs)])
            self.store.check_norms(stratum.stratum.name, side, rows, norms[at : at + len(rows)])

    def longest_norms(self, side: str) -> NDArray[np.float64]:  # [B]
        """Return, for each row of a batch, the norm that no row of its stratum is above in any of the blocks."""
        longest = [max(self.store.longest_norm(block, s.stratum.name, side) for block in self.blocks)
                   for s in self._strata]  # fmt: skip
        return np.repeat(longest, self.counts)

    def will_need(self, step: int) -> None:
        """Ask the kernel to read the rows of `step` ahead, or the object storage to send them."""
        for stratum, runs, _ in self._runs(step):
            for array in self.arrays:
                getattr(stratum, array).will_need(runs)

    def slices(self) -> dict[str, slice]:
        """Tell where each stratum's rows lie in every batch."""
        edges = pairwise(int(edge) for edge in np.cumsum([0, *self.counts]))
        return {
            s.stratum.name: slice(low, high) for s, (low, high) in zip(self._strata, edges, strict=True) if high > low
        }

    def epochs(self, step: int) -> dict[str, float]:
        """Tell how often each stratum's rows have been seen before `step`."""
        return {
            s.stratum.name: step * count / max(stream.rows, 1)
            for s, count, stream in zip(self._strata, self.counts, self._streams, strict=True)
        }

    def steps_per_epoch(self) -> dict[str, int]:
        """Tell in how many steps every row of each stratum that batches have has been seen at least once."""
        found = zip(self._strata, self.counts, self._streams, strict=True)
        return {s.stratum.name: -(-stream.rows // count) for s, count, stream in found if count}

    def describe(self, step: int) -> str:
        """Tell which rows of the store make up `step`, for an error message."""
        return ", ".join(f"{s.stratum.name} {low}:{high}" for s, low, high, _ in self.runs(step))

    def runs(self, step: int) -> Iterator[tuple[StratumRows, int, int, int]]:
        """Yield (stratum, first row, past the last row, place in the batch) of every run of `step`."""
        for stratum, runs, at in self._runs(step):
            for low, high in runs:
                yield stratum, low, high, at
                at += high - low

    def _runs(self, step: int) -> list[tuple[StratumRows, list[RowRun], int]]:
        """List the runs of every stratum, and the first one's place in the batch.

        They are asked for ahead and once per array.
        """
        known = self._found
        if step not in known:
            known = {other: runs for other, runs in known.items() if abs(other - step) <= AHEAD + self.ahead}
            known[step] = self._find_runs(step)
            self._found = known  # whole, at the end: two threads may ask
        return known[step]

    def _find_runs(self, step: int) -> list[tuple[StratumRows, list[RowRun], int]]:
        found, at = [], 0
        for stratum, stream, count in zip(self._strata, self._streams, self.counts, strict=True):
            runs = stream.runs(step * count, count, self.blocks.start * stratum.stratum.rows)
            found.append((stratum, runs, at))
            at += count
        return found
