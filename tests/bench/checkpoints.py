"""What checkpoints every 500 steps cost a run of the default size, written beside training or while it waits.

python -m tests.bench.checkpoints STORE [--repeats N]        a store of `make harvest`
python -m tests.bench.checkpoints large                      the times of one checkpoint of d_sae 18,432, d 2,304

Interleaved repeats; the figures are medians of seconds up to the last step, on one thread, with the last checkpoint,
which all three make, left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tests.bench.record import ROOT, record

STEPS, EVERY = 1_250, 500
ARMS = {
    "none": [f"checkpoint.every={STEPS}"],
    "beside training": [f"checkpoint.every={EVERY}"],
    "training waits": [f"checkpoint.every={EVERY}", "checkpoint.background=false"],
}
OFF = ["samples.rows=0", "threads=1", f"log_every={STEPS}", f"evaluation.every={STEPS}"]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.store == "large":
        large()
    elif options.arm:
        print(json.dumps(worker(options.store, options.arm)))
    else:
        compare(options.store, options.repeats)


def compare(store: str, repeats: int) -> None:
    """All arms, interleaved."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(repeats):
        for arm in ARMS:
            command = [sys.executable, "-m", "tests.bench.checkpoints", store, "--arm", arm]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(arm, found[arm][-1], file=sys.stderr)
    figures = {
        f"{name}, {arm}": (median(one[key] for one in runs), unit)
        for arm, runs in found.items()
        for name, key, unit in (
            ("run", "seconds", "s"),
            ("run, processor", "cpu_seconds", "CPU s"),
            ("held up by a checkpoint", "held_up", "s"),
        )
        if not (arm == "none" and key == "held_up")
    }
    nothing = found["none"]
    for arm in list(ARMS)[1:]:
        for name, key in (("seconds", "seconds"), ("processor time", "cpu_seconds")):
            ratios = [a[key] / b[key] - 1 for a, b in zip(found[arm], nothing, strict=True)]
            figures[f"cost in {name}, {arm}"] = (100 * median(ratios), "% of the run")
        share = median(one["held_up"] * 2 / one["seconds"] for one in found[arm])
        figures[f"steps held up, {arm}"] = (100 * share, "% of the run")
    record(f"checkpoints every {EVERY} of {STEPS:,} steps", "python -m tests.bench.checkpoints STORE", figures)


def worker(store: str, arm: str) -> dict[str, float]:
    """One run; seconds to its last step, and those that a checkpoint held training up, on average."""
    from shared.config import build
    from shared.store import Store
    from train import commands, loop
    from train.metrics import TIMING, Log
    from train.settings import Settings, load_settings

    held: list[float] = []
    real = loop.Run._checkpoint

    def timed(self: loop.Run, done: int, held_out: Any, *, last: bool) -> None:
        began = time.perf_counter()
        real(self, done, held_out, last=last)
        if not last:
            held.append(time.perf_counter() - began)

    loop.Run._checkpoint = timed  # type: ignore[method-assign]
    raw = load_settings("tiny", None, [f"steps={STEPS}", *OFF, *ARMS[arm]])
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        opened = Store.open(Path(store))
        commands.start(opened, build(Settings, raw, "bench"), run, None, force=False, fallback=None)
        last = Log(run / TIMING).rows()[-1]
    return {
        "seconds": last["seconds"],
        "cpu_seconds": last["cpu_seconds"],
        "held_up": sum(held) / max(len(held), 1),
    }


def large() -> None:
    """A checkpoint of the size of Gemma 2 2B's layer."""
    import torch

    from train import checkpoint
    from train.saver import CheckpointConfig, Saver

    d_sae, d = 18_432, 2_304
    weights = {name: torch.randn(d_sae, d) for name in ("W_enc", "W_dec")}
    optimizer = {f"{name}.{kind}": torch.randn(d_sae, d) for name in weights for kind in ("exp_avg", "exp_avg_sq")}
    size, held, whole = 12 * 2 * d_sae * d, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, background in (("beside training", True), ("training waits", False)):
            config = CheckpointConfig(background=background, keep_last=1, reserve=False)
            with Saver(Path(folder), config, {}, size) as saver:
                began = time.perf_counter()
                saver.save(1, weights, optimizer, None)
                held[name] = time.perf_counter() - began
            whole[name] = time.perf_counter() - began
            taken = sum(file.stat().st_size for file in checkpoint.folder(Path(folder), 1).iterdir())
    record(
        "one checkpoint, d_sae 18,432, d 2,304",
        "python -m tests.bench.checkpoints large",
        {"size": (taken, "bytes")}
        | {f"training held up, {name}": (seconds, "s") for name, seconds in held.items()}
        | {f"until it is published and read back, {name}": (seconds, "s") for name, seconds in whole.items()},
    )


if __name__ == "__main__":
    main()
