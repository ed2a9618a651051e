"""What `kernels=auto` takes on CUDA: the kind of kernels whose step is the fastest there, at the run's own shape."""

import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import UserError, warn
from train.model.activations import Activation
from train.model.kernels.base import Kernels
from train.model.losses import AuxKConfig
from train.model.step_output import StepOutput
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.device_rules import why_no_graph
from train.run.optimizer import Optimizer, OptimizerConfig
from train.run.step_graph import Choice, StepGraph

CANDIDATES: tuple[Kernels, ...] = ("triton", "matmul", "plain")
_WARM, _TIMED = 3, 5
"""Steps before the clock starts, in which kernels are compiled, and steps that are timed."""
_AGREES = 0.01
"""How far the first loss may be from that of the others, relative: TF32 may select other pairs at the threshold."""


class Shape(NamedTuple):
    """What the time of a step depends on."""

    d_in: int
    d_out: int
    rows: int
    """Of a batch"""
    transcoder: TranscoderConfig
    activation: Activation
    auxk: AuxKConfig
    step_graph: Choice
    """Whether steps of kernels that can be a CUDA graph are one."""


def fastest(shape: Shape, device: str) -> tuple[Kernels, dict[Kernels, float]]:
    """Time some steps by every kind of kernels on random rows; returns the fastest, and milliseconds by kind.

    A kind that fails on this GPU, or whose loss is another one, is left out with a warning. Raises `UserError` where
    every kind fails.
    """
    model, rows = _random(shape, device)
    taken: dict[Kernels, float] = {}
    expected: float | None = None
    activation, auxk = shape.activation.model_dump(), shape.auxk.model_dump()
    for kernels in reversed(CANDIDATES):  # what other libraries compute comes before what this project compiles
        model.kernels = kernels
        try:
            why_not = why_no_graph(kernels, activation, auxk, shape.rows)
            loss, milliseconds = _timed(model, rows, shape.auxk, "off" if why_not else shape.step_graph)
        except Exception as error:  # whatever a compiler or a driver raises
            warn(f"kernels = {kernels} does not run on this GPU and is not chosen: {_first_line(error)}")
            continue
        expected = loss if expected is None else expected
        if abs(loss - expected) <= _AGREES * abs(expected):
            taken[kernels] = milliseconds
        else:
            warn(
                f"kernels = {kernels} gives a loss of {loss:.6g} on this GPU where others give {expected:.6g}, and is "
                "not chosen; please report this"
            )
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    if not taken:
        raise UserError("no kind of kernels runs a step of this shape on this GPU: lower transcoder.d_sae")
    return min(taken, key=lambda kernels: taken[kernels]), {name: round(ms, 3) for name, ms in taken.items()}


def _timed(model: Transcoder, rows: tuple[Tensor, Tensor], auxk: AuxKConfig, wanted: Choice) -> tuple[float, float]:
    """Return the loss of the last step, and the median milliseconds of those after the first ones."""
    optimizer, device = Optimizer(model, OptimizerConfig(lr=1e-9), lambda _: 10**6), rows[0].device
    dead, taken, graph = torch.zeros(model.d_sae, dtype=torch.bool, device=device), [], StepGraph(device, wanted)

    def compute(given: Sequence[Tensor]) -> StepOutput:
        source, target = given
        output = model.step(source, target, dead, auxk, 0, number=graph.number)
        optimizer.update(output.losses)
        return output.detached()

    for step in range(_WARM + _TIMED):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        optimizer.begin(step)
        output = graph.run(step, "the same", rows, compute)
        torch.cuda.synchronize(device)
        taken.append(1e3 * (time.perf_counter() - began))
    return float(output.loss), statistics.median(taken[_WARM:])


def _random(shape: Shape, device: str) -> tuple[Transcoder, tuple[Tensor, Tensor]]:
    """Return a transcoder of random weights on a device, with unit decoder rows, and a batch."""
    still = Normalisation(torch.zeros(shape.d_in), 1.0, torch.zeros(shape.d_out), 1.0)
    config = shape.transcoder.model_copy(update={"decoder_norm": "unit"})
    model = Transcoder(shape.d_in, shape.d_out, config, shape.activation, still)
    model.initialise(0)
    model.tf32 = True
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(shape.rows, width, generator=generator) for width in (shape.d_in, shape.d_out))
    return model.to(device), (source.to(device), target.to(device))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
