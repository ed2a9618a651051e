"""How many latents of a known dictionary each arm against duplicates recovers, and how many it has twice.

    python -m tests.bench.planted [--arms NAME ...] [--seeds N] [--steps N] [--set A.B=VALUE ...] [--store FOLDER]
                                  [--no-record]

The target row is a sparse sum of true directions, the source row the same sum of others, and both have a dense part at
position 0. A tenth of the latents fire only when their parent does, and as many in pairs that fire together but point
elsewhere: pushing everything apart tears those. A true latent is recovered by a live latent whose decoder row has a
cosine above 0.9 with it, and is a duplicate when two or more have. `--set` applies to every arm.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from shared.store import layout
from tests.bench.record import record, run, sized
from tests.runs import VALUES
from tests.stores import BOS, Array, SyntheticStore, make_store
from train.model import checkpoint
from train.run.settings import read_config

OFF = ("samples.rows=0", "diversity.mined.weight=0", "diversity.co_activation.weight=0", "diversity.merge.at=[]")
ARMS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "orthogonality": ("diversity.orthogonality.weight=1",),
    "mined": ("diversity.mined.weight=1",),
    "mined, co_activation": ("diversity.mined.weight=1", "diversity.co_activation.weight=1"),
    "merge": ("diversity.merge.at=[0.8, 0.9]",),
}
"""What each has against duplicates; the rest is off."""
SETTINGS = """
log_every = 250
threads = 1

[transcoder]
d_sae = 1024
prefixes = [512, 1024]
encoder_scale = 0.35

[activation]
kind = "batchtopk"
k = 12

[rows]
batch_rows = 512

[auxk]
coefficient = 0.125

[optimizer]
lr = 8e-3
warmup_share = 0.02
decay_share = 0.5

[evaluation]
every = 1000000

[checkpoint]
every = 1000000
keep_last = 1
"""
CLOSE = 0.9
"""Cosine above which a latent is a true one."""
BLOCKS, WINDOWS, STEPS = sized((38, 256, 2000), (3, 16, 20))
"""Training blocks of 8,192 rows: 256 windows of 32; and steps of a run."""


class Truth(NamedTuple):
    """The dictionary of a planted store: T latents."""

    source: NDArray[np.float32]
    """[T, D] unit rows"""
    target: NDArray[np.float32]
    """[T, O] unit rows"""
    rates: NDArray[np.float64]
    """[T] share of rows on which each fires"""
    together: Array
    """[C, 2] latents that fire together, correlated by about 0.7"""
    families: Array
    """[H, 2] parents and their children"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a planted store."""

    d: int = 128
    latents: int = 512
    active: float = 6.0
    """Mean of true latents per row."""
    pairs: int = 26
    """Of latents that fire together, and as many parents with a child."""
    noise: float = 0.02
    """Deviation per dimension of the target's noise; a true direction's values are about 1."""
    context: float = 0.0
    """Size of a part of source rows that is of either sign and says nothing of the target; with it, d > latents."""
    together: float = 0.75
    """How often each of a pair fires with the other."""

    def truth(self, seed: int) -> Truth:
        """Random directions; rates log-uniform over a range of 20, so that some are rare."""
        rng = np.random.default_rng([seed, 1])
        sides = [rng.normal(size=(self.latents, self.d)) for _ in range(2)]
        source, target = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
        rates = np.exp(rng.uniform(np.log(1 / 20), 0, self.latents))
        together, families = np.arange(4 * self.pairs).reshape(2, self.pairs, 2)
        rates[together[:, 1]] = rates[together[:, 0]]
        rates[families[:, 0]] = np.exp(rng.uniform(np.log(1 / 4), 0, self.pairs))
        rates[families[:, 1]] = _CHILD * rates[families[:, 0]]
        rates *= self.active / rates.sum()
        return Truth(source.astype(np.float32), target.astype(np.float32), rates, together, families)


_CHILD, _DEVIATION = 0.4, 0.3
"""How often a child fires with its parent; deviation of the values' logarithm."""


SHAPE = sized(Shape(), Shape(d=16, latents=32, active=2.0, pairs=4))
TINY = sized((), ("transcoder.prefixes=[32, 64]", *(f"{key}={value}" for key, value in VALUES.items())))


class Planted:
    """Draws the rows of a planted store; one that was made again draws the same."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.truth, self._shape, self.rng = shape.truth(seed), shape, np.random.default_rng([seed, 2])
        self.dense = {side: self.rng.normal(size=shape.d).astype(np.float32) for side in ("source", "target")}
        """What rows of position 0 have beside their codes"""
        self.context, self._signs = shape.context * _beside(self.truth.source), np.random.default_rng([seed, 3])
        """[D] what each row has of either sign"""

    def codes(self, rows: int) -> NDArray[np.float32]:
        """The values [n, T] of the next rows, 0 where a latent does not fire."""
        truth, rng, together = self.truth, self.rng, self._shape.together
        chance = rng.random((rows, len(truth.rates)), np.float32)
        fires = chance < truth.rates
        first, second = truth.together.T
        alone = truth.rates[first] * (1 - together) / (1 - truth.rates[first])  # so that both fire as often
        fires[:, second] = chance[:, second] < np.where(fires[:, first], together, alone)
        parent, child = truth.families.T
        fires[:, child] = fires[:, parent] & (chance[:, child] < _CHILD)
        return fires * np.exp(_DEVIATION * rng.standard_normal(fires.shape, np.float32))

    def __call__(self, tokens: Array, position: Array, shared: Array | float) -> dict[str, NDArray[np.float32]]:
        """As `tests.stores.Draw`."""
        codes = self.codes(len(tokens))
        source, target = codes @ self.truth.source, codes @ self.truth.target
        target += self._shape.noise * self.rng.standard_normal(target.shape, np.float32)
        if self._shape.context:
            source += np.outer(self._signs.choice([-1, 1], len(source)), self.context)
        for side, rows in (("source", source), ("target", target)):
            rows[position == BOS] += self.dense[side]
        return {"source": source, "target": target}


def _beside(directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """A unit vector [D] at right angles to `directions` [T, D]; 0 where there is none."""
    count, width = directions.shape
    return np.linalg.qr(directions.T, "complete")[0][:, -1] if count < width else np.zeros(width, np.float32)


def planted_store(
    path: Path, shape: Shape, blocks: int = BLOCKS, windows: int = WINDOWS, seed: int = 0
) -> SyntheticStore:
    """Write a store of `shape`: two held-out blocks, and `blocks` to train on, each of some windows."""
    return make_store(
        path,
        d_in=shape.d,
        d_out=shape.d,
        training_blocks=blocks,
        draw=Planted(shape, seed),
        keep={0: 0.25},
        label="planted",
        block_sequences=windows,
        context_size=32,
    )


@dataclass(frozen=True, slots=True)
class Found:
    """How a dictionary stands to the true one."""

    recovered: float
    """Share of true latents."""
    rare_recovered: float
    """The same of the fourth that fires least."""
    together_recovered: float
    """Share of pairs that fire together, both of which are recovered."""
    families_recovered: float
    """Share of parents that are recovered and whose children are."""
    duplicated: int
    """True latents that are there twice or more."""
    spare: int
    """Latents that are there beside another of the same true one."""
    other: int
    """Live latents that are none of the true ones."""
    mmcs: float
    """Mean over true latents of the largest cosine (Sharkey et al. 2022)."""


def compare(
    W_dec: NDArray[np.float32],  # [F, O] unit rows of live latents
    truth: Truth,
) -> Found:
    """Match latents with true ones by the cosine of their directions."""
    cosines = truth.target @ W_dec.T
    close = cosines > CLOSE
    times = close.sum(1)
    there = times > 0
    rare = np.argsort(truth.rates)[: len(there) // 4]
    return Found(
        recovered=float(there.mean()),
        rare_recovered=float(there[rare].mean()),
        together_recovered=float(there[truth.together].all(1).mean()),
        families_recovered=float(there[truth.families].all(1).mean()),
        duplicated=int((times > 1).sum()),
        spare=int(np.maximum(times - 1, 0).sum()),
        other=int((~close.any(0)).sum()),
        mmcs=float(cosines.max(1).mean()),
    )


def judge(path: Path, truth: Truth) -> dict[str, float]:
    """What a run found of the true dictionary, and its held-out figures."""
    at, settings = checkpoint.find(path).path, read_config(path).settings
    since = load_file(at / checkpoint.OPTIMIZER)["rows_since_fired"]
    live = since < settings.auxk.dead_after(settings.steps * settings.rows.batch_rows)
    found = compare(load_file(at / checkpoint.WEIGHTS)["W_dec"][live], truth)
    held_out = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])["held_out"]
    return asdict(found) | {"live": int(live.sum()), "fvu": held_out["fvu"], "l0": held_out["l0"]}


UNITS = {
    "recovered": "share of true latents",
    "rare_recovered": "share of the rarest fourth",
    "together_recovered": "share of pairs",
    "families_recovered": "share of pairs",
    "duplicated": "true latents",
    "spare": "latents",
    "other": "latents",
    "live": "latents",
    "mmcs": "cosine",
    "fvu": "held out",
    "l0": "latents",
}


def main() -> None:
    """Train every arm with every seed, print the table and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.planted")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="A.B=VALUE")
    parser.add_argument("--store", type=Path, help="where the planted store is kept; default: made and removed")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(options, Path(folder))
    figures: dict[str, tuple[float, str]] = {}
    print(f"{'':24}" + "".join(f"{arm:>28}" for arm in results))
    for name, unit in UNITS.items():
        line = f"{name:24}"
        for arm, runs in results.items():
            values = [found[name] for found in runs]
            figures[f"{arm}: {name.replace('_', ' ')}"] = (mean(values), unit)
            figures[f"{arm}: {name.replace('_', ' ')}, largest less smallest"] = (max(values) - min(values), unit)
            line += f"{mean(values):14.4g} ({min(values):.4g}-{max(values):.4g})".rjust(28)
        print(line)
    if not options.no_record:
        settings = "".join(f" --set {assignment}" for assignment in options.assignments)
        title = f"planted: {SHAPE.latents} true latents, {options.seeds} seeds, {options.steps:,} steps of 512 rows"
        line = f"python -m tests.bench.planted --seeds {options.seeds} --steps {options.steps}{settings}"
        record(title, line, figures)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, float]]]:
    """The runs of every arm, taking turns by seed."""
    shape, store = SHAPE, options.store or folder / "store"
    if not (store / layout.STORE).is_file():
        planted_store(store, shape)
    config = folder / "planted.toml"
    config.write_text(SETTINGS)
    results: dict[str, list[dict[str, float]]] = {arm: [] for arm in options.arms}
    for seed in range(options.seeds):
        for arm in options.arms:
            name = f"{arm.replace(', ', '-')}-{seed}"
            where = ("--config", config, "--store", store, "--runs", folder, "--name", name)
            sets = [part for one in (*TINY, *OFF, *options.assignments, *ARMS[arm]) for part in ("--set", one)]
            command = (sys.executable, "-m", "train", "run", *where, "--steps", options.steps, "--seed", seed, *sets)
            done = run(*command)
            results[arm].append(judge(folder / name, shape.truth(0)))
            print(f"{name}: {done.cpu_seconds:.0f} CPU-s, {results[arm][-1]}", file=sys.stderr)
    return results


if __name__ == "__main__":
    main()
