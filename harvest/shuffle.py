"""How well a store's rows are shuffled, measured on the batches that training would read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvest.blocks import SIDES, decode
from shared.errors import UserError
from shared.layout import STORAGE_DTYPES
from shared.progress import Progress
from shared.reader import RowReader, RowsConfig
from shared.store import Store

BATCH_ROWS = (1024, 4096)
MOST_BATCHES = 512
LIMIT = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Shuffle:
    """The shuffle at one batch size."""

    batch_rows: int
    batches: int
    """Batches read."""
    neighbours: float
    """Share of adjacent rows of a stratum in a batch that come from one document."""
    neighbours_expected: float
    """The same share if the rows read were in random order."""
    ratio: dict[str, float]
    """By side: variance of batch means over that of independent rows with the same counts per stratum."""
    error: dict[str, float]
    """Standard error of each ratio."""

    @property
    def good(self) -> bool:
        """Whether no ratio is above the limit."""
        return max(self.ratio.values()) <= LIMIT


def measure(store: Store, batch_rows: int, seed: int = 0) -> Shuffle:
    """Measure the batches of the largest stratum's first epoch, at most `MOST_BATCHES` of them.

    Raises `UserError` when there are fewer than two.
    """
    blocks = store.record.training_blocks
    reader = RowReader(store, blocks, RowsConfig(batch_rows=batch_rows), seed)
    largest = max(reader.slices(), key=lambda name: reader.slices()[name].stop - reader.slices()[name].start)
    batches = min(MOST_BATCHES, int(1 / reader.epochs(1)[largest]))
    if batches < 2:
        raise UserError(f"{store.path} holds fewer than two batches of {batch_rows} training rows")
    documents, dtype = _Documents(store, reader, batch_rows), STORAGE_DTYPES[store.request.storage]
    widths = {"source": store.record.d_in, "target": store.record.d_out}
    means = {side: np.zeros((batches, width)) for side, width in widths.items()}
    with Progress(f"shuffle, batch {batch_rows:,}", batches, "batches") as bar:
        for step in range(batches):
            reader.will_need(min(step + 1, batches - 1))
            for side, width in widths.items():
                rows = reader.read(step, side, np.empty((batch_rows, width), dtype))
                means[side][step] = decode(rows).mean(axis=0, dtype=np.float64)
            documents.add(step)
            bar.update(step + 1)
    ratio, error = {}, {}
    for side in SIDES:
        ratio[side], error[side] = variance_ratio(means[side], independent_variance(store, reader, side))
    neighbours, expected = documents.shares()
    return Shuffle(
        batch_rows=batch_rows,
        batches=batches,
        neighbours=neighbours,
        neighbours_expected=expected,
        ratio=ratio,
        error=error,
    )


def independent_variance(store: Store, reader: RowReader, side: str) -> float:
    """The variance, summed over dimensions, of the mean of a batch of independent rows: sum of c_s sigma_s^2 / B^2."""
    total = sum(reader.counts)
    return sum(
        count * float(store.statistics[name][side].variance.sum()) / total**2
        for name, count in zip(store.strata, reader.counts, strict=True)
    )


def variance_ratio(means: NDArray[np.float64], independent: float) -> tuple[float, float]:
    """The variance of batch means [batches, d] over that of independent rows, and its standard error.

    Batches of one epoch share no rows: that makes their means vary less about the population's, and repel each other
    by as much. So their variance about their own mean is what independent rows give, but for a factor N / (N - 1).
    """
    squares = np.square(means - means.mean(axis=0)).sum(axis=1) * len(means) / (len(means) - 1)
    if not independent:
        return (1.0 if not squares.any() else float("inf")), 0.0
    return float(squares.mean() / independent), float(squares.std(ddof=1) / np.sqrt(len(means)) / independent)


class _Documents:
    """Counts neighbours from one document in the batches that are read."""

    def __init__(self, store: Store, reader: RowReader, batch_rows: int) -> None:
        self._store, self._reader = store, reader
        self._sequence, self._offset = np.empty(batch_rows, np.uint32), np.empty(batch_rows, np.uint16)
        self._same, self._pairs = 0, 0
        self._seen: dict[str, list[NDArray[np.int32]]] = {name: [] for name in reader.slices()}

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
        for name, place in self._reader.slices().items():
            part = found[place]
            self._same += int((part[1:] == part[:-1]).sum())
            self._pairs += max(0, len(part) - 1)
            self._seen[name].append(part)

    def shares(self) -> tuple[float, float]:
        """Share of neighbours from one document, and what it would be in random order."""
        expected = 0.0
        for parts in self._seen.values():
            _, counts = np.unique(np.concatenate(parts), return_counts=True)
            rows = counts.sum()
            collision = float((counts * (counts - 1.0)).sum() / max(rows * (rows - 1.0), 1.0))
            expected += collision * sum(max(0, len(part) - 1) for part in parts)
        return self._same / max(self._pairs, 1), expected / max(self._pairs, 1)


def as_json(found: Shuffle) -> dict[str, Any]:
    """Plain values."""
    values = {name: getattr(found, name) for name in Shuffle.__slots__}
    return {**values, "good": found.good}
