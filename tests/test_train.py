"""Stage 2 through its real commands on synthetic stores: results, exact resume, and what bad input says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.files import durable
from tests.runs import SMALL, as_format_4_had_it, assert_same_run, rows
from tests.stores import SyntheticStore, make_store, record_as_it_is
from train.model import checkpoint
from train.model.transcoder import Transcoder
from train.run.settings import checkpoint_bytes, read_config

CADENCE = ["--set", "log_every=7", "--set", "evaluation.every=20", "--set", "checkpoint.every=10"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


@pytest.fixture(scope="module")
def long(store: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 steps that nothing cut off."""
    runs = tmp_path_factory.mktemp("long")
    assert popen(*_long(store, runs), "--name", "whole").wait(120) == 0
    return runs / "whole"


def _long(store: SyntheticStore, runs: Path) -> tuple[object, ...]:
    return ("run", "--store", store.path, "--runs", runs, *SMALL, *CADENCE, "--steps", 400)


def popen(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_run_learns_and_leaves_what_the_design_says(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 600, *SMALL,
                   "--set", "optimizer.lr=0.01", "--set", "checkpoint.every=200")  # fmt: skip
    assert done.code == 0 and done.path == tmp_path / "tiny-001"
    last = rows(done.path)[-1]
    held_out = last["held_out"]
    assert held_out["fvu"] < 0.75
    assert held_out["l0"] == pytest.approx(6, rel=0.15)
    assert set(held_out["prefixes"]) == {"4", "8", "16", "32", "64"}
    assert set(held_out["strata"]) == {"000-001", "001-004", "004-016", "016-032"}
    fvus = [held_out["prefixes"][p]["fvu"] for p in ("4", "16", "64")]
    assert fvus == sorted(fvus, reverse=True)
    assert [p.name for p in checkpoint.steps(done.path)] == ["step-000400", "step-000600"]
    weights = load_file(checkpoint.folder(done.path, 600) / checkpoint.WEIGHTS)
    assert weights["W_enc"].shape == (16, 64) and weights["W_dec"].shape == (64, 24)
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.ones(64))
    assert float(weights["threshold"].mean()) == pytest.approx(held_out["threshold"])
    assert json.loads((done.path / "config.json").read_text())["settings"]["steps"] == 600


def test_the_cadence_of_rows_and_what_they_hold(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 30, *SMALL, *CADENCE)
    found = rows(done.path)
    assert [row["step"] for row in found] == [7, 14, 20, 21, 28, 30]
    assert [row["step"] for row in found if "held_out" in row] == [20, 30]
    for row in found:
        assert row["rows"] == 48 * row["step"]
        assert row["l0_training_rule"] == pytest.approx(6, rel=0.2)
        assert row["loss"] == pytest.approx(sum(row["terms"].values()))
        assert {"lr", "l0_threshold", "dead_share", "grad_norm", "fvu", "explained_variance"} <= set(row)
    timing = [json.loads(line) for line in (done.path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [7, 14, 20, 21, 28, 30]
    for row, seconds in zip(timing, [0.0, *(row["seconds"] for row in timing)], strict=False):
        assert row["data_wait"] > 0
        assert row["data_wait_share"] == pytest.approx(row["data_wait"] / (row["seconds"] - seconds))
        assert row["data_wait_share"] < 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


@pytest.mark.slow(60)
@pytest.mark.parametrize("samples", [0, pytest.param(512, marks=pytest.mark.exhaustive)])
def test_the_process_that_compiles_the_loops_gets_what_those_that_load_them_get(
    store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int
) -> None:
    """Compiled code and what is kept of it on disk are optimized apart, so they may fuse other products with sums.

    Samples are taken by loops of their own, which hardly compute.
    """
    line = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL, *CADENCE)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "loops"))
    for name in ("compiles", "loads"):
        run = popen(*line, "--set", f"samples.rows={samples}", "--name", name)
        _, err = run.communicate(timeout=280)
        assert run.returncode == 0, err
    assert any((tmp_path / "loops").rglob("numba_loops.adam-*.nbi"))
    assert_same_run(tmp_path / "compiles", tmp_path / "loads")


@pytest.mark.parametrize("skip", ["true", "false"])
@pytest.mark.parametrize("prefixes", ["[64]", "[8, 64]"])
@pytest.mark.parametrize(
    "activation", [["topk", "k=6"], ["jumprelu", "l0_coefficient=0.01"], ["relu", "l1_coefficient=0.001"]]
)
def test_every_activation_trains_with_any_prefixes_and_skip(
    command, store: SyntheticStore, tmp_path: Path, activation: list[str], prefixes: str, skip: str
) -> None:
    kind, option = activation
    done = command(
        "run", "tiny", "--store", store.path, "--runs", tmp_path, "--steps", 120, "--set", f"activation.kind={kind}",
        "--set", f"activation.{option}", "--set", "transcoder.d_sae=64", "--set", f"transcoder.prefixes={prefixes}",
        "--set", f"transcoder.skip={skip}", "--set", "rows.batch_rows=48", "--set", "log_every=20",
        "--set", "optimizer.lr=0.01",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = rows(done.path)
    assert found[-1]["fvu"] < found[0]["fvu"]
    assert set(found[-1]["prefixes"]) == {p.strip() for p in prefixes.strip("[]").split(",")}
    assert ("W_skip" in load_file(checkpoint.folder(done.path, 120) / checkpoint.WEIGHTS)) == (skip == "true")


def test_every_kind_of_kernels_gives_the_same_answer_and_is_recorded(
    command, store: SyntheticStore, tmp_path: Path
) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 60, *SMALL, "--set", "log_every=10")
    found = {}
    for kernels in ("auto", "compiled", "plain", "dense"):
        done = command(*common, "--set", f"kernels={kernels}")
        assert done.code == 0, done.err
        found[kernels] = done.path
        recorded = json.loads((done.path / "config.json").read_text())["settings"]["kernels"]
        assert recorded == ("compiled" if kernels == "auto" else kernels)
    assert_same_run(found["auto"], found["compiled"])
    dense = rows(found["dense"])
    for kernels in ("compiled", "plain"):
        mine = rows(found[kernels])
        for row, expected in zip(mine, dense, strict=True):
            assert row["fvu"] == pytest.approx(expected["fvu"], rel=1e-3)
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert mine[0]["loss"] == pytest.approx(dense[0]["loss"], rel=1e-5)
        assert mine[-1]["held_out"]["fvu"] == pytest.approx(dense[-1]["held_out"]["fvu"], rel=5e-3)


@pytest.mark.slow
def test_triton_kernels_give_the_same_answer(command, store: SyntheticStore, tmp_path: Path) -> None:
    """In Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 2, *SMALL, "--set", "log_every=1")
    found = [rows(command(*common, "--set", f"kernels={kernels}").path) for kernels in ("triton", "dense")]
    for row, expected in zip(*found, strict=True):
        assert row["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


def test_triton_kernels_are_refused_without_cuda(
    command, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    done = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--set", "kernels=triton")
    assert done.code == 2 and "kernels = triton is for CUDA, and the device is cpu; use --set kernels=auto" in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kernels", ["compiled", "plain"])
def test_a_product_in_bfloat16_trains_float32_weights(
    command, store: SyntheticStore, tmp_path: Path, kernels: str
) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 60, *SMALL, "--set", f"kernels={kernels}")
    full, low = command(*common), command(*common, "--set", "product_dtype=bfloat16")
    assert low.code == 0, low.err
    weights = load_file(checkpoint.folder(low.path, 60) / checkpoint.WEIGHTS)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert rows(low.path)[-1]["held_out"]["fvu"] == pytest.approx(rows(full.path)[-1]["held_out"]["fvu"], rel=0.05)
    assert rows(low.path)[0]["loss"] != rows(full.path)[0]["loss"]


def test_with_the_target_as_source_an_autoencoder_of_the_targets_is_trained(
    command, store: SyntheticStore, tmp_path: Path
) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, *SMALL, *CADENCE, "--set", "optimizer.lr=0.01")
    target = ("--set", "source=target", "--set", "transcoder.skip=false")
    whole, stopped = (command(*common, *target, "--steps", 200).path for _ in range(2))
    config = read_config(whole)
    assert (config.settings.source, config.d_in, config.d_out) == ("target", 24, 24)
    weights = load_file(checkpoint.folder(whole, 200) / checkpoint.WEIGHTS)
    assert weights["W_enc"].shape == (24, 64) and "W_skip" not in weights
    assert torch.equal(weights["source_mean"], weights["target_mean"])
    assert torch.equal(weights["source_scale"], weights["target_scale"])
    size = sum(file.stat().st_size for file in checkpoint.folder(whole, 200).iterdir())
    assert size < checkpoint_bytes(config.settings, config.d_in, config.d_out) < size + 2**22
    assert rows(whole)[-1]["held_out"]["fvu"] < 0.5
    shutil.rmtree(checkpoint.folder(stopped, 200))
    assert command("resume", stopped).code == 0
    assert_same_run(whole, stopped)
    found = json.loads(command("evaluate", whole, "--json", "--linear").out)
    assert found["fvu"] == rows(whole)[-1]["held_out"]["fvu"] and abs(found["linear_fvu"]) < 1e-6
    other = command(*common, "--steps", 1, "--init-from", whole, "--set", "transcoder.skip=false")
    assert other.code == 2 and "its source is target, this run's is source" in other.err


def test_one_seed_gives_one_result_and_another_seed_another(command, store: SyntheticStore, tmp_path: Path) -> None:
    common = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 25, *SMALL, *CADENCE)
    a, b, c = (command(*common, "--seed", seed).path for seed in (1, 1, 2))
    assert_same_run(a, b)
    assert (a / "metrics.jsonl").read_bytes() != (c / "metrics.jsonl").read_bytes()


def test_a_run_from_before_rows_had_a_seed_goes_on_with_the_same_bits(command, store, tmp_path: Path) -> None:
    whole = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 25, *SMALL, *CADENCE, "--seed", 3).path
    older = Path(shutil.copytree(whole, tmp_path / "older"))
    as_format_4_had_it(older)
    shutil.rmtree(checkpoint.folder(older, 25))
    config = json.loads((older / "config.json").read_text())
    assert config["settings"]["rows"].pop("seed") == 3
    (older / "config.json").write_text(json.dumps(config))
    assert command("resume", older).code == 0
    assert_same_run(whole, older)


@pytest.mark.fault(4)
def test_killed_anywhere_and_resumed_a_run_is_the_uninterrupted_one(
    store: SyntheticStore, long: Path, tmp_path: Path
) -> None:
    args = _long(store, tmp_path)
    for i, wait in enumerate((11, 33)):
        name = tmp_path / f"killed{i}"
        process = popen(*args, "--name", name.name)
        wait_for(lambda name=name, wait=wait: (name / "metrics.jsonl").exists() and len(rows_so_far(name)) >= wait)
        process.kill()
        process.wait()
        resumed = popen("resume", name)
        assert resumed.wait(120) == 0, resumed.communicate()[1]
        assert_same_run(long, name)
        assert not list(name.rglob("*.tmp"))


@pytest.mark.fault(5)
def test_a_signal_stops_after_the_step_with_a_checkpoint_and_resume_goes_on(
    store: SyntheticStore, long: Path, tmp_path: Path
) -> None:
    process = popen(*_long(store, tmp_path), "--name", "stopped")
    wait_for(lambda: (tmp_path / "stopped" / "metrics.jsonl").exists())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    step = checkpoint.find(tmp_path / "stopped").step
    assert f"stopped at step {step}; continue with: python -m train resume" in err
    assert popen("resume", tmp_path / "stopped").wait(120) == 0
    assert_same_run(long, tmp_path / "stopped")


def rows_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.mark.fault(41)
def test_a_finished_run_resumes_to_nothing(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 10, *SMALL)
    before = (done.path / "metrics.jsonl").read_bytes()
    again = command("resume", done.path)
    assert again.code == 0 and "is finished: 10 steps" in again.err
    assert (done.path / "metrics.jsonl").read_bytes() == before


def test_evaluate_repeats_the_last_held_out_figures_and_changes_nothing(
    command, store: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 20, *SMALL)
    files = {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    found = command("evaluate", done.path, "--json", "--linear")
    assert found.code == 0, found.err
    evaluation = json.loads(found.out)
    assert 0 < evaluation.pop("linear_fvu") < 1 and evaluation.pop("step") == 20
    assert evaluation == rows(done.path)[-1]["held_out"]
    assert files == {p: p.read_bytes() for p in done.path.rglob("*") if p.is_file()}
    table = command("evaluate", done.path)
    assert f"{evaluation['fvu']:.4f}" in table.out and "16-31" in table.out


def test_init_from_starts_with_the_other_runs_weights(command, store: SyntheticStore, tmp_path: Path) -> None:
    first = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL)
    args = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 1, *SMALL, "--set", "optimizer.lr=1e-12")
    second = command(*args, "--init-from", first.path)
    fresh = command(*args)
    ends = [rows(done.path)[-1]["held_out"]["fvu"] for done in (first, second, fresh)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    assert abs(ends[2] - ends[0]) > 1e-3
    other = command(*args, "--init-from", first.path, "--set", "transcoder.d_sae=32")
    assert other.code == 2 and "its transcoder.d_sae is 64, this run's is 32" in other.err
    more = ("--steps", 2, "--set", "transcoder.d_sae=96", "--set", "activation.k_start=2x")
    wide = command(*args, *more, "--set", "activation.k_warmup_steps=1", "--init-from", first.path)
    assert "step-000040 of 64 latents; the other 32 start at random; anew start the optimizer's" in wide.err
    assert "warning: --init-from" in wide.err and "k starts at 12 and falls to 6 over 1 steps" in wide.err
    narrow, widened = Transcoder.load(first.path), Transcoder.load(wide.path)
    for name, theirs in narrow.state_dict().items():
        ours = widened.state_dict()[name]
        if name != "inference_threshold":
            ours = ours[..., :64] if name == "W_enc" else ours[:64] if ours.shape != theirs.shape else ours
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    new = widened.W_dec[64:]
    torch.testing.assert_close(new.norm(dim=1), torch.ones(32))
    assert float((new @ narrow.W_dec.T).detach().abs().max()) < 0.999  # none is a copy


@pytest.mark.fault(29)
def test_two_trainers_on_one_run_folder_are_refused(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 10, *SMALL)
    with durable.lock(done.path / ".lock", "test"):
        second = command("resume", done.path)
    assert second.code == 2 and "is locked" in second.err
    again = command("run", "--store", store.path, "--runs", tmp_path, "--name", "tiny-001", *SMALL)
    assert again.code == 2 and "tiny-001 exists" in again.err


def test_resume_refuses_another_store_and_another_thread_count(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 10, *SMALL)
    other = make_store(tmp_path / "other", seed=9)
    refused = command("resume", done.path, "--store", other.path)
    assert refused.code == 2 and "was trained on: its request is" in refused.err
    config = json.loads((done.path / "config.json").read_text())
    config["settings"]["threads"] = 2
    (done.path / "config.json").write_text(json.dumps(config))
    refused = command("resume", done.path)
    torch.set_num_threads(1)
    assert refused.code == 2 and "was trained with" in refused.err and "threads 1, here 2" in refused.err
    assert "continue with --threads 1, or with --inexact" in refused.err


BAD = {
    "unknown preset": (["tinny"], "no preset 'tinny'; presets: base, gemma-2-2b, tiny; did you mean 'tiny'?"),
    "unknown setting": (["--set", "optimizer.lrr=1"], "unknown option 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
    "unknown option": (["--stpes", "1"], "No such option"),
    "setting of another activation": (
        ["--set", "activation.l1_coefficient=1"],
        "activation.l1_coefficient'; it is a setting of another activation.kind",
    ),
    "not a number": (["--set", "optimizer.lr=fast"], "--set optimizer.lr=fast: expected a number or auto"),
    "negative": (["--steps", "-5"], "'-5': not a whole number above 0"),
    "k above d_sae": (["--set", "transcoder.d_sae=16"], "activation.k = 32 is more than d_sae = 16"),
    "prefixes": (["--set", "transcoder.prefixes=[64, 100]"], "must end at d_sae = 128, got [64, 100]"),
    "a skip from the targets to themselves": (
        ["--set", "source=target", "--set", "transcoder.skip=true"],
        "transcoder.skip is on and source = target",
    ),
    "batch above the store": (["--set", "rows.batch_rows=10_000_000"], "is more than the store's"),
    "no cuda": (["--set", "device=cuda"], "finds no CUDA device"),
    "no rows of position 0": (
        ["--set", "diversity.position.weight=1", "--set", "rows.max_position_0_batch_share=0"],
        "needs rows",
    ),
    "no report in time": (
        ["--set", "monitor.every=100", "--steps", "100"],
        "monitor.every = 100, steps",
    ),
    "no report to act on": (
        ["--set", "diversity.controller.max_pairs_above_0_8=3", "--steps", "50", "--set", "monitor.every=50"],
        "diversity.controller acts after the monitor's reports",
    ),
    "no weight to move": (
        [f"--set=diversity.{o}" for o in ("controller.max_pairs_above_0_8=3", "co_activation.weight=0")],
        "has no weight to move",
    ),
    "more rows than sampled": (["--set", "monitor.least_together=9999"], "is more than the 8,192 rows of a sample"),
    "no such kernels": (["--set", "kernels=fast"], "--set kernels=fast: not one of auto, compiled, triton"),
    "no such device": (["--set", "device=tpu"], "device must be auto, cpu, cuda, or cuda:NUMBER, got tpu"),
    "config file": (["--config", "/nowhere.toml"], "no configuration file at /nowhere.toml"),
    "init from": (["--init-from", "/nowhere"], "no run at /nowhere"),
}


@pytest.mark.fault(36, 41)
@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_writes_nothing(command, store: SyntheticStore, tmp_path: Path, case: str) -> None:
    args, message = BAD[case]
    done = command("run", *args, "--store", store.path, "--runs", tmp_path / "runs")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and message in done.err, done.err
    assert not list(tmp_path.rglob("*.json"))


def test_a_store_that_is_none_or_unfinished_is_named(command, store: SyntheticStore, tmp_path: Path) -> None:
    assert "no such folder" in command("run", "--store", tmp_path / "none").err
    (tmp_path / "empty").mkdir()
    assert "is not a store" in command("run", "--store", tmp_path / "empty").err
    unfinished = make_store(tmp_path / "unfinished")
    (unfinished.path / "store.json").unlink()
    done = command("run", "--store", unfinished.path)
    assert done.code == 2 and "is unfinished (5 of 5 blocks)" in done.err
    assert command("run").code == 2
    assert command("evaluate", tmp_path / "empty").code == 2


@pytest.mark.fault(36)
def test_a_store_of_another_width_is_refused(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 3, *SMALL)
    wide = make_store(tmp_path / "wide", d_in=20)
    refused = command("evaluate", done.path, "--store", wide.path)
    assert refused.code == 2
    assert "has d_in 20 and d_out 24" in refused.err and "was trained with 16 and 24" in refused.err


@pytest.mark.fault(15)
def test_no_room_for_checkpoints_is_refused_before_the_run_and_force_goes_on(
    command, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    args = ("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 2, *SMALL)
    refused = command(*args)
    assert refused.code == 2 and "no room for checkpoints" in refused.err and "1,000 are free" in refused.err
    assert not (tmp_path / "runs").exists()
    assert command(*args, "--force").code == 0


@pytest.mark.parametrize("bits", [b"\x80\x7f", b"\xc0\x7f"], ids=["infinity", "nan"])
@pytest.mark.parametrize("activation", ["batchtopk", "topk"])
def test_a_source_that_is_not_finite_stops_the_run_and_names_its_rows(
    command, tmp_path: Path, activation: str, bits: bytes
) -> None:
    made = make_store(tmp_path / "store")
    for shard in (made.path / "activations.zarr/strata/016-032/source/c").glob("*/0"):
        data = bytearray(shard.read_bytes())
        data[: 16 * 2 * 64] = bits * (16 * 64)
        shard.write_bytes(data)
        record_as_it_is(made.path, shard)
    done = command(
        "run", "tiny", "--store", made.path, "--runs", tmp_path / "runs", "--steps", 50, "--set", "transcoder.d_sae=64",
        "--set", f"activation.kind={activation}", "--set", "activation.k=6", "--set", "activation.k_start=6",
        "--set", "rows.batch_rows=48",
        "--set", "auxk.dead_after_tokens=48",
    )  # fmt: skip
    assert done.code == 1
    assert "is not finite at step" in done.err and "016-032 " in done.err
    assert not checkpoint.steps(tmp_path / "runs" / "tiny-001")


@pytest.mark.slow(30)
def test_the_gemma_preset_trains_at_its_full_width(command, tmp_path: Path) -> None:
    """d 2,304, d_sae 18,432, k 48, as the preset says, on three small blocks."""
    made = make_store(tmp_path / "store", d_in=2304, d_out=2304, training_blocks=1)
    done = command("run", "gemma-2-2b", "--store", made.path, "--runs", tmp_path, "--steps", 2,
                   "--set", "rows.batch_rows=128", "--set", "evaluation.chunk_rows=128")  # fmt: skip
    assert done.code == 0, done.err
    last = rows(done.path)[-1]
    assert last["l0_training_rule"] == pytest.approx(48, rel=0.1)
    weights = load_file(checkpoint.folder(done.path, 2) / checkpoint.WEIGHTS)
    assert weights["W_enc"].shape == (2304, 18432)
    assert last["held_out"]["l0"] == pytest.approx(48, rel=0.2)


def test_training_uses_no_llm_library(store: SyntheticStore, tmp_path: Path) -> None:
    """The command runs where importing transformer-lens, transformers or datasets fails."""
    for name in ("transformer_lens", "transformers", "datasets"):
        (tmp_path / "absent" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "absent" / f"{name}.py").write_text("raise ImportError('not installed')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'absent'}:{Path.cwd()}"}
    args = ["run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", "3", *SMALL]
    done = subprocess.run(
        [sys.executable, "-m", "train", *map(str, args)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "tiny-001" / "metrics.jsonl").exists()
