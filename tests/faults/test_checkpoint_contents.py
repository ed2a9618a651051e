"""What checkpoints say of themselves, and what they hold beside weights: listed, compared, refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config import sealed
from shared.store.checks import file_record
from shared.store.layout import FileRecord
from tests.runs import SMALL, Outcome, rows
from tests.stores import SyntheticStore, make_store
from train.model import checkpoint

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


def steps(run: Path) -> list[int]:
    return [checkpoint.number(path) for path in checkpoint.steps(run) if checkpoint.verify(path) is None]


def test_checkpoints_are_listed_with_their_figures(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    found = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 40, *SMALL,
                    "--set", "checkpoint.every=10", "--set", "evaluation.every=20", "--set", "log_every=10",
                    "--set", "checkpoint.keep_last=1", "--set", "checkpoint.keep_every=30",
                    "--set", "checkpoint.keep_best=1")  # fmt: skip
    listed = json.loads(command("checkpoints", found.path, "--json").out)
    figures = {row["step"]: row["held_out"]["fvu"] for row in rows(found.path) if "held_out" in row}
    assert list(figures) == [20, 40]
    best = min(figures, key=lambda step: figures[step])
    assert {one["step"] for one in listed} == {30, 40, best}
    for one in listed:
        assert one["wrong"] is None and one["arithmetic"]["threads"] == "1"
        files = [file for file in Path(one["path"]).iterdir()]
        assert one["bytes"] == sum(file.stat().st_size for file in files)
        assert (one["held_out"] or {}).get("fvu") == figures.get(one["step"])
    assert f"{figures[40]:.4f}" in command("checkpoints", found.path).out


@pytest.mark.fault(4)
def test_other_arithmetic_is_refused_unless_asked_for(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    run = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 20, *SMALL,
                  "--set", "checkpoint.every=10").path  # fmt: skip
    shutil.rmtree(checkpoint.folder(run, 20))
    place = checkpoint.folder(run, 10) / checkpoint.STATE
    state = json.loads(place.read_text())
    other = state | {"arithmetic": state["arithmetic"] | {"processor": "AVX1024", "numpy": "9"}}
    place.write_text(json.dumps(sealed(other)))
    refused = command("resume", run)
    assert refused.code == 2 and f"numpy 9, here {state['arithmetic']['numpy']}, processor AVX1024, here" in refused.err
    assert "continue anyway with --inexact" in refused.err and steps(run) == [10]
    assert command("resume", run, "--inexact").code == 0 and steps(run) == [10, 20]
    shutil.rmtree(checkpoint.folder(run, 20))
    place.write_text(json.dumps(state))
    assert command("resume", run, "--threads", 2).code == 0
    assert checkpoint.find(run).state.arithmetic["threads"] == "2"
    torch.set_num_threads(1)


def rewritten(run: Path, step: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors of the optimizer's file, and make its record fit again."""
    path = checkpoint.folder(run, step) / checkpoint.OPTIMIZER
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    state = json.loads((path.parent / checkpoint.STATE).read_text())
    record: FileRecord = file_record(path)
    state["files"][checkpoint.OPTIMIZER] = record.model_dump(mode="json")
    (path.parent / checkpoint.STATE).write_text(json.dumps(sealed(state)))


def pairs(first: int, second: int) -> dict[str, torch.Tensor]:
    return {"diversity.mined.first": torch.tensor([first]), "diversity.mined.second": torch.tensor([second])}


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop("W_dec.exp_avg"), "tensor 'W_dec.exp_avg' is missing"),
    "shape": (
        lambda t: t.update({"W_enc.exp_avg_sq": torch.zeros(1)}),
        "'W_enc.exp_avg_sq' is torch.float32 [1], expected torch.float32 [16, 64]",
    ),
    "dtype": (lambda t: t.update({"rows_since_fired": torch.zeros(64)}), "'rows_since_fired' is torch.float32 [64]"),
    "nan": (lambda t: t["b_enc.exp_avg"].fill_(float("nan")), "tensor 'b_enc.exp_avg' holds NaN or infinity"),
    "latent": (lambda t: t.update(pairs(64, 1)), "tensor 'diversity.mined.first' holds 64 to 64, expected 0 to 63"),
    "negative": (lambda t: t["monitor.0000.latents"].fill_(-1), "tensor 'monitor.0000.latents' holds -1 to -1"),
    "starts": (lambda t: t["monitor.0001.starts"].zero_(), "tensor 'monitor.0001.starts' does not say where"),
    "counts": (
        lambda t: t.update({"usage.calls": torch.zeros(2, dtype=torch.int64)}),
        "tensor 'usage.calls' is torch.int64 [2]",
    ),
    "report": (
        lambda t: t.update({"monitor.report": torch.tensor(list(b"{}"), dtype=torch.uint8)}),
        "CorrelationReport",
    ),
}


@pytest.mark.fault(25)
@pytest.mark.parametrize("case", CHANGES)
def test_a_wrong_tensor_of_the_optimizer_is_refused_by_name(
    command: Command, store: SyntheticStore, tmp_path: Path, case: str
) -> None:
    run = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 24, *SMALL,
                  "--set", "checkpoint.every=10", "--set", "monitor.every=8").path  # fmt: skip
    shutil.rmtree(checkpoint.folder(run, 24))
    change, message = CHANGES[case]
    rewritten(run, 20, change)
    refused = command("resume", run)
    assert refused.code == 1 and message in refused.err and checkpoint.OPTIMIZER in refused.err
    assert len(refused.err.splitlines()) == 1
