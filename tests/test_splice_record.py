"""`splice.json` in `train report` and `train compare`: shown where it is of the checkpoint, refused when damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.splice_record import FILE, TRANSCODER, ArmFigures, Interval, SplicePart, SpliceRecord, publish_splice
from tests.reports import OPTIONS, STEPS, read
from tests.runs import Outcome
from tests.stores import SyntheticStore

Command = Callable[..., Outcome]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def measured(store: SyntheticStore, step: int = STEPS, recovered: float | None = 0.875) -> SpliceRecord:
    """A record of 4,321 predictions whose intervals are a tenth of each figure to either side."""

    def around(value: float) -> Interval:
        return Interval(value=value, low=0.9 * value, high=1.1 * value)

    found = None if recovered is None else around(recovered)
    arm = ArmFigures(ce=2.5, kl=around(0.125), ce_recovered=found, ce_recovered_of_mean=around(0.75))
    whole = SplicePart(tokens=4321, documents=10, clean_ce=2.0, arms={TRANSCODER: arm})
    return SpliceRecord(
        asked="ab" * 32, store=store.record.request.digest, library="transcoder-cache", weights="cd" * 32, step=step,
        windows=4, rows=4400, rows_left=4, whole=whole, strata={},
    )  # fmt: skip


def test_a_report_shows_what_was_measured_of_its_checkpoint(
    command: Command, run: Path, report_store: SyntheticStore
) -> None:
    publish_splice(run / FILE, measured(report_store))
    assert command("report", run).code == 0
    assert read(run).splice == measured(report_store)
    html, markdown = (run / "report.html").read_text(), (run / "report.md").read_text()
    for told in ("87.5% ± 8.8%", "75.0% ± 7.5%", "0.1250 ± 0.0125", "4,321"):
        assert f"<dd>{told}</dd>" in html and f"| {told} |" in markdown
    publish_splice(run / FILE, measured(report_store, recovered=None))
    assert command("report", run).code == 0
    assert "<dt>CE recovered</dt><dd>–</dd>" in (run / "report.html").read_text()


def test_a_report_leaves_out_what_was_measured_of_another_checkpoint(
    command: Command, run: Path, report_store: SyntheticStore
) -> None:
    publish_splice(run / FILE, measured(report_store, step=STEPS // 2))
    assert command("report", run).code == 0
    assert read(run).splice is None and "CE recovered" not in (run / "report.html").read_text()
    assert "CE recovered" not in (run / "report.md").read_text()


def test_a_comparison_has_the_figures_of_runs_that_have_them(
    command: Command, run: Path, report_store: SyntheticStore
) -> None:
    made = command("run", "--store", report_store.path, "--runs", run.parent, "--name", "b", *OPTIONS,
                   "--set", "optimizer.lr=0.01")  # fmt: skip
    assert made.code == 0, made.err
    assert "CE recovered" not in command("compare", run, made.path).out
    publish_splice(run / FILE, measured(report_store))
    found = json.loads(command("compare", run, made.path, "--json").out)
    first, second = (next(iter(arm["runs"].values())) for arm in found["arms"])
    assert (first["ce_recovered"], first["kl"]) == (0.875, 0.125) and second["ce_recovered"] is second["kl"] is None
    lines = command("compare", run, made.path).out.splitlines()
    cells = {
        line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]] for line in lines if "│" in line
    }
    assert cells["CE recovered"] == ["87.50%", "-"] and cells["KL, nats per token"] == ["0.1250", "-"]


@pytest.mark.parametrize("words", [("report",), ("compare", "--own-l0")], ids=lambda words: words[0])
def test_an_edited_record_is_refused_by_name(
    words: tuple[str, ...], command: Command, run: Path, report_store: SyntheticStore
) -> None:
    publish_splice(run / FILE, measured(report_store))
    (run / FILE).write_text((run / FILE).read_text().replace("0.875", "0.999"))
    done = command(*words, run)
    assert done.code != 0 and str(run / FILE) in done.err and "harvest splice" in done.err
    assert "Traceback" not in done.err and not (run / "report.html").exists()
