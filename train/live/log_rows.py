"""Check the rows of a run's logs before anything is read from them; and what `usage.json` holds. No torch here.

The model of a row has what readers rely on. What else a row holds is kept, and numbers in it are bounded.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from shared.bounds import Digest, Positions
from shared.config import Config, read_record
from shared.errors import CorruptData
from shared.files.durable import parse_json

OUTLIERS = "outliers"
"""Their name among the strata of a row."""
_LARGEST = 1e100
Step = Annotated[int, Field(ge=1, lt=2**53)]
Number = Annotated[float, Field(ge=-_LARGEST, le=_LARGEST)]
Amount = Annotated[float, Field(ge=0, le=_LARGEST)]


class _Checked(BaseModel):
    """Fields have defaults where a version wrote none; nothing reads them from here."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Prefix(_Checked):
    fvu: Number


class _Stratum(_Checked):
    fvu: Number | None
    """None where the target is constant."""
    rows: Amount
    l0_training_rule: Number


class _HeldOut(_Prefix):
    l0: Number
    dead_share: Number = 0.0


class AnyRow(_Checked):
    """A row of any log."""

    step: Step


class MetricsRow(AnyRow):
    """A row of metrics.jsonl."""

    rows: Amount = 0
    loss: Number = 0.0
    fvu: Number = 0.0
    fvu_natural: Number = 0.0
    l0_training_rule: Number = 0.0
    dead_share: Number = 0.0
    lr: Number = 0.0
    grad_norm: Number = 0.0
    running_threshold: Number = 0.0
    terms: dict[str, Number] = {}
    prefixes: dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], _Prefix] = {}
    strata: dict[Positions | Literal["outliers"], _Stratum] = {}
    merged: dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], Annotated[int, Field(ge=0, lt=2**53)]] = {}
    """Latents that were merged into others so far, by the step after which they were."""
    held_out: _HeldOut = _HeldOut(fvu=0.0, l0=0.0)


class TimingRow(AnyRow):
    """A row of timing.jsonl."""

    rows: Amount
    seconds: Amount
    from_step: Annotated[int, Field(ge=0, lt=2**53)] = 0
    cpu_seconds: Amount = 0.0
    data_wait_share: Number = 0.0


class _WatchedRows(_Checked):
    batch_rows: Step


class _WatchedSettings(_Checked):
    steps: Step
    rows: _WatchedRows


class WatchedConfig(_Checked):
    """What `watch` reads of config.json, which it takes from any version."""

    settings: _WatchedSettings
    store: str = ""
    imported: dict[str, Any] | None = None


MAY_FIND_NOTHING = ("merge",)
"""Components that look for something to mend: that there is nothing is good."""


class Component(Config):
    """What one component has done."""

    calls: int
    """Steps of which it was part; or reports, evaluations or checkpoints that it made."""
    effect: float
    """What came of it, in total."""
    effect_counts: str
    """What `effect` counts."""


class UsageRecord(Config):
    """`usage.json`."""

    schema_version: Literal[1] = 1
    step: int
    components: dict[str, Component]
    rows: dict[str, int]
    """Rows drawn from every stratum."""
    notes: list[str]
    digest: Digest | None = None
    """SHA-256 of the rest; none: in files from before there was one."""


def checked_row(line: bytes, model: type[AnyRow], log: Path) -> dict[str, Any]:
    """Return a row of `log`, one line of its file. Raises `CorruptData` when it is none that this project wrote."""
    try:
        row: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise CorruptData(f"{log}: not valid JSON ({error})") from error
    read_record(model, row, log)
    if any(not abs(number) <= _LARGEST for number in _numbers(row)):
        raise CorruptData(f"{log}: a number is above {_LARGEST:g}")
    return row


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers in a value, however deep."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, int | float):
        yield value
