"""Captures and commits blocks: forward passes, the block before being written, and the next one begun side by side."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

from harvest.llm.extract_unembedding import publish_unembedding
from harvest.llm.model import Model, check_isolation, load_model
from harvest.run.arithmetic import arithmetic, require_same
from harvest.run.block_rows import BlockRows, DeviceMemory, DeviceRows, HostRows
from harvest.run.capture import Capture, open_capture
from harvest.run.harvest_panel import Status, free_on
from harvest.run.ranks import Ranks
from harvest.text.packing import Windows, model_positions
from harvest.writer import attention_sinks, finish, ledger
from harvest.writer.blocks import BlockLayout, block_layout, most_rows
from harvest.writer.target import Push, Target, push_nowhere, read_block
from shared.console.progress import Progress
from shared.console.signals import leave, stop_signals
from shared.console.terminal import Verbosity, verbosity
from shared.errors import Stopped, warn
from shared.files import durable
from shared.store.layout import UNEMBEDDING
from shared.store.row_arrays import captured_as
from shared.store.statistics import Moments

_BLOCKS_HELD = 2
Missing = Mapping[Path, set[int]]
"""Blocks that each target lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runner:
    """Where the model lies, the width of each hook, the threads to use, and the processes that share the blocks."""

    folder: Path
    widths: Mapping[str, int]
    workers: int
    ranks: Ranks
    inexact: bool = False
    """Whether blocks may be computed on a GPU of another kind than those that are there."""
    push: Push = push_nowhere
    unembeddings: list[Path] = field(default_factory=list)
    """Those written so far: a gigabyte for a large vocabulary, the same for every layer."""

    def capture(self, targets: Sequence[Target], missing: Missing) -> None:
        """Commit the blocks that are missing; targets, whose tokens are the same, take their rows from one pass.

        The processes take turns with the blocks. Returns when all are committed.
        """
        todo = sorted(set().union(*missing.values()))
        lacking = [t for t in targets if t.request.unembedding and not (t.path / UNEMBEDDING).is_file()]
        if todo or lacking:
            device = self._device(targets[0].request.model.device)
            computed_on = arithmetic(device)
            if todo:
                require_same(targets, computed_on, inexact=self.inexact)
                self.ranks.require_same(", ".join(computed_on.values()), inexact=self.inexact)
            model = self._load(targets)
            if self.ranks.first:
                for path in [target.path / UNEMBEDDING for target in lacking]:
                    if self.unembeddings:
                        durable.publish_link(path, self.unembeddings[0])
                    else:
                        publish_unembedding(model, path)
                    self.unembeddings.append(path)
            if todo:
                self._run(model, [t for t in targets if missing[t.path]], missing, todo, computed_on)
        self.ranks.wait()

    def _load(self, targets: Sequence[Target]) -> Model:
        request = targets[0].request
        hooks = sorted({name for t in targets for name in (t.request.source_hook, t.request.target_hook)})
        device = self._device(request.model.device)
        return load_model(self.folder, request.model.dtype, device, hooks, attention=request.model.attention)

    def _device(self, kind: str) -> str:
        return f"cuda:{self.ranks.local_rank}" if kind == "cuda" else kind

    def _run(
        self,
        model: Model,
        targets: Sequence[Target],
        missing: Missing,
        todo: Sequence[int],
        computed_on: Mapping[str, str],
    ) -> None:
        request, mine = targets[0].request, todo[self.ranks.rank :: self.ranks.size]
        done = targets[0].blocks - len(todo) if self.ranks.size == 1 else 0
        device = self._device(request.model.device)
        if request.documents == "apart":
            check_isolation(model, request.context_size, device)
        name = "harvest" if self.ranks.size == 1 else f"harvest, process {self.ranks.rank} of {self.ranks.size}"
        with (
            ThreadPoolExecutor(1, "write") as writer,
            open_capture(model, self.workers, device, captured_as(request.storage), request.documents) as capture,
        ):
            blocks = Blocks(targets, missing, self.widths, device, computed_on, self.ranks.first, self.push)
            batch = self._batch(capture, targets, mine)
            size = request.block_tokens
            status = Status(
                targets=targets,
                missing=missing,
                mine=frozenset(mine),
                there=done,
                widths=self.widths,
                batch=batch,
                device=device,
                workers=self.workers,
                disk=free_on(targets[0].path),
            )
            alone = self.ranks.size == 1
            bar = Progress(name, (done + len(mine)) * size, "tokens", done * size, draw=status.panel, alone=alone)
            count = _Counter(bar, done * size, status)
            with stop_signals() as stop, bar:
                try:
                    blocks.run(mine, batch, capture, writer, count.tokens, stop, count.block)
                except KeyboardInterrupt:  # the second one: a pass of a large model takes a minute
                    leave("stopped at once; run the same command again to continue")
                if stop:
                    left = len(set(mine) & set().union(*missing.values()))
                    raise Stopped(
                        f"stopped with {left} of {len(mine)} blocks to go; run the same command again to continue"
                    )

    def _batch(self, capture: Capture, targets: Sequence[Target], mine: Sequence[int]) -> int:
        """Find the windows per pass: what committed blocks were made with, or the most that fit on every process."""
        fixed, batch = ledger.fixed_batch(targets[0]), targets[0].request.batch_sequences
        if fixed is None and mine:
            windows = read_block(targets[0], mine[0])
            batch = capture.fitting_batch(windows, model_positions(windows, targets[0].request.documents), batch)
        return self.ranks.least(fixed or batch)


class _Begun(NamedTuple):
    """A block whose passes were submitted."""

    block: int
    windows: Windows
    layout: BlockLayout
    rows: BlockRows
    passes: Sequence[Future[bool]]


class Blocks:
    """The blocks of some targets on their way to disk. Takes the memory that they need on a CUDA device."""

    def __init__(
        self,
        targets: Sequence[Target],
        missing: Missing,
        widths: Mapping[str, int],
        device: str,
        computed_on: Mapping[str, str],
        first: bool,
        push: Push = push_nowhere,
    ) -> None:
        self._targets, self._missing, self._computed_on, self._first = targets, missing, computed_on, first
        self._warned, self._push = not first, push
        self._rows = _rows(targets, widths, device)

    def run(
        self,
        blocks: Sequence[int],
        batch: int,
        capture: Capture,
        writer: ThreadPoolExecutor,
        done: Callable[[int], None],
        stop: Sequence[int] = (),
        written: Callable[[int], None] = lambda block: None,
    ) -> None:
        """Capture and commit `blocks`, `batch` windows per pass; one is begun when the one before the last is on disk.

        `done` hears of tokens whose passes are made, `written` of blocks that are committed.
        When `stop` has a signal, no pass is begun any more, and blocks that lack one are left out.
        """
        target, request = self._targets[0], self._targets[0].request
        pending: deque[Future[None]] = deque()
        for block, rows in zip(blocks, cycle(self._rows), strict=False):
            if stop:
                break
            windows = read_block(target, block)
            layout = block_layout(request, target.strata, windows, block, target.special)
            if len(pending) == len(self._rows):
                pending.popleft().result()
            passes = capture.submit(windows, layout, batch, rows, done, stop)
            begun = _Begun(block, windows, layout, rows, passes)
            pending.append(writer.submit(self._write, begun, batch, capture, written))
        while pending:
            pending.popleft().result()

    def _write(self, begun: "_Begun", batch: int, capture: Capture, written: Callable[[int], None]) -> None:
        """Commit a block when its passes are done, if all of them ran."""
        block, windows, layout, rows, passes = begun
        if not all([future.result() for future in passes]):
            return
        capture.settle(windows, layout, batch, rows)
        for target in self._targets:
            if block in self._missing[target.path]:
                moments = ledger.commit(target, block, layout, rows.buffers, batch, rows.measured, self._computed_on)
                self._missing[target.path].discard(block)
                if self._first:
                    ledger.grow_arrays(target, set(range(target.blocks)) - self._missing[target.path])
                self._push(target.path)
                self._warn(target, block, moments)
        written(block)

    def _warn(self, target: Target, block: int, moments: Mapping[str, Moments]) -> None:
        """Tell of attention sinks, and of what the storage type takes, as soon as a block to train on has been seen."""
        if self._warned or block < target.request.held_out_blocks:
            return
        self._warned = target is self._targets[-1]
        for line in attention_sinks.warnings(target.strata, moments) + finish.floor_warnings(target, [block]):
            warn(f"layer {target.request.layer}: {line}")


def _rows(targets: Sequence[Target], widths: Mapping[str, int], device: str) -> Sequence[BlockRows]:
    """Return where the rows of the two blocks lie that are in memory at once: one being filled, one being written."""
    request, kind = targets[0].request, captured_as(targets[0].request.storage)
    used = {name: widths[name] for t in targets for name in (t.request.source_hook, t.request.target_hook)}
    if not device.startswith("cuda"):
        return [HostRows(used, kind) for _ in range(_BLOCKS_HELD)]
    rows = most_rows(request, targets[0].strata)
    memory = DeviceMemory(device, used, kind, request.block_tokens, rows)
    # Moments are of rows as they are stored: which are left out by norm is decided on the host, and int8 made there.
    measure = request.max_norm_quantile == 1 and request.storage != "int8"
    return [DeviceRows(memory, measure=measure) for _ in range(_BLOCKS_HELD)]


def seconds_per_token(folder: Path, targets: Sequence[Target], vocabulary: int, workers: int) -> float:
    """Return the seconds that a token takes on this machine, by two batches for each of `workers` threads."""
    request = targets[0].request
    hooks = sorted({name for t in targets for name in (t.request.source_hook, t.request.target_hook)})
    identity = request.model
    model = load_model(folder, identity.dtype, identity.device, hooks, attention=identity.attention)
    ids = np.random.default_rng(0).integers(0, vocabulary, (request.batch_sequences, request.context_size))
    windows = Windows(ids.astype(np.int32), np.zeros_like(ids, np.int32))
    positions = model_positions(windows, "joined")
    with open_capture(model, workers, request.model.device, captured_as(request.storage), "joined") as capture:
        batch = capture.fitting_batch(windows, positions, request.batch_sequences)
        part, passes = Windows(*(rows[:batch] for rows in windows)), 2 * workers

        def once(_: int) -> None:
            if identity.device == "cpu":
                capture.rows(part, positions[:batch])
            else:  # their rows reach the host beside the passes
                capture.forward(part.tokens, positions[:batch])

        began = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(once, range(passes)))
        if identity.device != "cpu":
            torch.cuda.synchronize()
        return (time.monotonic() - began) / (passes * part.tokens.size)


class _Counter:
    """Tells a progress bar of tokens and blocks, which several threads finish."""

    def __init__(self, bar: Progress, done: int, status: Status) -> None:
        self._bar, self._done, self._status, self._lock = bar, done, status, Lock()

    def tokens(self, count: int) -> None:
        """Count `count` more tokens as done."""
        with self._lock:
            self._done += count
            self._bar.update(self._done)

    def block(self, block: int) -> None:
        """Note that a block is on disk."""
        with self._lock:
            detail = self._status.detail(block) if verbosity() == Verbosity.VERBOSE else ""
            self._bar.update(self._done, self._status.note(), detail)
