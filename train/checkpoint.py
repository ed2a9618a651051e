"""Checkpoints: immutable folders `checkpoints/step-000500/`, published whole, verified when read, pruned by policy.

weights.safetensors      parameters, normalisation, inference thresholds: all that evaluation and export need
optimizer.safetensors    Adam's moments, dead counters, running threshold, the open metrics window
state.json               step, and size and crc32c of the two files; "latest" is the highest step that verifies
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from shared import durable
from shared.config import Config, read_record
from shared.errors import CorruptData, UserError
from shared.layout import FileRecord
from shared.store import fault, file_crc32c

FORMAT_VERSION = 3
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


class CheckpointConfig(Config):
    """When checkpoints are made, and which are kept."""

    every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step always makes one."""
    keep_last: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""


class CheckpointState(Config):
    """`state.json`."""

    format_version: int = FORMAT_VERSION
    step: int
    """Steps done."""
    threads: int
    """Torch's CPU threads while training."""
    files: dict[str, FileRecord]


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    step: int
    threads: int


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def publish(run: Path, step: int, weights: dict[str, Tensor], optimizer: dict[str, Tensor], keep_last: int) -> Path:
    """Publish a checkpoint, then remove those that `keep_last` no longer covers. Raises `DiskFull`."""
    path = folder(run, step)
    with durable.publish_folder(path) as temporary:
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
            _write(temporary / name, tensors)
        files = {
            name: FileRecord(bytes=(temporary / name).stat().st_size, crc32c=file_crc32c(temporary / name))
            for name in (WEIGHTS, OPTIMIZER)
        }
        state = CheckpointState(step=step, threads=torch.get_num_threads(), files=files)
        (temporary / STATE).write_bytes(durable.json_bytes(state.model_dump(mode="json")))
    valid = [c for c in steps(run) if verify(c) is None]
    for old in valid[:-keep_last]:
        shutil.rmtree(old)
    return path


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write from the tensors' own memory."""
    with durable.saving_tensors(path):
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)


def steps(run: Path) -> list[Path]:
    """The folders of all checkpoints, oldest first, valid or not."""
    return sorted(run.glob("checkpoints/step-[0-9]*[0-9]"), key=lambda path: int(path.name.removeprefix("step-")))


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        state = read_state(path)
    except (CorruptData, UserError) as error:
        return str(error)
    for name, record in state.files.items():
        if wrong := fault(path / name, record):
            return f"{path / name}: {wrong}"
    return None


def read_state(path: Path) -> CheckpointState:
    """`state.json` of a checkpoint. Raises `UserError` where there is none, and `CorruptData`."""
    if not (path / STATE).is_file():
        raise UserError(f"{path} is not a checkpoint: it has no {STATE}")
    data = durable.read_json(path / STATE)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        remedy = "upgrade" if version > FORMAT_VERSION else "train it again"
        raise UserError(f"{path}: written by format {version}, this reads {FORMAT_VERSION}; {remedy}")
    return read_record(CheckpointState, data, path / STATE)


def find(run: Path, step: int | None = None, warn: list[str] | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest one that verifies; torn newer ones are named in `warn`.

    Raises `UserError` when there is none.
    """
    if not run.is_dir():
        raise UserError(f"no run at {run}: no such folder")
    candidates = steps(run) if step is None else [folder(run, step)]
    for path in reversed(candidates):
        wrong = verify(path)
        if wrong is None:
            state = read_state(path)
            return Checkpoint(path, state.step, state.threads)
        if step is not None:
            raise (
                CorruptData(wrong)
                if path.is_dir()
                else UserError(
                    f"{run} has no checkpoint of step {step}; it has {[int(p.name[5:]) for p in steps(run)]}"
                )
            )
        if warn is not None:
            warn.append(f"skipped a checkpoint that does not verify: {wrong}")
    raise UserError(f"{run} has no valid checkpoint; start the run again under another name")


def load_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file, checked against the names, shapes and dtypes of `expected`.

    Raises `CorruptData` naming the tensor when one is missing, too many, of another shape or dtype, or not finite.
    """
    tensors = load_state(path)
    if odd := sorted(set(tensors) ^ set(expected)):
        raise CorruptData(f"{path}: tensor {odd[0]!r} is {'missing' if odd[0] in expected else 'not expected'}")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise CorruptData(
                f"{path}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {want.dtype} {list(want.shape)}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CorruptData(f"{path}: tensor {name!r} holds NaN or infinity")
    return tensors


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises `CorruptData` when it is not one."""
    try:
        return load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise CorruptData(f"{path}: not a readable safetensors file ({error})") from error
