"""What a sync in W&B costs the trainer's steps, also while wandb's process is stopped, by the command.

python -m tests.bench.wandb_sync             writes docs/benchmarks.json and docs/benchmarks.md

Every step is logged, fifty times as often as by default, so that what wandb's process does not take fills its socket
and blocks the sync. Offline, in temporary folders; the first steps, which wait for rows and caches, are left out.
"""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from shared.files import durable
from tests.bench.record import SMOKE, record, sized
from tests.stores import make_store
from tests.wandb_syncs import core, environment, files, paused_while_synced, trainer
from train.wandb_sync import sync as process

D, BLOCKS, WINDOWS, STEPS, WARM, ROUNDS = sized((64, 8, 256, 800, 100, 2), (16, 3, 4, 40, 5, 1))
D_SAE, ROWS = sized((1024, 512), (64, 64))
WAIT: dict[str, float] = sized({}, {"with": 200.0, "stopped": 2.0})
"""By kind, how long the trainer waits for its sync at its end, if not as long as by default."""
SPACE = sized(2**30, 2**20)
LINE = "python -m tests.bench.wandb_sync"
KINDS = {"without": "no sync", "with": "sync", "stopped": "sync, wandb's process stopped"}
OPTIONS = ("--steps", STEPS, "--set", "log_every=1", "--set", f"evaluation.every={STEPS}", "--set", "samples.rows=0",
           "--set", f"checkpoint.every={STEPS}", "--set", "monitor.every=0", "--set", "diversity.mined.weight=0",
           "--set", "diversity.co_activation.weight=0", "--set", "activation.k_start=32",
           "--set", f"transcoder.d_sae={D_SAE}", "--set", f"rows.batch_rows={ROWS}")  # fmt: skip


def main() -> None:
    """Make a store, train by turns, and record."""
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    totals: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        durable.require_space(Path(folder), SPACE, "the bench's store")
        store = make_store(Path(folder, "store"), d_in=D, d_out=D, training_blocks=BLOCKS, context_size=256,
                           edges=(0, 1, 4, 16, 64), keep={0: 0.0625}, block_sequences=WINDOWS)  # fmt: skip
        for i in range(ROUNDS):
            for kind in KINDS:
                found, total = measure(store.path, Path(folder), f"{kind}-{i}", kind)
                steps[kind] += found
                totals[kind].append(total)
                print(f"{kind}: median {statistics.median(found) * 1e3:.2f} ms, worst {max(found) * 1e3:.2f} ms, "
                      f"command {total:.1f} s", file=sys.stderr)  # fmt: skip
    median = {kind: statistics.median(found) for kind, found in steps.items()}
    figures: dict[str, tuple[float, str]] = {}
    for kind, name in KINDS.items():
        figures[f"median step, {name}"] = (median[kind] * 1e3, "ms")
        figures[f"99th percentile, {name}"] = (statistics.quantiles(steps[kind], n=100)[98] * 1e3, "ms")
        figures[f"worst step, {name}"] = (max(steps[kind]) * 1e3, "ms")
        figures[f"whole command, {name}"] = (statistics.median(totals[kind]), "s")
    for kind in ("with", "stopped"):
        figures[f"median step, {KINDS[kind]}, by that without"] = (median[kind] / median["without"], "x")
    figures["bound of the wait at the end"] = (process.SECONDS, "s")
    record(f"sync: every step logged, d {D}, {D_SAE:,} latents, {ROWS} rows", LINE, figures)


def measure(store: Path, folder: Path, name: str, kind: str) -> tuple[list[float], float]:
    """Seconds of every step, and of the whole command."""
    options = ("--wandb",) if kind != "without" else ()
    began = time.monotonic()
    done = trainer("run", "tiny", "--store", store, "--runs", folder, "--name", name, *OPTIONS, *options,
                   seconds=WAIT.get(kind, process.SECONDS), env=environment(folder))  # fmt: skip
    if kind == "stopped":
        if SMOKE:  # the steps are too few to wait for it
            paused_while_synced(done, folder / name)
        while not files(folder / name):
            if done.poll() is not None:
                sys.exit(f"the training ended before its sync began: {done.communicate()[1]}")
            time.sleep(0.01)
        os.kill(core(folder / name), signal.SIGSTOP)
        done.send_signal(signal.SIGCONT)
    _, err = done.communicate()
    total = time.monotonic() - began
    left = process.marked(folder / name)
    if done.returncode or left:
        sys.exit(f"{name}: exit code {done.returncode}, left behind {left}: {err}")
    if ("did not finish" in err) != (kind == "stopped"):
        sys.exit(f"{name}: {err}")
    seconds = [json.loads(line)["seconds"] for line in (folder / name / "timing.jsonl").read_text().splitlines()]
    return [b - a for a, b in zip(seconds[WARM:-2], seconds[WARM + 1 : -1], strict=True)], total


if __name__ == "__main__":
    main()
