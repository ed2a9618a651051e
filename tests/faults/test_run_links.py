"""Links and pipes in a run from a stranger: nothing outside it is written or cut, and nothing is waited for."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import CorruptData, UserError
from shared.files import durable
from tests.llms import contents
from tests.runs import Outcome
from tests.stores import SyntheticStore
from train.run.metrics import Log

Command = Callable[..., Outcome]
FILES = ("metrics.jsonl", "timing.jsonl", "usage.json", "report.html", "checkpoints/reserve", "config.json.tmp")
FOLDERS = ("samples", "checkpoints", "report", "anti_duplication_logs", "wandb")
COMMANDS = ("resume", "samples", "report")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs" / "run"))


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_nothing_is_written_through_a_link_in_a_run(command: Command, run: Path, tmp_path: Path, name: str) -> None:
    outside, place = tmp_path / "outside", run / name
    outside.mkdir()
    (outside / "thesis").write_text("years of work\n")
    if place.is_dir():
        shutil.copytree(place, outside / "folder")
        shutil.rmtree(place)
    (outside / "folder").mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(outside / ("folder" if name in FOLDERS else "thesis"))
    before = contents(outside)
    for what in COMMANDS:
        done = command(what, run)
        assert done.code == 1 and len(done.err.splitlines()) == 1, done
        assert f"{place} is a symbolic link; take another copy of {run}, without links" in done.err
    assert contents(outside) == before


@pytest.mark.fault(22)
def test_a_link_in_the_fallback_folder_is_refused(command: Command, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "run"
    other.mkdir(parents=True)
    shutil.copy(run / "config.json", other)
    (other / "checkpoints").symlink_to(tmp_path)
    done = command("resume", run, "--fallback-dir", other.parent)
    assert done.code == 1 and f"{other / 'checkpoints'} is a symbolic link" in done.err


@pytest.mark.fault(22)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "checkpoints/reserve", ".lock"])
def test_a_pipe_in_a_run_is_not_waited_for(command: Command, run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    for what in COMMANDS:
        done = command(what, run)
        assert done.code == 1 and f"{run / name} is not a regular file" in done.err, done
    done = command("watch", run, "--once")
    logs = name.endswith("jsonl")
    assert done.code == int(logs) and (not logs or f"{run / name} is not a regular file" in done.err), done


def test_wandb_may_keep_its_links(command: Command, run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to("nowhere")
    assert command("resume", run, "-q").code == 0


@pytest.mark.fault(22)
@pytest.mark.parametrize("dangling", [True, False])
def test_no_writer_follows_a_link(tmp_path: Path, dangling: bool) -> None:
    """Also one that was put there after the run was looked at."""
    target, log = tmp_path / "target", tmp_path / "log"
    if not dangling:
        target.write_bytes(b"years of work")
    for path in (log, tmp_path / "file.tmp"):
        path.symlink_to(target)
    writers: list[Callable[[], object]] = [
        lambda: durable.append_line(log, b"x\n"),
        lambda: durable.truncate(log, 1),
        lambda: durable.reserve(log, 4096),
        lambda: durable.make_sparse(log, 4096),
        lambda: durable.write_at(log, 0, b"x"),
        lambda: durable.publish_bytes(tmp_path / "file", b"x"),
        lambda: durable.lock(log, "run").__enter__(),
    ]
    for write in writers:
        with pytest.raises(CorruptData, match="is a symbolic link; put the file itself there"):
            write()
    durable.publish_file(tmp_path / "file", lambda path: path.write_bytes(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"
    assert target.read_bytes() == b"years of work" if not dangling else not target.exists()


def test_a_log_that_became_a_link_costs_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "target")
    log = Log(tmp_path / "metrics.jsonl")
    log.append({"step": 1})
    assert log.lost_rows == 1 and not (tmp_path / "target").exists()
    assert "metrics.jsonl is a symbolic link" in capsys.readouterr().err


NAMES = ["../up", "a/b", "/abs", "", ".", "..", "a\x1b[31mb", "a\nb", "a\0b", "\u202ea"]


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_run_stays_in_the_folder_of_runs(
    command: Command, report_store: SyntheticStore, tmp_path: Path, name: str
) -> None:
    done = command("run", "--store", report_store.path, "--runs", tmp_path / "runs", "--name", name, "--steps", 1)
    words = "expected the name of one folder in --runs" if name else "the argument after --name is empty"
    assert done.code == UserError.exit_code and words in done.err, done
    assert len(done.err.splitlines()) == 1 and done.err[:-1].isprintable()
    assert list(tmp_path.iterdir()) == []
