"""One step of a dictionary in eight virtual shards, by one process and by two under torchrun, each with one thread.

python -m tests.bench.parallel [S] [M] [L]         shapes as of tests.bench.step; M when none is named

Processes take turns with each other: one, two, one, two. `CPU time` is that of the process that needs most, which
is what a step takes where every process has a core for itself.
"""

import json
import os
import statistics
import sys
import time

import torch

from tests.bench.record import named, record, run, sized
from tests.bench.step import AUXK, SHAPES, one_thread, setup
from train.parallel.dictionary import ShardedTranscoder
from train.parallel.ranks import Ranks
from train.run.optimizer import Optimizer, OptimizerConfig

SHARDS = 8
ROUNDS, STEPS, WARM = sized((2, 12, 2), (1, 2, 1))


def main() -> None:
    """Measure the shapes named on the command line, and record; or be one of the processes."""
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2])
        return
    names = named(__doc__, *SHAPES) if sys.argv[1:] else [sized("M", "S")]
    for shape in names:
        measure(shape)


def worker(shape: str) -> None:
    """Print milliseconds of each step, and the CPU time of a step in the process that needs most."""
    one_thread()
    ranks = Ranks()
    ranks.join()
    made = setup(shape)
    model = ShardedTranscoder(made.model, SHARDS, ranks)
    model.take()
    optimizer = Optimizer(model, OptimizerConfig(lr=1e-4), lambda _: 10**6)
    taken = []
    for step in range(WARM + STEPS):
        if step == WARM:
            cpu = time.process_time()
        began = time.perf_counter()
        output = model.step(made.source, made.target, made.dead, AUXK, step)
        optimizer.step(output.losses, step)
        taken.append(1e3 * (time.perf_counter() - began))
    own = torch.tensor([[1e3 * (time.process_time() - cpu) / STEPS]], dtype=torch.float64)
    most = float(ranks.gathered(own).max())
    if ranks.rank == 0:
        print(json.dumps({"wall": taken[WARM:], "cpu": most}))
    ranks.leave()


def measure(shape: str) -> None:
    """Let one process and two take turns, and record medians."""
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    wall: dict[int, list[float]] = {1: [], 2: []}
    cpu: dict[int, list[float]] = {1: [], 2: []}
    runner = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    for _ in range(ROUNDS):
        for processes in wall:
            line = (*runner, f"--nproc-per-node={processes}", "-m", "tests.bench.parallel", "worker", shape)
            found = json.loads(run(*line).out.splitlines()[-1])
            wall[processes] += found["wall"]
            cpu[processes].append(found["cpu"])
    d, d_sae, k = SHAPES[shape]
    figures: dict[str, tuple[float, str]] = {}
    for kind, measured in (("", wall), ("CPU time, ", cpu)):
        one, two = (statistics.median(measured[processes]) for processes in (1, 2))
        figures |= {f"{kind}one process": (one, "ms"), f"{kind}two processes": (two, "ms")}
        figures |= {f"{kind}one by two": (one / two, "x")}
    record(f"parallel step {shape}: d {d}, d_sae {d_sae}, k {k}", "python -m tests.bench.parallel", figures)


if __name__ == "__main__":
    main()
