"""Six runs side by side against the same six alone, one after the other: time, CPU, and how often rows are read.

python -m tests.bench.sweep STORE         writes docs/benchmarks.json and docs/benchmarks.md
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.bench.record import Finished, record, run, sized

STEPS = sized(40, 4)
SETTINGS = sized(
    {"steps": STEPS, "rows.seed": 0},
    {"steps": STEPS, "rows.seed": 0, "transcoder.d_sae": 64, "rows.batch_rows": 48, "samples.rows": 500},
)
GRID = {"activation.k": sized([16, 32, 48], [4, 5, 6]), "seed": sized([0, 1], [0])}


def main() -> None:
    """Train them both ways and record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    store = parser.parse_args().store.resolve()
    with tempfile.TemporaryDirectory() as folder:
        alone = [one_alone(store, Path(folder), k, seed) for k in GRID["activation.k"] for seed in GRID["seed"]]
        swept = swept_command(store, Path(folder), "--no-compare", "-q")
        planned = swept_command(store, Path(folder), "--dry-run", "--json").out
        projected = max(one["round_memory_bytes"] for one in json.loads(planned)) / 2**20
        figures = figures_of(alone, swept, projected, Path(folder))
    what = f"sweep: six runs of {STEPS:,} steps, preset tiny, {len(os.sched_getaffinity(0))} cores"
    record(what, "python -m tests.bench.sweep STORE", figures)


def one_alone(store: Path, folder: Path, k: int, seed: int) -> Finished:
    """A run by itself, with as many threads as there are cores."""
    sets = [f"{name}={value}" for name, value in (SETTINGS | {"activation.k": k, "seed": seed}).items()]
    return run(sys.executable, "-m", "train", "run", "--store", store, "--runs", folder / "alone", "--quiet",
               *(part for one in sets for part in ("--set", one)))  # fmt: skip


def swept_command(store: Path, folder: Path, *options: str) -> Finished:
    """All of them side by side; a comparison is not made, as runs alone make none."""
    common = "".join(f"{name} = {json.dumps(value)}\n" for name, value in SETTINGS.items())
    grid = "".join(f"{name} = {json.dumps(values)}\n" for name, values in GRID.items())
    file = folder / "six.toml"
    file.write_text(f"[set]\n{common}\n[grid]\n{grid}")
    return run(sys.executable, "-m", "train", "sweep", file, "--store", store, "--runs", folder, *options)


def figures_of(alone: list[Finished], swept: Finished, projected: float, folder: Path) -> dict[str, tuple[float, str]]:
    """Whole commands, and their steps alone by the runs' own logs."""
    seconds, cpu = sum(one.seconds for one in alone), sum(one.cpu_seconds for one in alone)
    steps = [last(path) for path in sorted((folder / "alone").glob("*/timing.jsonl"))]
    beside = [last(path) for path in sorted((folder / "six").glob("*/timing.jsonl"))]
    by_steps = sum(row["seconds"] for row in steps), max(row["seconds"] for row in beside)
    cpu_of_steps = sum(row["cpu_seconds"] for row in steps), sum(row["cpu_seconds"] for row in beside)
    return {
        "alone, one after the other": (seconds, "s"),
        "side by side": (swept.seconds, "s"),
        "side by side over alone": (swept.seconds / seconds, "of the time"),
        "alone: CPU": (cpu, "s"),
        "side by side: CPU": (swept.cpu_seconds, "s"),
        "side by side over alone: CPU": (swept.cpu_seconds / cpu, "of the CPU time"),
        "steps alone, without start and end": (by_steps[0], "s"),
        "steps side by side, without start and end": (by_steps[1], "s"),
        "steps side by side over alone": (by_steps[1] / by_steps[0], "of the time"),
        "steps side by side over alone: CPU": (cpu_of_steps[1] / cpu_of_steps[0], "of the CPU time"),
        "alone: largest process": (max(one.peak_mib for one in alone), "MiB"),
        "side by side: the process": (swept.peak_mib, "MiB"),
        "alone: memory of its own": (max(one.own_mib for one in alone), "MiB"),
        "side by side: memory of its own": (swept.own_mib, "MiB"),
        "side by side: projected, beside the process itself": (projected, "MiB"),
    }


def last(path: Path) -> dict[str, float]:
    """The last row of a log."""
    found: dict[str, float] = json.loads(path.read_text().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
