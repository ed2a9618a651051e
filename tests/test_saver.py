"""Which checkpoints are kept, in what order they give way, and what a run takes at most."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from shared.store.layout import FileRecord
from tests.gpu.fake_device import fake_cuda
from train.model import checkpoint
from train.model.checkpoint import Checkpoint, CheckpointState, HeldOut
from train.run.host_copy import HostCopies
from train.run.saver import CheckpointConfig, Saver

WEIGHTS, STATE = {"w": torch.arange(1000.0)}, {"s": torch.zeros(10)}
FVU = {100: 0.5, 200: 0.2, 300: 0.3, 400: 0.25, 500: 0.4}


def found(fvu: Mapping[int, float | None], size: int = 10) -> list[Checkpoint]:
    record = FileRecord(bytes=size, crc32c="00000000")
    return [
        Checkpoint(
            Path(f"step-{step:06d}"),
            CheckpointState(
                step=step,
                arithmetic={},
                held_out=None if value is None else HeldOut(fvu=value, l0=1.0),
                files={"weights.safetensors": record},
            ),
        )
        for step, value in fvu.items()
    ]


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"keep_last": 1}, {500}),
        ({"keep_last": 3}, {300, 400, 500}),
        ({"keep_last": 9}, {100, 200, 300, 400, 500}),
        ({"keep_last": 1, "keep_every": 200}, {200, 400, 500}),
        ({"keep_last": 1, "keep_best": 2}, {200, 400, 500}),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 300}, {200, 300, 400, 500}),
        ({"keep_last": 9, "max_bytes": 39}, {300, 400, 500}),
        ({"keep_last": 2, "keep_best": 1, "max_bytes": 20}, {200, 500}),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 100, "max_bytes": 30}, {200, 400, 500}),
        ({"keep_last": 9, "max_bytes": 5}, {500}),
    ],
)
def test_what_is_kept(rule: dict[str, int], kept: set[int]) -> None:
    assert CheckpointConfig(**rule).kept(found(FVU)) == kept


def test_those_that_were_not_evaluated_are_never_the_best() -> None:
    assert CheckpointConfig(keep_last=1, keep_best=2).kept(found({1: None, 2: 0.9, 3: None, 4: None})) == {2, 4}
    assert CheckpointConfig(keep_last=1).kept([]) == set()


@pytest.mark.parametrize(
    ("rule", "most"),
    [
        ({"keep_last": 2}, 4),  # two, the one being written, and the reserve
        ({"keep_last": 2, "reserve": False}, 3),
        ({"keep_last": 50}, 12),  # no more than there are steps for
        ({"keep_last": 2, "keep_every": 300}, 7),
        ({"keep_last": 2, "keep_best": 3}, 7),
        ({"keep_last": 9, "max_bytes": 250}, 4.5),
    ],
)
def test_what_a_run_takes_at_most(rule: dict[str, int], most: float) -> None:
    assert CheckpointConfig(every=100, **rule).most(1000, 100) == most * 100


@pytest.mark.parametrize("background", [True, False])
def test_a_copy_is_saved_and_later_steps_do_not_reach_it(tmp_path: Path, background: bool) -> None:
    weights = {"w": torch.zeros(1_000_000)}
    with Saver(tmp_path, CheckpointConfig(background=background, keep_last=9), {}, 10_000) as saver:
        assert (tmp_path / "checkpoints" / "reserve").stat().st_size == 10_000
        for step in (1, 2, 3):
            saver.save(step, weights, STATE, None)
            weights["w"] += 1
    assert not (tmp_path / "checkpoints" / "reserve").exists()
    for step in (1, 2, 3):
        saved = checkpoint.load_state(checkpoint.folder(tmp_path, step) / checkpoint.WEIGHTS)["w"]
        assert torch.equal(saved, torch.full_like(saved, step - 1.0))


def test_without_memory_for_a_copy_training_waits_for_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    with Saver(tmp_path, CheckpointConfig(), {}, 10_000) as saver:
        monkeypatch.setattr(HostCopies, "take", refused)
        saver.save(1, WEIGHTS, STATE, None)
        assert checkpoint.find(tmp_path).step == 1  # published when `save` returns
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1 and "checkpoint of step 1, 4,040 bytes" in said
    assert "training waits while it is written; checkpoint.background = false" in said


def test_a_checkpoint_of_cuda_has_the_same_bytes_and_takes_no_memory_there(tmp_path: Path) -> None:
    """Nor does the host wait. The pinned copy is used again, and grows with what is open in the run."""
    made = {"W_enc": torch.arange(35.0).view(7, 5).T, "W_dec": torch.arange(28.0).view(7, 4), "count": torch.tensor(3)}
    mined = [torch.arange(0), torch.arange(90)]
    with fake_cuda() as log:
        here, there = ({name: one.to(device) for name, one in made.items()} for device in ("cpu", "cuda:1"))
        for name, tensors in (("cpu", here), ("cuda", there)):
            with Saver(tmp_path / name, CheckpointConfig(keep_last=9), {}, 10_000) as saver:
                for step, pairs in enumerate(mined, 1):
                    state = {"steps": torch.tensor(1.0), "pairs": pairs.to(tensors["W_dec"].device)}
                    log.clear()
                    saver.save(step, tensors, state, None)
                    if name == "cuda":
                        assert log.syncs == [] and {op.name for op in log.ops} == {"copy_"}
                    for one in tensors.values():
                        one += 1
    for step in (1, 2):
        for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE):
            ours, theirs = (checkpoint.folder(tmp_path / name, step) / file for name in ("cuda", "cpu"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_damaged_ones_do_not_count_and_are_replaced_by_the_same_step(tmp_path: Path) -> None:
    with Saver(tmp_path, CheckpointConfig(keep_last=2), {}, 10_000) as saver:
        for step in (1, 2):
            saver.save(step, WEIGHTS, STATE, None)
    (checkpoint.folder(tmp_path, 2) / checkpoint.WEIGHTS).write_bytes(b"")
    with Saver(tmp_path, CheckpointConfig(keep_last=2), {}, 10_000) as saver:
        saver.save(3, WEIGHTS, STATE, None)
    assert [checkpoint.number(path) for path in checkpoint.steps(tmp_path)] == [1, 2, 3]
    with Saver(tmp_path, CheckpointConfig(keep_last=2), {}, 10_000) as saver:
        saver.save_last(2, WEIGHTS, STATE, HeldOut(fvu=0.25, l0=3.0))
    assert [checkpoint.number(path) for path in checkpoint.steps(tmp_path)] == [2, 3]
    assert checkpoint.find(tmp_path, 2).state.held_out == HeldOut(fvu=0.25, l0=3.0)
