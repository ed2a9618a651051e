"""A run's records belong together: its store's blocks, its settings, its checkpoints; and how a run is made longer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from shared.files import durable
from shared.store.layout import ARRAYS
from shared.store.store import Store
from tests.reports import read
from tests.runs import SMALL, Outcome, as_format_4_had_it, assert_same_run, rows
from tests.stores import SyntheticStore, edit, faults, make_store
from train.model import checkpoint
from train.run import trainer
from train.run.settings import Extension, read_config

Command = Callable[..., Outcome]
CADENCE = ["--set", "log_every=5", "--set", "checkpoint.every=10", "--set", "evaluation.every=10"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store")


@pytest.fixture
def other(store: SyntheticStore, tmp_path: Path) -> Path:
    """A store of the same request, name and size, of which block 3 holds other rows; it verifies."""
    noisy = make_store(tmp_path / "noisy", noise=0.1).path
    path = Path(shutil.copytree(store.path, tmp_path / "other" / "store"))
    for file in [*noisy.glob(f"{ARRAYS}/strata/*/*/c/3/*"), *noisy.glob("ledger/000003.*")]:
        shutil.copyfile(file, path / file.relative_to(noisy))
    assert faults(path) == {} and Store.open(path).request.digest == store.record.request.digest
    return path


def trained(command: Command, store: Path, runs: Path, *options: object, name: str = "run", steps: int = 20) -> Path:
    done = command("run", "--store", store, "--runs", runs, "--name", name, "--steps", steps, *SMALL, *CADENCE,
                   *options)  # fmt: skip
    assert done.code == 0, done.err
    return done.path


def stopped(run: Path, step: int = 20) -> Path:
    """The run as a kill before its last checkpoint leaves it."""
    shutil.rmtree(checkpoint.folder(run, step))
    return run


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def refused(done: Outcome, *said: str) -> None:
    assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
    assert [text for text in said if text not in done.err] == []


@pytest.mark.fault(46)
def test_a_store_of_the_same_name_with_other_rows_is_refused_by_block(
    command: Command, store: SyntheticStore, other: Path, tmp_path: Path
) -> None:
    run = stopped(trained(command, store.path, tmp_path))
    before = contents(run)
    refused(
        command("resume", run, "--store", other), "block 3 holds other rows (checksum ", f"{other} is not the store"
    )
    assert contents(run) == before
    mine, theirs = trained(command, store.path, tmp_path, name="a"), trained(command, other, tmp_path, name="b")
    for runs in ((mine, theirs), (theirs, mine)):
        refused(command("compare", *runs), "block 3 holds other rows", f"that {runs[1]} was trained on")
    refused(command("compare", mine, "--store", other), "block 3 holds other rows", f"that {mine} was trained on")


@pytest.mark.fault(46)
@pytest.mark.parametrize("word", ["evaluate", "samples", "report"])
def test_other_rows_where_the_store_of_a_run_was_are_refused(
    command: Command, store: SyntheticStore, other: Path, tmp_path: Path, word: str
) -> None:
    place = Path(shutil.copytree(store.path, tmp_path / "place"))
    run = trained(command, place, tmp_path)
    shutil.rmtree(place)
    shutil.copytree(other, place)
    refused(command(word, run), f"{place} is not the store that {run} was trained on: block 3 holds other rows")
    assert command("evaluate", run, "--store", other).code == 0  # another store, and named as one


def test_a_store_that_was_extended_and_moved_is_the_runs_own(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    """The first blocks of a longer store are those of the shorter one; a store that lacks one is another."""
    longer = make_store(tmp_path / "longer", training_blocks=6).path
    whole, run = (trained(command, store.path, tmp_path, name=name) for name in ("whole", "run"))
    assert command("resume", stopped(run), "--store", longer).code == 0
    assert_same_run(whole, run)
    on_longer = trained(command, longer, tmp_path, name="longer-run")
    refused(command("resume", stopped(on_longer), "--store", store.path), "block 5 is missing, it has 5 blocks")
    assert command("resume", on_longer).code == 0
    assert command("compare", whole, on_longer).code == 0  # on the shorter store, which has the held-out rows of both


@pytest.mark.parametrize("damage", ["lost", "edited"])
def test_without_its_record_of_blocks_a_run_still_tells_its_store_from_another(
    command: Command, store: SyntheticStore, other: Path, tmp_path: Path, damage: str
) -> None:
    run = stopped(trained(command, store.path, tmp_path))
    if damage == "lost":
        (run / "blocks.json").unlink()
    else:
        edit(run / "blocks.json", lambda record: record["checksums"].update({"3": "0" * 16}))
    done = command("resume", run, "--store", other)
    assert done.code == 1 and "blocks.json" in done.err and len(done.err.splitlines()) == 1
    assert command("resume", run).code == 0


def test_a_run_from_before_blocks_and_settings_were_bound_goes_on(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    whole, run = (trained(command, store.path, tmp_path, name=name) for name in ("whole", "old"))
    (run / "blocks.json").unlink()
    edit(run / "config.json", lambda config: (config.pop("blocks"), config.pop("extensions")))
    as_format_4_had_it(stopped(run))
    assert command("resume", run).code == 0
    assert_same_run(whole, run)


EDITS: dict[str, tuple[str, Any, str]] = {
    "k": ("activation.k", 4, "activation.k is 4, and the checkpoint of step 10 was trained with 6; put that back"),
    "lr": ("optimizer.lr", 0.04, "optimizer.lr is 0.04, and the checkpoint of step 10 was trained with 0.004"),
    "steps": ("steps", 30, "steps is 30, and the checkpoint of step 10 was trained with 20; put that back; to train "
              "longer: train resume "),
    "seed": ("seed", 5, "seed is 5, and the checkpoint of step 10 was trained with 0"),
    "batch": ("rows.batch_rows", 40, "rows.batch_rows is 40, and the checkpoint of step 10 was trained with 48"),
    "prefixes": ("transcoder.prefixes", [32, 64], "transcoder.prefixes is [32, 64], and"),
    "auxk": ("auxk.coefficient", 0.7, "auxk.coefficient is 0.7, and the checkpoint of step 10 was trained with 0.5"),
    "kind": ("activation.kind", "topk", "activation.kind is 'topk', and the checkpoint of step 10 was trained with "
             "'batchtopk'"),
    "keep": ("checkpoint.keep_last", 7, "checkpoint.keep_last is 7, and the checkpoint of step 10 was trained with 2"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.reports import train

    runs = tmp_path_factory.mktemp("runs")
    train("run", "--store", store.path, "--runs", runs, "--name", "run", "--steps", 20, *SMALL, *CADENCE)
    return runs / "run"


def set_in(config: dict[str, Any], name: str, value: object) -> None:
    *groups, last = name.split(".")
    for group in groups:
        config = config[group]
    config[last] = value


@pytest.mark.fault(47)
@pytest.mark.parametrize("case", EDITS)
def test_an_edited_configuration_is_refused_by_field(
    command: Command, finished: Path, tmp_path: Path, case: str
) -> None:
    run = stopped(Path(shutil.copytree(finished, tmp_path / "run")))
    name, value, said = EDITS[case]
    edit(run / "config.json", lambda config: set_in(config["settings"], name, value))
    before = contents(run)
    for words in (["resume", run], ["evaluate", run], ["report", run], ["samples", run]):
        refused(command(*words), f"{run}/config.json: {said}", f"train run ... --init-from {run}")
    assert {path: data for path, data in contents(run).items() if path.name != ".lock"} == {
        path: data for path, data in before.items() if path.name != ".lock"
    }


@pytest.mark.fault(47)
def test_rows_that_are_left_out_and_blocks_are_settings_too(command: Command, finished: Path, tmp_path: Path) -> None:
    cases: dict[str, Callable[[Any], Any]] = {
        "exclusion.source_norm is 1.0, and": lambda config: config["exclusion"].update(source_norm=1.0),
        "first_block is 3, and the checkpoint of step 20 was trained with 2": lambda config: config.update(
            first_block=3
        ),
    }
    for i, (said, change) in enumerate(cases.items()):
        run = Path(shutil.copytree(finished, tmp_path / str(i)))
        edit(run / "config.json", change)
        refused(command("evaluate", run), said)
    edit(run / "config.json", lambda config: config.update(extensions=[{"step": 20, "steps_before": 20}]))
    done = command("evaluate", run)
    assert done.code == 1 and "a run is only ever made longer, and extensions say that it had [20, 20]" in done.err


@pytest.mark.fault(47)
def test_a_run_that_others_start_from_is_checked_as_well(
    command: Command, store: SyntheticStore, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(run / "config.json", lambda config: config["settings"].update(seed=5))
    start = ("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 5, *SMALL, "--init-from", run)
    refused(command(*start), "seed is 5, and the checkpoint of step 20 was trained with 0")
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(48)
@pytest.mark.parametrize("change", [
    lambda state: state["held_out"].update(fvu=0.0512),
    lambda state: state["arithmetic"].update(numpy="9"),
    lambda state: state["config"]["settings"]["activation"].update(k=4),
    lambda state: state.pop("digest"),
    lambda state: state.update(digest="0" * 64),
])  # fmt: skip
def test_a_checkpoint_whose_record_was_edited_does_not_verify(
    command: Command, finished: Path, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(checkpoint.folder(run, 20) / checkpoint.STATE, change)
    listed = {one["step"]: one for one in json.loads(command("checkpoints", run, "--json").out)}
    assert listed[10]["wrong"] is None and "it was edited, or is damaged" in listed[20]["wrong"]
    assert listed[20]["held_out"] is None
    done = command("resume", run)
    assert done.code == 0 and "skipped a checkpoint that does not verify" in done.err
    assert_same_run(finished, run)


CONSTANT = ["--set", "optimizer.decay_share=0", "--set", "auxk.dead_after_tokens=500", "--set", "monitor.every=5",
            "--set", "optimizer.warmup_steps=4"]  # fmt: skip


def test_a_run_with_a_constant_rate_that_is_made_longer_is_the_longer_run(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    straight = trained(command, store.path, tmp_path, *CONSTANT, name="straight", steps=30)
    run = trained(command, store.path, tmp_path, *CONSTANT)
    done = command("resume", run, "--steps", 30)
    assert done.code == 0 and f"{run} had 20 steps and now has 30; from step 21 on the learning rate" in done.err
    weights = [load_file(checkpoint.find(path).path / checkpoint.WEIGHTS) for path in (straight, run)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert rows(run)[-1]["held_out"] == rows(straight)[-1]["held_out"]
    held_out = json.loads((run / "anti_duplication_logs/correlation-held-out.json").read_text())
    assert held_out["step"] == 30 and (run / "samples/step-000030.parquet").is_file()


@pytest.mark.fault(47)
def test_a_run_made_longer_says_so_and_its_learning_rate_is_that_of_the_longer_run_from_there_on(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ("--set", "optimizer.decay_share=0.5", "--set", "optimizer.warmup_steps=0")
    trained(command, store.path, tmp_path, *options)
    assert command("resume", run, "--steps", 40).code == 0
    config = read_config(run)
    assert config.settings.steps == 40 and config.extensions == (Extension(step=20, steps_before=20),)
    assert [config.length_at(step) for step in (0, 19, 20, 39)] == [20, 20, 40, 40]
    lr = {row["step"]: row["lr"] for row in rows(run)}
    assert lr == {step: pytest.approx(0.004 * min(1, (length - step + 1) / (length / 2)))
                  for step in range(5, 41, 5) for length in [20 if step <= 20 else 40]}  # fmt: skip
    killed = Path(shutil.copytree(run, tmp_path / "killed"))
    shutil.rmtree(checkpoint.folder(killed, 40))
    assert command("resume", killed, "--steps", 40).code == 0  # the same command again goes on
    assert_same_run(run, killed)
    refused(
        command("resume", run, "--steps", 30), f"--steps 30: {run} has 40 steps already, and is only ever made longer"
    )
    assert command("report", run).code == 0
    finished = next(check for check in read(run).verdict if check.name == "finished")
    assert finished.said == "Trained for all of its 40 steps; made longer at step 20, when it had 20 steps."


@pytest.mark.fault(49)
@pytest.mark.parametrize("fate", ["renamed", "replaced"])
def test_a_run_that_is_removed_or_renamed_under_its_trainer_ends_in_an_error(
    command: Command, store: SyntheticStore, finished: Path, tmp_path: Path, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", trainer.Trainer._step

    def meet_fate(self: trainer.Trainer, number: int) -> Any:
        if number == 12:
            self._saver.wait()
            run.rename(tmp_path / "elsewhere")
            if fate == "replaced":
                shutil.copytree(finished, run)
        return step(self, number)

    monkeypatch.setattr(trainer.Trainer, "_step", meet_fate)
    before = contents(finished)
    done = command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", 20, *SMALL, *CADENCE)
    monkeypatch.undo()
    assert done.code == 1 and len(done.err.splitlines()) >= 1
    assert f"{run} was removed or renamed while it was trained; nothing is written there after step 15" in done.err
    if fate == "replaced":
        assert contents(run) == {run / path.relative_to(finished): data for path, data in before.items()}
    else:
        assert not run.exists()
        assert command("resume", tmp_path / "elsewhere").code == 0
        assert_same_run(finished, tmp_path / "elsewhere")


@pytest.mark.fault(49)
@pytest.mark.parametrize("writer", ["checkpoint", "usage"])
def test_a_run_that_is_renamed_while_something_of_it_is_written_is_not_begun_again_in_its_old_place(
    command: Command, store: SyntheticStore, finished: Path, tmp_path: Path, writer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, moved = tmp_path / "run", tmp_path / "elsewhere"
    publish = durable.publish_json

    def renamed_before(path: Path, value: Any) -> None:
        ours = {"checkpoint": f"step-000010{durable.TEMPORARY}/state.json", "usage": "run/usage.json"}[writer]
        if path.as_posix().endswith(ours) and not moved.exists():
            run.rename(moved)
        publish(path, value)

    monkeypatch.setattr(durable, "publish_json", renamed_before)
    done = command("run", "--store", store.path, "--runs", tmp_path, "--name", "run", "--steps", 20, *SMALL, *CADENCE)
    monkeypatch.undo()
    assert done.code == 1 and f"error: {run} was removed or renamed while it was trained" in done.err
    assert moved.exists() and not run.exists()
    assert command("resume", moved).code == 0
    assert_same_run(finished, moved)


@pytest.mark.fault(48)
def test_edited_counts_of_components_are_left_out_and_made_again(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    edit(run / "usage.json", lambda record: record["components"]["auxk"].update(effect=5.0))
    done = command("report", run)
    assert done.code == 0 and f"{run}/usage.json: its digest is not that of what it holds" in done.err
    assert f"python -m train resume {run}" in done.err
    again = command("resume", run)
    assert again.code == 0 and "warning: " in again.err
    assert (run / "usage.json").read_bytes() == (finished / "usage.json").read_bytes()
    edit(run / "usage.json", lambda record: record.pop("digest"))  # as those of earlier versions are
    assert command("report", run).code == 0


def test_a_run_that_is_started_anew_starts_from_the_weights_that_it_started_from(
    command: Command, store: SyntheticStore, finished: Path, tmp_path: Path
) -> None:
    """It was killed before its first checkpoint, and the other run was trained further meanwhile."""
    first = Path(shutil.copytree(finished, tmp_path / "first"))
    whole, run = (trained(command, store.path, tmp_path, "--init-from", first, name=name) for name in ("a", "b"))
    assert command("resume", first, "--steps", 30).code == 0 and checkpoint.find(first).step == 30
    for file in ("checkpoints", "samples"):
        shutil.rmtree(run / file)
    killed = Path(shutil.copytree(run, tmp_path / "killed"))
    assert command("resume", run).code == 0
    assert_same_run(whole, run)
    edit(killed / "config.json", lambda config: config["initial"].update(crc32c="0" * 8))
    refused(command("resume", killed), "step-000020 is not the checkpoint that this run started from")
    shutil.rmtree(checkpoint.folder(first, 20))
    refused(command("resume", killed), f"{first} has no checkpoint of step 20; it has [30]")
