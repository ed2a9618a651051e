"""Rows and records of a run that are lost, cut or damaged: said by every command that reads them, with no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.targets_of_runs import _tables
from tests.runs import SMALL, Outcome
from tests.stores import SyntheticStore, flip
from train.live.run_files import CONFIG, METRICS, TIMING, USAGE
from train.live.store_place import PLACE
from train.run.metrics import Log, logged_steps
from train.samples.parquet import RECORD, parquet, read_contexts, read_latents

Command = Callable[..., Outcome]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(True)


def edit(path: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change one row."""
    found = lines(path)
    row = json.loads(found[number])
    change(row)
    found[number] = json.dumps(row) + "\n"
    path.write_text("".join(found))


def test_the_steps_that_have_a_row() -> None:
    assert logged_steps(50, 120, 260, 260) == [50, 100, 120, 150, 200, 240, 250, 260]
    assert logged_steps(50, 120, 260, 120) == [50, 100, 120]
    assert logged_steps(50, 120, 260, 30) == []


@pytest.mark.fault(43)
def test_lost_rows_are_said_by_report_and_resume(run: Path, command: Command) -> None:
    """The second half of one log, and one row of the other."""
    metrics, timing = lines(run / METRICS), lines(run / TIMING)
    (run / METRICS).write_text("".join(metrics[:6]))
    (run / TIMING).write_text("".join(timing[:3] + timing[4:]))
    (run / USAGE).unlink()
    done = command("report", run)
    assert done.code == 0, done.err
    verdict = {one["name"]: one for one in json.loads((run / "report.json").read_text())["verdict"]}
    said = "metrics.jsonl: 6 rows are missing, of steps 70, 80, 90, 100, 110 and 1 more; figures over steps are of the "
    assert (verdict[METRICS]["state"], verdict[METRICS]["said"]) == ("look", f"{said}others.")
    assert verdict[TIMING]["said"].startswith("timing.jsonl: 1 row is missing, of step 40;")
    assert verdict[USAGE]["state"] == "look" and "missing" in verdict[USAGE]["said"]
    assert "generalisation" not in verdict  # the last rows trained on are not there
    resumed = command("resume", run)
    assert resumed.code == 0 and f"warning: {run / METRICS}: 6 rows are missing, of steps 70, 80" in resumed.err
    assert f"warning: {run / TIMING}: 1 row is missing, of step 40" in resumed.err
    assert f"warning: {run / USAGE} is missing" in resumed.err and (run / USAGE).is_file()


@pytest.mark.fault(43)
def test_a_whole_run_has_no_word_on_lost_rows(run: Path, command: Command) -> None:
    done = command("report", run)
    names = [one["name"] for one in json.loads((run / "report.json").read_text())["verdict"]]
    assert done.code == 0 and "warning" not in done.err and not {METRICS, TIMING, USAGE} & set(names)
    assert "generalisation" in names
    assert "warning" not in command("resume", run).err


ROWS: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "no held-out figures": (METRICS, lambda row: row.update(held_out=None)),
    "a text for a figure": (METRICS, lambda row: row.update(fvu="x")),
    "no figure of a stratum": (METRICS, lambda row: row["strata"].update({"004-016": {}})),
    "a huge step": (METRICS, lambda row: row.update(step=10**400)),
    "step 0": (METRICS, lambda row: row.update(step=0)),
    "NaN": (METRICS, lambda row: row.update(loss=float("nan"))),
    "a huge number": (METRICS, lambda row: row.update(epochs={"004-016": 10**400})),
    "a text for seconds": (TIMING, lambda row: row.update(seconds="")),
    "no seconds": (TIMING, lambda row: row.pop("seconds")),
    "seconds below 0": (TIMING, lambda row: row.update(seconds=-1)),
    "a list for from_step": (TIMING, lambda row: row.update(from_step=[])),
}


@pytest.mark.fault(43)
def test_a_row_that_is_none_is_named_once_and_left_out(run: Path, command: Command) -> None:
    whole = {name: (run / name).read_bytes() for name in (METRICS, TIMING)}
    for kind, (name, change) in ROWS.items():
        edit(run / name, 5, change)
        watched = command("watch", run, "--once", "--json")
        json.loads(watched.out, parse_constant=lambda text: pytest.fail(text))
        resumed = command("resume", run, "-q")
        assert "1 row is missing, of step 60" in resumed.err
        for done, warnings in ((watched, 1), (command("watch", run, "-v"), 1), (resumed, 2)):
            assert done.code == 0, (kind, done.err)
            assert done.err.count(f"warning: {run / name}: ") == warnings, (kind, done.err)
            assert "in line 6; such rows are left out" in done.err
        (run / name).write_bytes(whole[name])


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    "last", [b"[" * 200_000 + b"\n", b"\xff\xfe\n", b"[]\n", b"null\n", b'{"step": 1, "step": 2}\n']
)
def test_a_line_that_is_no_row_is_left_out_of_a_log(tmp_path: Path, last: bytes, capsys: Any) -> None:
    log = Log(tmp_path / METRICS)
    log.append({"step": 10})
    log.path.write_bytes(log.path.read_bytes() + last)
    assert [row["step"] for row in log.rows()] == [10]
    assert capsys.readouterr().err.startswith(f"warning: {log.path}: ")
    log.cut(10)
    assert log.path.read_bytes() == b'{"step": 10}\n'


@pytest.mark.fault(43)
@pytest.mark.parametrize("name", [METRICS, TIMING, USAGE])
def test_damaged_figures_are_said_by_the_report(run: Path, command: Command, name: str) -> None:
    if name == USAGE:
        (run / USAGE).write_text('{"step": 120, "components": {"evaluation": {"calls": 3}}}')
    elif name == TIMING:
        edit(run / TIMING, 5, lambda row: row.update(rows=None))
    else:
        edit(run / METRICS, 11, lambda row: row["held_out"].pop("strata"))
    done = command("report", run, "-q")
    assert done.code == 0, done.err
    assert done.err.count("warning: ") == 1 and str(run / name) in done.err and "left out" in done.err
    shown = command("watch", run, "--once")
    assert shown.code == 0 and shown.err.count("warning: ") == (name != METRICS)


@pytest.mark.fault(43)
@pytest.mark.parametrize("steps", ['"x"', "1e308", "0", "-3", "null", "[]"])
def test_watch_of_a_damaged_configuration_is_one_line(run: Path, command: Command, steps: str) -> None:
    data = json.loads((run / CONFIG).read_text())
    data["settings"]["steps"] = "STEPS"
    (run / CONFIG).write_text(json.dumps(data).replace('"STEPS"', steps))
    done = command("watch", run, "--once")
    assert done.code == 1 and done.err.count("\n") == 1
    assert done.err.startswith(f"error: {run / CONFIG}: not the settings of a run (settings.steps")


@pytest.mark.fault(8)
def test_an_older_checkpoint_is_never_taken_without_a_word(run: Path, command: Command) -> None:
    flip(run / "checkpoints/step-000120/weights.safetensors", -8)
    said = (
        f"warning: skipped a checkpoint that does not verify: {run}/checkpoints/step-000120/weights.safetensors: crc32c"
    )
    for line in (("evaluate", run, "--json"), ("samples", run, "-q"), ("report", run, "-q")):
        done = command(*line)
        assert done.code == 0 and done.err.count(said) == 1, (line, done.err)
    compared = command("compare", run)
    assert compared.code == 2 and compared.err.count(said) == 1 and "is at step 60 of 120" in compared.err


@pytest.mark.fault(44)
@pytest.mark.parametrize(
    ("which", "every"),
    [(0, 29), pytest.param(0, 7, marks=pytest.mark.exhaustive), pytest.param(1, 7, marks=pytest.mark.exhaustive)],
)
def test_no_flipped_bit_of_samples_is_read_as_other_data(tmp_path: Path, which: int, every: int) -> None:
    """A bit in every byte of a small file, or in every fourth: an error, or the same table and record."""
    from shared.errors import CorruptData

    read, path = (read_contexts, read_latents)[which], tmp_path / "samples.parquet"
    data = parquet(_tables()[which])
    path.write_bytes(data)
    whole, other = read(path), []
    for bit in range(0, 8 * len(data), every):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read(path)
            if not found.equals(whole) or found.schema.metadata[RECORD] != whole.schema.metadata[RECORD]:
                other.append(bit)
        except CorruptData as error:
            assert str(error).startswith(str(path)) and "remove it" in str(error)
    assert not other


@pytest.mark.fault(44)
def test_damaged_samples_are_refused_by_the_report(run: Path, command: Command) -> None:
    path = run / "samples/step-000120.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    done = command("report", run, "-q")
    assert done.code == 1 and str(path) in done.err and "remove it, and the report makes it again" in done.err
    path.unlink()
    assert command("report", run, "-q").code == 0


@pytest.mark.fault(45)
def test_a_store_that_was_moved_is_given_once(synthetic: SyntheticStore, tmp_path: Path, command: Command) -> None:
    """By any command."""
    run, old = tmp_path / "runs/run", synthetic.path
    made = command("run", "--store", old, "--runs", run.parent, "--name", "run", "--steps", "8", "-q", *SMALL)
    assert made.code == 0, made.err
    assert command("evaluate", run, "--store", shutil.copytree(old, tmp_path / "copy")).code == 0
    assert not (run / PLACE).exists()  # it was not moved
    new = shutil.move(old, tmp_path / "new")
    lost = command("evaluate", run, "--json")
    assert lost.code == 2 and f"no store at {old}" in lost.err and "--store" in lost.err
    assert command("evaluate", run, "--json", "--store", new).code == 0
    for line in (("evaluate", run, "--json"), ("resume", run, "-q"), ("report", run, "-q"), ("compare", run)):
        done = command(*line)
        assert done.code == 0, (line, done.err)
    newer = shutil.move(new, tmp_path / "newer")
    assert command("resume", run, "-q", "--store", newer).code == 0
    assert command("evaluate", run, "--json").code == 0
    (run / PLACE).write_text('{"store": 3}')
    damaged = command("evaluate", run)
    assert damaged.code == 1 and damaged.err.startswith(f"error: {run / PLACE}: store: ")
