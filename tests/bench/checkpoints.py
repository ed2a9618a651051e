"""What a checkpoint of the default size costs, written beside training or while it waits, as a share of 500 steps.

python -m tests.bench.checkpoints STORE                      a store of `make harvest`
python -m tests.bench.checkpoints large                      the times of one checkpoint of d_sae 18,432, d 2,304

Processor time, which other work on the machine changes little: that of a step, and that of a checkpoint on the way, in
the training's thread (calibration, the copy) and beside it (writing, checksums), on one thread each.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.bench.record import record, run, sized
from tests.runs import VALUES

STEPS, EVERY = sized((500, 125), (12, 4))
ARMS = {"beside training": "true", "training waits": "false"}
OPTIONS = ["samples.rows=0", "threads=1", "steps=7000", f"checkpoint.every={EVERY}"]
OPTIONS += sized([], [f"log_every={EVERY}", *(f"{key}={value}" for key, value in VALUES.items())])
D_SAE, D = sized((18_432, 2_304), (256, 64))
"""Of the large checkpoint: a layer of Gemma 2 2B."""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store")
    parser.add_argument("--arm", choices=ARMS)
    options = parser.parse_args()
    if options.store == "large":
        large()
    elif options.arm:
        print(json.dumps(worker(options.store, options.arm)))
    else:
        compare(options.store)


def compare(store: str) -> None:
    """Both arms."""
    figures: dict[str, tuple[float, str]] = {}
    for arm in ARMS:
        done = run(sys.executable, "-m", "tests.bench.checkpoints", store, "--arm", arm)
        found = json.loads(done.out.splitlines()[-1])
        print(arm, found, file=sys.stderr)
        per_step = (found["run"] - found["inside"] - found["beside"]) / STEPS
        figures |= {
            f"a step, {arm}": (1000 * per_step, "CPU ms"),
            f"a checkpoint, in the training's thread, {arm}": (found["inside"] / found["count"], "CPU s"),
            f"a checkpoint, beside it, {arm}": (found["beside"] / found["count"], "CPU s"),
            f"training held up, {arm}": (found["held_up"] / found["count"], "s"),
            f"checkpoints every {STEPS} steps, {arm}": (
                100 * (found["inside"] + found["beside"]) / found["count"] / (STEPS * per_step),
                "% of the run's CPU",
            ),
        }
    record(
        f"checkpoints, default size, as a share of {STEPS} steps", "python -m tests.bench.checkpoints STORE", figures
    )


def worker(store: str, arm: str) -> dict[str, float]:
    """One run: its processor seconds, those of its checkpoints on the way, and how long they held training up."""
    from shared.errors import Stopped
    from train import commands
    from train.live.run_files import TIMING
    from train.run import trainer
    from train.run.metrics import Log
    from train.run.saver import Saver
    from train.run.settings import load_settings

    found = {"inside": 0.0, "beside": 0.0, "held_up": 0.0, "count": 0.0}
    checkpoint, write = trainer.Trainer._checkpoint, Saver._try

    def inside(self: trainer.Trainer, done: int, held_out: Any, *, last: bool) -> None:
        began, cpu = time.perf_counter(), time.thread_time()
        checkpoint(self, done, held_out, last=last)
        if done < STEPS:
            found["held_up"] += time.perf_counter() - began
            found["inside"] += time.thread_time() - cpu
            found["count"] += 1

    def beside(self: Saver, job: Any) -> None:
        cpu = time.thread_time()
        write(self, job)
        if ARMS[arm] == "true" and job.step < STEPS:
            found["beside"] += time.thread_time() - cpu

    def step(self: trainer.Trainer, done: int) -> Any:
        if done == STEPS + 5:  # what is measured is over
            signal.raise_signal(signal.SIGTERM)
        return real(self, done)

    real = trainer.Trainer._step
    settings = load_settings("tiny", [*OPTIONS, f"checkpoint.background={ARMS[arm]}"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        with ExitStack() as stack:
            for place, name, measured in (
                (trainer.Trainer, "_checkpoint", inside),
                (Saver, "_try", beside),
                (trainer.Trainer, "_step", step),
            ):
                stack.enter_context(patch.object(place, name, measured))
            stack.enter_context(suppress(Stopped))
            commands.train(store, settings, path)
        row = next(row for row in Log(path / TIMING).rows() if row["step"] == STEPS)
        return found | {"run": row["cpu_seconds"]}


def large() -> None:
    """A checkpoint of the size of Gemma 2 2B's layer."""
    import torch

    from train.model import checkpoint
    from train.run.saver import CheckpointConfig, Saver

    weights = {name: torch.randn(D_SAE, D) for name in ("W_enc", "W_dec")}
    optimizer = {f"{name}.{kind}": torch.randn(D_SAE, D) for name in weights for kind in ("exp_avg", "exp_avg_sq")}
    size, held, whole = 12 * 2 * D_SAE * D, dict[str, float](), dict[str, float]()
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
        f"one checkpoint, d_sae {D_SAE:,}, d {D:,}",
        "python -m tests.bench.checkpoints large",
        {"size": (taken, "bytes")}
        | {f"training held up, {name}": (seconds, "s") for name, seconds in held.items()}
        | {f"until it is published and read back, {name}": (seconds, "s") for name, seconds in whole.items()},
    )


if __name__ == "__main__":
    main()
