"""The diversity loss, the monitor and `usage.json` through the real commands on a synthetic store."""

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import SMALL, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from train.live.run_files import HELD_OUT, REPORTS
from train.model import checkpoint


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


DIVERSE = [
    "--set", "diversity.orthogonality.weight=8", "--set", "diversity.orthogonality.every=3",
    "--set", "diversity.mined.weight=8", "--set", "diversity.mined.cost_share=0.2",
    "--set", "diversity.co_activation.weight=2", "--set", "diversity.co_activation.margin=0.1",
    "--set", "diversity.position.weight=1", "--set", "diversity.position.max_position_0_mass_share=0.01",
    "--set", "rows.position_0=train", "--set", "rows.max_position_0_batch_share=0.1",
    "--set", "monitor.every=6", "--set", "monitor.rows=150", "--set", "monitor.least_together=3",
]  # fmt: skip
OFF = ["--set", "diversity.mined.weight=0", "--set", "diversity.co_activation.weight=0"]


def test_the_diversity_loss_parts_latents_and_every_term_is_logged(
    command, store: SyntheticStore, tmp_path: Path
) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 120, *SMALL, "--set", "optimizer.lr=0.01")
    plain, diverse = command(*common, *DIVERSE[-8:], *OFF).path, command(*common, *DIVERSE).path
    last = [json.loads((run / REPORTS / "correlation-000120.json").read_text()) for run in (plain, diverse)]
    assert rows(plain)[-1]["terms"].keys() == {"reconstruction", "auxk", "quiet"}
    terms = rows(diverse)[-1]["terms"]
    assert terms.keys() == {"reconstruction", "auxk", "orthogonality", "mined", "co_activation", "position"}
    assert all(terms[name] > 0 for name in ("orthogonality", "mined", "co_activation", "position"))
    shares = [report["directions"]["share_within_segment_above"]["0.5"] for report in last]
    assert shares[1] < 0.5 * shares[0]
    pairs = [report["without_position_0"]["pairs_above"]["0.5"] for report in last]
    assert pairs[1] <= pairs[0]


def test_usage_says_what_every_component_did(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 30, *SMALL, *DIVERSE)
    record = json.loads((done.path / "usage.json").read_text())
    calls = {name: component["calls"] for name, component in record["components"].items()}
    assert calls == {
        "reconstruction": 30, "auxk": 30, "orthogonality": 10, "mined": 30, "co_activation": 30, "position": 30,
        "monitor": 5, "evaluation": 1, "checkpoint": 1, "samples": 1,
    }  # fmt: skip
    for name in ("auxk", "orthogonality", "mined", "co_activation", "position"):
        total = sum(row["terms"].get(name, 0) * row["steps"] for row in rows(done.path))
        assert record["components"][name]["effect"] == pytest.approx(total) and total > 0
    assert sum(record["rows"].values()) == 30 * 48 and record["step"] == 30
    assert record["notes"] == []


def test_an_inert_component_stops_the_run_before_its_first_step(
    command, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.duplicates.diversity.direction_loss", lambda W_dec, *_: W_dec.sum() * 0)
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 30, *SMALL, *DIVERSE)
    assert done.code == 1 and "diversity.orthogonality is on, and planted duplicates do not move it" in done.err
    assert not (tmp_path / "tiny-001").exists()


def test_a_run_with_the_diversity_loss_resumes_bit_for_bit(command, store: SyntheticStore, tmp_path: Path) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL, *DIVERSE)
    cadence = ("--set", "checkpoint.every=11", "--set", "log_every=7", "--set", "evaluation.every=20")
    whole, stopped = (command(*common, *cadence).path for _ in range(2))
    shutil.rmtree(checkpoint.folder(stopped, 40))
    for report in (stopped / REPORTS).iterdir():  # those after the checkpoint are made again
        if report.name > "correlation-000033":
            report.unlink()
    assert checkpoint.find(stopped).step == 33
    assert command("resume", stopped).code == 0
    assert_same_run(whole, stopped)
    assert (whole / "usage.json").read_bytes() == (stopped / "usage.json").read_bytes()
    reports = sorted(path.name for path in (whole / REPORTS).iterdir())
    assert len(reports) == 8
    for name in reports:
        assert (whole / REPORTS / name).read_bytes() == (stopped / REPORTS / name).read_bytes()


def test_a_run_without_the_monitor_writes_no_reports(command, store: SyntheticStore, tmp_path: Path) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 6, *SMALL, "--set", "monitor.every=0")
    done = command(*common, *OFF)
    assert done.code == 0 and not (done.path / REPORTS).exists()
    assert "monitor" not in json.loads((done.path / "usage.json").read_text())["components"]
    for options, remedy in (([], "diversity.co_activation.weight = 0"),
                            (["--set", "diversity.controller.max_share_above_0_7=0"], "below steps\n")):  # fmt: skip
        refused = command(*common, *options)
        assert refused.code == 2 and "set monitor.every above 0" in refused.err and remedy in refused.err


def test_a_finished_run_that_lost_its_last_report_makes_it_again(
    command, store: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 12, *SMALL)
    report = done.path / REPORTS / HELD_OUT
    before = report.read_bytes()
    found = json.loads(before)
    assert found["sample"]["rows_of"] == "held-out blocks" and found["step"] == 12
    assert sum(found["sample"]["strata"].values()) == found["with_position_0"]["rows"] > 0
    report.unlink()
    assert command("resume", done.path).code == 0 and report.read_bytes() == before
