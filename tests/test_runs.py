"""Which runs there are, removing them, starting one from another's settings, and what is wrong with settings."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from shared.check_settings import names_in
from shared.errors import UserError
from shared.files import durable
from shared.store.store import Store
from tests.runs import SETS, SMALL, Outcome
from tests.stores import SyntheticStore
from train.live.runs import ListedRun, list_runs, print_runs
from train.model.activations import Activation
from train.read_settings import ALIASES, preset_for, read_settings, settings_with_defaults
from train.run.advice import advice
from train.run.rules import NEED_UNIT_DECODER, read_and_check
from train.run.settings import Settings, checkpoint_bytes, load_settings, read_config, resolve

Command = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("activation.k=16, 32", "not a whole number"),
        ("activation.k=true", "not a whole number"),
        ("activation.k=0", "must be at least 1"),
        ("activation.kind=gated", "not one of batchtopk, jumprelu, relu, topk"),
        ("log_every=often", "expected a whole number or auto"),
        ("kernels=fast", "not one of auto, compiled, triton, matmul, plain, dense"),
        ("evaluation=3", "not a group of settings; name one in it, such as evaluation.calibration_rows"),
        ("activation=topk", "not a group of settings; name one in it, such as activation.kind"),
        ("transcoder.prefixes=abc", "not a list, such as [1, 2]"),
        ("transcoder.prefixes=[1, true]", "transcoder.prefixes.1 = True: not a whole number"),
        ("diversity.merge.at=[0.5, 1.5]", "diversity.merge.at.1 = 1.5: must be below 1"),
        ("device=1", "not text"),
        ("steps=10k", "not a whole number; settings are written out, such as 10000 or 1e4"),
        ("activation.K=16", "unknown option 'activation.K'; did you mean 'activation.k'?"),
        ("learning_rate=1", "unknown option 'learning_rate'; did you mean 'optimizer.lr'?"),
        ("optimizer.lr_rate=1", "unknown option 'optimizer.lr_rate'; did you mean 'optimizer.decoder_rate'?"),
        ("samples.zzzz=1", "unknown option 'samples.zzzz'; there are samples.bins, samples.context, "),
    ],
)
def test_what_is_wrong_with_a_setting_blames_the_option_that_was_typed(line: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_settings("tiny", [line])
    assert str(error.value).startswith(f"--set {line}: {said}")


def test_a_file_is_blamed_for_its_own_settings_and_all_changes_for_how_they_go_together(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[rows]\nbatch_rows = 0\n")
    with pytest.raises(UserError, match=r"^\S+mine.toml: rows.batch_rows = 0: must be at least 1$"):
        load_settings(file=file)
    assert load_settings(file=file, changes=["rows.batch_rows=8"]).rows.batch_rows == 8


def test_every_other_name_leads_to_a_setting_or_says_where_it_is_decided() -> None:
    for name, told in ALIASES.items():
        with pytest.raises(UserError) as error:
            read_settings("tiny", [f"{name}=1"])
        assert str(error.value).endswith((f"did you mean {told!r}?", f"; {told}")), error.value
        assert " " in told or told in names_in(Settings.model_json_schema())


@pytest.mark.parametrize("kind", ["batchtopk", "topk", "jumprelu", "relu"])
def test_defaults_that_are_filled_in_before_torch_are_those_of_the_class(kind: str) -> None:
    read = read_settings("base", {"activation.kind": kind})
    assert settings_with_defaults(read) == Settings.model_validate(read.tables).model_dump(mode="json")


def test_kinds_that_need_decoder_rows_of_norm_1_are_those_whose_class_says_so() -> None:
    kinds = get_args(get_args(Activation)[0])
    assert {kind.model_fields["kind"].default for kind in kinds if kind.needs_unit_decoder} == set(NEED_UNIT_DECODER)


@pytest.mark.parametrize(("kind", "steps"), [("batchtopk", 5000), ("jumprelu", 5000), ("batchtopk", 1)])
def test_a_bound_on_checkpoints_is_checked_before_torch_by_the_size_that_one_is_given(
    kind: str, steps: int, pristine: SyntheticStore
) -> None:
    values = {"transcoder.d_sae": 128, "rows.batch_rows": 48, "activation.kind": kind, "steps": steps}
    store = Store.open(pristine.path)
    config = resolve(store, load_settings("base", values), None)
    size = checkpoint_bytes(config.settings, config.d_in, config.d_out)
    read_and_check("base", values | {"checkpoint.max_bytes": size}, None, store)
    with pytest.raises(UserError, match=f"{size - 1:,} is less than one checkpoint, about {size:,} bytes"):
        resolve(store, load_settings("base", values | {"checkpoint.max_bytes": size - 1}), None)
    with pytest.raises(UserError, match=f"{size - 1:,} is less than one checkpoint, about {size:,} bytes"):
        read_and_check("base", values | {"checkpoint.max_bytes": size - 1}, None, store)


def test_a_run_like_another_has_what_was_asked_for_and_the_other_store(
    command: Command, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    options = ["--runs", runs, *SMALL, "--set", "monitor.every=0", "--set", "diversity.co_activation.weight=0"]
    made = command("run", "--store", synthetic.path, "--name", "one", "--steps", 4, *options)
    assert made.code == 0, made.err
    first = read_config(made.path)
    assert first.asked and first.asked.evaluation.every == "auto" and first.settings.evaluation.every != "auto"
    for source in (["--like", runs / "one"], ["--config", runs / "one/config.json", "--store", synthetic.path]):
        done = command("run", *source, "--runs", runs, "--set", "transcoder.d_sae=32")
        assert done.code == 0, done.err
        config = read_config(done.path)
        expected = first.asked.transcoder.model_copy(update={"d_sae": 32})
        assert config.asked == first.asked.model_copy(update={"transcoder": expected})
        assert config.store == first.store and (config.settings.transcoder.prefixes or ())[-1:] == (32,)
    older = json.loads((runs / "one/config.json").read_text())
    older["settings"]["steps"] = 9
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert load_settings(file=tmp_path / "config.json") == first.asked.model_copy(update={"steps": 9})
    del older["asked"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(older))
    assert load_settings(file=tmp_path / "old/config.json") == first.settings.model_copy(update={"steps": 9})
    both = command("run", "--like", runs / "one", "--config", "x.toml")
    assert both.code == 2 and "--config and --like" in both.err

    found = list_runs(runs)
    assert [one.name for one in found] == ["config-001", "one", "one-001"]
    assert {(one.state, one.step, one.steps, one.store) for one in found} == {("finished", 4, 4, synthetic.path.name)}
    last = [json.loads(line) for line in (runs / "one/metrics.jsonl").read_text().splitlines()][-1]["held_out"]
    assert (found[1].fvu, found[1].l0, found[1].dead_share) == (last["fvu"], last["l0"], last["dead_share"])
    assert found[1].bytes == sum(path.stat().st_size for path in (runs / "one").rglob("*") if path.is_file())
    table = command("ls", "--runs", runs).out
    assert max(map(len, table.splitlines())) <= 80 and f"{last['fvu']:.4f}" in table and "3 runs" in table

    refused = command("rm", "one", "--runs", runs)
    assert refused.code == 2 and "pass --yes to remove it" in refused.err and (runs / "one").is_dir()
    with durable.lock(runs / "one/.lock", "it"):
        held = command("rm", "one", "--runs", runs, "--yes")
    assert held.code == 2 and "process " in held.err and (runs / "one").is_dir()
    done = command("rm", "one", runs / "one-001", "--runs", runs, "--yes")
    assert done.code == 0 and [path.name for path in runs.iterdir()] == ["config-001"]
    none = command("rm", "two", "--runs", runs, "--yes")
    assert none.code == 2 and "two is not a run" in none.err


def test_the_list_breaks_no_name_of_usual_length_and_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = ListedRun(name="wide-k64-seed1-lr3e-4", store="gemma-2-2b-L8-193c1e", state="running", step=150_000,
                    steps=200_000, fvu=0.1234, l0=48.1, dead_share=0.123, bytes=3 * 2**30)  # fmt: skip
    print_runs([run], Path("runs"))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for whole in (run.name, run.store, run.state, "150,000/200,000", "0.1234", "48.1", "12.3%", "3 GiB"):
        assert any(whole in line for line in lines), whole


def test_a_run_without_a_preset_has_that_of_its_store_and_says_so(
    command: Command, synthetic: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", synthetic.path, "--runs", tmp_path, "--steps", 1, *SETS)
    assert done.code == 0 and done.path.name == "base-001", done.err
    assert "preset base: none was named, and it is for any store" in done.err
    asked = read_config(done.path).asked
    assert asked == load_settings("base", [part for part in SETS if part != "--set"] + ["steps=1"])
    request = Store.open(synthetic.path).request
    embedded = request.model_copy(update={"model": request.model.model_copy(update={"name": "embedded"})})
    assert [preset_for(one) for one in (request, embedded)] == ["base", "tiny"]


def test_settings_that_are_read_before_torch_are_those_of_the_class() -> None:
    read = read_settings("base", {"activation.kind": "jumprelu", "steps": 7})
    assert Settings.model_validate(read.tables) == load_settings("base", {"activation.kind": "jumprelu", "steps": 7})


def test_advice_is_of_the_runs_own_numbers(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    changes = {"transcoder.d_sae": 64, "activation.k": 6, "rows.batch_rows": 48, "steps": 100}
    config = resolve(store, load_settings("base", changes), None)
    rows = sum(part.source.rows for part in store.strata.values()) * len(config.training_blocks) // store.record.blocks
    lr, k, d_sae, steps, whole, _ = advice(config, store)
    assert whole.startswith("transcoder.whole_weight: 16; with 16 instead of 4, ")
    alone = resolve(store, load_settings("base", changes | {"transcoder.prefixes": [64]}), None)
    assert advice(alone, store)[:4] == [lr, k, d_sae, steps]
    assert lr.startswith("optimizer.lr: 0.0056 here") and "; 16 was not measured (" in lr
    narrow, wide = (advice(config.model_copy(update={"d_in": width}), store)[0] for width in (128, 576))
    assert "; at a width of 128, 0.004 was better than 0.008 (" in narrow and "576" not in narrow
    assert "; at a width of 576, 0.0056 was best (" in wide and not any("not measured" in one for one in (narrow, wide))
    assert k.startswith("activation.k: 6 ") and d_sae.startswith("transcoder.d_sae: 64, 4 times the width")
    assert f"steps: 100 read each of {rows:,} training rows {100 * 48 / rows:.2g} times" in steps
    assert ("twice as much text" in steps) == (2 * rows < 100 * 48)
    assert "wider rows need less" in advice(config.model_copy(update={"d_in": 2304}), store)[0]
