"""The bench of a GPU: what it measures is right, and what is wrong shows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.store.store import Store
from tests.bench import gpu
from tests.bench.gpu import Report
from tests.bench.gpu_checks import _of_ops, cases
from tests.bench.gpu_counts import CARDS, counted, counted_settings, noting_parts
from tests.bench.gpu_dense import DenseTrainer
from tests.bench.gpu_setup import Shape
from tests.gpu.fake_device import fake_cuda
from tests.stores import make_store
from train.model.activations import BatchTopK
from train.model.kernels.plain import Plain
from train.model.losses import AuxKConfig
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig

MOST_INSIDE = {(1024, True): 36, (1024, False): 34, (4096, True): 38, (4096, False): 36}
"""Operations of a captured step, by the rows of a batch, and whether rows are left out, which latents are silent on"""
MOST_OF_HOST = 4
"""What the host asks for where it is replayed"""


class Wrong(Plain):
    """Values that are a thousandth too large."""

    def encode(self, *args: Any, **options: Any) -> Tensor:
        return 1.001 * super().encode(*args, **options)


def test_checks_hold_for_sound_kernels_and_name_what_is_wrong_with_others() -> None:
    for _, case in cases(12, 16, 32, 4, "cpu"):
        assert [check for check in _of_ops(Plain(), case) if not check.holds] == []
        wrong = {check.name for check in _of_ops(Wrong(), case) if not check.holds}
        assert wrong >= {"loss", "gradient of W_enc"} and not any("topk" in name for name in wrong)


def test_the_dense_trainer_has_the_loss_and_the_gradients_of_a_step() -> None:
    torch.manual_seed(0)
    activation, auxk, d = BatchTopK(k=4), AuxKConfig(k=8), 16
    config = TranscoderConfig(d_sae=64).resolve(d, activation)
    model = Transcoder(d, d, config, activation, Normalisation(torch.zeros(d), 1.0, torch.zeros(d), 1.0))
    model.initialise(0)
    dense = DenseTrainer(model, 4, auxk, lambda one: one, torch.float32)
    x, y, dead = torch.randn(24, d), torch.randn(24, d), torch.arange(64) % 4 == 0
    expected = model.step(x, y, dead, auxk, 0).loss
    expected.backward()
    found = dense.loss(x, y, dead)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for ours, theirs in zip((model.W_enc, model.b_enc, model.W_dec, model.b_dec), dense.parameters, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-7)


def test_counts_are_of_the_operations_of_each_part_and_estimates_follow_from_them() -> None:
    shape = Shape(1024, 18432)
    # 170 MB a matrix: two are updated with two moments each, read and written, and the gradients are written and read.
    assert sum(shape.necessary_bytes.values()) == pytest.approx((16 + 1) * 170e6, rel=0.2)
    with fake_cuda() as log, noting_parts(log) as found:
        left = torch.ones(8, 4, device="cuda")
        log.clear()
        found.ops.clear()
        left @ left.T
        left[torch.tensor([1, 2, 2]).to("cuda")]
    indexed = found.ops.pop()[1]
    assert (indexed.name, indexed.bytes) == ("index", 4 * (3 * 4 + 3 * 4) + 8 * 3)  # three rows, and not the table
    (part, op) = found.ops[-1]
    assert (op.name, op.flops, op.bytes, op.precision) == ("mm", 2 * 8 * 4 * 8, 4 * (32 + 32 + 64), "float32")
    assert found.of(part) == [one for _, one in found.ops]
    assert found.seconds(CARDS["H200"]) == 3e-6  # of one launch


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with rows enough for one large batch."""
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    sizes = {"d_in": 16, "d_out": 16, "context_size": 128, "block_sequences": 48, "edges": (0, 1, 16)}
    made = make_store(tmp_path_factory.mktemp("narrow") / "store", training_blocks=1, tokenizer=True, **sizes)  # type: ignore[arg-type]
    return Store.open(made.path)


@pytest.mark.parametrize(("rows", "silent"), MOST_INSIDE)
def test_a_captured_step_has_no_more_operations_than_it_had(
    narrow: Store, rows: int, silent: bool, tmp_path: Path
) -> None:
    """As at the width of Gemma 2 2B: with terms of all pairs, and latents on so many rows that sums are shared."""
    shape, few, most = Shape(rows, 64), ["activation.k=4", "auxk.k=4"], MOST_INSIDE[rows, silent]
    few += [] if silent else ["quiet.weight=0"]
    found = counted(narrow, counted_settings(narrow, shape, ["kernels=triton", *few]), tmp_path / "run")
    listed = "\n".join(f"{i:3} {part}: {op.name} @ {op.where}" for i, (part, op) in enumerate(found.inside, 1))
    assert len(found.inside) <= most, (
        f"a step of {rows:,} rows is recorded as {len(found.inside)} operations, and it was {most}: each costs a\n"
        "launch at every step. Take away what was added, or, if it is worth that, raise MOST_INSIDE and record\n"
        f"`python -m tests.bench.gpu_counts steps`. They are\n{listed}"
    )
    assert found.launched is not None and found.launched <= MOST_OF_HOST, (
        f"the host asks for {found.launched} operations where a step is replayed, and it asked for {MOST_OF_HOST}:\n"
        "look for what a step does outside of StepGraph.run, or for an input more"
    )


def test_the_fake_device_knows_how_much_memory_is_held() -> None:
    with fake_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        kept = torch.ones(256, 4, device="cuda")
        view = kept[:2]
        _ = kept + 1  # held while it is made, and no longer
        del kept, _
        assert torch.cuda.max_memory_allocated() - before == 2 * 4096
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() - before == 4096  # the view needs all of it
        del view
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == before


def test_a_part_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    figures = tmp_path / "figures"
    figures.touch()

    def popen(line: list[str], **options: object) -> "subprocess.Popen[bytes]":
        return real([sys.executable, "-c", f"import sys; {code}"], **options)  # type: ignore[call-overload]

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    code = "sys.exit(3)"
    assert not gpu.one_part("step", figures, tmp_path, 60)
    code = "import time; time.sleep(60)"
    assert not gpu.one_part("step", figures, tmp_path, 0.2)
    code = "pass"
    assert gpu.one_part("step", figures, tmp_path, 60)
    out = capfd.readouterr().out
    assert "exit code 3: step" in out and "ended after 0 s: step" in out


def test_figures_of_one_part_are_compared_with_those_of_another(tmp_path: Path) -> None:
    file = tmp_path / "figures"
    report = gpu.Report("step", file)
    report.add("B 1,024, d_sae 18,432: step", 2.0, "ms")
    gpu.Report("dense", file).add("B 1,024, d_sae 18,432: step", 5.0, "ms")
    gpu.Report("run", file).add("training loop, with all that happens between two steps", 19.528, "s")
    summary = gpu.by_part(file)["summary"]
    assert summary["B 1,024, d_sae 18,432: step of the dense trainer over ours"] == (2.5, "times as fast")
    assert summary["training loop over the steps' own time"][0] == pytest.approx(2.0)


def test_what_goes_wrong_leaves_the_other_shapes_and_is_kept_for_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wide() -> None:
        raise RuntimeError("out of memory")

    report = Report("step", tmp_path / "figures")
    with report.going_on("wide"):
        wide()
    with report.going_on("narrow"):
        report.add("narrow: step", 2.5, "ms")
    assert report.failed == ["wide"]
    out = capsys.readouterr().out
    assert "FAILED: wide" in out and "RuntimeError: out of memory" in out
    assert json.loads((tmp_path / "figures").read_text()) == ["step", "narrow: step", 2.5, "ms"]
