"""From text to five trained dictionaries: one harvest and five runs, beside live runs with the LLM inside.

    python -m tests.bench.end_to_end [--steps N] [--threads N] [--live N] [--no-at-once] [--no-record]

Ours: `harvest run tiny` of as many tokens as a run sees, 1.2 million at most (a longer run sees them again, as a live
one sees its text), from an empty cache, then `train run tiny` with five seeds; start-up, held-out rows, evaluation and
checkpoints included. The compiled loops' cache is taken as it is found: empty, it costs the first run some twenty
seconds.

Theirs: SAELens' own runners on the same model folder, text, hook, width, prefixes, k, rows per step and number of
steps, also from a fresh process to the saved weights: five runs of `LanguageModelSAETrainingRunner`, of which `--live`
are timed (one unless said otherwise), and its `MultiSAETrainingRunner`, which trains five at once on one LLM, provided
that all five are wanted at the same time, with one learning rate, and fit into memory together. Neither evaluates or
writes checkpoints on the way. SAELens trains no transcoder: its runs are autoencoders of the transcoder's target, which
is one hook instead of two. Writing the text to the file that they read is not counted, and glibc is told to keep freed
memory, which makes them faster.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from harvest.embedded import MODEL_FOLDER
from harvest.settings import TextSettings
from harvest.text.corpus import open_corpus
from tests.bench.peer_worker import STAND_IN
from tests.bench.peers import TUNED, environment
from tests.bench.record import ROOT, SMOKE, Finished, record, run, sized
from tests.llms import small_harvest
from tests.runs import SETS

RUNS = sized(5, 2)
ROWS, MOST_TOKENS = 1024, 1_200_000
PEER = sized("SAELens", STAND_IN)
HOOK = "model.layers.8.post_feedforward_layernorm"
"""Transformers' name of the module whose output is `blocks.8.hook_mlp_out`."""
SHAPE = {"d": 128, "d_sae": 4096, "k": 32, "prefixes": [256, 512, 1024, 2048, 4096], "context_size": 256, "rows": ROWS}


class Cost(NamedTuple):
    """What commands took, one after the other."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, *done: Finished) -> "Cost":
        """Their sum."""
        return cls(sum(one.seconds for one in done), sum(one.cpu_seconds for one in done))

    def times(self, factor: float) -> "Cost":
        """Of `factor` times as many."""
        return Cost(self.wall * factor, self.cpu * factor)


def main() -> None:
    """Measure ours, then theirs, and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.end_to_end")
    parser.add_argument("--steps", type=int, default=sized(400, 20))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--live", type=int, default=1, choices=range(1, RUNS + 1), help="live runs that are timed")
    parser.add_argument("--no-at-once", action="store_true", help="leave out five runs on one LLM")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    environment(PEER)
    os.environ |= {f"{pool}_NUM_THREADS": str(options.threads) for pool in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(options, Path(folder))
    for name, (value, unit) in figures.items():
        print(f"{name}: {value:.6g} {unit}")
    if not options.no_record:
        title = f"end to end: d_sae 4,096, k 32, {options.steps * ROWS:,} tokens a run, {options.threads} threads"
        line = f"python -m tests.bench.end_to_end --steps {options.steps} --threads {options.threads}"
        record(title, line, figures)


def compare(options: argparse.Namespace, scratch: Path) -> dict[str, tuple[float, str]]:
    """Wall and CPU seconds of both, and their ratios."""
    harvest, trains = ours(options, scratch)
    text = write_text(scratch / "text.jsonl")
    timed = [live(options, text, 1, scratch / f"live-{i}") for i in range(options.live)]
    one = Cost.of(*timed).times(1 / len(timed))
    at_once = None if options.no_at_once else Cost.of(live(options, text, RUNS, scratch / "at-once"))
    said = {1: f" (one timed x {RUNS})", RUNS: ""}.get(options.live, f" (the mean of {options.live} x {RUNS})")
    costs = {
        "ours, harvest": Cost.of(harvest),
        "ours, one run": Cost.of(trains[0]),
        "ours, harvest and one run": Cost.of(harvest, trains[0]),
        "ours, harvest and five runs": Cost.of(harvest, *trains),
        "SAELens, one live run": one,
        f"SAELens, five live runs{said}": one.times(RUNS),
    }
    if at_once:
        costs["SAELens, five at once on one LLM"] = at_once
    figures: dict[str, tuple[float, str]] = {}
    for name, cost in costs.items():
        figures |= {name: (cost.wall, "s"), f"{name}: CPU": (cost.cpu, "CPU-s")}
    for name, theirs, mine in (
        ("K = 1: live over ours", one, costs["ours, harvest and one run"]),
        (f"K = 5: live over ours{said}", one.times(RUNS), costs["ours, harvest and five runs"]),
        ("K = 5: live, all at once, over ours", at_once, costs["ours, harvest and five runs"]),
    ):
        if not theirs:
            continue
        figures[name] = (theirs.wall / mine.wall, "times the time")
        figures[f"{name}: CPU"] = (theirs.cpu / mine.cpu, "times the time")
    return figures


def ours(options: argparse.Namespace, scratch: Path) -> tuple[Finished, list[Finished]]:
    """A harvest and five runs."""
    cache, tokens = scratch / "cache", min(MOST_TOKENS, options.steps * ROWS)
    workers = ("--tokens", tokens, "--set", f"workers={options.threads}")
    small = small_harvest(scratch) if SMOKE else []
    harvest = run(sys.executable, "-m", "harvest", "run", "tiny", "--cache", cache, *workers, *small)
    train = (sys.executable, "-m", "train", "run", "tiny", "--store", harvest.out.splitlines()[-1])
    settings = (
        "--runs",
        scratch / "runs",
        "--steps",
        options.steps,
        "--set",
        f"threads={options.threads}",
        *sized([], SETS),
    )
    return harvest, [run(*train, *settings, "--seed", seed) for seed in range(RUNS)]


def write_text(path: Path) -> Path:
    """The documents of the preset `tiny` in its order."""
    with path.open("w") as file:
        for document in open_corpus(TextSettings(), None, 0).read():
            print(json.dumps({"text": document.value}), file=file)
    return path


def live(options: argparse.Namespace, text: Path, count: int, out: Path) -> Finished:
    """One process of SAELens, for `count` autoencoders."""
    out.mkdir()
    told = {"text": str(text), "model": str(MODEL_FOLDER), "hook": HOOK, "count": count, "out": str(out)}
    told |= {"stand_in": PEER == STAND_IN}
    told |= {"steps": options.steps, "threads": options.threads, **SHAPE}
    settings = TUNED | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env = ("env", *(f"{name}={value}" for name, value in settings.items()))
    return run(*env, environment(PEER), "-I", ROOT / "tests/bench/live_worker.py", json.dumps(told))


if __name__ == "__main__":
    main()
