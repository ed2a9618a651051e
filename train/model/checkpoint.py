"""Checkpoints: immutable folders `checkpoints/step-000500/`, published whole and verified when they are read.

weights.safetensors      parameters, normalisation, inference thresholds: all that evaluation and export need
optimizer.safetensors    Adam's moments, dead counters, running threshold, the open metrics window
shard-0-of-8.safetensors ...  where the dictionary is cut: what both of them have for the latents of each shard
state.json               step, what the last bits depend on, held-out figures, the run's settings, size and crc32c of
                         these files, and its own digest; "latest" is the highest step that verifies
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import google_crc32c
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from shared.config import Config, read_record, sealed
from shared.errors import CorruptData, UserError, warn
from shared.files import durable
from shared.files.untrusted import refuse_links
from shared.store.checks import fault, file_crc32c
from shared.store.layout import FileRecord
from train.live.run_files import CONFIG
from train.model.saved_tensors import fitting
from train.model.shards import deal, join

FORMAT_VERSION: Final = 5
"""A run's settings, beside its checkpoints: `train.run.settings.RunConfig`."""
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_SHARD = "shard-{}-of-{}.safetensors"
_FILES = r"^(weights|optimizer|shard-[0-9]{1,2}-of-[0-9]{1,2})\.safetensors$"


Short = Annotated[str, Field(max_length=200)]


class HeldOut(Config):
    """Headline figures of the evaluation at a checkpoint's step."""

    fvu: float
    l0: float


class CheckpointState(Config):
    """`state.json`. Format 4 had no `config` and no digest; 3 no held-out figures, and of `arithmetic` the threads."""

    format_version: Literal[3, 4, 5] = FORMAT_VERSION
    step: int = Field(ge=0, lt=2**53)
    """Steps done."""
    arithmetic: dict[Short, Short] = Field(max_length=100)
    """What the last bits of training depend on, see `train.run.determinism`."""
    held_out: HeldOut | None = None
    """Of this step, if it was evaluated."""
    config: dict[str, Any] | None = None
    """What `config.json` held when the checkpoint was made."""
    files: dict[Annotated[str, Field(pattern=_FILES)], FileRecord] = Field(max_length=66)

    @property
    def bytes(self) -> int:
        """Of the tensors' files."""
        return sum(record.bytes for record in self.files.values())

    @property
    def shards(self) -> int:
        """Of the dictionary, each of which has a file; 0 where it is not cut."""
        return len(self.files.keys() - {WEIGHTS, OPTIMIZER})

    @property
    def weights_crc32c(self) -> str:
        """Of the weights' file; where latents have files of their own, of the checksums of all."""
        if not self.shards:
            return self.files[WEIGHTS].crc32c
        sums = "".join(f"{name} {record.crc32c}\n" for name, record in sorted(self.files.items()))
        return f"{google_crc32c.value(sums.encode()):08x}"


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    path: Path
    state: CheckpointState

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step


class Listed(Config):
    """A checkpoint, valid or not, for people and scripts."""

    step: int
    path: Path
    bytes: int
    """Of its files as they are."""
    wrong: str | None
    """What is wrong with it; none for a valid one."""
    held_out: HeldOut | None
    arithmetic: dict[str, str]


def folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return run / "checkpoints" / f"step-{step:06d}"


def publish(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    arithmetic: Mapping[str, str],
    held_out: HeldOut | None = None,
    config: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Path:
    """Publish a checkpoint, in place of one that does not verify. Raises `DiskFull`, and leaves nothing then.

    `config`: what the run's `config.json` holds. `shards`: as many files have what belongs to latents.
    """
    path = folder(run, step)
    tensors = {WEIGHTS: weights, OPTIMIZER: optimizer}
    if shards > 1:
        (weights, of_weights), (optimizer, of_optimizer) = (deal(part, shards) for part in (weights, optimizer))
        cut = [one | other for one, other in zip(of_weights, of_optimizer, strict=True)]
        tensors = {WEIGHTS: weights, OPTIMIZER: optimizer}
        tensors |= {_SHARD.format(i, shards): part for i, part in enumerate(cut)}
    needed = sum(tensor.nbytes for part in tensors.values() for tensor in part.values())
    if path.exists():  # torn, or training would not have come here again
        durable.remove_folder(path)
    with durable.publish_folder(path, needed) as temporary:
        for name, part in tensors.items():
            save_tensors(temporary / name, part)
        files = {
            name: FileRecord(bytes=(temporary / name).stat().st_size, crc32c=file_crc32c(temporary / name))
            for name in tensors
        }
        state = CheckpointState(
            step=step,
            arithmetic=dict(arithmetic),
            held_out=held_out,
            config=dict(config) if config else None,
            files=files,
        )
        durable.publish_json(temporary / STATE, sealed(state.model_dump(mode="json")))
    return path


def steps(run: Path) -> list[Path]:
    """List the folders of all checkpoints, oldest first, valid or not."""
    return sorted((p for p in run.glob("checkpoints/step-*") if p.name[5:].isdecimal()), key=number)


def number(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    try:
        if path.is_symlink():
            return f"{path} is a symbolic link"
        refuse_links(path)
        state = read_state(path)
    except (CorruptData, UserError) as error:
        return str(error)
    if state.step != number(path):
        return f"{path / STATE}: it is of step {state.step}"
    for name in dict.fromkeys((WEIGHTS, OPTIMIZER, *state.files)):
        try:
            wrong = fault(path / name, state.files[name]) if name in state.files else f"{STATE} does not name it"
        except OSError as error:
            wrong = str(error.strerror)
        if wrong:
            return f"{path / name}: {wrong}"
    return None


def listed(path: Path) -> Listed:
    """Return what there is to say of the checkpoint in a folder."""
    wrong = verify(path)
    state = None if wrong else read_state(path)
    return Listed(
        step=number(path),
        path=path,
        bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        wrong=wrong,
        held_out=state.held_out if state else None,
        arithmetic=state.arithmetic if state else {},
    )


def read_state(path: Path) -> CheckpointState:
    """Read `state.json` of a checkpoint. Raises `UserError` where there is none, and `CorruptData`."""
    if not (path / STATE).is_file():
        raise UserError(f"{path} is not a checkpoint: it has no {STATE}")
    data = durable.read_json(path / STATE)
    version = data.get("format_version") if isinstance(data, dict) else None
    if isinstance(version, int) and not 3 <= version <= FORMAT_VERSION:
        remedy = "upgrade" if version > FORMAT_VERSION else "train it again"
        raise UserError(f"{path}: written by format {version}, this reads 3 to {FORMAT_VERSION}; {remedy}")
    if version == 3 and isinstance(data.get("threads"), int):
        data["arithmetic"] = {"threads": str(data.pop("threads"))}
    if version == FORMAT_VERSION and data != sealed(data):
        raise CorruptData(f"{path / STATE}: its digest is not that of what it holds: it was edited, or is damaged")
    if isinstance(data, dict):
        data.pop("digest", None)
    return read_record(CheckpointState, data, path / STATE)


def find(run: Path, step: int | None = None) -> Checkpoint:
    """Find the checkpoint of `step`, or the newest one that verifies, with a warning for each newer one that does not.

    Raises `UserError` when there is none.
    """
    if not run.is_dir():
        raise UserError(f"no run at {run}: no such folder")
    candidates = steps(run) if step is None else [folder(run, step)]
    for path in reversed(candidates):
        wrong = verify(path)
        if wrong is None:
            return Checkpoint(path, read_state(path))
        if step is not None:
            if path.is_dir():
                raise CorruptData(wrong)
            raise UserError(f"{run} has no checkpoint of step {step}; it has {[number(p) for p in steps(run)]}")
        warn(f"skipped a checkpoint that does not verify: {wrong}")
    raise UserError(f"{run} has no valid checkpoint; start the run again under another name")


def of(path: Path, step: int | None = None) -> tuple[Path, Checkpoint]:
    """Return the run and the checkpoint of a run's folder, as `find`, or of a checkpoint's own folder.

    Raises `UserError` when `path` is neither, and `CorruptData` when the checkpoint is damaged.
    """
    if not (path / STATE).is_file():
        if path.is_dir() and not (path / CONFIG).is_file():
            raise UserError(f"{path} is neither a run, which has {CONFIG}, nor a checkpoint, which has {STATE}")
        return path, find(path, step)
    if step is not None and step != number(path):
        raise UserError(f"{path} is a checkpoint of another step than {step}; pass the run's folder")
    if wrong := verify(path):
        raise CorruptData(wrong)
    return path.parent.parent, Checkpoint(path, read_state(path))


def load_weights(found: Checkpoint, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Load the weights of a checkpoint, as `load_tensors`."""
    return load_tensors(found.path / WEIGHTS, expected, _joined(found, of_weights=True))


def load_tensors(
    path: Path, expected: dict[str, Tensor], beside: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Load the tensors of a checkpoint's file, checked against the names, shapes and dtypes of `expected`.

    `beside`: tensors of other files that are checked with them. Raises `CorruptData` naming the tensor when one is
    missing, too many, of another shape or dtype, or not finite.
    """
    tensors = load_state(path) | dict(beside or {})
    if odd := sorted(set(tensors) ^ set(expected)):
        raise CorruptData(f"{path}: tensor {odd[0]!r} is {'missing' if odd[0] in expected else 'not expected'}")
    try:
        return {name: fitting(tensors, name, want) for name, want in expected.items()}
    except ValueError as error:
        raise CorruptData(f"{path}: {error}") from error


def load_optimizer(found: Checkpoint) -> dict[str, Tensor]:
    """Load all else that training continues from. Raises `CorruptData`."""
    return load_state(found.path / OPTIMIZER) | _joined(found, of_weights=False)


def _joined(found: Checkpoint, *, of_weights: bool) -> dict[str, Tensor]:
    """Put together what the files of shards have, of weights or of all else. Raises `CorruptData` where one lacks."""
    count = found.state.shards
    names = [_SHARD.format(i, count) for i in range(count)]
    if missing := [name for name in names if name not in found.state.files]:
        raise CorruptData(f"{found.path / STATE}: it names {count} files of shards, and not {missing[0]}")
    parts = [load_state(found.path / name) for name in names]
    wanted = [{name: part[name] for name in part if ("." not in name) == of_weights} for part in parts]
    try:
        return join(wanted) if wanted else {}
    except ValueError as error:
        raise CorruptData(f"{found.path / names[0]}: {error}") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises `OSError` when the disk is full."""
    with durable.saving_tensors(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_state(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file. Raises `CorruptData` when it is not one, and `OSError`."""
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise CorruptData(f"{path}: not a readable safetensors file ({error})") from error
