"""What `train probe` takes, and what it finds, on a run.

    python -m tests.bench.probe RUN      writes docs/benchmarks.{json,md}

On a copy of RUN beside it, whose files are hard links: a record that RUN has stays. Run it twice where figures of speed
count: the first call may compile loops.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench.record import Finished, record, run, sized
from train.probe.probe_record import FILE, ProbeRecord, ProbeSummary
from train.run.settings import read_config


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.probe")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=sized(131_072, 1024))
    parser.add_argument("--labels", default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.run.parent) as folder:
        copy = Path(folder, options.run.name)
        shutil.copytree(options.run, copy, copy_function=os.link, ignore=shutil.ignore_patterns(FILE))
        done = run(sys.executable, "-m", "train", "probe", copy, "--rows", options.rows, "--labels", options.labels,
                   "--json")  # fmt: skip
    found = ProbeRecord.model_validate_json(done.out).summary
    settings = read_config(options.run).settings
    shape = f"{settings.transcoder.d_sae:,} latents, {settings.steps:,} steps"
    command = f"python -m tests.bench.probe RUN --rows {options.rows} --labels {options.labels}"
    record(f"probe: {shape}", command, cost(done, found) | dict(figures(found)))


def cost(done: Finished, found: ProbeSummary) -> dict[str, tuple[float, str]]:
    """What the command took."""
    return {
        "whole command": (done.seconds, "s"),
        "CPU time, all cores": (done.cpu_seconds, "s"),
        "most memory": (done.peak_mib, "MiB"),
        "rows that figures are of": (found.rows[1], "rows"),
        f"{found.unit} that figures are of": (found.units[1], found.unit),
        "labels": (len(found.labels), "labels"),
    }


def figures(found: ProbeSummary) -> Iterator[tuple[str, tuple[float, str]]]:
    """What it found, latents beside baselines."""
    for kind, explained in found.explained.items():
        for limit, share in explained.items():
            yield f"{kind}: explained by a label, F1 of at least {limit}", (share, "share")
    for kind, by_count in found.mean_f1.items():
        for k, value in by_count.items():
            yield f"{kind}: mean F1 of probes of {k}", (value, "F1")
    yield "logistic probe on all dimensions: mean F1", (found.mean_dense_f1, "F1")
    yield "further latents that a label is split over", (found.mean_splits, "latents")
    if found.mean_absorption is not None and found.mean_absorption_fraction is not None:
        yield "absorption rate", (found.mean_absorption, "share")
        yield "absorption fraction", (found.mean_absorption_fraction, "share")


if __name__ == "__main__":
    main()
