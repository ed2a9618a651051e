"""How the encoder's scale at the start decides what a short run reaches.

python -m tests.bench.initialisation STORE      writes docs/benchmarks.json and docs/benchmarks.md
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.bench.record import record, run, sized
from tests.runs import SETS

SCALES, STEPS = sized(((1.0, 0.5, 0.25, 0.1), 1000), ((0.5, 0.25), 20))


def main() -> None:
    """Train once per scale and record."""
    store, figures = sys.argv[1], dict[str, tuple[float, str]]()
    with tempfile.TemporaryDirectory() as folder:
        for scale in SCALES:
            options = ("--steps", STEPS, "--set", f"transcoder.encoder_scale={scale}", *sized([], SETS))
            done = run(sys.executable, "-m", "train", "run", "tiny", "--store", store, "--runs", folder, *options)
            last = json.loads((Path(done.out.splitlines()[-1]) / "metrics.jsonl").read_text().splitlines()[-1])
            figures[f"encoder scale {scale}: held-out fvu"] = (last["held_out"]["fvu"], "")
            figures[f"encoder scale {scale}: dead"] = (last["held_out"]["dead_share"], "share")
    record(f"initialisation: tiny, {STEPS} steps", "python -m tests.bench.initialisation STORE", figures)


if __name__ == "__main__":
    main()
