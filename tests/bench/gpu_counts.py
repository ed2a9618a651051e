"""What a step asks of a GPU, counted on a fake one: operations, launches, waits, copies and bytes, part by part.

    python -m tests.bench.gpu_counts [steps] [memory] [compiled]

`steps` runs two steps of the trainer at the shape of Gemma 2 2B and counts the second: a step in the middle of a run,
without reports and checkpoints, with as many mined and correlated pairs as there can be, and no dead latent. Bytes
are what every operation moves at least: its inputs and outputs, each once, and the rows of a table that it indexes
(tests/gpu/kernel_bytes.py for Triton's kernels); beside them stand the bytes that no step can do without. From both
follow times on four cards: ESTIMATES, from rates that such cards usually reach and 3 us for each launch. Operations
of torch that are known to be several kernels count as so many launches, which is an estimate, too; and memory is that
of tensors, without any operation's own scratch memory. Where the step can be a CUDA graph, what the host then asks for
is counted apart, a replay being one of these operations, and what is inside the graph, part by part.
`memory` has what wider shapes hold throughout a run. `compiled` records registers, spills and shared memory of every
kernel, by the compiler that a GPU would get it from (`python -m tests.gpu.compile`).
"""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its launches are counted, and not made

import torch

from shared.store.store import Store
from tests.bench.gpu_setup import BATCHES, GIB, SHAPES, WIDTHS, D, Shape, settings_of, small_store
from tests.bench.record import ROOT, named, record, sized
from tests.gpu.device_log import DeviceLog, Op
from tests.gpu.fake_device import fake_cuda
from train.data.batches import BatchReader
from train.duplicates.diversity import Diversity
from train.model.quiet import Quiet
from train.model.transcoder import Transcoder
from train.run.optimizer import Optimizer
from train.run.settings import RunConfig
from train.run.trainer import Trainer

LINE = "python -m tests.bench.gpu_counts"
Figures = dict[str, tuple[float, str]]
KERNELS = ("plain", "matmul", "triton")
LAUNCHES = {
    "topk": 6, "sort": 6, "index_put": 4, "index_put_": 4, "_index_put_impl_": 4, "cumsum": 2, "sampled_addmm": 3,
    "_embedding_bag_forward_only": 2, "_foreach_norm": 4, "nonzero": 4,
}  # fmt: skip
"""Kernels of an operation on CUDA, where that is more than one: about so many."""
PER_LAUNCH = 3e-6
"""Seconds that a launch takes at least."""
PARTS: dict[str, tuple[tuple[type, str], ...]] = {
    "rows": ((BatchReader, "rows_of"), (Trainer, "_prepared"), (Transcoder, "normalised")),
    "forward": ((Transcoder, "step_of"),),
    "terms against duplicates": ((Diversity, "value_terms"), (Diversity, "direction_terms")),
    "silent rows": ((Quiet, "terms"),),
    "backward and update": ((Optimizer, "update"),),
}
REST = "counting and logging"


class Card(NamedTuple):
    """Rates that such a card usually reaches: bytes and operations per second."""

    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float

    def product(self, precision: str) -> float:
        """Operations per second of a matrix product."""
        return {"tf32": self.tf32, "bfloat16": self.bfloat16}.get(precision, self.float32)


CARDS = {
    "H200": Card(4.2e12, 50e12, 380e12, 700e12),
    "H100": Card(2.9e12, 50e12, 380e12, 700e12),
    "A100 80 GB": Card(1.75e12, 18e12, 130e12, 260e12),
    "RTX 4090": Card(0.92e12, 65e12, 75e12, 150e12),
}


@dataclass
class Counted:
    """What a step asked of the device: each operation, its part, and how often it made the host wait."""

    ops: list[tuple[str, Op]]
    syncs: list[str]
    copies: list[str]
    peak: int = 0
    """Most bytes of tensors at once"""
    launched: int | None = None
    """What the host asks for where the same step is a graph; none: it cannot be one"""
    inside: Sequence[tuple[str, Op]] = ()
    """The operations inside that graph, as `ops`; what is done once after a report or a scan is not among them"""

    def of(self, part: str) -> list[Op]:
        """Return the operations of a part."""
        return [op for name, op in self.ops if name == part]

    def seconds(self, card: Card) -> float:
        """Estimate a step's time: each operation in turn, by what holds it up most."""
        return sum(
            max(op.bytes / card.bandwidth, op.flops / card.product(op.precision), _launches(op) * PER_LAUNCH)
            for _, op in self.ops
        )


def main() -> None:
    """Count what is named, or all, and record."""
    parts = {"steps": steps, "memory": memory, "compiled": compiled}
    for name in named(__doc__, *parts):
        parts[name]()


def steps() -> None:
    """Count a step by each kind of kernels; by Triton's also where rows are left out, on which latents are silent."""
    with tempfile.TemporaryDirectory() as folder:
        stores = {"": small_store(Path(folder)), ", position 0 left out": small_store(Path(folder), 20.0)}
        forms = [(kernels, store) for kernels in KERNELS for store in list(stores)[: 1 + (kernels == "triton")]]
        for (kernels, name), rows in itertools.product(forms, sized(BATCHES, BATCHES[:1])):
            shape, title = Shape(rows, WIDTHS[0]), f"kernels {kernels}{name}"
            config = counted_settings(stores[name], shape, [f"kernels={kernels}"])
            assert bool(config.settings.quiet.weight) == bool(name)
            figures = figures_of(shape, counted(stores[name], config, Path(folder) / f"{title}-{rows}"))
            for figure, (value, unit) in figures.items():
                print(f"{title:36} {shape}  {figure:50} {value:12,.5g} {unit}", flush=True)
            record(f"gpu counts, {title}: {shape}", f"{LINE} steps", figures, on="a fake device")


def memory() -> None:
    """Bytes that every shape holds: of four numbers for each weight, and of a batch's pre-activations."""
    figures: Figures = {
        f"d_sae {d_sae:,}: weights, gradients and Adam's moments": (4 * 4 * 2 * d_sae * D / GIB, "GiB")
        for d_sae in WIDTHS
    }
    figures |= {f"{one}: pre-activations in float32": (4 * one.rows * one.d_sae / GIB, "GiB") for one in SHAPES}
    record(f"gpu memory: d {D:,}", f"{LINE} memory", figures, on="arithmetic")


def counted_settings(store: Store, shape: Shape, changes: Sequence[str]) -> RunConfig:
    """Settings of a run whose first steps are like those in the middle of one. Raises `UserError`."""
    rarely = [f"{name}=1000" for name in ("log_every", "evaluation.every", "checkpoint.every", "monitor.every")]
    rarely += ["threads=1", "steps=4000", f"monitor.rows={shape.rows}"]
    with fake_cuda():
        return settings_of(store, shape, "cuda", [*rarely, *changes])


def counted(store: Store, config: RunConfig, run: Path) -> Counted:
    """Return what the second step of a run in the folder `run` asks of the device."""
    kernels, d_sae = config.settings.kernels, config.settings.transcoder.d_sae
    gc.collect()  # a trainer is not freed by itself: what it refers to refers to it
    with fake_cuda() as log:
        log.runs_kernels, before = kernels == "plain", log.live
        trainer = Trainer(store, config, run)
        with trainer._reader:
            trainer._step(1)  # not 0, which scans all decoder rows for close pairs
            plant(trainer._diversity, int(d_sae))
            log.clear()
            torch.cuda.reset_peak_memory_stats()
            with noting_parts(log) as found:
                trainer._step(2)
            found.peak = torch.cuda.max_memory_allocated() - before
            found.syncs, found.copies = list(log.syncs), list(log.copies)
            if trainer._graph.number is not None:
                with noting_parts(log) as recorded:
                    trainer._step(3)  # and replayed
                log.clear()
                trainer._step(4)
                assert log.syncs == []
                graph: Any = trainer._graph._graph
                within = set(map(id, graph.kernels))
                found.launched = len(log.ops)
                found.inside = [(part, op) for part, op in recorded.ops if id(op) in within]
        assert log.faults == []
    return found


def plant(diversity: Diversity, d_sae: int) -> None:
    """Give the diversity loss as many pairs as it takes at most: random weights have none."""
    generator, planted = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, most in sized((("mined", 8192), ("correlated", 1024)), (("mined", 32), ("correlated", 16))):
        first = torch.randint(0, d_sae - 1, (most,), generator=generator).sort().values
        planted |= {f"diversity.{name}.first": first, f"diversity.{name}.second": first + 1}
    diversity.load({**diversity.state(), **planted, "diversity.strength": torch.ones(most)})


@contextmanager
def noting_parts(log: DeviceLog) -> Iterator[Counted]:
    """Note to which part of a step an operation belongs."""
    current, found = [REST], Counted([], [], [])
    op_of = log.op

    def op(name: str, size: int, flops: int = 0, precision: str = "") -> None:
        op_of(name, size, flops, precision)
        found.ops.append((current[-1], log.ops[-1]))

    def within(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            current.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                current.pop()

        return call

    with ExitStack() as stack:
        stack.enter_context(patch.object(log, "op", op))
        for part, methods in PARTS.items():
            for owner, name in methods:
                stack.enter_context(patch.object(owner, name, within(part, getattr(owner, name))))
        yield found


def figures_of(shape: Shape, found: Counted) -> Figures:
    """Counts of the step and of its parts, the necessary bytes, and estimates."""
    figures: Figures = {}
    parts = {"step": [op for _, op in found.ops], **{part: found.of(part) for part in (*PARTS, REST)}}
    for part, ops in parts.items():
        figures[f"{part}: operations"] = (len(ops), "operations")
        figures[f"{part}: launches, estimated"] = (sum(map(_launches, ops)), "launches")
        figures[f"{part}: bytes"] = (sum(op.bytes for op in ops) / 1e9, "GB")
    least = shape.necessary_bytes
    figures |= {f"necessary, {part}: bytes": (size / 1e9, "GB") for part, size in least.items()}
    figures["necessary: bytes"] = (sum(least.values()) / 1e9, "GB")
    moved = sum(op.bytes for _, op in found.ops)
    figures["bytes over those that are necessary"] = (moved / sum(least.values()), "times")
    figures["matrix products"] = (sum(op.flops for _, op in found.ops) / 1e9, "GFLOP")
    figures["memory at the peak"] = (found.peak / GIB, "GiB")
    figures["waits of the host for the device"] = (len(found.syncs), "waits")
    figures["copies to the device"] = (len(found.copies), "copies")
    if found.launched is not None:
        figures["as a CUDA graph: operations that the host asks for"] = (found.launched, "operations")
        figures["as a CUDA graph: operations inside"] = (len(found.inside), "operations")
        for part in (*PARTS, REST):
            ops = [op for name, op in found.inside if name == part]
            figures[f"as a CUDA graph, {part}: operations inside"] = (len(ops), "operations")
            figures[f"as a CUDA graph, {part}: bytes"] = (sum(op.bytes for op in ops) / 1e9, "GB")
        moved = sum(op.bytes for _, op in found.inside)
        figures["as a CUDA graph: bytes over those that are necessary"] = (moved / sum(least.values()), "times")
    for name, card in CARDS.items():
        figures[f"ESTIMATE of a step on {name}"] = (1e3 * found.seconds(card), "ms, estimated")
        figures[f"ESTIMATE of the floor on {name}"] = (
            1e3 * shape.floor(card.bandwidth, card.bfloat16), "ms, estimated",
        )  # fmt: skip
    return figures


def _launches(op: Op) -> int:
    return LAUNCHES.get(op.name, 1)


def compiled() -> None:
    """Registers, spills and shared memory: the most of any variant of a kernel on any GPU."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "tests.gpu.compile", "--json", *sized([], ["--capability", "90"])]
    done = subprocess.run(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found = [json.loads(one) for one in done.stdout.splitlines()]
    figures: Figures = {}
    for kernel in sorted({one["kernel"] for one in found}):
        for capability in sorted({one["capability"] for one in found}):
            figures |= _most(kernel, capability, [
                one for one in found if (one["kernel"], one["capability"]) == (kernel, capability)
            ])  # fmt: skip
    record("gpu kernels, compiled", f"{LINE} compiled", figures, on="compiled without a GPU")


def _most(kernel: str, capability: int, variants: Sequence[dict[str, int]]) -> Figures:
    units = {"registers": "a thread", "spilled": "bytes of a thread", "shared": "bytes of a program"}
    return {
        f"{kernel}, sm_{capability}: {what}": (max(one[what] for one in variants), unit) for what, unit in units.items()
    }


if __name__ == "__main__":
    main()
