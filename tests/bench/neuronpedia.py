"""Files for Neuronpedia of 18,432 latents, by the command: what they take beyond the pass that samples make.

python -m tests.bench.neuronpedia             writes docs/benchmarks.json and docs/benchmarks.md

The store is synthetic (rows of width 256, a vocabulary of 8,192 tokens), the transcoder trained for a few steps.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from shared.files import durable
from tests.bench.record import record, run, sized
from tests.runs import SETS
from tests.stores import make_store

D, D_SAE, VOCABULARY, BLOCKS, WINDOWS, STEPS = sized((256, 18_432, 8192, 8, 256, 30), (16, 64, 100, 3, 4, 20))
SPACE = sized(2 * 2**30, 2**20)
LINE = "python -m tests.bench.neuronpedia"


def main() -> None:
    """Make a store and a transcoder, measure, and record."""
    with tempfile.TemporaryDirectory() as folder:
        durable.require_space(Path(folder), SPACE, "the bench's store and files")
        path = trained(Path(folder))
        train = (sys.executable, "-m", "train")
        run(*train, "samples", path, "--rows", 1000)  # compiles the loops
        run(*train, "export", path, "--format", "neuronpedia", "--out", Path(folder, "warm"))
        pass_ = run(*train, "samples", path, "--json")
        told = json.loads(pass_.out)
        out = Path(folder, "out")
        done = run(*train, "export", path, "--format", "neuronpedia", "--out", out)
        size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    record(
        f"neuronpedia: d {D}, {D_SAE:,} latents, {VOCABULARY:,} tokens",
        LINE,
        {
            "whole command": (done.seconds, "s"),
            "samples, whole command": (pass_.seconds, "s"),
            "beyond the samples": (done.seconds - pass_.seconds, "s more"),
            "beyond the samples, of one core": (done.cpu_seconds - pass_.cpu_seconds, "CPU-s more"),
            "most memory": (done.peak_mib, "MiB"),
            "contexts": (told["contexts"], "contexts"),
            "all files": (size / 2**20, "MiB"),
        },
    )


def trained(folder: Path) -> Path:
    """A run on a synthetic store with an unembedding."""
    store = make_store(
        folder / "store",
        d_in=D,
        d_out=D,
        training_blocks=BLOCKS,
        context_size=128,
        edges=(0, 1, 4, 16, 64),
        keep={0: 0.0625},
        block_sequences=WINDOWS,
        vocabulary=VOCABULARY,
        tokenizer=True,
        unembedding=True,
    )
    tensors = {"W_U": np.random.default_rng(0).normal(size=(VOCABULARY, D)), "final_norm.gain": np.ones(D)}
    save_file({name: one.astype(np.float32) for name, one in tensors.items()}, store.path / "unembedding.safetensors")
    settings = (
        "samples.rows=0",
        f"transcoder.d_sae={D_SAE}",
        "activation.k_start=32",
        "diversity.co_activation.weight=0",
        "monitor.every=0",
    )
    options = [*sized([], SETS), *(part for one in sized(settings, settings[:1]) for part in ("--set", one))]
    done = run(
        sys.executable,
        "-m",
        "train",
        "run",
        "tiny",
        "--store",
        store.path,
        "--runs",
        folder,
        "--steps",
        STEPS,
        *options,
    )
    return Path(done.out.splitlines()[-1])


if __name__ == "__main__":
    main()
