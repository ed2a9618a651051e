"""Parts of the sync: rows from files that grow, what is read back, when it is offline, and how its process is started.

tests/faults/test_wandb_sync.py has what befalls that process.
"""

import ast
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.runs import SMALL, Outcome
from tests.stores import SyntheticStore
from tests.wandb_syncs import ROOT, UNAFFECTED
from train.live.run_files import REPORTS
from train.samples import parquet
from train.wandb_sync import read_back, worker
from train.wandb_sync import sync as process
from train.wandb_sync.log_records import LATENTS, Records, flatten
from train.wandb_sync.sync import FOLDER, SECONDS

Command = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"settings": {"steps": 30}}))
    return tmp_path


def append(path: Path, *rows: dict) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def report(run: Path, step: int) -> None:
    (run / REPORTS).mkdir(exist_ok=True)
    content = {"step": step, "schema_version": 1, "sample": {}, "pairs": [{}, {}], "clusters": [[1, 2]], "rank": 1.5}
    (run / REPORTS / f"correlation-{step:06d}.json").write_text(json.dumps(content))


def test_names_are_flat_and_without_points() -> None:
    row = {"fvu": 0.5, "strata": {"000-001": {"fvu": None, "rows": 3}}, "above": {"0.7": 1}, "list": [1]}
    assert flatten(row) == {"fvu": 0.5, "strata/000-001/rows": 3, "above/0_7": 1}


def test_a_row_is_given_out_once_when_nothing_is_added_to_its_step_any_more(run: Path) -> None:
    found = Records(run)
    assert list(found.ready(False)) == []
    append(run / "metrics.jsonl", {"step": 10, "fvu": 0.5})
    report(run, 8)
    report(run, 15)
    assert [step for step, _ in found.ready(False)] == [8]
    append(run / "timing.jsonl", {"step": 10, "rows": 1, "seconds": 2.0})
    assert list(found.ready(False)) == [(10, {"step": 10, "fvu": 0.5, "timing/seconds": 2.0})]
    append(run / "metrics.jsonl", {"step": 20, "fvu": 0.4})  # whose row of timing was lost
    append(run / "metrics.jsonl", {"step": 30, "fvu": 0.3})
    append(run / "timing.jsonl", {"step": 30, "rows": 1, "seconds": 6.0})
    named = {"correlation/pairs_listed": 2, "correlation/clusters": 1, "correlation/rank": 1.5}
    assert list(found.ready(False)) == [(15, {"step": 15} | named), (20, {"step": 20, "fvu": 0.4})]
    assert list(found.ready(True)) == [(30, {"step": 30, "fvu": 0.3, "timing/seconds": 6.0})]
    assert list(found.ready(True)) == []


def test_a_line_that_is_being_written_waits_and_a_replaced_file_is_read_anew(run: Path) -> None:
    found, path = Records(run), run / "metrics.jsonl"
    append(path, {"step": 5}, {"step": 6})
    with open(path, "a") as file:
        file.write('{"step": 7, "fv')
    assert [step for step, _ in found.ready(False)] == [5]
    with open(path, "a") as file:
        file.write('u": 1}\n{"step": 8}\n')
    assert list(found.ready(False)) == [(6, {"step": 6}), (7, {"step": 7, "fvu": 1})]
    (run / "new").write_text('{"step": 5, "again": 1}\n{"step": 9}\n')
    (run / "new").rename(path)
    assert list(found.ready(False)) == [(5, {"step": 5, "again": 1}), (8, {"step": 8})]


def test_a_torn_line_is_left_out(run: Path) -> None:
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 2}\n{"step": 3}\n')
    assert [step for step, _ in Records(run).ready(False)] == [1, 2]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of wandb's own, of 200 rows and several blocks."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("places")))
        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
        with wandb.init(mode="offline", dir=tmp_path_factory.mktemp("run"), settings=settings) as run:
            for step in range(200):
                run.log({"x": step, "long": "x" * (40_000 if step == 150 else 700)}, step=3 * step)
            path = Path(run.dir).parent / f"run-{run.id}.wandb"
        wandb.teardown()  # waits for its process, which writes its last rows on the way out
    return path


def test_wandbs_file_is_read_back(file: Path) -> None:
    assert file.stat().st_size > 5 * read_back.BLOCK
    assert read_back.steps(file) == {3 * step for step in range(200)}


def test_a_torn_or_damaged_file_is_read_back_but_for_what_is_lost(file: Path, tmp_path: Path) -> None:
    data, torn = file.read_bytes(), tmp_path / "torn.wandb"
    torn.write_bytes(data[:70_000])
    found = read_back.steps(torn)
    assert 20 < len(found) < 200 and found == {3 * step for step in range(len(found))}
    for place in (0, 6):
        torn.write_bytes(data[:place])
        assert read_back.steps(torn) == set()
    damaged = bytearray(data)
    damaged[40_000:40_004] = b"\0\0\0\0"
    torn.write_bytes(damaged)
    lost = read_back.steps(file) - read_back.steps(torn)
    assert 0 < len(lost) < 45 and max(read_back.steps(torn)) == 3 * 199


@pytest.mark.parametrize(
    ("netrc", "url", "expected"),
    [
        (None, "https://api.wandb.ai", False),
        ("machine api.wandb.ai login user password key", "https://api.wandb.ai", True),
        ("machine example.org login user password key", "https://api.wandb.ai", False),
        ("machine example.org login user password key", "https://example.org", True),
        ("machine", "https://api.wandb.ai", False),
    ],
)
def test_a_key_is_found_where_wandb_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, netrc: str | None, url: str, expected: bool
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc is not None:
        (tmp_path / "netrc").write_text(netrc + "\n")
    settings = SimpleNamespace(api_key=None, base_url=url)
    assert worker._has_key(settings) is expected
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    assert worker._has_key(settings)


def test_what_the_version_before_called_the_mirror_is_carried_on(tmp_path: Path) -> None:
    before = {"id": "12345678", "project": "mine", "step": 40}
    (tmp_path / "mirror.json").write_text(json.dumps(before))
    child = object.__new__(worker.Child)
    child._folder, child._project = tmp_path, "mine"
    child._open_state()
    assert child._state == before and json.loads((tmp_path / worker.STATE).read_text()) == before


@pytest.mark.slow
@pytest.mark.fault(13)
def test_off_starts_no_process(
    command: Command, pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(process, "_start")
    common = ("run", "--store", pristine.path, "--runs", tmp_path, "--steps", 2, *SMALL)
    assert command(*common).code == 0
    with pytest.raises(NameError):
        command(*common, "--wandb")


@pytest.mark.fault(13)
def test_only_the_childs_modules_import_wandb_and_the_trainer_imports_none_of_them() -> None:
    importing = {name: set[Path]() for name in ("wandb", "train.wandb_sync.worker", "train.wandb_sync.read_back")}
    for path in sorted((ROOT / "train").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
                "import_module",
                "__import__",
            ):
                names = [str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)]
            for name in names:
                for module, found in importing.items():
                    if name == module or name.startswith(module + "."):
                        found.add(path.relative_to(ROOT / "train/wandb_sync"))
    assert importing == {
        "wandb": {Path("worker.py"), Path("read_back.py")},
        "train.wandb_sync.worker": set(),
        "train.wandb_sync.read_back": {Path("worker.py")},
    }


@pytest.mark.fault(13)
def test_the_name_of_the_samples_is_the_trainers() -> None:
    assert Path("run", LATENTS.format(7)) == parquet.paths(Path("run"), 7)[1]


@pytest.mark.fault(13)
def test_a_folder_called_wandb_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb itself makes one where it is used."""
    monkeypatch.setattr(process, "find_spec", lambda name: type("Namespace", (), {"origin": None}))
    assert process._start(tmp_path, "project") is None
    assert "is not installed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.fault(13)
def test_a_folder_that_cannot_be_written_to_costs_the_sync(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", pristine.path, "--runs", tmp_path, "--steps", 2, *SMALL)
    (done.path / FOLDER).write_text("no folder")
    again = command("resume", done.path, "--wandb")
    assert again.code == 0 and again.err.count("warning: ") == 1
    assert f"warning: the run is not synced to W&B: {done.path / FOLDER}: File exists" in again.err


@pytest.mark.fault(13)
def test_the_trainer_waits_for_ten_seconds_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert SECONDS == 10
    monkeypatch.setattr(process, "SECONDS", 0.25)
    waited, wait = [], subprocess.Popen.wait

    def noted(self: subprocess.Popen, timeout: float | None = None) -> int:
        waited.append(timeout)
        return wait(self, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", shutil.which("sleep"))
        start = subprocess.Popen
        patch.setattr(subprocess, "Popen", lambda command, **given: start([command[0], "600"], **given))
        started = process._start(tmp_path, "project")
    assert started
    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    process._end(started, tmp_path, complete=True)
    assert waited == [0.25, 1]
    assert started.returncode == -signal.SIGKILL
    assert UNAFFECTED in capsys.readouterr().err
