"""Checkpoints: published whole, verified, pruned, and refused by name when something in them is wrong."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import CorruptData, UserError
from train.model import checkpoint

WEIGHTS = {"W_dec": torch.arange(6.0).reshape(2, 3), "b_dec": torch.ones(3)}
STATE = {"rows_since_fired": torch.tensor([3, 4])}


ARITHMETIC = {"threads": "1", "torch": "2.13.0"}


def publish(run: Path, *steps: int) -> list[Path]:
    return [checkpoint.publish(run, step, WEIGHTS, STATE, ARITHMETIC) for step in steps]


def flip(path: Path, at: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_holds_what_was_saved(tmp_path: Path) -> None:
    (path,) = publish(tmp_path, 500)
    assert path == tmp_path / "checkpoints" / "step-000500"
    assert sorted(p.name for p in path.iterdir()) == ["optimizer.safetensors", "state.json", "weights.safetensors"]
    found = checkpoint.load_tensors(path / checkpoint.WEIGHTS, WEIGHTS)
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)
    assert torch.equal(checkpoint.load_state(path / checkpoint.OPTIMIZER)["rows_since_fired"], torch.tensor([3, 4]))
    newest = checkpoint.find(tmp_path)
    assert (newest.path, newest.step, newest.state.arithmetic) == (path, 500, ARITHMETIC)


def test_a_transposed_parameter_is_saved_as_it_reads(tmp_path: Path) -> None:
    column_major = torch.arange(6.0).reshape(3, 2).T
    checkpoint.publish(tmp_path, 1, {"W_enc": column_major}, STATE, ARITHMETIC)
    assert torch.equal(load_file(checkpoint.folder(tmp_path, 1) / checkpoint.WEIGHTS)["W_enc"], column_major)


def test_torn_newest_checkpoints_are_skipped_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(tmp_path, 1, 2, 3)
    (checkpoint.folder(tmp_path, 3) / checkpoint.WEIGHTS).write_bytes(b"")
    flip(checkpoint.folder(tmp_path, 2) / checkpoint.OPTIMIZER)
    assert checkpoint.find(tmp_path).step == 1
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and "step-000003/weights.safetensors: 0 bytes" in warnings[0]
    assert "crc32c" in warnings[1]
    with pytest.raises(CorruptData, match=r"step-000002/optimizer.safetensors: crc32c"):
        checkpoint.find(tmp_path, step=2)


def test_a_full_disk_is_named_and_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    publish(tmp_path, 1)
    program = (
        "import resource, sys, torch; from pathlib import Path; from train.model import checkpoint; "
        "from shared.errors import DiskFull; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try: checkpoint.publish(Path(sys.argv[1]), 2, {'w': torch.ones(10**5)}, {}, {})\n"
        "except DiskFull as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DiskFull disk full while writing") and "step-000002" in done.stdout
    assert checkpoint.find(tmp_path).step == 1
    assert not list(tmp_path.rglob("*.tmp*"))


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    publish(tmp_path, 999_999, 1_000_000)
    assert checkpoint.find(tmp_path).step == 1_000_000


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_missing_file_makes_a_checkpoint_invalid(tmp_path: Path, name: str) -> None:
    (path,) = publish(tmp_path, 1)
    (path / name).unlink()
    assert checkpoint.verify(path) is not None
    with pytest.raises(UserError, match="no valid checkpoint"):
        checkpoint.find(tmp_path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*nothing"):
        checkpoint.find(tmp_path / "nothing")
    publish(tmp_path, 1, 5)
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[1, 5\]"):
        checkpoint.find(tmp_path, step=3)


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"b_dec": t["b_dec"]}, "'W_dec' is missing"),
        (lambda t: t | {"extra": torch.ones(1)}, "'extra' is not expected"),
        (
            lambda t: t | {"W_dec": t["W_dec"].T.contiguous()},
            r"'W_dec' is torch.float32 \[3, 2\], expected .* \[2, 3\]",
        ),
        (lambda t: t | {"b_dec": t["b_dec"].half()}, "'b_dec' is torch.float16"),
        (lambda t: t | {"b_dec": torch.tensor([1.0, float("nan"), 0])}, "'b_dec' holds NaN"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path: Path, change, message: str) -> None:
    save_file(change(dict(WEIGHTS)), tmp_path / "w.safetensors")
    with pytest.raises(CorruptData, match=message):
        checkpoint.load_tensors(tmp_path / "w.safetensors", WEIGHTS)


@pytest.mark.fault(26)
def test_a_pickle_in_place_of_weights_is_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    torch.save({"W_dec": Bomb()}, tmp_path / "w.safetensors")
    with pytest.raises(CorruptData, match="not a readable safetensors file"):
        checkpoint.load_tensors(tmp_path / "w.safetensors", WEIGHTS)
    assert not marker.exists()


@pytest.mark.fault(23)
def test_a_newer_format_is_named(tmp_path: Path) -> None:
    (path,) = publish(tmp_path, 1)
    (path / "state.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match=f"written by format 99, this reads 3 to {checkpoint.FORMAT_VERSION}; upgrade"):
        checkpoint.read_state(path)


def test_a_file_that_cannot_be_opened_is_no_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(OSError, match="Too many open files"):
        checkpoint.load_state(tmp_path / checkpoint.OPTIMIZER)
