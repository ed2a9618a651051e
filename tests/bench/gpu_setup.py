"""What the benches of a GPU share: shapes, the least that a step of one must move, a step made of settings, clocks.

Legend: B rows, D d_in, O d_out, F latents, P prefixes, N pairs.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.store.store import Store
from tests.bench.record import sized
from tests.stores import SIDES, make_store
from train.model.losses import AuxKConfig
from train.model.step_output import StepOutput
from train.model.transcoder import Transcoder
from train.run.load_run import build_transcoder
from train.run.optimizer import Optimizer
from train.run.settings import RunConfig, load_settings, resolve
from train.run.step_graph import StepGraph, graph_of

D, K, P = sized((2304, 48, 5), (32, 4, 5))
"""The width of Gemma 2 2B, the active latents of a row, and the prefixes, at their default."""
BATCHES = sized((1024, 4096), (16, 32))
WIDTHS = sized((18432, 65536, 131072), (32, 64))
DEAD = 4
"""Every this-many-th latent counts as dead."""
AUXK = f"auxk.k={sized(64, 8)}"
GIB = 2**30


class Shape(NamedTuple):
    """A step's size; source and target rows are `D` wide."""

    rows: int
    d_sae: int

    def __str__(self) -> str:
        return f"B {self.rows:,}, d_sae {self.d_sae:,}"

    @property
    def product_flops(self) -> int:
        """Of the encoder's product, the one matrix product that no step can do without."""
        return 2 * self.rows * D * self.d_sae

    @property
    def necessary_bytes(self) -> dict[str, int]:
        """The least that a step moves through the device's memory, by part: what is read once, and written once.

        Weights and moments are float32, and the product reads and writes bfloat16. Of the decoder, rows of active
        latents are read. Gradients are written and read, since they are clipped by a norm over all of them.
        """
        weights, pre_acts = self.d_sae * D, self.rows * self.d_sae
        rows, meet = 4 * self.rows * D, 4 * self.rows * P * D
        return {
            "product and selection": 2 * weights + rows + 2 * 2 * pre_acts,
            "decode and errors": 4 * min(self.rows * K, self.d_sae) * D + rows + meet,
            "gradients": meet + rows + 4 * 2 * weights,
            "update": (4 + 4 * 6) * 2 * weights + 2 * weights,
        }

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the least seconds of a step: its product, and then its bytes."""
        return sum(self.necessary_bytes.values()) / bytes_per_second + self.product_flops / flops_per_second


SHAPES = [Shape(rows, width) for width in WIDTHS for rows in BATCHES]
MAIN = SHAPES[0]
"""The one that the preset `gemma-2-2b` trains."""


def small_store(folder: Path, long_first: float = 1.0) -> Store:
    """A store as wide as the shapes, with rows enough for one batch, whose means and scales a step needs.

    `long_first`: how many times as long as others rows of position 0 are; training leaves them out where they are much
    longer.
    """
    made = make_store(
        folder / f"small-store-{long_first:g}", d_in=D, d_out=D, training_blocks=sized(1, 3),
        context_size=sized(128, 32), block_sequences=sized(48, 16), edges=(0, 1, 16), tokenizer=True,
        draw=partial(_noise, long_first), histograms=True,
    )  # fmt: skip
    return Store.open(made.path)


def _noise(long_first: float, tokens: NDArray[Any], position: NDArray[Any], shared: object) -> dict[str, NDArray[Any]]:
    rng, length = np.random.default_rng(int(tokens.sum())), np.where(position == 0, np.float32(long_first), 1)
    return {side: length[:, None] * rng.standard_normal((len(tokens), D), np.float32) for side in SIDES}


@dataclass
class Step:
    """A step as a run makes it, on batches that take turns; as a CUDA graph where the run would have one."""

    config: RunConfig
    model: Transcoder
    optimizer: Optimizer
    graph: StepGraph
    batches: Sequence[tuple[Tensor, Tensor]]
    dead: Tensor

    @property
    def auxk(self) -> AuxKConfig:
        """Of the run's settings."""
        return self.config.settings.auxk

    def __call__(self, number: int) -> None:
        """Make one step."""
        self.optimizer.begin(number)
        batch = self.batches[number % len(self.batches)]
        self.graph.run(number, "the same", batch, lambda given: self._compute(given, number))

    def _compute(self, batch: Sequence[Tensor], number: int) -> StepOutput:
        source, target = batch
        output = self.model.step(source, target, self.dead, self.auxk, number, number=self.graph.number)
        self.optimizer.update(output.losses)
        return output.detached()


def settings_of(store: Store, shape: Shape, device: str, changes: Sequence[str] = ()) -> RunConfig:
    """The run of preset `gemma-2-2b` in another shape, every automatic choice made. Raises `UserError`."""
    sizes = [f"transcoder.d_sae={shape.d_sae}", f"activation.k={K}", f"rows.batch_rows={shape.rows}", AUXK]
    sizes += sized([], ["kernels=plain"])  # in Triton's interpreter a step takes seconds
    return resolve(store, load_settings("gemma-2-2b", [*sizes, f"device={device}", *changes]), None)


def make_step(store: Store, shape: Shape, device: str, changes: Sequence[str] = ()) -> Step:
    """A step of random weights and rows. Raises `UserError` where the settings do not fit the device."""
    config = settings_of(store, shape, device, changes)
    model = build_transcoder(config, store)
    model.initialise(0)
    generator = torch.Generator().manual_seed(0)
    batches = [random_batch(shape, device, generator) for _ in range(sized(4, 2))]
    dead = torch.arange(shape.d_sae, device=device) % DEAD == 0
    optimizer = Optimizer(model, config.settings.optimizer, config.length_at)
    return Step(config, model, optimizer, graph_of(config.settings), batches, dead)


def random_batch(shape: Shape, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target rows [B, D], made on the host."""
    source, target = (torch.randn(shape.rows, D, generator=generator).to(device) for _ in range(2))
    return source, target


class Timed(NamedTuple):
    """Medians, in milliseconds."""

    device: float
    """From one call's start to its end on the device, waits for the host between two operations included"""
    host: float
    """Until a call returns, with nothing before it in the device's queue"""


def timed(call: Callable[[int], object], repeats: int, warm_up: int = 3) -> Timed:
    """Time `call`, which gets the number of the call, on the current CUDA device."""
    for number in range(warm_up):
        call(number)
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for number in range(repeats):
        call(warm_up + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    device = statistics.median(begin.elapsed_time(end) for begin, end in itertools.pairwise(events))
    host = []
    for number in range(sized(5, 1)):
        began = time.perf_counter()
        call(warm_up + repeats + number)
        host.append(1e3 * (time.perf_counter() - began))
        torch.cuda.synchronize()
    return Timed(device, statistics.median(host))


def peak_gib(device: str) -> float:
    """Most memory that was allocated on the device since it was last asked for."""
    most = torch.cuda.max_memory_allocated(device) / GIB
    torch.cuda.reset_peak_memory_stats(device)
    return most
