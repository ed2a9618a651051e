"""Peak memory of a harvest at Gemma-2-2B's width: d 2,304, random weights, three blocks.

python -m tests.bench.wide                writes docs/benchmarks.json and docs/benchmarks.md
"""

import sys
import tempfile
from pathlib import Path

from shared.layout import block_bytes
from shared.store import read_store_record
from tests.bench.record import record, run
from tests.llms import make_gemma

SEQUENCES, CONTEXT = 32, 1024


def main() -> None:
    """Harvest with the preset `gemma-2-2b` from a narrow-MLP model of its width, and record."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_gemma(Path(folder) / "model", hidden_size=2304, num_hidden_layers=9, sliding_window=512)
        options = ("--model", model, "--text", "embedded", "--cache", Path(folder) / "cache")
        sizes = {"store.block_sequences": SEQUENCES, "store.held_out_blocks": 1, "model.dtype": "float32"}
        settings = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
        tokens = ("--tokens", 2 * SEQUENCES * CONTEXT)
        plain = ("--set", "text.streaming=false", "--set", "text.column=text")
        done = run(sys.executable, "-m", "harvest", "run", "gemma-2-2b", *options, *tokens, *settings, *plain)
        found = read_store_record(Path(done.out.splitlines()[-1]))
        weights = (model / "model.safetensors").stat().st_size
    block = block_bytes(found.request, found.d_in, found.d_out)
    figures = {
        "peak memory": (done.peak_mib, "MiB"),
        "one block": (block / 2**20, "MiB"),
        "model weights": (weights / 2**20, "MiB"),
        "peak memory beyond two blocks": (done.peak_mib - 2 * block / 2**20, "MiB"),
    }
    record("harvest at d 2,304, three blocks", "python -m tests.bench.wide", figures)


if __name__ == "__main__":
    main()
