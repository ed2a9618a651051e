"""A sync in W&B cannot hurt a run: whatever befalls wandb, its disk or its network, the weights are those without.

The commands run as processes. A trainer is stopped (SIGSTOP) while a fault is injected, so that it comes on the way,
however fast the training is; the sync of a stopped trainer works on.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import wandb_syncs as syncs
from tests.runs import SMALL, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from tests.wandb_server import Server
from tests.wandb_syncs import UNAFFECTED, core, files, histories, summaries, trainer, wait_for
from train.live.run_files import CONFIG, HELD_OUT, REPORTS
from train.wandb_sync import log_records, read_back, worker
from train.wandb_sync import sync as process
from train.wandb_sync.sync import FOLDER, LOG, marked, unsent

SmallDisk = Callable[[str, int], tuple["subprocess.Popen[str]", Path]]
pytestmark = [pytest.mark.slow(20), pytest.mark.fault(13)]

STEPS = 200
OPTIONS = ("--steps", STEPS, *SMALL, "--set", "log_every=5", "--set", "evaluation.every=100",
           "--set", "checkpoint.every=50", "--set", "monitor.every=27")  # fmt: skip
AMPLE, SHORT = 200.0, 2.0
"""Seconds that a trainer waits: for a sync that has to finish, and for one that cannot."""
KILLED = pytest.mark.parametrize("also", [pytest.param("the trainer", marks=pytest.mark.exhaustive), "the sync, too"])
"""What a kill ends"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


@pytest.fixture(scope="module")
def plain(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a sync."""
    folder = tmp_path_factory.mktemp("plain")
    done = trainer("run", "--store", store.path, "--runs", folder, "--name", "plain", *OPTIONS, seconds=SHORT,
                   env=syncs.environment(folder))  # fmt: skip
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    return folder / "plain"


@pytest.fixture(scope="module")
def synced(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one, on which nothing went wrong."""
    folder = tmp_path_factory.mktemp("synced")
    done = trainer(*arguments(store, folder), seconds=AMPLE, env=syncs.environment(folder))
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert f"upload it with: wandb sync {folder / 'run' / FOLDER}/offline-run-*" in err and "warning" not in err
    return folder / "run"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return syncs.environment(tmp_path)


def arguments(store: SyntheticStore, runs: Path) -> tuple[object, ...]:
    return ("run", "--store", store.path, "--runs", runs, "--name", "run", *OPTIONS, "--wandb")


def finished(done: subprocess.Popen, run: Path, plain: Path) -> str:
    """Let a trainer go on to its end, which is that of a run without a sync; returns its stderr."""
    done.send_signal(signal.SIGCONT)
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    assert marked(run) == []
    assert_same_run(plain, run)
    return err


def assert_synced_once(run: Path) -> None:
    """Every row of metrics is in one of the files, once, with its values; all have one id."""
    found = histories(run)
    assert sorted(row["step"] for row in found) == sorted({row["step"] for row in found})
    assert_holds_metrics(found, run)
    state = json.loads((run / FOLDER / worker.STATE).read_text())
    assert state["step"] == STEPS
    assert {path.name for path in files(run)} == {f"run-{state['id']}.wandb"}


def assert_holds_metrics(found: list[dict], run: Path) -> None:
    by_step = {row["step"]: row for row in found}
    for row in rows(run):
        for name, value in log_records.flatten(row).items():
            assert by_step[row["step"]][name] == value


def resumed(run: Path, env: dict[str, str], *options: object) -> str:
    done = trainer("resume", run, "--wandb", *options, seconds=AMPLE, env=env)
    _, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    return err


def test_off_is_off(plain: Path) -> None:
    """That wandb was not imported is asserted in the process itself."""
    assert sorted(path.name for path in plain.iterdir()) == [
        ".lock", "anti_duplication_logs", "blocks.json", "checkpoints", "config.json", "metrics.jsonl", "samples",
        "timing.jsonl", "usage.json",
    ]  # fmt: skip


def test_the_sync_holds_what_the_files_do(synced: Path, plain: Path) -> None:
    assert_same_run(plain, synced)
    assert_synced_once(synced)
    by_step = {row["step"]: row for row in histories(synced)}
    assert {27, 54, STEPS} <= set(by_step)
    for step in (27, STEPS):
        report = json.loads((synced / f"anti_duplication_logs/correlation-{step:06d}.json").read_text())
        row = by_step[step]
        assert (
            row["correlation/without_position_0/pairs_above/0_5"] == report["without_position_0"]["pairs_above"]["0.5"]
        )
        assert row["correlation/directions/effective_number"] == report["directions"]["effective_number"]
        assert row["correlation/clusters"] == len(report["clusters"])
    for line in syncs.lines(synced / "timing.jsonl"):
        timing = json.loads(line)
        assert by_step[timing["step"]]["timing/rows_per_second"] == timing["rows_per_second"]
    last, report = by_step[STEPS], json.loads((synced / REPORTS / HELD_OUT).read_text())
    assert last["correlation_held_out/without_position_0/largest"] == report["without_position_0"]["largest"]
    assert sum(last["plots/held_out_correlations/values"]) == len(report["pairs"])
    assert 0 < sum(last["plots/log10_density/values"]) <= 64
    components = json.loads((synced / "usage.json").read_text())["components"]
    told = summaries(synced)
    assert {name: told[f"usage/{name}/calls"] for name in components} == {
        name: component["calls"] for name, component in components.items()
    }
    assert told["usage/mined/effect"] == components["mined"]["effect"] > 0


def test_a_report_is_synced_once_with_its_plots_and_verdict(synced: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(synced, tmp_path / "synced"))
    for _ in range(2):
        done = trainer("report", run, "--wandb", seconds=AMPLE, env=syncs.environment(tmp_path))
        _, err = done.communicate(timeout=280)
        assert done.returncode == 0 and UNAFFECTED not in err, err
    (row,) = [row for row in histories(run) if any(name.startswith("report/") for name in row)]
    assert row["step"] == STEPS and row["_step"] == STEPS + 1
    assert {"report/fvu", "report/terms", "report/nearest", "report/density"} <= {
        "/".join(n.split("/")[:2]) for n in row
    }
    (drawn,) = run.glob("wandb/offline-run-*/files/media/plotly/report/fvu_*.json")
    expected = [line["fvu_natural"] for line in rows(run)]
    assert json.loads(drawn.read_text())["data"][0]["y"] == expected
    report = json.loads((run / "report.json").read_text())
    told = summaries(run)
    assert {one["name"]: f"{one['state']}: {one['said']}" for one in report["verdict"]} == {
        name.removeprefix("verdict/"): said for name, said in told.items() if name.startswith("verdict/")
    }


@pytest.mark.exhaustive
def test_the_report_of_an_unfinished_run_is_not_synced(synced: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(synced, tmp_path / "synced"))
    done = trainer("report", run, "--step", STEPS - 50, "--wandb", seconds=AMPLE, env=syncs.environment(tmp_path))
    _, err = done.communicate(timeout=280)
    assert done.returncode == 2 and f"step {STEPS - 50} of {STEPS}" in err and not (run / "report.html").exists()


def test_the_sync_knows_the_runs_settings_and_its_axis_and_has_no_checkpoints(synced: Path) -> None:
    found = {record.WhichOneof("record_type"): record for record in read_back.records(files(synced)[0])}
    config = {item.key: json.loads(item.value_json) for item in found["run"].run.config.update}
    assert config["settings"] == json.loads((synced / CONFIG).read_text())["settings"]
    assert found["run"].run.project == "transcoder-cache" and found["run"].run.display_name == "run"
    assert found["metric"].metric.glob_name == "*" and found["metric"].metric.step_metric == "step"
    assert found["exit"].exit.exit_code == 0
    size = sum(path.stat().st_size for path in (synced / FOLDER).rglob("*") if path.is_file())
    names = {path.suffix for path in (synced / FOLDER).rglob("*") if path.is_file()}
    assert not names & {".safetensors", ".parquet", ".json"} - {".json"}
    assert size < 2_000_000


def test_wandb_sync_uploads_what_is_left(synced: Path, tmp_path: Path, env: dict[str, str]) -> None:
    shutil.copytree(synced, tmp_path / "run", symlinks=True)
    [file] = files(tmp_path / "run")
    assert unsent(tmp_path / "run") == [file]
    with Server() as server:
        found = subprocess.run([sys.executable, "-m", "wandb", "sync", file.parent], capture_output=True, text=True,
                               timeout=120, env=env | server.environment, cwd=tmp_path)  # fmt: skip
    assert found.returncode == 0, found.stderr
    [(name, sent)] = server.history.items()
    assert file.name == f"run-{name}.wandb" and unsent(tmp_path / "run") == []
    assert [row["step"] for row in sent] == [row["step"] for row in histories(tmp_path / "run")]
    assert_holds_metrics(sent, tmp_path / "run")


@pytest.mark.exhaustive
@KILLED
def test_a_killed_run_goes_on_at_the_server(
    store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str], also: str
) -> None:
    run = tmp_path / "run"
    with Server() as server:
        killed = trainer(*arguments(store, tmp_path), seconds=AMPLE, env=env | server.environment)
        syncs.paused_after(killed, run, rows=25)
        wait_for(lambda: server.history)
        if also == "the sync, too":
            process.kill_marked(run)
        killed.kill()
        killed.communicate(timeout=60)
        wait_for(lambda: marked(run) == [])
        before = [row["step"] for sent in server.history.values() for row in sent]
        assert 0 < len(before) < len(rows(plain))
        err = resumed(run, env | server.environment)
    assert "warning" not in err and "offline" not in err and files(run) == []
    [sent] = server.history.values()
    steps = [row["step"] for row in sent]
    assert steps == sorted(set(steps)) and steps[: len(before)] == before
    assert_same_run(plain, run)
    assert_holds_metrics(sent, run)


@pytest.mark.fault(4)
@KILLED
def test_a_killed_run_goes_on_as_the_same_run_of_wandb(
    store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str], also: str
) -> None:
    """As after a power cut, when the sync goes down with the trainer: rows that wandb had not written are made up."""
    run = tmp_path / "run"
    killed = trainer(*arguments(store, tmp_path), "--wandb-project", "of-its-own", seconds=AMPLE, env=env)
    syncs.paused_while_synced(killed, run, rows=25)
    if also == "the sync, too":
        wait_for(lambda: histories(run))  # wandb writes blocks of rows
        process.kill_marked(run)
    killed.kill()
    killed.communicate(timeout=60)
    wait_for(lambda: marked(run) == [])
    before = {row["step"] for row in histories(run)}
    assert len(before) >= (25 if also == "the trainer" else 1)
    resumed(run, env)
    assert_same_run(plain, run)
    assert_synced_once(run)
    assert len(files(run)) == 2
    assert json.loads((run / FOLDER / worker.STATE).read_text())["project"] == "of-its-own"


@pytest.mark.exhaustive
def test_a_run_that_was_trained_without_a_sync_gets_one(plain: Path, tmp_path: Path, env: dict[str, str]) -> None:
    shutil.copytree(plain, tmp_path / "run")
    assert "is finished" in resumed(tmp_path / "run", env)
    assert_synced_once(tmp_path / "run")
    shutil.rmtree(files(tmp_path / "run")[0].parent)  # as `wandb sync --clean` does
    resumed(tmp_path / "run", env)
    assert files(tmp_path / "run") == []


SMALL_DISK = 'mount -t tmpfs -o size=$0 none "$1" && head -c "$2" /dev/zero > "$1/filler" && shift 2 && exec "$@"'


@pytest.fixture
def resumed_on_small_disk(plain: Path, tmp_path: Path, env: dict[str, str]) -> SmallDisk:
    """Starts to resume a copy of a run whose folder of the sync is a disk of a size, with a filler of another."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no file systems can be mounted here: user namespaces are not allowed")
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    shutil.rmtree(run / "checkpoints/step-000200")  # 150 is the newest then
    (run / FOLDER).mkdir()

    def start(size: str, filler: int) -> tuple[subprocess.Popen, Path]:
        prefix = ("unshare", "-Urm", "sh", "-c", SMALL_DISK, size, str(run / FOLDER), str(filler))
        done = trainer("resume", run, "--wandb", seconds=AMPLE, env=env, prefix=prefix)
        wait_for(lambda: marked(run), done)
        done.send_signal(signal.SIGSTOP)
        return done, Path(f"/proc/{done.pid}/root{run / FOLDER}")  # as it is in there

    return start


@pytest.mark.parametrize(
    ("size", "filler"),
    [("4k", 4096), pytest.param("100k", 0, marks=pytest.mark.exhaustive)],
    ids=["from the start", "on the way"],
)
def test_a_full_disk_of_wandbs(
    resumed_on_small_disk: SmallDisk, plain: Path, tmp_path: Path, size: str, filler: int
) -> None:
    done, folder = resumed_on_small_disk(size, filler)
    wait_for(lambda: shutil.disk_usage(folder).free == 0, done)
    err = finished(done, tmp_path / "run", plain)
    assert err.count("warning: ") == 1 and UNAFFECTED in err


@pytest.mark.exhaustive
def test_rows_that_wandb_lost_on_a_full_disk_are_noticed(
    resumed_on_small_disk: SmallDisk, plain: Path, tmp_path: Path
) -> None:
    """It reports success."""
    done, folder = resumed_on_small_disk("260k", 150_000)
    wait_for(lambda: shutil.disk_usage(folder).free == 0, done)
    (folder / "filler").unlink()
    with open(folder / LOG) as log:
        err = finished(done, tmp_path / "run", plain)
        assert f"rows are not in {tmp_path / 'run' / FOLDER}: is the disk full?" in log.read()
    assert err.count("warning: ") == 1 and UNAFFECTED in err


@pytest.mark.exhaustive
def test_a_dead_process_of_wandbs_is_started_again(
    store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    run = tmp_path / "run"
    done = trainer(*arguments(store, tmp_path), seconds=AMPLE, env=env)
    syncs.paused_while_synced(done, run)
    os.kill(core(run), signal.SIGKILL)
    err = finished(done, run, plain)
    assert "warning" not in err
    assert_synced_once(run)
    assert len(files(run)) == 2


@pytest.mark.exhaustive
def test_a_stopped_process_of_wandbs(store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str]) -> None:
    run = tmp_path / "run"
    done = trainer(*arguments(store, tmp_path), seconds=SHORT, env=env)
    syncs.paused_while_synced(done, run)
    os.kill(core(run), signal.SIGSTOP)
    err = finished(done, run, plain)
    assert err.count("warning: ") == 1 and UNAFFECTED in err
    assert f"with: python -m train resume {run} --wandb" in err and f"wandb sync {run}/wandb/offline-run-*" in err
    resumed(run, env)
    assert_synced_once(run)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.exhaustive)])
def test_a_dead_or_stopped_sync(
    store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str], number: signal.Signals
) -> None:
    run = tmp_path / "run"
    done = trainer(*arguments(store, tmp_path), seconds=SHORT, env=env)
    syncs.paused_while_synced(done, run)
    os.kill(syncs.child(run), number)
    err = finished(done, run, plain)
    assert err.count("warning: ") == 1 and UNAFFECTED in err
    resumed(run, env)
    assert_synced_once(run)


@pytest.mark.exhaustive
def test_a_killed_trainer_leaves_no_stopped_process_of_wandbs(
    store: SyntheticStore, tmp_path: Path, env: dict[str, str]
) -> None:
    """The sync ends itself, and what it started."""
    run = tmp_path / "run"
    done = trainer(*arguments(store, tmp_path), seconds=SHORT, env=env)
    syncs.paused_while_synced(done, run)
    os.kill(core(run), signal.SIGSTOP)
    assert len(marked(run)) == 2
    done.kill()
    done.communicate(timeout=60)
    wait_for(lambda: marked(run) == [])
    assert "not finished 2 s after the trainer" in (run / FOLDER / LOG).read_text()


@pytest.mark.exhaustive
def test_a_stopped_sync_of_a_killed_trainer_does_not_hold_up_the_next(
    store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str]
) -> None:
    run = tmp_path / "run"
    done = trainer(*arguments(store, tmp_path), seconds=SHORT, env=env)
    syncs.paused_while_synced(done, run)
    stopped = syncs.child(run)
    os.kill(stopped, signal.SIGSTOP)
    done.kill()
    done.communicate(timeout=60)
    assert stopped in marked(run)
    assert "warning" not in resumed(run, env)
    assert marked(run) == []
    assert_same_run(plain, run)
    assert_synced_once(run)


def test_no_network(store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str]) -> None:
    run = tmp_path / "run"
    online = env | {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = trainer(*arguments(store, tmp_path), seconds=AMPLE, env=online)
    err = finished(done, run, plain)
    assert "warning" not in err and "synced offline; upload it with: wandb sync" in err
    log = (run / FOLDER / LOG).read_text()
    assert "W&B has not answered" in log or "W&B cannot be reached" in log
    assert "offline: W&B's mode is offline" in log
    assert_synced_once(run)
    assert "is finished" in resumed(run, online)
    assert f"to be uploaded first, with: wandb sync {files(run)[0].parent}" in (run / FOLDER / LOG).read_text()


WITHOUT_WANDB = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
def find_others(cls, name, *given):
    return None if name.split(".")[0] == "wandb" else find(name, *given)
machinery.PathFinder.find_spec = classmethod(find_others)
"""


def test_wandb_is_not_installed(store: SyntheticStore, plain: Path, tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text(WITHOUT_WANDB)
    run = tmp_path / "run"
    path = os.pathsep.join([str(tmp_path / "hide"), env["PYTHONPATH"]])
    done = trainer(*arguments(store, tmp_path), seconds=AMPLE, env=env | {"PYTHONPATH": path})
    err = finished(done, run, plain)
    assert err.count("warning: ") == 1
    assert "warning: wandb is not installed, and the run is not synced: pip install 'transcoder-cache[wandb]'" in err
    assert not (run / FOLDER).exists()
