"""Publishes a run's checkpoints beside training, keeps those that the policy says, and gets by on a full disk.

A checkpoint is written by a thread from a copy in memory, so that steps do not wait for the disk. One that cannot be
written costs a warning while training goes on; the last one of a process makes room for itself: the reserve is given
up, then checkpoints that are not the newest, then the fallback folder is tried, and only then it fails.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Self

from pydantic import Field
from torch import Tensor

from shared.bounds import Every
from shared.config import Config
from shared.errors import DiskFull, ProjectError, UserError, cause, warn
from shared.files import durable
from train.live.run_files import CONFIG
from train.model import checkpoint
from train.model.checkpoint import Checkpoint, HeldOut
from train.run.host_copy import HostCopies

RESERVE = "reserve"
Tensors = Mapping[str, Tensor]


class CheckpointConfig(Config):
    """When checkpoints are written, and which are kept. The newest is always kept."""

    every: Every = "auto"
    """Steps between checkpoints; the last step always writes one. `auto`: 500; on CUDA about as many as take a
    minute."""
    keep_last: int = Field(2, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_every: int = Field(0, ge=0)
    """Also keep checkpoints of steps that are multiples of this; 0: none."""
    keep_best: int = Field(0, ge=0)
    """Also keep this many checkpoints with the lowest held-out fvu, of those that were evaluated."""
    max_bytes: int = Field(0, ge=0)
    """Maximum size of all kept checkpoints, in bytes, filled in this order: the newest, the best, `keep_every`, older
    ones; 0: no limit."""
    reserve: bool = True
    """Whether disk space for one checkpoint is reserved when the run starts, and released for the last one."""
    background: bool = True
    """Whether training continues while a checkpoint is written from a copy in the host's memory; false: it waits, and
    needs no copy."""

    def kept(self, found: Sequence[Checkpoint]) -> set[int]:
        """Return which of `found`, oldest first, are kept, by step."""
        steps, size = [one.step for one in found], {one.step: one.state.bytes for one in found}
        fvu = {one.step: one.state.held_out.fvu for one in found if one.state.held_out}
        best = sorted(fvu, key=lambda step: (fvu[step], step))[: self.keep_best]
        often = [step for step in reversed(steps) if self.keep_every and step % self.keep_every == 0]
        wanted = dict.fromkeys([*steps[-1:], *best, *often, *reversed(steps[-self.keep_last :])])
        kept, used = set(steps[-1:]), sum(size[step] for step in steps[-1:])
        for step in [step for step in wanted if step not in kept]:
            if not self.max_bytes or used + size[step] <= self.max_bytes:
                kept.add(step)
                used += size[step]
        return kept

    def most(self, steps: int, size: int) -> int:
        """Return the most bytes that `steps` steps take for checkpoints of `size`, the one being written included."""
        assert isinstance(self.every, int), "resolve the configuration first"
        many = (
            self.keep_last + self.keep_best + (steps // math.lcm(self.every, self.keep_every) if self.keep_every else 0)
        )
        kept = min(many, -(-steps // self.every)) * size
        return (min(kept, max(self.max_bytes, size)) if self.max_bytes else kept) + size * (1 + self.reserve)


class _Job(NamedTuple):
    step: int
    weights: Tensors
    optimizer: Tensors
    held_out: HeldOut | None
    copied: Callable[[], object] = lambda: None
    """Waits until the tensors can be read."""


class Saver:
    """The checkpoints of one run while it trains. Leaving its context waits for the one that is being written."""

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        arithmetic: Mapping[str, str],
        size: int,
        *,
        logs: Sequence[Path] = (),
        fallback: Path | None = None,
        failed: Callable[[], None] = lambda: None,
        record: Mapping[str, Any] | None = None,
        shards: int = 1,
    ) -> None:
        """Set up saving. `size`: bytes of a checkpoint, about. `record`: what the run's `config.json` holds.

        `logs` are forced to disk before a checkpoint is published. `fallback`: a run's folder on another disk, for when
        this one is full. `failed` is called for each that is lost. `shards`: those of the dictionary, each of which has
        a file.
        """
        self._run, self._config, self._arithmetic, self._size = run, config, arithmetic, size
        self._logs, self._fallback, self._failed, self._record = logs, fallback, failed, record
        self._shards = shards
        self._reserve = checkpoint.folder(run, 0).with_name(RESERVE)
        self._copies = HostCopies()
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._valid: dict[Path, Checkpoint] = {}
        """Those that were read and found whole by this process: they are immutable."""

    def __enter__(self) -> Self:
        if self._config.reserve:
            try:
                durable.reserve(self._reserve, self._size)
            except DiskFull as error:
                warn(f"{error}; the last checkpoint has no room set aside")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):  # a second Ctrl-C does not wait
            self.wait()
            self._reserve.unlink(missing_ok=True)

    def save(self, step: int, weights: Tensors, optimizer: Tensors, held_out: HeldOut | None) -> None:
        """Publish a checkpoint beside training. One that fails costs a warning."""
        self.wait()
        job = _Job(step, weights, optimizer, held_out)
        copy = self._copied(job) if self._config.background else None
        if not copy:
            self._try(job)
            return
        self._thread = Thread(target=self._try, args=(copy,), name="checkpoint", daemon=True)
        self._thread.start()

    def save_last(self, step: int, weights: Tensors, optimizer: Tensors, held_out: HeldOut | None) -> None:
        """Publish the last checkpoint of this process, with the reserve's room. Raises `DiskFull` or `ProjectError`."""
        self.wait()
        self._reserve.unlink(missing_ok=True)
        try:
            self._publish(_Job(step, weights, optimizer, held_out))
        except ProjectError as error:
            raise type(error)(f"{error}; continue with: python -m train resume {self._run}") from error

    def prune(self) -> None:
        """Remove the checkpoints that the policy no longer keeps: also what a kill kept from being removed."""
        self._prune(self._run)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is published or lost."""
        if self._thread:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def _copied(self, job: _Job) -> _Job | None:
        """Return the same with copies of its tensors; none, with a warning, where the host has no memory for them."""
        try:
            copies, copied = self._copies.take({**job.weights, **job.optimizer})
        except (RuntimeError, MemoryError) as error:
            size = sum(tensor.nbytes for part in (job.weights, job.optimizer) for tensor in part.values())
            warn(
                f"no memory for a copy of the checkpoint of step {job.step}, {size:,} bytes ({cause(error)}): training "
                "waits while it is written; checkpoint.background = false asks for no copy"
            )
            return None
        weights, optimizer = ({name: copies[name] for name in part} for part in (job.weights, job.optimizer))
        return job._replace(weights=weights, optimizer=optimizer, copied=copied)

    def _try(self, job: _Job) -> None:
        try:
            job.copied()
            self._publish(job)
        except ProjectError as error:
            self._failed()
            warn(f"{error}; training goes on")
        except BaseException as error:  # raised where training waits for this thread
            self._error = error

    def _publish(self, job: _Job) -> None:
        """Publish and prune; on a full disk, make room and try again, then take the fallback folder."""
        try:
            self._write_with_room(job)
        except (DiskFull, OSError) as error:
            if not self._fallback:
                raise self._lost(job.step, error) from error
            self._write_elsewhere(self._fallback, job, error)
            self._prune(self._fallback)
        else:
            self.prune()

    def _write_with_room(self, job: _Job) -> None:
        while True:
            try:
                return self._write(self._run, job)
            except DiskFull:
                if not self._make_room(sum(t.nbytes for part in (job.weights, job.optimizer) for t in part.values())):
                    raise

    def _write(self, run: Path, job: _Job) -> None:
        for log in self._logs:
            if log.is_file():
                durable.fsync_file(log)
        path = checkpoint.publish(
            run, job.step, job.weights, job.optimizer, self._arithmetic, job.held_out, self._record, self._shards
        )
        if wrong := checkpoint.verify(path):
            raise OSError(None, f"written, and does not verify: {wrong}", str(path))

    def _write_elsewhere(self, fallback: Path, job: _Job, cause: Exception) -> None:
        try:
            if not (fallback / CONFIG).exists():
                durable.publish_bytes(fallback / CONFIG, (self._run / CONFIG).read_bytes())
            self._write(fallback, job)
        except (DiskFull, OSError) as error:
            raise self._lost(job.step, error) from error
        warn(
            f"{_words(cause)}; the checkpoint of step {job.step} is in {fallback}; with room again, this "
            f"brings it home: python -m train resume {self._run} --fallback-dir {fallback.parent}"
        )

    def _lost(self, step: int, error: Exception) -> ProjectError:
        newest = next(iter(reversed(self._found(self._run))), None)
        left = f"the newest is that of step {newest.step}" if newest else "there is none"
        kind = DiskFull if isinstance(error, DiskFull) else ProjectError
        return kind(f"no checkpoint of step {step} of {self._run}, {left}: {_words(error)}")

    def _prune(self, run: Path) -> None:
        found = self._found(run)
        kept = self._config.kept(found)
        try:
            for one in found:
                if one.step not in kept:
                    self._remove(one)
        except OSError as error:
            warn(f"{_words(error)}; an old checkpoint could not be removed")

    def _make_room(self, needed: int) -> bool:
        """Remove what does not verify, then the least wanted until `needed` bytes are free; the newest valid one stays.

        Returns whether anything was removed.
        """
        found, removed = self._found(self._run), False
        for path in checkpoint.steps(self._run):
            if path not in self._valid:
                durable.remove_folder(path)
                removed = True
        while len(found) > 1 and not (removed and durable.free_bytes(self._run) > needed):
            few = self._config.model_copy(update={"max_bytes": sum(one.state.bytes for one in found) - 1})
            kept = few.kept(found)
            doomed = next(one for one in found if one.step not in kept)
            self._remove(doomed)
            found, removed = [one for one in found if one is not doomed], True
        return removed

    def _remove(self, one: Checkpoint) -> None:
        durable.remove_folder(one.path)
        del self._valid[one.path]

    def _found(self, run: Path) -> list[Checkpoint]:
        """List the valid checkpoints of a folder, oldest first: others do not count, and are not touched."""
        paths = checkpoint.steps(run)
        for path in paths:
            if path not in self._valid and checkpoint.verify(path) is None:
                self._valid[path] = Checkpoint(path, checkpoint.read_state(path))
        return [self._valid[path] for path in paths if path in self._valid]


def require_own(fallback: Path, config: bytes) -> None:
    """Raise `UserError` when the `fallback` folder is there, and is not of the run whose `config.json` is `config`."""
    path = fallback / CONFIG
    if fallback.exists() and not (path.is_file() and path.read_bytes() == config):
        raise UserError(f"{fallback} is not of this run: its {CONFIG} differs; give another --fallback-dir")


def bring_home(run: Path, fallback: Path) -> None:
    """Move checkpoints of `run` from its `fallback` folder to where they belong, the newest first.

    Raises `DiskFull` when there is no room for more.
    """
    for path in reversed(checkpoint.steps(fallback)):
        home = checkpoint.folder(run, checkpoint.number(path))
        if checkpoint.verify(path) or (home.exists() and checkpoint.verify(home) is None):
            continue
        if home.exists():
            durable.remove_folder(home)
        with durable.publish_folder(home, checkpoint.read_state(path).bytes) as temporary:
            for name in (*checkpoint.read_state(path).files, checkpoint.STATE):
                shutil.copyfile(path / name, temporary / name)
        durable.remove_folder(path)


def _words(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
