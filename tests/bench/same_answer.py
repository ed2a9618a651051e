"""Do the fast step and the dense one, and this trainer and others, reach the same answer on the same rows?

    python -m tests.bench.same_answer reference --store STORE [--steps N] [--k N] [--kernels A B]
    python -m tests.bench.same_answer peers --store STORE [--steps N] [--k N] [--seeds N] [--preset NAME]
                                            [--trainers NAME ...] [--set a.b=value ...] [--label NAME]
                                            [--rates LR ...] [--work FOLDER] [--jobs N]

`reference`: two runs of the preset `tiny` with one seed and so one batch order, one on the fast kernels and one on the
dense fp32 reference (`--kernels A B` compares others). Held-out fvu must agree within half a percent.

`peers`: other trainers and this one on the same rows in the same order, shifted and scaled alike, at the same width and
k, on one thread each. SAELens and dictionary_learning train no transcoders: their Matryoshka BatchTopK autoencoders of
the store's target are set against this trainer with `source=target`, which is the same map. sparsify's TopK transcoder
is set against this trainer's with `activation.kind=topk` and no prefixes, which has its loss, and against its default
kind. Every trainer has a grid of learning rates of its own, which grows by factors of two until its best is not at an
edge (or `--most` rates are tried, which is then said; `--rates` are tried alone): by the fvu of the k largest latents
of every row for trainers that train so, and for the others by that under the threshold of k latents on average; both
are told of all. At the best rate `--seeds` seeds count, each with another order of rows. tests/bench/judge.py measures
all of them alike on the report rows without position 0, and tests/bench/peer_training.py says what else peers are
given. Rows that this trainer leaves out nobody sees.

What was trained and judged is kept in `--work`, by what it was made from, so that a killed bench goes on where it was.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from shared.store.store import Store
from tests.bench.judge import CORRELATION, COSINE
from tests.bench.peers import environment
from tests.bench.record import ROOT, record, sized
from tests.bench.same_rows import OURS, TRAINERS, Result, SameRows, last, own_settings, train

LIMIT = 0.005
"""Relative difference of fvu that still counts as the same answer."""
RULES = {"equal": "fvu at l0 {k}", "per_row": "fvu of the {k} largest latents of every row"}
"""Those of `Judged` that give everybody the same l0"""
Figures = dict[str, tuple[float, str]]


def main() -> None:
    """Measure the parts that are named, or both, and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.same_answer")
    parser.add_argument("parts", nargs="*", choices=[[], "reference", "peers"], default=[])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=sized(1000, 20))
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--seeds", type=int, default=3, help="at the best rate")
    parser.add_argument("--most", type=int, default=7, help="learning rates of a trainer")
    parser.add_argument("--rates", nargs="+", type=float, help="the learning rates of every trainer")
    parser.add_argument("--preset", default="tiny", help="of this trainer")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="a setting of this trainer")
    parser.add_argument("--label", help="of the store in the title; its widths if not given")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "same-answer", help="what was trained is kept here"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainers side by side, on a thread each")
    parser.add_argument("--kernels", nargs=2, default=["compiled", "dense"], help="what `reference` compares")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    store = Store.open(options.store).record
    where = options.label or f"{store.d_in} to {store.d_out}"
    for part, compare in (("reference", reference), ("peers", peers)):
        if options.parts and part not in options.parts:
            continue
        figures = compare(options)
        for name, (value, unit) in figures.items():
            print(f"{name}: {value:.6g} {unit}")
        if not options.no_record:
            shape = f"d_sae {options.d_sae:,}, k {options.k}, {options.steps:,} steps of 1,024"
            sets = "".join(f" --set {setting}" for setting in options.set)
            seeds = f" --seeds {options.seeds}" if part == "peers" else ""
            preset = f" --preset {options.preset}" if options.preset != "tiny" else ""
            preset += f" --rates {' '.join(map(str, options.rates))}" if options.rates else ""
            line = (
                f"python -m tests.bench.same_answer {part} --store STORE --steps {options.steps}{preset}{seeds}{sets}"
            )
            record(f"same answer, {part}, {where}: {shape}", line, figures)
        worst = figures.get("relative difference of held-out fvu", (0.0, ""))[0]
        if worst > LIMIT:
            sys.exit(f"held-out fvu differs by {worst:.2%}, more than {LIMIT:.1%}")


def reference(options: argparse.Namespace) -> Figures:
    """Two runs that differ in their kernels only."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kernels in options.kernels:
            settings = own_settings(options.steps, options.k, options.d_sae, f"kernels={kernels}", *options.set)
            found[kernels] = last(train(options.store, Path(folder), kernels, settings, options.preset))
    figures: Figures = {}
    for kernels, row in found.items():
        figures[f"{kernels}: held-out fvu"] = (row["held_out"]["fvu"], "")
        figures[f"{kernels}: l0 by threshold"] = (row["held_out"]["l0"], "latents")
        figures[f"{kernels}: dead latents at the end"] = (row["dead_share"], "share")
    ours, dense = (row["held_out"]["fvu"] for row in found.values())
    return figures | {"relative difference of held-out fvu": (abs(ours / dense - 1), "")}


def peers(options: argparse.Namespace) -> Figures:
    """This trainer and the others on the same rows, judged alike."""
    torch.set_num_threads(1)
    for name in options.trainers:
        if name not in OURS:
            environment(name.split()[0])
    rows = SameRows(options)
    with ThreadPoolExecutor(options.jobs) as pool:
        at_once = pool.map if options.jobs > 1 else map
        found = list(at_once(lambda name: measure(rows, name, options), options.trainers))
    figures: Figures = {name: value for told, _ in found for name, value in told.items()}
    best = {name: results for name, (_, results) in zip(options.trainers, found, strict=True)}
    for own in (name for name in best if name in OURS):
        for peer in (name for name in best if name not in OURS and TRAINERS[name].map == TRAINERS[own].map):
            for rule, words in RULES.items():
                ratio = mean_fvu(best[own], rule) / mean_fvu(best[peer], rule)
                figures[f"{words.format(k=options.k)}: {own} over {peer}"] = (ratio, "times")
    return figures


def measure(rows: SameRows, name: str, options: argparse.Namespace) -> tuple[Figures, list[Result]]:
    """A trainer's figures, and its seeds at its best learning rate."""
    results, rule = dict[float, Result](), TRAINERS[name].rule

    def at(lr: float) -> float:
        results[lr] = rows.result(name, lr, 0)
        return mean_fvu([results[lr]], rule)

    best, inside = search(at, options.rates or TRAINERS[name].rates, 0 if options.rates else options.most)
    seeds = [results[best], *(rows.result(name, best, seed) for seed in range(1, options.seeds))]
    words = RULES[rule].format(k=options.k)
    figures: Figures = {f"{name}: {words}, lr {lr:.3g}": (mean_fvu([results[lr]], rule), "") for lr in sorted(results)}
    figures[f"{name}: best lr{'' if inside else ', at the edge of the grid'}"] = (best, "")
    return figures | {f"{name}: {key}": value for key, value in summary(seeds, options.k).items()}, seeds


def mean_fvu(results: Sequence[Result], rule: str) -> float:
    """Over seeds, under one of the rules that give everybody the same l0."""
    return statistics.fmean(getattr(result.judged, rule).fvu for result in results)


def search(fvu_at: Callable[[float], float], rates: Sequence[float], most: int) -> tuple[float, bool]:
    """The best rate of a grid that grows by factors of two while its best is at an edge, and whether it is at none."""
    found = {lr: fvu_at(lr) for lr in rates}
    while True:
        best, edges = min(found, key=lambda lr: found[lr]), (min(found), max(found))
        if best not in edges or len(found) >= most:
            return best, best not in edges
        lr = best / 2 if best == edges[0] else best * 2
        found[lr] = fvu_at(lr)


def summary(results: Sequence[Result], k: int) -> Figures:
    """Means over seeds."""
    judged, figures = [result.judged for result in results], Figures()
    own = [one.own for one in judged if one.own]
    for rule, words in RULES.items():
        fvus = [getattr(one, rule).fvu for one in judged]
        figures[f"{words.format(k=k)}, mean of {len(fvus)} seeds"] = (statistics.fmean(fvus), "")
        if len(fvus) > 1:
            figures[f"{words.format(k=k)}, standard deviation"] = (statistics.stdev(fvus), "")
    if own:
        figures["fvu by its own threshold"] = (statistics.fmean(part.fvu for part in own), "")
        figures["l0 by its own threshold"] = (statistics.fmean(part.l0 for part in own), "latents")
    return figures | {
        "dead on held-out rows": (statistics.fmean(one.dead for one in judged), "share"),
        f"pairs correlated above {CORRELATION}": (statistics.fmean(one.correlated for one in judged), "pairs"),
        f"pairs of cosine above {COSINE}": (statistics.fmean(one.parallel for one in judged), "pairs"),
        "training": (statistics.fmean(result.seconds for result in results), "CPU-s"),
    }


if __name__ == "__main__":
    main()
