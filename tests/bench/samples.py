"""Samples of 4,096 latents from a million rows of width 128, by the command.

python -m tests.bench.samples             writes docs/benchmarks.json and docs/benchmarks.md

The store is synthetic (600 MB in a temporary folder), the transcoder trained for some steps, so that 32 latents are
active on a row.
"""

import json
import sys
import tempfile
from pathlib import Path

from shared.files import durable
from tests.bench.record import record, run, sized
from tests.runs import SETS
from tests.stores import make_store

D, BLOCKS, WINDOWS, STEPS = sized((128, 16, 256, 200), (16, 3, 4, 20))
SPACE = sized(2**30, 2**20)
LINE = "python -m tests.bench.samples"


def main() -> None:
    """Make a store and a transcoder, measure, and record."""
    with tempfile.TemporaryDirectory() as folder:
        durable.require_space(Path(folder), SPACE, "the bench's store")
        store = make_store(
            Path(folder, "store"),
            d_in=D,
            d_out=D,
            training_blocks=BLOCKS,
            context_size=256,
            edges=(0, 1, 4, 16, 64),
            keep={0: 0.0625},
            block_sequences=WINDOWS,
            vocabulary=1000,
            tokenizer=True,
        )
        options = ("--steps", STEPS, "--set", "samples.rows=0", "--set", "activation.k_start=32", *sized([], SETS))
        train = (sys.executable, "-m", "train")
        done = run(*train, "run", "tiny", "--store", store.path, "--runs", folder, *options)
        path = Path(done.out.splitlines()[-1])
        run(*train, "samples", path, "--rows", 1000)  # compiles the loops
        done = run(*train, "samples", path, "--json")
        told = json.loads(done.out)
        found = [file.stat().st_size for file in Path(told["path"]).parent.iterdir()]
    record(
        "samples: d 128, 4,096 latents",
        LINE,
        {
            "whole command": (done.seconds, "s"),
            "whole command, both cores": (done.cpu_seconds, "CPU s"),
            "most memory": (done.peak_mib, "MiB"),
            "stored rows looked at": (sum(told["rows"].values()), "rows"),
            "latents with samples": (told["latents"], "latents"),
            "contexts of 32 tokens": (told["contexts"], "contexts"),
            "both files": (sum(found) / 2**20, "MiB"),
        },
    )


if __name__ == "__main__":
    main()
