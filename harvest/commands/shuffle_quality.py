"""How well a store's rows are shuffled, measured on the batches that training would read.

The measure is the variance of batch means, summed over dimensions, over what it would be if every epoch of every
stratum were a uniform permutation of its rows. Within one epoch of N rows that is the variance of independent rows
times N / (N - 1): batches that share no rows vary less about the population's mean, and repel each other by as much.
Where a stratum is read several times over, epochs are independent of each other, and that is in the expectation too.
So a good shuffle gives 1 on a store of any size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.console.progress import Progress
from shared.store.mapped_array import RowArray
from shared.store.reader import RowReader, RowsConfig
from shared.store.row_arrays import SIDES
from shared.store.statistics import decode, row_norms
from shared.store.store import Store

BATCH_ROWS = (1024, 4096)
FEWEST_BATCHES, MOST_BATCHES = 128, 512
LIMIT = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """The shuffle at one batch size."""

    batch_rows: int
    run_rows: int
    """Neighbouring rows that are read together."""
    batches: int
    """Batches read."""
    neighbours: float
    """Share of adjacent rows of a stratum in a batch that come from one document."""
    neighbours_expected: float
    """The same share if the rows read were in random order."""
    ratio: dict[str, float]
    """By side: variance of batch means over that of uniformly shuffled rows with the same counts per stratum."""
    error: dict[str, float]
    """Standard error of each ratio, as if batches were independent: too small where few rows are read many times."""

    @property
    def good(self) -> bool:
        """Whether no ratio is above the limit."""
        return max(self.ratio.values()) <= LIMIT

    @property
    def better_run_rows(self) -> int:
        """Rows per run that keep every ratio within the limit; `run_rows` if they are.

        A ratio's excess over 1 grows with the run's length less 1, and somewhat less, as batches end within runs: aims
        at two thirds of the limit.
        """
        excess = max(self.ratio.values()) - 1
        return self.run_rows if self.good else 1 + int((self.run_rows - 1) * (LIMIT - 1) * 2 / 3 / excess)


def measure(store: Store, batch_rows: int, run_rows: int | None = None, seed: int = 0) -> Shuffle:
    """Measure the first batches: an epoch of the stratum with most rows in them, but 128 to 512.

    `run_rows` as training is told, or its default. Raises `CorruptData` when a row is not finite, or longer than any
    that the store's statistics know.
    """
    config = RowsConfig(batch_rows=batch_rows, run_rows=run_rows or "auto")
    reader = RowReader(store, store.record.training_blocks, config, seed)
    largest = max(reader.slices(), key=lambda name: reader.slices()[name].stop - reader.slices()[name].start)
    batches = min(MOST_BATCHES, max(FEWEST_BATCHES, int(1 / reader.epochs(1)[largest])))
    documents, first = _Documents(store, reader, batch_rows), next(iter(store.strata.values()))
    widths = {"source": store.record.d_in, "target": store.record.d_out}
    means = {side: np.zeros((batches, width)) for side, width in widths.items()}
    with Progress(f"shuffle, batch {batch_rows:,}", batches, "batches") as bar:
        for step in range(batches):
            reader.will_need(min(step + 1, batches - 1))
            for side in SIDES:
                array: RowArray = getattr(first, side)
                rows = reader.read(step, side, array.room(batch_rows))
                reader.check_norms(step, side, row_norms(rows))
                means[side][step] = decode(rows).mean(axis=0, dtype=np.float64)
            documents.add(step)
            bar.update(step + 1)
    ratio, error = {}, {}
    for side in SIDES:
        ratio[side], error[side] = variance_ratio(means[side], shuffled_variance(store, reader, side, batches))
    neighbours, expected = documents.shares()
    return Shuffle(
        batch_rows=batch_rows,
        run_rows=reader.run_rows,
        batches=batches,
        neighbours=neighbours,
        neighbours_expected=expected,
        ratio=ratio,
        error=error,
    )


def shuffled_variance(store: Store, reader: RowReader, side: str, batches: int) -> float:
    """Return the sample variance of the first batches' means, on average over all shuffles, summed over dimensions."""
    total, rows = sum(reader.counts), len(reader.blocks)
    return sum(
        (count / total) ** 2
        * float(store.statistics[name][side].variance.sum())
        * shuffled_share(count, rows * stratum.stratum.rows, batches)
        for (name, stratum), count in zip(store.strata.items(), reader.counts, strict=True)
    )


def shuffled_share(count: int, rows: int, batches: int) -> float:
    """Return the sample variance over `batches` batches, on average, of the mean of `count` rows of variance 1.

    They follow each other in a stream of independent uniform permutations of `rows` rows. Two rows of one permutation
    have the covariance -1 / (rows - 1), and two of different ones have none.
    """
    if not count or rows == 1:
        return 0.0
    edges, borders = count * np.arange(batches + 1), rows * np.arange(-(-count * batches // rows) + 1)
    low = np.maximum(edges[:-1, None], borders[:-1])
    parts = np.maximum(np.minimum(edges[1:, None], borders[1:]) - low, 0)  # rows of a batch from an epoch
    within = (parts * (parts - 1)).sum() / batches
    between = (parts.sum(axis=0) ** 2 - (parts**2).sum(axis=0)).sum() / (batches * (batches - 1))
    return float((count - (within - between) / (rows - 1)) / count**2)


def variance_ratio(means: NDArray[np.float64], shuffled: float) -> tuple[float, float]:
    """Return the sample variance of batch means [batches, d] over `shuffled`, and its standard error.

    Batches that cannot differ, because each is a whole epoch or all rows are the same, have the ratio 1.
    """
    if not shuffled:
        return 1.0, 0.0
    squares = np.square(means - means.mean(axis=0)).sum(axis=1) * len(means) / (len(means) - 1)
    return float(squares.mean() / shuffled), float(squares.std(ddof=1) / np.sqrt(len(means)) / shuffled)


class _Documents:
    """Counts neighbours from one document in the batches that are read."""

    def __init__(self, store: Store, reader: RowReader, batch_rows: int) -> None:
        self._store, self._reader = store, reader
        self._sequence, self._offset = np.empty(batch_rows, np.uint32), np.empty(batch_rows, np.uint16)
        self._same, self._pairs = 0, 0
        self._seen: dict[str, list[NDArray[np.int64]]] = {name: [] for name in reader.slices()}

    def add(self, step: int) -> None:
        """Read the documents of the rows of `step`."""
        sequence = self._reader.read(step, "sequence", self._sequence)
        offset = self._reader.read(step, "offset", self._offset)
        array = self._store.documents
        shard, row = np.divmod(sequence, array.spec.rows_per_shard)
        found = np.empty(len(sequence), np.int32)
        for number in np.unique(shard):
            chosen = shard == number
            found[chosen] = array.shard(int(number))[row[chosen], offset[chosen]]
        rows = sequence.astype(np.int64) * self._store.request.context_size + offset
        for name, place in self._reader.slices().items():
            part = found[place]
            self._same += int((part[1:] == part[:-1]).sum())
            self._pairs += len(part) - 1
            self._seen[name].append(np.stack([rows[place], part]))

    def shares(self) -> tuple[float, float]:
        """Return the share of neighbours from one document, and what it would be in random order."""
        expected = 0.0
        for parts in self._seen.values():
            rows, owners = np.concatenate(parts, axis=1)
            _, first = np.unique(rows, return_index=True)  # a row that was read again is no neighbour of its own
            _, counts = np.unique(owners[first], return_counts=True)
            collision = float((counts * (counts - 1.0)).sum() / max(len(first) * (len(first) - 1.0), 1.0))
            expected += collision * sum(part.shape[1] - 1 for part in parts)
        return self._same / max(self._pairs, 1), expected / max(self._pairs, 1)


def as_json(found: Shuffle) -> dict[str, Any]:
    """Return plain values."""
    values = {name: getattr(found, name) for name in Shuffle.__slots__}
    return {**values, "good": found.good, "better_run_rows": found.better_run_rows}
