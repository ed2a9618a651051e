"""What is trained on CUDA, on a fake device: commands end without a device fault, and steps without a wait."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.errors import CorruptData
from shared.store.store import Store
from tests.gpu.device_log import DeviceFault
from tests.gpu.fake_device import fake_cuda
from tests.gpu.test_compile import KERNELS
from tests.runs import SMALL, Outcome, assert_same_run, rows
from tests.stores import SyntheticStore, make_store
from train.data.batches import StoreRows
from train.evaluation.evaluate import evaluate
from train.model import checkpoint
from train.run import choose_kernels, trainer
from train.run.trainer import Trainer

QUICK = [
    *SMALL, "--set", "steps=4", "--set", "log_every=4", "--set", "monitor.every=2", "--set", "evaluation.every=4",
    "--set", "checkpoint.every=2", "--set", "samples.rows=0", "--set", "kernels=plain",
]  # fmt: skip
VARIANTS = {
    "topk": ["activation.kind=topk"],
    "jumprelu": ["activation.kind=jumprelu"],
    "relu": ["activation.kind=relu"],
    "bfloat16": ["product_dtype=bfloat16"],
    "no skip": ["transcoder.skip=false"],
    "target": ["source=target", "transcoder.skip=false"],
    "free": ["transcoder.decoder_norm=free"],
    "dense": ["kernels=dense"],
    "matmul": ["kernels=matmul"],
    "controller": ["diversity.controller.max_pairs_above_0_8=1"],
}
KINDS = {"topk", "jumprelu", "relu"}
RARELY = ("log_every", "evaluation.every", "checkpoint.every")


@pytest.fixture(scope="module")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("gpu") / "store", tokenizer=True)


def start(command, store: SyntheticStore, runs: Path, *assignments: str) -> Outcome:
    options = [part for one in assignments for part in ("--set", one)]
    quick = [*QUICK]
    if any(one.removeprefix("activation.kind=") in KINDS - {"topk"} for one in assignments):  # these have no k
        for one in ("activation.k=6", "activation.k_start=6"):
            at = quick.index(one)
            del quick[at - 1 : at + 1]
    if "activation.kind=topk" in assignments:
        at = quick.index("activation.k_start=6")
        del quick[at - 1 : at + 1]
    return command("run", "--store", store.path, "--runs", runs, "--name", "run", *quick, *options)


@pytest.mark.slow
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.exhaustive), "cuda:1"])
def test_every_command_runs_without_a_device_fault(command, small_store, tmp_path: Path, device: str) -> None:
    with fake_cuda() as log:
        done = start(command, small_store, tmp_path, f"device={device}")
        assert done.code == 0, done.err
        run = tmp_path / "run"
        for line in (
            ["resume", run, "--steps", 6],
            ["evaluate", run, "--linear"],
            ["samples", run],
            ["report", run],
            ["compare", run, tmp_path / "again" / "run"],
        ):
            if line[0] == "compare":
                start(command, small_store, tmp_path / "again", f"device={device}", "seed=1")
            done = command(*line)
            assert done.code == 0, (line, done.err)
    assert log.faults == []
    assert json.loads((run / "config.json").read_text())["settings"]["device"] == device


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_without_a_device_fault(command, small_store, tmp_path: Path, variant: str) -> None:
    with fake_cuda() as log:
        done = start(command, small_store, tmp_path, "device=cuda:1", *VARIANTS[variant])
    assert (done.code, log.faults) == (0, []), done.err


@pytest.mark.slow
def test_triton_kernels_train_on_the_second_device(command, small_store, tmp_path: Path) -> None:
    """In Triton's interpreter, launched where their tensors are."""
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    few = ["rows.batch_rows=8", "steps=2", "monitor.every=1", "monitor.rows=8", "transcoder.d_sae=16"]
    few += ["diversity.margin=0.01", "diversity.co_activation.margin=0.01", "monitor.least_together=2"]  # some pairs
    with fake_cuda() as log:
        done = start(command, small_store, tmp_path, "device=cuda:1", "kernels=triton", *few)
    assert (done.code, log.faults) == (0, []), done.err
    launched = {op.name for op in log.ops if op.name.startswith("triton")}
    never = {"_long_sums", "_add_long_sums"}  # too few pairs
    never |= {"_products"}  # a step's values are computed where its errors are
    assert launched == {f"triton {name}" for name in KERNELS - never}


@pytest.mark.slow
def test_what_is_trained_on_cuda_is_what_is_trained_on_cpu(command, small_store, tmp_path: Path) -> None:
    """By the same kernels: code that asks for the device sums in another order, and float32 has 24 bits.

    Reports act after the same delay, whether a thread counts meanwhile or not.
    """
    same = ["kernels=plain", "blas=torch", "monitor.delay=1"]
    done = [start(command, small_store, tmp_path / "cpu", "device=cpu", *same)]
    with fake_cuda():
        done.append(start(command, small_store, tmp_path / "cuda", "device=cuda", "product_dtype=float32", *same))
    assert [one.code for one in done] == [0, 0], [one.err for one in done]
    ours, theirs = (tmp_path / name / "run" for name in ("cuda", "cpu"))
    files = [checkpoint.find(run).path / checkpoint.WEIGHTS for run in (ours, theirs)]
    left, right = map(load_file, files)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=1e-5, atol=1e-6, err_msg=name)
    for a, b in zip(rows(ours), rows(theirs), strict=True):
        assert a["terms"] == pytest.approx(b["terms"], rel=1e-6)
        assert a["held_out"]["fvu"] == pytest.approx(b["held_out"]["fvu"], rel=1e-6)


@pytest.mark.slow
def test_a_step_waits_for_no_device(command, small_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for step 0, whose rows are so few and so short that a scan for mined pairs could find some.

    Nor is anything copied to the device but the batch, from pinned memory; rows that are kept for a report go back to
    pinned memory.
    """
    waits: dict[int, list[str]] = {}
    copies: dict[int, list[str]] = {}
    step_of = Trainer._step

    def watched(self: Trainer, step: int) -> Any:
        log.syncs.clear()
        log.copies.clear()
        out = step_of(self, step)
        waits[step], copies[step] = list(log.syncs), list(log.copies)
        return out

    monkeypatch.setattr(Trainer, "_step", watched)
    rare = ["steps=8", "monitor.every=5", "monitor.rows=48", *(f"{what}=100" for what in RARELY)]
    with fake_cuda() as log:
        done = start(command, small_store, tmp_path, "device=cuda", *rare)
    assert done.code == 0, done.err
    quiet = [step for step in range(1, 8)]
    assert {step: waits[step] for step in quiet} == {step: [] for step in quiet}
    assert all(one.startswith("pinned @") for step in quiet for one in copies[step])
    assert all(len(copies[step]) == 2 for step in quiet)


@pytest.mark.slow
def test_a_report_that_is_counted_beside_training_is_the_same_after_a_resume(
    command, small_store, tmp_path: Path
) -> None:
    """From a checkpoint between its beginning and its end; its scans are those of the mined pairs."""
    reports = ["steps=12", "monitor.every=4", "checkpoint.every=5", "checkpoint.keep_last=9", "evaluation.every=12"]
    with fake_cuda() as log:
        for name in ("whole", "resumed"):
            assert start(command, small_store, tmp_path / name, "device=cuda", *reports).code == 0
        whole, resumed = (tmp_path / name / "run" for name in ("whole", "resumed"))
        for step in (10, 12):
            shutil.rmtree(checkpoint.folder(resumed, step))
        assert "monitor.pending" in checkpoint.load_state(checkpoint.folder(resumed, 5) / checkpoint.OPTIMIZER)
        log.clear()
        done = command("resume", resumed)
        assert done.code == 0, done.err
    assert_same_run(whole, resumed)
    assert json.loads((whole / "config.json").read_text())["settings"]["monitor"]["delay"] == 2


@pytest.mark.slow
def test_resident_rows_train_the_same_bits_and_cross_no_bus(command, small_store, tmp_path: Path, monkeypatch) -> None:
    """But for the numbers of a batch's rows, one copy from pinned memory."""
    copies: list[list[str]] = []
    step_of = Trainer._step

    def watched(self: Trainer, step: int) -> Any:
        log.copies.clear()
        out = step_of(self, step)
        copies.append(list(log.copies))
        return out

    monkeypatch.setattr(Trainer, "_step", watched)
    with fake_cuda() as log:
        for name in ("on", "off"):
            done = start(command, small_store, tmp_path / name, "device=cuda", f"resident_rows={name}")
            assert done.code == 0, done.err
            assert ("rows are kept on cuda" in done.err) == (name == "on"), done.err
    here, there = (tmp_path / name / "run" for name in ("on", "off"))
    assert_same_run(here, there)
    assert [len(of_step) for of_step in copies] == [1] * 4 + [2] * 4
    assert all(one.startswith("pinned @") for of_step in copies for one in of_step)


@pytest.mark.slow
def test_an_evaluation_waits_once_a_chunk_for_how_many_latents_are_active(
    command, small_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under both rules. All other waits are as many whatever the number of chunks."""
    waits: list[list[str]] = []

    def watched(*args: Any) -> Any:
        log.clear()
        found = evaluate(*args)
        waits.append(list(log.syncs))
        assert log.copies and all(one.startswith("pinned @") for one in log.copies)
        return found

    monkeypatch.setattr(trainer, "evaluate", watched)
    sizes, found = (16, 48), []
    with fake_cuda() as log:
        for rows_of_chunk in sizes:
            runs = tmp_path / str(rows_of_chunk)
            assert start(command, small_store, runs, "device=cuda", f"evaluation.chunk_rows={rows_of_chunk}").code == 0
            found.append(rows(runs / "run")[-1]["held_out"]["fvu"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    record = small_store.record
    for rows_of_chunk, of_size in zip(sizes, waits, strict=True):
        held_out = [len(record.report_blocks) * s.rows for s in record.plan.stored_strata]
        chunks = sum(-(-count // rows_of_chunk) for count in held_out)
        assert len([one for one in of_size if "above" in one]) == chunks
        assert len([one for one in of_size if "positive" in one]) == -(-sum(held_out) // rows_of_chunk)
    others = [[one for one in of_size if not one.endswith((" above", " positive"))] for of_size in waits]
    assert len(others[0]) < 60
    assert others[0] == others[1]


def test_a_damaged_row_is_named_after_a_pass_that_waits_for_no_chunk(small_store, tmp_path: Path) -> None:
    shutil.copytree(small_store.path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    path = next((tmp_path / "store/activations.zarr/strata/001-004/target/c").glob("1/*"))
    bits = bytearray(path.read_bytes())
    bits[1] = 0x7F  # the first number of the first row of block 1
    path.write_bytes(bits)
    with fake_cuda() as log, pytest.raises(CorruptData) as raised:
        chunks = 0
        for _ in StoreRows(store, 16).chunks(range(2), torch.device("cuda")):
            chunks += 1
            assert log.syncs == []
    assert chunks == sum(-(-2 * part.stratum.rows // 16) for part in store.strata.values())
    with pytest.raises(CorruptData, match="001-004/target/c/1/0: row 0 ") as at_once:
        list(StoreRows(store, 16).chunks(range(2), torch.device("cpu")))
    assert str(raised.value) == str(at_once.value)


def test_rows_that_do_not_fit_are_read_from_the_store_or_refused(command, small_store, tmp_path: Path) -> None:
    with fake_cuda() as log:
        log.free_bytes = 10**6
        done = start(command, small_store, tmp_path, "device=cuda", "resident_rows=on")
    assert done.code == 2 and "resident_rows = on, and the rows do not fit" in done.err
    assert "cuda has 0.0 GB free" in done.err


@pytest.mark.slow
def test_auto_takes_the_fastest_kernels_that_run_and_agree(
    command, small_store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kind fails, and one computes something else: both are said, and the record has the others' times."""
    taken = {"plain": 3.0, "matmul": 2.0, "triton": 1.0, "dense": 0.5}
    timed = choose_kernels._timed

    def watched(model: Any, *others: Any) -> tuple[float, float]:
        if model.kernels == "triton":
            raise RuntimeError("no such instruction\nmore")
        return timed(model, *others)[0] * (1.5 if model.kernels == "dense" else 1), taken[model.kernels]

    monkeypatch.setattr(choose_kernels, "_timed", watched)
    monkeypatch.setattr(choose_kernels, "CANDIDATES", ("triton", "dense", "matmul", "plain"))
    with fake_cuda() as log:
        done = start(command, small_store, tmp_path, "device=cuda", "kernels=auto")
    assert (done.code, log.faults) == (0, []), done.err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["kernels"] == "matmul" and config["settings"]["product_dtype"] == "tf32"
    assert config["step_times"] == {"plain": 3.0, "matmul": 2.0}
    assert "kernels = triton does not run on this GPU and is not chosen: RuntimeError: no such instruction" in done.err
    assert "kernels = dense gives a loss of" in done.err


def test_no_device_of_that_number_is_one_clear_line(command, small_store, tmp_path: Path) -> None:
    with fake_cuda(devices=2):
        done = start(command, small_store, tmp_path, "device=cuda:2")
    assert done.code != 0 and "the last of torch's 2 CUDA devices is cuda:1" in done.err
    done = start(command, small_store, tmp_path, "device=gpu")
    assert done.code != 0 and "device must be auto, cpu, cuda, or cuda:NUMBER, got gpu" in done.err


def test_the_fake_device_refuses_what_cuda_refuses() -> None:
    with fake_cuda() as log:
        here, there, host = torch.ones(2, device="cuda"), torch.ones(2, device="cuda:1"), torch.ones(2)
        wrong: Callable[[], object]
        for wrong in (
            lambda: here + host,
            lambda: here + there,
            lambda: host[here.long()],
            lambda: torch.cat([here, host]),
            lambda: here.numpy(),
        ):
            with pytest.raises(DeviceFault):
                wrong()
        assert len(log.faults) == 5
        assert (here + torch.tensor(1.0)).tolist() == [2.0, 2.0]  # a number on the CPU is one
        assert log.syncs == ["tolist @ autograd"]
    assert torch.ones(2).device.type == "cpu"
