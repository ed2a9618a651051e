"""The LLM's loss with a run's transcoder in its MLP's place, beside zero, the mean and the best linear map.

    python -m tests.bench.splice RUN [--tokens N] [--model FOLDER]      writes docs/benchmarks.{json,md}

`harvest splice` itself, on a copy of RUN beside it, whose files are hard links: what RUN holds is not looked up.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.splice_record import Interval, SplicePart, SpliceRecord
from tests.bench.record import Finished, record, run, sized
from train.run.settings import read_config


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.splice")
    parser.add_argument("run", type=Path)
    parser.add_argument("--tokens", type=int, default=sized(65_536, 64))
    parser.add_argument("--model", help="where the store's model lies, if not where the store says")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.run.parent) as folder:
        copy = Path(folder, options.run.name)
        shutil.copytree(options.run, copy, copy_function=os.link, ignore=shutil.ignore_patterns("splice*"))
        model = ["--model", options.model] if options.model else []
        line = ("splice", copy, "--tokens", options.tokens, "--linear", "--json", *model)
        done = run(sys.executable, "-m", "harvest", *line)
    found = SpliceRecord.model_validate_json(done.out)
    settings = read_config(options.run).settings
    shape = f"{settings.transcoder.d_sae:,} latents, {settings.steps:,} steps"
    command = f"python -m tests.bench.splice RUN --tokens {options.tokens}"
    record(f"splice: {shape}", command, cost(done, found) | dict(figures(found.whole)))


def cost(done: Finished, found: SpliceRecord) -> dict[str, tuple[float, str]]:
    """What the command took; the linear map is fitted on all training rows within it."""
    return {
        "whole command": (done.seconds, "s"),
        "most memory": (done.peak_mib, "MiB"),
        "predictions": (found.whole.tokens, "tokens"),
        "documents": (found.whole.documents, "documents"),
        "rows that keep the MLP's own output": (found.rows_left / found.rows, "share"),
    }


def figures(part: SplicePart) -> Iterator[tuple[str, tuple[float, str]]]:
    """Each arm's figures, and half of their 95 % intervals."""
    yield "unchanged LLM: CE", (part.clean_ce, "nats")
    for name, arm in part.arms.items():
        yield f"{name}: CE", (arm.ce, "nats")
        yield from _with_half(f"{name}: KL", arm.kl, "nats")
        yield from _with_half(f"{name}: CE recovered", arm.ce_recovered, "share")
        yield from _with_half(f"{name}: CE recovered, against mean ablation", arm.ce_recovered_of_mean, "share")


def _with_half(name: str, found: Interval | None, unit: str) -> Iterator[tuple[str, tuple[float, str]]]:
    if found is None:
        return
    yield name, (found.value, unit)
    if found.high is not None:
        yield f"{name}, half the 95 % interval", (found.high - found.value, unit)


if __name__ == "__main__":
    main()
