"""`probe.json`: what a run's latents mean, by labels of the store's tokens."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shared.bounds import Count, Digest, Name
from shared.config import Config, json_digest, read_record, sealed
from shared.errors import CorruptData
from shared.files import durable

FILE = "probe.json"
_MOST_BYTES = 2**28
"""Three labels of each of a million latents."""
EXPLAINED = (0.5, 0.8)
"""F1 from which a label explains a latent: the first is the headline's."""

Share = Annotated[float, Field(ge=0, le=1)]
Kind = Literal["latents", "random", "residual"]
"""Columns that are probed: the latents, as many random directions at the same l0, the dimensions of the rows."""
ByCount = Annotated[dict[str, Share], Field(max_length=16)]
"""F1 by the number of columns of a probe."""


class Absorption(Config):
    """How often another latent does what the label's main latents should, by SAEBench's definitions."""

    tokens: Count
    """Rows with the label on which the dense probe of the targets finds it."""
    rate: Share
    """Of these, those on which no main latent is active, and another one adds at least 0.4 of what the target has along
    the probe."""
    fraction: Share
    """Mean share of other latents in what main latents and others add along the probe."""


class LabelProbe(Config):
    """One label."""

    name: Name
    share: Share
    """Of the rows of the second half that have it."""
    f1: dict[Kind, ByCount]
    """Of the k-sparse probes."""
    dense_f1: Share
    """Of the logistic probe on all dimensions."""
    latents: list[Count] = Field(max_length=100)
    """Those of the k-sparse probes, the first first."""
    splits: Count
    """Further latents, each of which raises F1 by more than 0.03: the label is split over so many more."""
    absorption: Absorption | None
    """None: the dense probe of the targets does not find the label."""
    explains: Count
    """Latents whose best label this is, with an F1 of at least 0.5."""


class ProbeSummary(Config):
    """All but the labels of single latents."""

    asked: Digest
    """Digest of what was probed: runs that agree in it were probed on the same rows for the same labels."""
    store: Digest
    """Digest of the store's request."""
    step: Count
    """Of the checkpoint."""
    kind: Name
    """Of labels: `python`, `english`, or `file` with its SHA-256."""
    unit: Literal["documents", "sequences"]
    """What halves and draws of the bootstrap are made of."""
    units: tuple[Count, Count]
    """Of the first half, on which all is chosen and fitted, and of the second, on which all is scored."""
    rows: tuple[Count, Count]
    d_sae: Count
    live: Count
    """Latents that are active on any of the rows."""
    l0: float = Field(ge=0)
    explained: dict[Kind, dict[str, Share]]
    """Share of live latents, or of random directions, whose best label has at least this F1."""
    mean_f1: dict[Kind, ByCount]
    """Over labels."""
    mean_dense_f1: Share
    mean_splits: float = Field(ge=0)
    mean_absorption: Share | None
    """Rate, over labels that have one; none: no label has."""
    mean_absorption_fraction: Share | None
    labels: list[LabelProbe] = Field(max_length=1000)
    left_out: list[Name] = Field(max_length=1000)
    """Labels with too few or too many rows."""

    @property
    def best_first(self) -> list[LabelProbe]:
        """The labels by falling F1 of one latent."""
        return sorted(self.labels, key=lambda label: -label.f1["latents"]["1"])


class LatentLabels(Config):
    """A row for each latent and label, by latent, the best label first; columns of the same length."""

    latent: list[Count]
    label: list[Count]
    """By its place in the summary's `labels`."""
    cut: list[float]
    """Activation above which the latent tells the label; 0: active at all."""
    precision: list[Share]
    recall: list[Share]
    f1: list[Share]
    f1_low: list[Share]
    """The 95 % intervals are of a bootstrap over documents; what was chosen on the first half stays."""
    f1_high: list[Share]
    auroc: list[Share]
    auroc_low: list[Share]
    auroc_high: list[Share]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len({len(getattr(self, name)) for name in type(self).model_fields}) > 1:
            raise ValueError("columns of different lengths")
        return self


class ProbeRecord(Config):
    """`probe.json`."""

    schema_version: Literal[1] = 1
    summary: ProbeSummary
    latents: LatentLabels

    @model_validator(mode="after")
    def _names_what_is_there(self) -> Self:
        numbers = (self.latents.latent, self.summary.d_sae), (self.latents.label, len(self.summary.labels))
        if any(max(given, default=-1) >= count for given, count in numbers):
            raise ValueError("names a latent or a label that does not exist")
        if self.latents.latent != sorted(self.latents.latent):
            raise ValueError("latents are not in order")
        return self


def publish_probe(run: Path, record: ProbeRecord) -> Path:
    """Write the record with its digest. Raises `DiskFull`."""
    durable.publish_json(run / FILE, sealed(record.model_dump(mode="json")))
    return run / FILE


def probe_of(run: Path, step: int, store: str) -> ProbeRecord | None:
    """Return what was measured of the checkpoint of `step` on the store of request digest `store`.

    None: nothing, or that of another step or store. Raises `CorruptData` when the record was edited or is damaged.
    """
    path = run / FILE
    if not path.is_file():
        return None
    data = durable.read_json(path, _MOST_BYTES)
    remedy = f"remove it, and measure again with: python -m train probe {run}"
    if not isinstance(data, dict) or data.pop("digest", None) != json_digest(data):
        raise CorruptData(f"{path}: its digest is not that of what it holds: it was edited, or is damaged; {remedy}")
    record = read_record(ProbeRecord, data, path)
    return record if (record.summary.step, record.summary.store) == (step, store) else None
