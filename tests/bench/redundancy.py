"""Whether the measure of redundant latents finds what was planted, and nothing else; and how long it takes.

    python -m tests.bench.redundancy [--seeds N] [--no-record]
    python -m tests.bench.redundancy RUN ... [--no-record]      instead, what is redundant in finished runs

Runs whose names differ in a number at the end are one arm.

The dictionary is made by hand: it knows the true directions of a planted store, which its encoder tells apart. Some
true latents are there as two copies that share their value and have noise of their own, some are split by what says
nothing of the target, and some children have taken over their parents. A pair is truly redundant when both are of one
true latent. What is active together, or absorbed, is not.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shared.store.store import Store
from tests.bench.planted import Planted, Shape, planted_store
from tests.bench.record import record, sized
from train.data.batches import StoreRows
from train.model.activations import ReLU
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.redundancy.measure_redundancy import measure_redundancy
from train.redundancy.redundancy_record import Redundancy
from train.run.load_run import load_run
from train.run.settings import read_config

Array = NDArray[Any]

SHAPE = sized(
    Shape(d=384, latents=256, active=12.0, pairs=20, noise=0.02, context=3.0),
    Shape(d=128, latents=80, active=6.0, pairs=8, noise=0.02, context=3.0),
)
WINDOWS = sized(512, 64)
"""Of a block; one calibrates, one is reported on."""
TOGETHER = (0.75, 0.9)
"""How often truly co-active latents fire with each other."""
_CUT = 0.2
"""Activation threshold: values are about 1."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What copies and splits have of their own, over the length of the true direction."""

    encoder: float = 0.1
    decoder: float = 0.3


class Dictionary(NamedTuple):
    """A transcoder with planted duplicates. L latents, T true ones."""

    model: Transcoder
    threshold: torch.Tensor
    """[L]"""
    truth: Array
    """[L] the true latent of each"""
    kind: Array
    """[L] of plant: `one`, `copy`, `split`, `absorbed` or `together`"""


def dictionary(shape: Shape, noise: Noise, seed: int = 0) -> Dictionary:
    """Make one of which a fifth of the other true latents are copied, as many split, and as many left out."""
    truth, planted, rng = shape.truth(seed), Planted(shape, seed), np.random.default_rng([seed, 4])
    pinv = np.linalg.pinv(truth.source)  # [D, T]: rows times this are the codes
    others = rng.permutation(np.arange(4 * shape.pairs, shape.latents))
    fifth = len(others) // 5
    copied, split, missing = others[:fifth], others[fifth : 2 * fifth], others[2 * fifth : 3 * fifth]
    columns, biases, rows, of, kinds = [], [], [], [], []

    def add(latent: int, column: Array, bias: float, row: Array, kind: str) -> None:
        columns.append(column)
        biases.append(bias)
        rows.append(row)
        of.append(latent)
        kinds.append(kind)

    def noisy(vector: Array, much: float) -> Array:
        off = rng.normal(size=vector.shape)
        return vector + much * np.linalg.norm(vector) * off / np.linalg.norm(off)

    context = planted.context / shape.context**2  # rows times this are the sign
    parents, children = truth.families.T
    together = set(truth.together.ravel().tolist())
    for latent in range(shape.latents):
        column, row = pinv[:, latent], truth.target[latent]
        if latent in copied:
            for share in (part := rng.uniform(0.35, 0.65), 1 - part):
                add(latent, noisy(column, noise.encoder), 0.0, share * noisy(row, noise.decoder), "copy")
        elif latent in split:
            for sign in (-4, 4):
                add(latent, noisy(column, noise.encoder) + sign * context, -4.0, noisy(row, noise.decoder), "split")
        elif latent in parents:
            child = children[list(parents).index(latent)]
            add(latent, column - 4 * pinv[:, child], 0.0, row, "absorbed")
            add(child, pinv[:, child], 0.0, truth.target[child] + row, "absorbed")
        elif latent not in missing and latent not in children:
            add(latent, column, 0.0, row, "together" if latent in together else "one")
    config = TranscoderConfig(d_sae=len(of), prefixes=(len(of),), decoder_norm="free")
    still = Normalisation(torch.zeros(shape.d), 1.0, torch.zeros(shape.d), 1.0)
    model = Transcoder(shape.d, shape.d, config, ReLU(), still)
    with torch.no_grad():
        for to, parts in ((model.W_enc.T, columns), (model.b_enc, biases), (model.W_dec, rows)):
            to.copy_(torch.from_numpy(np.array(parts)))
    return Dictionary(model, torch.full((len(of),), _CUT), np.array(of), np.array(kinds))


NOISES = {"little noise": Noise(), "more noise": Noise(0.15, 0.4)}


class Judged(NamedTuple):
    """How the measure stands to what was planted."""

    recall: dict[str, float]
    """Share of planted pairs that are in one group, of `copy` and `split`"""
    precision: float
    """Share of pairs of a group that are of one true latent; 1 for none"""
    wrong: dict[str, int]
    """Pairs of a group that are not, by the kind of their first latent"""
    pairs: int
    """That were planted."""


def judge(found: Redundancy, planted: Dictionary) -> Judged:
    """Compare groups with what was planted."""
    pairs = [(a, b) for one in found.groups for i, a in enumerate(one.latents) for b in one.latents[i + 1 :]]
    right = {pair for pair in pairs if planted.truth[pair[0]] == planted.truth[pair[1]]}
    recall, count = {}, 0
    for kind in ("copy", "split"):
        latents = np.flatnonzero(planted.kind == kind).reshape(-1, 2).tolist()
        recall[kind] = mean(tuple(pair) in right for pair in latents)
        count += len(latents)
    wrong = [str(planted.kind[pair[0]]) for pair in pairs if pair not in right]
    return Judged(
        recall=recall,
        precision=len(right) / max(len(pairs), 1) if pairs else 1.0,
        wrong={kind: wrong.count(kind) for kind in sorted(set(wrong))},
        pairs=count,
    )


def main() -> None:
    """Plant, or take runs; measure, print and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.redundancy")
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=sized(3, 1))
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    title, command = f"redundancy: {SHAPE.latents} true latents, {options.seeds} seeds", f"--seeds {options.seeds}"
    if options.runs:
        settings = read_config(options.runs[0]).settings
        title = f"redundancy of runs: {settings.transcoder.d_sae:,} latents, {settings.steps:,} steps"
        command = " ".join(run.name for run in options.runs)
    figures = of_runs(options.runs) if options.runs else of_plants(options.seeds)
    for name, (value, unit) in figures.items():
        print(f"{name:75} {value:10.6g} {unit}")
    if not options.no_record:
        record(title, f"python -m tests.bench.redundancy {command}", figures)


def of_runs(runs: list[Path]) -> dict[str, tuple[float, str]]:
    """Means over the seeds of each arm, and how far apart they are."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        loaded, began = load_run(run), time.process_time()
        measured = measure_redundancy(loaded.transcoder, loaded.rows, loaded.threshold)
        spent = time.process_time() - began
        correlated = measured.candidates["correlation"]
        values = {
            "fvu": measured.merged.fvu,
            "live latents": measured.live,
            "latents that could be judged": measured.live - measured.not_judged,
            "redundant latents": measured.redundant,
            "rise of merging them, at equal l0": measured.merged.fvu_rise_at_equal_l0,
            "pairs looked at": measured.candidates["all"].pairs,
            "redundant pairs": measured.candidates["all"].redundant,
            "redundant pairs that correlate above 0.3": correlated.redundant,
            "CPU time of the measure": spent,
        }
        for name, value in values.items():
            found.setdefault(run.name.rstrip("0123456789").rstrip("-"), {}).setdefault(name, []).append(value)
    figures: dict[str, tuple[float, str]] = {}
    for arm, by_name in found.items():
        for name, each in by_name.items():
            unit = "s" if "time" in name else "pairs" if "pairs" in name else "latents" if "latents" in name else "fvu"
            figures[f"{arm}: {name}"] = mean(each), unit
            if len(each) > 1:
                figures[f"{arm}: {name}, largest less smallest"] = max(each) - min(each), "difference"
    return figures


def of_plants(seeds: int) -> dict[str, tuple[float, str]]:
    """What is found of planted duplicates."""
    figures: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for together in TOGETHER:
            judged = measure(replace(SHAPE, together=together), seeds, Path(folder, f"{together}"))
            for noise, found in judged.items():
                figures |= described(f"co-active {together:.0%} of the time, {noise}", found)
    return figures


def measure(shape: Shape, seeds: int, folder: Path) -> dict[str, list[tuple[Judged, float]]]:
    """What was found of each dictionary, and the CPU seconds that it took."""
    found: dict[str, list[tuple[Judged, float]]] = {name: [] for name in NOISES}
    for seed in range(seeds):
        planted_store(folder / f"{seed}", shape, blocks=1, windows=WINDOWS, seed=seed)
        rows = StoreRows(Store.open(folder / f"{seed}"))
        for name, noise in NOISES.items():
            known, began = dictionary(shape, noise, seed), time.process_time()
            redundancy = measure_redundancy(known.model, rows, known.threshold)
            found[name].append((judge(redundancy, known), time.process_time() - began))
    return found


def described(of: str, found: list[tuple[Judged, float]]) -> dict[str, tuple[float, str]]:
    """The worst figures over seeds."""
    judged = [one for one, _ in found]
    return {
        f"{of}: recall of copies, least": (min(one.recall["copy"] for one in judged), "share"),
        f"{of}: recall of splits, least": (min(one.recall["split"] for one in judged), "share"),
        f"{of}: precision, least": (min(one.precision for one in judged), "share"),
        f"{of}: co-active pairs called redundant, most": (max(one.wrong.get("together", 0) for one in judged), "pairs"),
        f"{of}: absorbed pairs called redundant, most": (max(one.wrong.get("absorbed", 0) for one in judged), "pairs"),
        f"{of}: planted copies and splits": (mean(one.pairs for one in judged), "pairs"),
        f"{of}: CPU time of the measure, most": (max(seconds for _, seconds in found), "s"),
    }


if __name__ == "__main__":
    main()
