"""One optimiser step on one thread: tokens/s beside the dense reference and the encoder's product alone, and its parts.

python -m tests.bench.step [S] [M] [L]      all shapes when none is named
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numba
import torch

from shared.process import keep_freed_memory
from tests import reference
from tests.bench.peer_worker import peak_mib
from tests.bench.record import record, run
from train.blas import addmm, faster_here
from train.losses import AuxKConfig
from train.optimizer import Optimizer, OptimizerConfig
from train.transcoder import BatchTopK, Normalisation, Transcoder, TranscoderConfig

B = 1024
SHAPES = {"S": (256, 4096, 32), "M": (512, 8192, 32), "L": (768, 16384, 48)}
DEAD = 4
"""Every this-many-th latent counts as dead."""
REPEATS = 9
AUXK = AuxKConfig(coefficient=1 / 32, k=64, row_stride=4)
LINE = "python -m tests.bench.step"


@dataclass
class Setup:
    """A transcoder, its optimiser and one batch."""

    model: Transcoder
    optimizer: Optimizer
    source: torch.Tensor
    target: torch.Tensor
    dead: torch.Tensor
    step: int = 0

    def ours(self) -> None:
        """One whole step."""
        output = self.model.step(self.source, self.target, self.dead, AUXK, self.step)
        self.optimizer.step(output.loss, self.step)
        self.step += 1


def setup(shape: str) -> Setup:
    """Random weights and rows of a shape."""
    d, d_sae, k = SHAPES[shape]
    torch.manual_seed(0)
    activation = BatchTopK(k=k)
    config = TranscoderConfig(d_sae=d_sae).resolve(d, activation)
    still = Normalisation(torch.zeros(d), 1.0, torch.zeros(d), 1.0)
    model = Transcoder(d, d, config, activation, still)
    model.initialise(0)
    model.blas, model.kernels = faster_here(), "compiled"
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4), 10**6)
    dead = torch.arange(d_sae) % DEAD == 0
    return Setup(model, optimizer, torch.randn(B, d), torch.randn(B, d), dead)


def dense_loss(model: Transcoder, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """The loss of a step as plainly as its formula."""
    pre_acts = x @ model.W_enc + model.b_enc
    kept = torch.zeros_like(pre_acts, dtype=torch.bool).view(-1)
    assert isinstance(model.activation, BatchTopK)
    kept[pre_acts.detach().relu().view(-1).topk(model.activation.k * len(x)).indices] = True
    latents = pre_acts * kept.view_as(pre_acts)
    parts = reference.reconstructions(latents, model.W_dec, model.b_dec, model.prefixes)
    loss = sum(reference.prefix_loss(part, y) for part in parts) / len(parts)
    residual = (y - parts[-1])[:: AUXK.row_stride]
    return loss + AUXK.coefficient * dense_auxk(model, x[:: AUXK.row_stride], residual, dead)


def dense_auxk(model: Transcoder, x: torch.Tensor, residual: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """As `reference.auxk_term`, with the rows' largest by topk."""
    residual = residual.detach()
    pre_acts = x @ model.W_enc[:, dead] + model.b_enc[dead]
    chosen = torch.zeros_like(pre_acts).scatter_(1, pre_acts.detach().topk(AUXK.k, dim=1).indices, 1.0)
    return ((pre_acts * chosen) @ model.W_dec[dead] - residual).square().sum() / residual.square().sum()


def main() -> None:
    """Measure the shapes named on the command line, and record."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    keep_freed_memory()
    if sys.argv[1:2] == ["peak"]:
        peak(sys.argv[2], sys.argv[3])
        return
    for shape in sys.argv[1:] or list(SHAPES):
        measure(shape)


def measure(shape: str) -> None:
    """Parity first, then every part in turn, by CPU time."""
    ours, dense = setup(shape), setup(shape)
    output = ours.model.step(ours.source, ours.target, ours.dead, AUXK, 0)
    expected = dense_loss(dense.model, dense.source, dense.target, dense.dead)
    difference = abs(float(output.loss) - float(expected)) / float(expected)
    assert difference < 1e-5, f"the loss is {float(output.loss)}, the dense reference's {float(expected)}"
    adam = torch.optim.Adam(dense.model.parameters(), lr=1e-4, fused=True)

    def dense_step() -> None:
        adam.zero_grad(set_to_none=True)
        dense_loss(dense.model, dense.source, dense.target, dense.dead).backward()
        dense.model.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(dense.model.parameters(), 1.0)
        adam.step()
        dense.model.normalise_decoder()

    model, parts = ours.model, Setup(ours.model, ours.optimizer, ours.source, ours.target, torch.zeros_like(ours.dead))
    pre_acts = model.pre_acts(ours.source)
    low = (ours.source.bfloat16(), model.W_enc.detach().bfloat16())

    taken = interleaved(
        {
            "step": ours.ours,
            "step without aux-k": parts.ours,
            "dense reference": dense_step,
            "encoder's product": lambda: addmm(model.blas, model.b_enc, ours.source, model.W_enc),
            "encoder's product by torch": lambda: torch.addmm(model.b_enc.detach(), ours.source, model.W_enc.detach()),
            "encoder's product in bfloat16": lambda: low[0] @ low[1],
            "selection": lambda: model.select(pre_acts, 0),
            "update": lambda: ours.optimizer._adam.update(1e-4, 1.0),
        }
    )
    figures: dict[str, tuple[float, str]] = {
        f"{name}: tokens/s": (B / taken[name], "tokens/s") for name in ("step", "step without aux-k", "dense reference")
    }
    figures |= {name: (seconds * 1e3, "CPU-ms") for name, seconds in taken.items()}
    figures["step over dense reference"] = (taken["dense reference"] / taken["step"], "times as fast")
    figures["step over encoder's product"] = (taken["step"] / taken["encoder's product"], "times the time")
    figures["loss beside the dense reference, relative difference"] = (difference, "")
    for name in ("ours", "dense"):
        done = run(sys.executable, "-m", "tests.bench.step", "peak", shape, name)
        figures[f"peak memory, {name}"] = (float(done.out), "MiB")
    d, d_sae, k = SHAPES[shape]
    record(f"step {shape}: d {d}, d_sae {d_sae}, k {k}, B {B}, one thread", f"{LINE} {shape}", figures)


def peak(shape: str, name: str) -> None:
    """A process whose memory is measured."""
    made = setup(shape)
    for _ in range(3):
        if name == "ours":
            made.ours()
        else:
            loss = dense_loss(made.model, made.source, made.target, made.dead)
            made.optimizer.step(loss, 0)
    print(peak_mib())


def interleaved(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(REPEATS + 1):
        for name, part in parts.items():
            began = time.process_time()
            part()
            if repeat:  # the first round warms up
                taken[name].append(time.process_time() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
