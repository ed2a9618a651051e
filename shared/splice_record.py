"""What `python -m harvest splice` leaves in a run's folder: the LLM's loss with a transcoder in its MLP's place."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.bounds import Count, Digest, Name
from shared.config import Config, json_digest, read_record, sealed
from shared.errors import CorruptData
from shared.files import durable

FILE = "splice.json"
"""Of the run's own transcoder; one of another library is in `splice-<digest>.json`."""
TRANSCODER = "transcoder"
"""The arm of the headline."""


class Interval(Config):
    """An estimate with its 95 % confidence interval over documents."""

    value: float
    low: float | None
    """None: fewer than two documents."""
    high: float | None


class ArmFigures(Config):
    """The LLM with something in place of the MLP's output."""

    ce: float
    """Cross entropy of the next token, nats per token."""
    kl: Interval
    """KL divergence of the next token's distribution from that of the unchanged LLM, nats per token."""
    ce_recovered: Interval | None
    """(CE_zero - CE) / (CE_zero - CE_clean); none: zero ablation raises no loss here."""
    ce_recovered_of_mean: Interval | None
    """The same with the mean target in place of zero."""


class SplicePart(Config):
    """The predictions made at some positions."""

    tokens: Count
    documents: Count
    clean_ce: float
    """Of the unchanged LLM, nats per token."""
    arms: dict[Name, ArmFigures] = Field(max_length=1000)
    """By what stands in the MLP's place."""


class SpliceRecord(Config):
    """`splice.json`."""

    schema_version: Literal[1] = 1
    asked: Digest
    """Digest of what was measured: store, weights, windows, arms and the rows that are left."""
    store: Digest
    """Digest of the store's request."""
    library: Name
    """That the transcoder is of."""
    weights: Digest
    step: Count | None
    """Of the checkpoint; none: the transcoder is no run's."""
    windows: Count
    """Held-out windows that the LLM ran on: evenly spaced among the store's report blocks."""
    rows: Count
    """Of these windows, position 0 included."""
    rows_left: Count
    """Of them, those where the MLP's own output stays: rows that the run's training leaves out."""
    whole: SplicePart
    """All positions but 0: the headline."""
    strata: dict[Name, SplicePart] = Field(max_length=1024)
    """By position stratum of the row at which a prediction is made."""

    @property
    def headline(self) -> ArmFigures:
        """Of the whole transcoder."""
        return self.whole.arms[TRANSCODER]


def publish_splice(path: Path, record: SpliceRecord) -> None:
    """Write the record with its digest. Raises `DiskFull`."""
    durable.publish_json(path, sealed(record.model_dump(mode="json")))


def read_splice(path: Path) -> SpliceRecord | None:
    """Read a record; none: there is no such file. Raises `CorruptData` when it was edited or is damaged."""
    if not path.is_file():
        return None
    data = durable.read_json(path)
    remedy = "remove it, and measure again with: python -m harvest splice RUN"
    if not isinstance(data, dict) or "digest" not in data:
        raise CorruptData(f"{path}: it has no digest; {remedy}")
    if data.pop("digest") != json_digest(data):
        raise CorruptData(f"{path}: its digest is not that of what it holds: it was edited, or is damaged; {remedy}")
    record = read_record(SpliceRecord, data, path)
    if TRANSCODER not in record.whole.arms:
        raise CorruptData(f"{path}: it lacks the figures of the transcoder; {remedy}")
    return record


def splice_of(run: Path, step: int, store: str) -> SpliceRecord | None:
    """Return what was measured of a run's own checkpoint of `step` on the store of request digest `store`.

    None: nothing, or that of another step or store. Raises `CorruptData` when the record was edited or is damaged.
    """
    found = read_splice(run / FILE)
    return found if found and (found.step, found.store) == (step, store) else None
