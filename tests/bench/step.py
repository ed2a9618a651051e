"""One optimiser step on one thread: tokens/s beside the dense reference and the encoder's product alone, and its parts.

python -m tests.bench.step [S] [M] [L]              all shapes when none is named
python -m tests.bench.step threads [S] [M] [L]      two threads beside one, by wall time
python -m tests.bench.step guarded [S] [M] [L]      the guarded search in bfloat16 beside a product in float32
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numba
import torch

from shared.console.process import keep_freed_memory
from tests import reference
from tests.bench.peer_worker import peak_mib
from tests.bench.record import record, run, sized
from train.model.activations import BatchTopK
from train.model.blas import addmm, faster_here, product
from train.model.kernels import guarded
from train.model.kernels.base import Groups
from train.model.kernels.sparse_ops import sparse_ops
from train.model.losses import AuxKConfig
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.latent_counters import Counters
from train.run.metrics import Window
from train.run.optimizer import Optimizer, OptimizerConfig

B = sized(1024, 64)
SHAPES = sized({"S": (256, 4096, 32), "M": (512, 8192, 32), "L": (768, 16384, 48)}, {"S": (16, 128, 4)})
DEAD = 4
"""Every this-many-th latent counts as dead."""
REPEATS = sized(9, 2)
AUXK = AuxKConfig(coefficient=1 / 32, k=sized(64, 8), row_stride=4)
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
        self.optimizer.step(output.losses, self.step)
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
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4), lambda _: 10**6)
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
    chosen = torch.zeros_like(pre_acts).scatter_(1, pre_acts.detach().topk(AUXK.active(dead), dim=1).indices, 1.0)
    return ((pre_acts * chosen) @ model.W_dec[dead] - residual).square().sum() / residual.square().sum()


def main() -> None:
    """Measure the shapes named on the command line, and record."""
    if sys.argv[1:2] == ["peak"]:
        one_thread()
        peak(sys.argv[2], sys.argv[3])
        return
    if sys.argv[1:2] in (["threads"], ["guarded"]):
        for shape in sys.argv[2:] or list(SHAPES):
            {"threads": threads, "guarded": search}[sys.argv[1]](shape)
        return
    for shape in sys.argv[1:] or list(SHAPES):
        measure(shape)


def one_thread() -> None:
    """Have this process use one thread, and keep its memory as a run does."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    keep_freed_memory()


def measure(shape: str) -> None:
    """Memory and parity first, then every part in turn, by CPU time."""
    peaks: dict[str, tuple[float, str]] = {}
    for name in ("ours", "dense"):
        done = run(sys.executable, "-m", "tests.bench.step", "peak", shape, name)
        peaks[f"peak memory, {name}"] = (float(done.out), "MiB")
    one_thread()
    ours, dense = setup(shape), setup(shape)
    output = ours.model.step(ours.source, ours.target, ours.dead, AUXK, 0)
    expected = dense_loss(dense.model, dense.source, dense.target, dense.dead)
    loss, plain = float(output.loss.detach()), float(expected.detach())
    difference = abs(loss - plain) / plain
    assert difference < 1e-5, f"the loss is {loss}, the dense reference's {plain}"
    adam = torch.optim.Adam(dense.model.parameters(), lr=1e-4, fused=True)

    def dense_step() -> None:
        adam.zero_grad(set_to_none=True)
        dense_loss(dense.model, dense.source, dense.target, dense.dead).backward()
        dense.model.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(dense.model.parameters(), 1.0)
        adam.step()
        dense.model.normalise_decoder()

    model, no_dead = ours.model, torch.zeros_like(ours.dead)
    without = Setup(model, ours.optimizer, ours.source, ours.target, no_dead)
    x, y = model.normalised(ours.source, ours.target)
    pre_acts = model.pre_acts(x)
    active, _ = model.select(pre_acts, 0)
    counters, window = figures_of(model)
    low = (ours.source.bfloat16(), model.W_enc.detach().bfloat16())

    def forward() -> torch.Tensor:
        values = sparse_ops("compiled").encode(x, model.W_enc, model.b_enc, active).relu()
        base, prefixes = model.b_dec.unsqueeze(0), len(model.prefixes)
        groups = Groups(model.group, prefixes, 1e-6)
        return sparse_ops("compiled").prefix_loss(values, model.W_dec, base, y, active, groups)[0]

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        forward().backward()

    def figured() -> None:
        counters.update(output)
        window.add(output, torch.ones(()))

    taken = interleaved(
        {
            "step": ours.ours,
            "step without dead latents": without.ours,
            "dense reference": dense_step,
            "encoder's product": lambda: addmm(model.blas, model.b_enc, x, model.W_enc),
            "encoder's product by torch": lambda: torch.addmm(model.b_enc.detach(), x, model.W_enc.detach()),
            "encoder's product in bfloat16": lambda: low[0] @ low[1],
            "selection": lambda: model.select(pre_acts, 0),
            "loss of all prefixes": forward,
            "loss and gradients": backward,
            "update": lambda: ours.optimizer._adam.update(1.0),
            "figures": figured,
        }
    )
    taken["gradients"] = taken.pop("loss and gradients") - taken["loss of all prefixes"]
    taken["aux-k"] = taken["step"] - taken["step without dead latents"]
    shares = ("encoder's product", "selection", "loss of all prefixes", "gradients", "aux-k", "update")
    taken["the rest of the step"] = taken["step"] - sum(taken[name] for name in shares)
    figures: dict[str, tuple[float, str]] = {
        f"{name}: tokens/s": (B / taken[name], "tokens/s")
        for name in ("step", "step without dead latents", "dense reference")
    }
    figures |= {name: (seconds * 1e3, "CPU-ms") for name, seconds in taken.items()}
    for name in (*shares, "the rest of the step"):
        figures[f"share of the step: {name}"] = (100 * taken[name] / taken["step"], "%")
    figures["step over dense reference"] = (taken["dense reference"] / taken["step"], "times as fast")
    figures["step over encoder's product"] = (taken["step"] / taken["encoder's product"], "times the time")
    low_product = taken["encoder's product in bfloat16"]
    figures["step over encoder's product in bfloat16"] = (taken["step"] / low_product, "times the time")
    figures["loss beside the dense reference, relative difference"] = (difference, "")
    figures |= peaks
    d, d_sae, k = SHAPES[shape]
    record(f"step {shape}: d {d}, d_sae {d_sae}, k {k}, B {B}, one thread", f"{LINE} {shape}", figures)


def figures_of(model: Transcoder) -> tuple[Counters, Window]:
    """What a run counts and sums after every step."""
    strata, width = {"001-256": slice(0, B)}, model.W_dec.shape[1]
    return Counters(model.d_sae, 10**6, torch.device("cpu")), Window(strata, model.prefixes, width, torch.ones(B))


def threads(shape: str) -> None:
    """A step with one thread and with two, taking turns, by wall time."""
    one_thread()
    made = setup(shape)
    x, _ = made.model.normalised(made.source, made.target)

    def on(number: int, part: Callable[[], object]) -> Callable[[], object]:
        def call() -> None:
            torch.set_num_threads(number)
            numba.set_num_threads(sized(number, 1))
            part()

        return call

    parts = {"step": made.ours, "encoder's product": lambda: made.model.pre_acts(x)}
    wanted = {f"{name}, {n} thread{'s' * (n - 1)}": on(n, part) for name, part in parts.items() for n in (1, 2)}
    taken = interleaved(wanted, time.perf_counter)
    figures: dict[str, tuple[float, str]] = {name: (seconds * 1e3, "ms") for name, seconds in taken.items()}
    for name in parts:
        figures[f"{name}: two threads over one"] = (taken[f"{name}, 1 thread"] / taken[f"{name}, 2 threads"], "times")
    d, d_sae, k = SHAPES[shape]
    record(f"threads {shape}: d {d}, d_sae {d_sae}, k {k}, B {B}", f"{LINE} threads {shape}", figures)


def search(shape: str) -> None:
    """A step by a guarded search and one by a product in float32, taking turns, with their products and selections."""
    whole, low, k = setup(shape), setup(shape), SHAPES[shape][2]
    low.model.guarded = guarded.Guarded()
    x, W_enc, b_enc = whole.source, whole.model.W_enc.detach().clone(), whole.model.b_enc.detach().clone()
    near, pre_acts, alone = guarded.in_bfloat16(x, W_enc, b_enc), whole.model.pre_acts(x), guarded.Guarded()
    alone.batch_topk(whole.model.blas, x, W_enc, b_enc, k * B, True)  # so that it has a guess, as `select` has

    low_x, low_W = x.bfloat16(), W_enc.T.bfloat16().T

    def find() -> None:
        guarded._rounded(x), guarded._rounded(W_enc.T)
        alone._search(near, x, W_enc, k * B).largest(k * B)

    taken = interleaved(
        {
            "step, float32": whole.ours,
            "step, guarded-bfloat16": low.ours,
            "product, float32": lambda: product(whole.model.blas, x, W_enc),
            "product, bfloat16": lambda: low_x @ low_W,
            "selection, float32": lambda: whole.model.select(pre_acts, 0),
            "selection and rounding of both sides, guarded-bfloat16": find,
        }
    )
    figures: dict[str, tuple[float, str]] = {name: (seconds * 1e3, "CPU-ms") for name, seconds in taken.items()}
    ratio = taken["step, float32"] / taken["step, guarded-bfloat16"]
    figures["step, guarded-bfloat16 over float32"] = (ratio, "times as fast")
    units = {"search_computed": "values per selected pair", "search_again": "steps", "search_fallbacks": "steps"}
    figures |= {name: (value, units[name]) for name, value in low.model.guarded.figures().items()}
    d, d_sae, _ = SHAPES[shape]
    record(f"guarded {shape}: d {d}, d_sae {d_sae}, k {k}, B {B}, one thread", f"{LINE} guarded {shape}", figures)


def peak(shape: str, name: str) -> None:
    """A process whose memory is measured."""
    made = setup(shape)
    for _ in range(3):
        if name == "ours":
            made.ours()
        else:
            loss = dense_loss(made.model, made.source, made.target, made.dead)
            made.optimizer.step([loss], 0)
    print(peak_mib())


def interleaved(
    parts: dict[str, Callable[[], object]], clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each, CPU time if not said otherwise, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(REPEATS + 1):
        for name, part in parts.items():
            began = clock()
            part()
            if repeat:  # the first round warms up
                taken[name].append(clock() - began)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
