"""`train sweep`: every run is the run alone bit for bit, rows are read once, and no run stops another."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.errors import ProjectError
from shared.store.reader import AHEAD
from shared.store.store import Store
from tests.runs import VALUES, Outcome, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from train.data.batches import BatchReader
from train.data.shared_batches import SharedBatchReader
from train.model import checkpoint
from train.run.process import OwnProcess
from train.run.settings import read_config
from train.sweeps.plan import group_bytes, plan, rounds
from train.sweeps.shared_process import train_side_by_side
from train.sweeps.wanted_runs import name_of, wanted_runs

Command = Callable[..., Outcome]
STEPS = 20
COMMON = {**VALUES, "steps": STEPS, "log_every": 5, "evaluation.every": 10, "checkpoint.every": 5, "monitor.every": 5,
          "samples.rows": 500, "rows.seed": 0}  # fmt: skip


def sweep_file(folder: Path, text: str, **changes: object) -> Path:
    """A sweep of small runs; `text` is what follows their settings in common."""
    common = "".join(f"{name} = {json.dumps(value)}\n" for name, value in (COMMON | changes).items())
    path = folder / "small.toml"
    path.write_text(f"[set]\n{common}\n{text}")
    return path


def alone(command: Command, store: Path, runs: Path, name: str, **changes: object) -> Path:
    sets = [part for key, value in (COMMON | changes).items() for part in ("--set", f"{key}={json.dumps(value)}")]
    found = command("run", "--store", store, "--runs", runs, "--name", name, *sets)
    assert found.code == 0, found.err
    return found.path


def standings(folder: Path) -> dict[str, dict]:
    return {one["name"]: one for one in json.loads((folder / "sweep.json").read_text())["runs"]}


GRID = """
[grid]
seed = [0, 1]

[[runs]]
name = "narrow"
activation.k = 4

[[runs]]
name = "wide"
transcoder.d_sae = 96
"""


def test_every_run_is_the_run_alone_and_rows_are_read_once(
    command: Command, pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, fill = Counter[int](), BatchReader._fill

    def counted(self: BatchReader, step: int, ahead: range) -> object:
        read[step] += isinstance(self, SharedBatchReader)  # others are of evaluations
        return fill(self, step, ahead)

    monkeypatch.setattr(BatchReader, "_fill", counted)
    file = sweep_file(tmp_path, GRID)
    args = ("sweep", file, "--store", pristine.path, "--runs", tmp_path, "--at-once", 2)
    done = command(*args)
    assert done.code == 0, done.err
    folder = tmp_path / "small"
    assert done.out.splitlines()[-2:] == [str(folder / "compare.html"), str(folder)]
    assert read == Counter(range(STEPS + AHEAD))
    names = ["narrow-seed0", "narrow-seed1", "wide-seed0", "wide-seed1"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == names
    for name, changes in (("narrow-seed1", {"seed": 1, "activation.k": 4}), ("wide-seed0", {"transcoder.d_sae": 96})):
        whole = alone(command, pristine.path, tmp_path / "alone", name, **changes)
        assert_same_run(whole, folder / name)
        assert (whole / "config.json").read_bytes() == (folder / name / "config.json").read_bytes()
    found = standings(folder)
    for name in names:
        held_out = rows(folder / name)[-1]["held_out"]
        assert found[name]["state"] == "finished" and found[name]["step"] == STEPS
        assert (found[name]["fvu"], found[name]["l0"]) == (held_out["fvu"], held_out["l0"])
        report = json.loads((folder / name / "anti_duplication_logs" / f"correlation-{STEPS:06d}.json").read_text())
        assert (
            found[name]["pairs_above_0_8"] == (report["tracked"] or report["without_position_0"])["pairs_above"]["0.8"]
        )
        assert f"{held_out['fvu']:.4f}" in done.out and found[name]["cpu_seconds"] > 0
    assert list(found) == sorted(names, key=lambda name: found[name]["fvu"])
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"}
    again = command(*args)
    assert again.code == 0 and "4 of 4 runs are finished already" in again.err
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert command("watch", folder / "wide-seed0", "--once").code == 0
    assert "is finished" in command("resume", folder / "wide-seed0").err


def test_a_sweep_over_stores_trains_each_on_its_own_rows(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    other = make_store(tmp_path / "other", layer=4, seed=1)
    file = sweep_file(tmp_path, "")
    file.write_text(f'stores = ["{pristine.path}", "{other.path}"]\n{file.read_text()}')
    done = command("sweep", file, "--runs", tmp_path)
    assert done.code == 0, done.err
    folder, place = tmp_path / "small", pristine.path.name
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {f"{place}-run", "other-run"}
    assert_same_run(alone(command, other.path, tmp_path, "alone"), folder / "other-run")
    assert read_config(folder / "other-run").request == Store.open(other.path).request.digest
    assert not list(folder.glob("*.html"))


@pytest.mark.fault(4)
def test_killed_in_the_middle_the_same_command_ends_as_if_it_had_not_been(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, "[grid]\nactivation.k = [4, 6]\n", steps=150)
    args = ("sweep", str(file), "--store", str(pristine.path), "--runs", str(tmp_path))
    process = subprocess.Popen([sys.executable, "-m", "train", *args], stderr=subprocess.DEVNULL)
    logs = [tmp_path / "small" / f"k{k}" / "metrics.jsonl" for k in (4, 6)]
    wait_for(lambda: all(log.exists() and log.read_text().count("\n") > 3 for log in logs))
    process.kill()
    process.wait()
    assert not checkpoint.steps(logs[0].parent) or checkpoint.find(logs[0].parent).step < 150
    done = command(*args)
    assert done.code == 0, done.err
    for k in (4, 6):
        whole = alone(command, pristine.path, tmp_path, f"alone{k}", **{"steps": 150, "activation.k": k})
        assert_same_run(whole, tmp_path / "small" / f"k{k}")


def wait_for(there: Callable[[], bool]) -> None:
    for _ in range(6000):
        if there():
            return
        time.sleep(0.02)
    raise AssertionError("two minutes were not enough")


def test_a_signal_stops_all_runs_and_the_same_command_goes_on(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, "[grid]\nactivation.k = [4, 6]\n", steps=100)
    args = ("sweep", file, "--store", pristine.path, "--runs", tmp_path)
    log = tmp_path / "small" / "k6" / "metrics.jsonl"

    def stop() -> None:
        wait_for(log.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    stopped = command(*args)
    thread.join()
    assert stopped.code == 3 and "the same command continues the sweep" in stopped.err
    found = standings(tmp_path / "small")
    assert {one["state"] for one in found.values()} == {"stopped"}
    assert all(checkpoint.find(tmp_path / "small" / name).step >= one["step"] for name, one in found.items())
    assert command(*args).code == 0
    whole = alone(command, pristine.path, tmp_path, "alone", **{"steps": 100, "activation.k": 4})
    assert_same_run(whole, tmp_path / "small" / "k4")


def test_a_run_that_fails_and_one_that_diverges_leave_the_others_alone(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    runs = "".join(f'[[runs]]\nname = "{name}"\noptimizer.lr = {lr}\n' for name, lr in RATES.items())
    args = ("sweep", sweep_file(tmp_path, runs), "--store", pristine.path, "--runs", tmp_path)
    done = command(*args)
    assert done.code == 1 and "2 of 3 runs have failed or diverged: " in done.err, done.err
    found = standings(tmp_path / "small")
    assert {name: one["state"] for name, one in found.items()} == {
        "good": "finished", "nan": "failed", "high": "diverged"
    }  # fmt: skip
    assert "not finite" in found["nan"]["said"] and "has diverged" in found["high"]["said"]
    whole = alone(command, pristine.path, tmp_path, "alone", **{"optimizer.lr": RATES["good"]})
    assert_same_run(whole, tmp_path / "small" / "good")


RATES = {"good": 0.001, "nan": 1e30, "high": 30.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nactivation.q = [1]\n", "unknown option 'activation.q'"),
        ("[grid]\nseed = 3\n", "grid seed is 3: expected a list of values"),
        ("[grid]\nseed = [0, 0]\n", "grid seed has 0 twice"),
        ("[grid]\nseed = [0]\n[[runs]]\nseed = 1\n", "seed is in [grid] and in [[runs]]"),
        ("[[runs]]\nname = '../out'\n", "cannot be the name of a run's folder"),
        (
            "[grid]\nrows.batch_rows = [48, 1000000]\n",
            "run batch_rows1000000: rows.batch_rows = 1,000,000 is more than",
        ),
        ("[girds]\nseed = [0]\n", "unknown option 'girds.seed'; there are preset, config, stores, set, grid, runs"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_before_anything_is_written(
    text: str, message: str, command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    done = command("sweep", sweep_file(tmp_path, text), "--store", pristine.path, "--runs", tmp_path)
    assert done.code == 2 and message in done.err, done.err
    assert not (tmp_path / "small").exists()


def test_a_run_that_is_there_with_other_settings_is_refused(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    alone(command, pristine.path, tmp_path / "small", "k4", **{"activation.k": 6})
    done = command("sweep", sweep_file(tmp_path, "[grid]\nactivation.k = [4]\n"), "--store", pristine.path,
                   "--runs", tmp_path)  # fmt: skip
    assert done.code == 2 and "k4 was started with activation.k = 6, not 4" in done.err
    assert "names no store" in command("sweep", tmp_path / "small.toml", "--runs", tmp_path).err


def test_a_dry_run_shows_what_shares_its_rows(command: Command, pristine: SyntheticStore, tmp_path: Path) -> None:
    file = sweep_file(tmp_path, "[grid]\nseed = [0, 1]\nrows.batch_rows = [48, 32]\n", threads=0)
    args = ("sweep", file, "--store", pristine.path, "--runs", tmp_path, "--dry-run")
    found = json.loads(command(*args, "--json").out)
    assert [one["name"] for one in found] == [f"seed{seed}-batch_rows{rows}" for rows in (48, 32) for seed in (0, 1)]
    shared = [one["rows"] for one in found]
    assert shared[0] == shared[1] != shared[2] == shared[3]
    assert {(one["round"], one["threads"]) for one in found} == {(1, 1)}
    assert "rows.seed = 0" not in command(*args).out
    file.write_text(file.read_text().replace("rows.seed = 0\n", ""))
    assert "rows.seed = 0" in command(*args).out and not (tmp_path / "small").exists()


def test_runs_that_do_not_fit_into_memory_together_are_trained_in_rounds(
    pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep_file(tmp_path, "[grid]\nactivation.k = [2, 3, 4]\n")
    found = plan(wanted_runs(file, [pristine.path], tmp_path))
    assert [len(group) for group in rounds(found)] == [3]
    two, three = group_bytes(found[:2], 1), group_bytes(found, 1)
    standing, passing = [one.standing_bytes for one in found], max(one.passing_bytes for one in found)
    assert three == sum(standing) + passing and group_bytes(found, 2) > three  # one computes at a time, or two
    assert passing > 0 < min(standing)
    monkeypatch.setattr("train.sweeps.plan._free_bytes", lambda device: (two + three) / 2 / 0.8)
    assert [[one.name for one in group] for group in rounds(found, 1)] == [["k2", "k3"], ["k4"]]
    monkeypatch.setattr("train.sweeps.plan._free_bytes", lambda device: 0)
    assert [len(group) for group in rounds(found)] == [1, 1, 1]


def test_two_stores_of_one_name_are_refused_by_it(command: Command, pristine: SyntheticStore, tmp_path: Path) -> None:
    file, twin = sweep_file(tmp_path, ""), tmp_path / "elsewhere" / pristine.path.name
    done = command("sweep", file, "--store", pristine.path, "--store", twin, "--runs", tmp_path / "runs")
    assert done.code == 2 and f"{pristine.path} and {twin} are both called {twin.name}" in done.err
    assert not (tmp_path / "runs").exists()


def test_names_tell_what_differs() -> None:
    assert name_of({"activation.k": 16, "seed": 0, "optimizer.lr": 0.004}) == "k16-seed0-lr0.004"
    assert name_of({"seed": 1, "rows.seed": 2}) == "seed1-rows.seed2"
    assert name_of({"transcoder.prefixes": [16, 64]}) == "prefixes16_64" and name_of({}) == "run"


@pytest.mark.parametrize("lanes", [1, 2])
def test_runs_take_turns_at_most_a_step_apart_and_share_the_cpu_time(lanes: int) -> None:
    lengths = {Path("a"): 5, Path("b"): 9, Path("c"): 7}
    at, working, most, raised = dict[Path, int](), set[Path](), [0], dict[Path, Exception | None]()
    spent = dict[Path, float]()

    def train(run: Path, process: OwnProcess) -> None:
        for step in range(lengths[run]):
            process.wait_for_turn(step)
            at[run] = step
            working.add(run)
            most[0] = max(most[0], len(working))
            behind = [other for other in lengths if other not in raised and at.get(other, -1) < step - 1]
            assert not behind, (run, step, at)
            sum(range(20_000))
            working.discard(run)
            if run.name == "c" and step == 3:
                raise ProjectError("it had to be")
        spent[run] = process.cpu_seconds()

    before = time.process_time()
    stopped = train_side_by_side(
        dict.fromkeys(lengths, "rows"), train, lanes, lambda run, error: raised.update({run: error})
    )
    took = time.process_time() - before
    assert not stopped and most[0] <= lanes
    assert raised[Path("a")] is raised[Path("b")] is None and str(raised[Path("c")]) == "it had to be"
    assert at == {Path("a"): 4, Path("b"): 8, Path("c"): 3}
    assert 0 < sum(spent.values()) <= took


def test_a_plan_says_what_differs_and_which_runs_share_rows(pristine: SyntheticStore, tmp_path: Path) -> None:
    file = sweep_file(tmp_path, GRID)
    found = plan(wanted_runs(file, [pristine.path], tmp_path))
    assert [one.differs for one in found] == [
        {"activation.k": 4, "seed": 0}, {"activation.k": 4, "seed": 1},
        {"transcoder.d_sae": 96, "seed": 0}, {"transcoder.d_sae": 96, "seed": 1},
    ]  # fmt: skip
    assert {one.rows for one in found} == {found[0].rows}


def test_a_grid_of_kinds_drops_none_of_the_settings_that_all_runs_have(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    file = sweep_file(tmp_path, '[grid]\nactivation.kind = ["batchtopk", "topk"]\n')
    found = plan(wanted_runs(file, [pristine.path], tmp_path))
    assert [(one.settings.activation.kind, one.settings.activation.expected_l0) for one in found] == [
        ("batchtopk", VALUES["activation.k"]), ("topk", VALUES["activation.k"])
    ]  # fmt: skip
    file = sweep_file(tmp_path, '[grid]\nactivation.kind = ["topk", "relu"]\n')
    refused = command("sweep", file, "--store", pristine.path, "--runs", tmp_path)
    assert refused.code == 2 and "run kindrelu: activation.k = 6: unknown option 'activation.k'" in refused.err


def test_a_few_runs_of_cut_dictionaries_have_the_one_thread_that_these_need(
    pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("train.sweeps.plan", "train.run.settings"):
        monkeypatch.setattr(f"{module}.usable_cores", lambda: 8)
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    file = sweep_file(tmp_path, "[grid]\nparallel.shards = [1, 4]\n", threads=0)
    assert [one.config.settings.threads for one in plan(wanted_runs(file, [pristine.path], tmp_path))] == [8, 1]
