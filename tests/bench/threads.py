"""How idle OpenMP threads wait, on a machine where something else keeps one core busy.

python -m tests.bench.threads             writes docs/benchmarks.json and docs/benchmarks.md
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.record import ROOT, record, sized
from tests.stores import make_store

STEPS = sized(200, 5)
BUSY = sized("while True: pass", "import time; time.sleep(600)")


def main() -> None:
    """Train small steps beside a busy process and record."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        try:
            figures = {
                f"{name}: steps per second": (rate(store.path, Path(folder) / name, threads, policy), "1/s")
                for name, threads, policy in (
                    ("two threads that spin", 2, "ACTIVE"),
                    ("two threads that sleep", 2, "PASSIVE"),
                    ("one thread", 1, "PASSIVE"),
                )
            }
        finally:
            busy.kill()
    record("threads: d_sae 256, B 64, beside a busy process", "python -m tests.bench.threads", figures)


def rate(store: Path, runs: Path, threads: int, policy: str) -> float:
    """Steps per second of a run, start-up excluded."""
    shape = ("transcoder.d_sae=256", "activation.k=8", "rows.batch_rows=64", f"threads={threads}")
    options = [part for setting in shape for part in ("--set", setting)]
    where = ("--store", store, "--runs", runs, "--steps", STEPS)
    command = [sys.executable, "-m", "train", "run", "tiny", *where, *options]
    environment = os.environ | {"OMP_WAIT_POLICY": policy}
    subprocess.run([str(part) for part in command], env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    last = json.loads((runs / "tiny-001" / "timing.jsonl").read_text().splitlines()[-1])
    return float(last["rows_per_second"] / 64)


if __name__ == "__main__":
    main()
