"""One optimiser step of this trainer and of others, taking turns, each in an environment of its own; one thread.

python -m tests.bench.peers [S] [M] [L]     makes .venv-peers/ at first use (gigabytes, minutes)

Same rows, width and k, a quarter of the latents dead; loss, all prefixes, aux-k, clipping and the decoder's norm
included where the trainer has them. Peers once as they come, and once with glibc told to keep freed memory.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.bench.peer_worker import STAND_IN, STEPS
from tests.bench.record import ROOT, SMOKE, named, record, sized
from tests.bench.step import SHAPES, B

PLACE = sized(ROOT / ".venv-peers", ROOT)
PACKAGES = {
    "SAELens": "sae-lens==6.54.12",
    "dictionary_learning": "dictionary-learning==0.1.0",
    "sparsify": "eai-sparsify==1.3.3",
    "circuit_tracer": "circuit-tracer==0.5.0",
    "delphi": "eai-delphi==0.1.3",
    "SAEDashboard": "sae-dashboard==0.8.0",
}
BESIDE = {
    "delphi": ("transformers", "orjson", "asyncer", "blobfile", "faiss-cpu", "sentence-transformers", "jaxtyping",
               "simple_parsing", "safetensors", "datasets"),
    "SAEDashboard": ("sae-lens==6.54.12", "eindex-callum", "dataclasses-json", "python-dotenv", "requests", "einops",
                     "matplotlib", "rich", "neuronpedia==1.2.1"),
}  # fmt: skip
"""What these two are installed with instead of their own dependencies: delphi's bring a server of LLMs, and those of
SAEDashboard cannot be met beside the SAELens that reads transcoders."""
TORCH = "torch==2.13.0"
ROUNDS = sized({"S": 12, "M": 8, "L": 3}, {"S": 1})
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
LINE = "python -m tests.bench.peers"


def others(known: Iterable[str]) -> list[str]:
    """The other trainers among `known`; where a bench only shows that it runs, one that needs no installation."""
    return [name for name in known if name != "ours" and (name == STAND_IN) == bool(SMOKE)]


def environment(package: str) -> Path:
    """The Python of a peer's environment, made if it is missing."""
    if package == STAND_IN:
        return Path(sys.executable)
    folder = PLACE / package
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"installing {PACKAGES[package]} into {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        last = ["--no-deps", PACKAGES[package]] if package in BESIDE else [TORCH, PACKAGES[package]]
        # torch first, alone: of a range, pip may take another build
        for wanted in ([TORCH], *([[TORCH, *BESIDE[package]]] if package in BESIDE else []), last):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        if package == "dictionary_learning":  # it pulls a torchvision of another build, which breaks the import
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
        (folder / "made").touch()
    return python


class Worker:
    """A process that makes a step when told."""

    def __init__(self, name: str, shape: str, tuned: bool) -> None:
        d, d_sae, k = SHAPES[shape]
        python = Path(sys.executable) if name == "ours" else environment(name.split()[0])
        threads = {f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
        where = {"PYTHONPATH": str(ROOT)} if name == "ours" else {}
        # -P: a peer must not take this folder's modules for its own
        line = [python, "-P", ROOT / "tests/bench/peer_worker.py", name, d, d_sae, k, B]
        self._name = name
        self._process = subprocess.Popen(
            [str(part) for part in line],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT if name == "ours" else PLACE,
            env={**os.environ, **threads, **where, **(TUNED if tuned else {})},
        )
        while (found := self._read().strip()) != "ready":
            print(found, file=sys.stderr)

    def step(self) -> tuple[float, float]:
        """CPU seconds of a step, and the peak memory so far in MiB."""
        assert self._process.stdin is not None
        print(file=self._process.stdin, flush=True)
        seconds, peak = self._read().split()
        return float(seconds), float(peak)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"{self._name} ended with exit code {self._process.wait()}")
        return line


def main() -> None:
    """Measure the shapes named on the command line, and record."""
    for shape in named(__doc__, *SHAPES):
        measure(shape)


def measure(shape: str) -> None:
    """Every trainer in turn, round by round, after two rounds to warm up."""
    wanted = [("ours", False), *((name, tuned) for name in others(STEPS) for tuned in (False, True))]
    workers = {one: Worker(one[0], shape, one[1]) for one in wanted}
    seconds: dict[tuple[str, bool], list[float]] = {one: [] for one in wanted}
    peaks = {}
    try:
        for round_ in range(ROUNDS[shape] + 2):
            for one, worker in workers.items():
                once, peaks[one] = worker.step()
                if round_ >= 2:
                    seconds[one].append(once)
    finally:
        for worker in workers.values():
            worker.stop()
    figures: dict[str, tuple[float, str]] = {}
    own = statistics.median(seconds["ours", False])
    for (name, tuned), taken in seconds.items():
        label = f"{name}, memory kept" if tuned else name
        figures[f"{label}: tokens/s"] = (B / statistics.median(taken), "tokens/s")
        figures[f"{label}: peak memory"] = (peaks[name, tuned], "MiB")
        if name != "ours":
            figures[f"ours over {label}"] = (statistics.median(taken) / own, "times as fast")
    d, d_sae, k = SHAPES[shape]
    record(f"peers {shape}: d {d}, d_sae {d_sae}, k {k}, B {B}, one thread", f"{LINE} {shape}", figures)


if __name__ == "__main__":
    main()
