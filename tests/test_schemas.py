"""The JSON schemas that ship are those of the models that write the files.

python -m tests.test_schemas      writes them again
"""

import json
from importlib import resources

import pytest

from shared.config import Config
from train.compare.arms import Comparison
from train.duplicates.correlation_report import CorrelationReport
from train.live.log_rows import UsageRecord
from train.probe.probe_record import ProbeRecord
from train.report.report_record import Report
from train.run.settings import Settings
from train.samples.parquet import SamplesRecord

SCHEMAS: dict[str, type[Config]] = {
    "comparison": Comparison,
    "correlation": CorrelationReport,
    "probe": ProbeRecord,
    "report": Report,
    "samples": SamplesRecord,
    "settings": Settings,
    "usage": UsageRecord,
}
PLACE = resources.files("train") / "schemas"


def text_of(model: type[Config]) -> str:
    return json.dumps(model.model_json_schema(), indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_a_shipped_schema_is_the_models(name: str) -> None:
    assert (PLACE / f"{name}.json").read_text() == text_of(SCHEMAS[name])


def test_no_schema_is_left_over() -> None:
    assert {item.name for item in PLACE.iterdir()} == {f"{name}.json" for name in SCHEMAS}


if __name__ == "__main__":
    for name, model in SCHEMAS.items():
        (PLACE / f"{name}.json").write_text(text_of(model))  # type: ignore[attr-defined]
