"""Checkpoints that were damaged or made by others, through the commands that read them: refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config import sealed
from shared.store.checks import file_record
from tests.runs import SMALL, Outcome
from tests.stores import SyntheticStore, edit, flip
from train.model import checkpoint

Command = Callable[..., Outcome]
WEIGHTS, OPTIMIZER, STATE = checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE


@pytest.fixture(scope="module")
def trained(pristine: SyntheticStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints of steps 3 and 6."""
    import subprocess
    import sys

    runs = tmp_path_factory.mktemp("runs")
    line = [sys.executable, "-m", "train", "run", "--store", pristine.path, "--runs", runs, "--name", "run", *SMALL]
    line += ["--steps", "6", "--set", "checkpoint.every=3", "--set", "samples.rows=0", "--set", "monitor.every=0"]
    line += ["--set", "diversity.co_activation.weight=0"]
    root = Path(__file__).parents[2]
    done = subprocess.run(list(map(str, line)), cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return runs / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def publish(run: Path, step: int, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a checkpoint's file, and its record: what no checksum can tell."""
    path = checkpoint.folder(run, step) / name
    tensors = load_file(path)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    seal(path)


def seal(path: Path) -> None:
    record = file_record(path).model_dump(mode="json")
    edit(path.with_name(STATE), lambda value: (value["files"].update({path.name: record}), value.update(sealed(value))))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda t: t.pop("W_dec"), "tensor 'W_dec' is missing"),
    "unknown": (lambda t: t.update(W_more=torch.ones(1)), "tensor 'W_more' is not expected"),
    "shape": (lambda t: t.update(W_dec=t["W_dec"].T), "tensor 'W_dec' is torch.float32 [24, 64], expected"),
    "dtype": (lambda t: t.update(b_dec=t["b_dec"].double()), "tensor 'b_dec' is torch.float64"),
    "nan": (lambda t: t["W_enc"].__setitem__((3, 5), float("nan")), "tensor 'W_enc' holds NaN"),
    "inf": (lambda t: t["b_enc"].__setitem__(0, float("inf")), "tensor 'b_enc' holds NaN or infinity"),
}


@pytest.mark.fault(25)
@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("line", ["evaluate", "resume"])
def test_weights_that_do_not_fit_are_refused_by_name(run: Path, command: Command, kind: str, line: str) -> None:
    change, cause = CHANGES[kind]
    publish(run, 6, WEIGHTS, change)
    done = command(line, run)
    last = done.err.splitlines()[-1]
    assert done.code == 1 and cause in last and f"step-000006/{WEIGHTS}" in last


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_flipped_bit_is_named_and_never_loaded(run: Path, command: Command, name: str) -> None:
    flip(checkpoint.folder(run, 6) / name, -5)
    done = command("evaluate", run, "--step", 6)
    assert done.code == 1 and f"step-000006/{name}: crc32c" in done.err
    assert json.loads(command("evaluate", run, "--json").out)["step"] == 3  # the one before is whole
    flip(checkpoint.folder(run, 3) / name, -5)
    done = command("evaluate", run)
    assert done.code == 2 and "has no valid checkpoint" in done.err


@pytest.mark.fault(26)
@pytest.mark.parametrize("line", ["evaluate", "resume"])
@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER])
def test_a_pickle_in_place_of_tensors_is_never_unpickled(
    run: Path, command: Command, tmp_path: Path, line: str, name: str
) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    path = checkpoint.folder(run, 6) / name
    torch.save({"W_dec": Bomb()}, path)
    seal(path)
    done = command(line, run)
    if (line, name) == ("evaluate", OPTIMIZER):
        assert done.code == 0  # which reads weights alone
    else:
        assert done.code == 1 and f"{path}: not a readable safetensors file" in done.err.splitlines()[-1]
    assert not marker.exists()


@pytest.mark.fault(23)
def test_a_checkpoint_of_a_newer_format_asks_for_an_upgrade(run: Path, command: Command) -> None:
    newer = checkpoint.FORMAT_VERSION + 1
    edit(checkpoint.folder(run, 6) / STATE, lambda value: value.update(format_version=newer, more={"a": 1}))
    done = command("evaluate", run, "--step", 6)
    assert done.code in (1, 2)
    assert f"written by format {newer}, this reads 3 to {checkpoint.FORMAT_VERSION}; upgrade" in done.err


@pytest.mark.fault(21)
@pytest.mark.parametrize("content", [b"", b"{", b'{"step": NaN}', b'{"step": 1e999}', b'{"step": 6, "step": 6}', b"[]"])
def test_a_state_that_is_no_record_is_named(run: Path, command: Command, content: bytes) -> None:
    (checkpoint.folder(run, 6) / STATE).write_bytes(content)
    done = command("evaluate", run, "--step", 6)
    assert done.code == 1 and len(done.err.splitlines()) == 1 and f"step-000006/{STATE}" in done.err


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", [WEIGHTS, STATE, ""])
def test_a_link_in_a_checkpoint_does_not_verify(run: Path, command: Command, tmp_path: Path, name: str) -> None:
    """Also one to the very same bytes, elsewhere."""
    place = checkpoint.folder(run, 6) / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    done = command("evaluate", run, "--step", 6)
    assert done.code == 1 and f"{place} is a symbolic link" in done.err
    assert json.loads(command("evaluate", run, "--json").out)["step"] == 3
