"""Small training runs: their settings, what they leave, and when two are the same."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.model import checkpoint

VALUES: dict[str, Any] = {
    "transcoder.d_sae": 64,
    "activation.k": 6,
    "activation.k_start": 6,
    "rows.batch_rows": 48,
    "threads": 1,
    "diversity.merge.at": [],
}
VALUES_WITHOUT_K = {name: value for name, value in VALUES.items() if not name.startswith("activation.")}
"""For JumpReLU and ReLU: settings that a kind of activation does not have are refused."""


def as_options(values: Mapping[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in ("--set", f"{name}={value}")]


SETS = as_options(VALUES)
SMALL, SMALL_WITHOUT_K = ["tiny", *SETS], ["tiny", *as_options(VALUES_WITHOUT_K)]
"""With the preset that tests were written for: on test stores a run without one has `base`."""


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def path(self) -> Path:
        return Path(self.out.splitlines()[-1])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, optimiser state, metrics, counts, correlation reports and samples are equal bit for bit."""
    left, right = checkpoint.find(a), checkpoint.find(b)
    assert left.step == right.step
    assert left.state.files.keys() == right.state.files.keys()
    for name in left.state.files:
        assert (left.path / name).read_bytes() == (right.path / name).read_bytes(), name
    files = [{str(path.relative_to(run)) for path in _results(run)} for run in (a, b)]
    assert files[0] == files[1]
    for name in sorted(files[0]):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def _results(run: Path) -> list[Path]:
    logs = [run / "metrics.jsonl", run / "usage.json"]
    return [*logs, *run.glob("anti_duplication_logs/*"), *run.glob("samples/*")]


def as_format_4_had_it(run: Path) -> None:
    """Take from a run's checkpoints what they did not hold before format 5: settings, and a digest of their record."""
    for path in checkpoint.steps(run):
        state = json.loads((path / checkpoint.STATE).read_text())
        older = {name: value for name, value in state.items() if name not in ("config", "digest")}
        (path / checkpoint.STATE).write_text(json.dumps(older | {"format_version": 4}))
