"""Train this trainer or another on the same rows, and judge: or find what was trained and judged before."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import cache, partial
from inspect import getsource
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.files import durable
from shared.store.store import Store
from shared.store.strata import POSITION_0
from tests.bench import peer_training
from tests.bench.judge import Judged, Part, Rows, Weights, judge
from tests.bench.peers import PACKAGES, PLACE, TUNED, environment, others
from tests.bench.record import ROOT, run, sized
from tests.runs import VALUES
from train.compare.measure import cost_per_step
from train.data.batches import BatchReader, Side, StoreRows
from train.evaluation.evaluate import natural_weights
from train.live.run_files import METRICS, TIMING
from train.model import checkpoint
from train.run.load_run import build_transcoder
from train.run.metrics import Log
from train.run.settings import RunConfig, load_settings, read_config, resolve

CPU = torch.device("cpu")


class Trainer(NamedTuple):
    """Whom to train, and how."""

    map: str
    """What is compared with what: an `autoencoder` of the targets, or a `transcoder`."""
    rates: tuple[float, ...]
    """Where the grid of learning rates begins."""
    settings: tuple[str, ...] = ()
    """Of this project's trainer, beside the preset's; with {k} and {d_sae}"""
    rule: Literal["equal", "per_row"] = "equal"
    """Of those in `Judged`, the one whose fvu decides which learning rate is best."""

    @property
    def source(self) -> Side:
        """The side of the pairs that is read."""
        return "target" if self.map == "autoencoder" else "source"


OURS = {
    "ours, autoencoder": Trainer("autoencoder", (2e-3, 4e-3, 8e-3), ("activation.k_start={k}",)),
    "ours, TopK without prefixes": Trainer(
        "transcoder", (2e-3, 4e-3, 8e-3), ("activation.kind=topk", "transcoder.prefixes=[{d_sae}]"), "per_row"
    ),
    "ours, Matryoshka BatchTopK": Trainer("transcoder", (2e-3, 4e-3, 8e-3)),
}
PEERS = {
    "stand-in": Trainer("autoencoder", (1e-3,)),
    "SAELens Matryoshka BatchTopK": Trainer("autoencoder", (2e-3, 4e-3, 8e-3)),
    "dictionary_learning Matryoshka BatchTopK": Trainer("autoencoder", (2e-3, 4e-3, 8e-3)),
    "sparsify TopK, Signum": Trainer(
        "transcoder", (5e-3, 1e-2, 2e-2), rule="per_row"
    ),  # its own choice at 4,096 latents: 1e-2
    "sparsify TopK, Adam": Trainer("transcoder", (1e-3, 2e-3, 4e-3), rule="per_row"),  # 4e-4
}


TRAINERS = sized(OURS, {"ours, autoencoder": OURS["ours, autoencoder"]}) | {name: PEERS[name] for name in others(PEERS)}


class Result(NamedTuple):
    """One training, judged."""

    judged: Judged
    seconds: float
    """CPU time of training alone"""


class SameRows:
    """Trainings on one store at one width, k and number of steps. Threads may ask for several at once."""

    def __init__(self, options: Namespace) -> None:
        self._options, self._work = options, options.work.resolve()
        self._work.mkdir(parents=True, exist_ok=True)
        self._judging, self._rows = Lock(), cache(self._read_rows)

    def result(self, name: str, lr: float, seed: int) -> Result:
        """Train with one learning rate and seed, and judge; both are kept."""
        sets = self.settings(name, lr, seed)
        store, config = self.resolved(sets)
        told = told_ours(config) if name in OURS else told_peer(name, config, lr)
        key = f"{name.replace(',', '').replace(' ', '-')}-lr{lr:.3g}-seed{seed}-{digest(told)}"
        weights, found = self._work / f"{key}.npz", self._work / f"{key}.json"
        if not found.exists():
            if not weights.exists():
                print(f"training {key}", file=sys.stderr, flush=True)
                train_ours(store, self._options.preset, sets, weights) if name in OURS else train_peer(
                    store, config, told, weights
                )
            durable.publish_bytes(found, json.dumps(self._judge(name, weights)).encode())
        read = json.loads(found.read_text())
        own, equal, per_row = (part and Part(*part) for part in read["parts"])
        return Result(Judged(own, equal, per_row, *read["counts"]), read["seconds"])

    def settings(self, name: str, lr: float, seed: int) -> list[str]:
        """Settings of this trainer's run whose rows everybody gets."""
        options, trainer = self._options, TRAINERS[name]
        own = [setting.format(k=options.k, d_sae=options.d_sae) for setting in trainer.settings]
        own += ["transcoder.skip=false"] if trainer.map == "autoencoder" else []
        chosen = f"source={trainer.source}", f"seed={seed}", f"optimizer.lr={lr!r}", "threads=1", "samples.rows=0"
        return own_settings(options.steps, options.k, options.d_sae, *own, *chosen, *options.set)

    def resolved(self, sets: list[str]) -> tuple[Store, RunConfig]:
        """The store, and the run of these settings."""
        store = Store.open(self._options.store)
        config = resolve(store, load_settings(self._options.preset, sets), None)
        return store.excluding(config.exclusion), config

    def _judge(self, name: str, weights: Path) -> dict[str, Any]:
        """What is kept of a judged training."""
        arrays = dict(np.load(weights))
        with self._judging:  # numba's loops are not for several threads
            found = judge(from_arrays(arrays), self._rows(TRAINERS[name].source), self._options.k)
        if "said" in arrays:  # what this trainer says of the same rows by other code
            assert found.own and abs(found.own.fvu / arrays["said"] - 1) < 1e-3, f"{found}, not {arrays['said']}"
        return {"parts": found[:3], "counts": found[3:], "seconds": float(arrays["seconds"])}

    def _read_rows(self, source: Side) -> list[Rows]:
        """The report blocks' rows at natural frequencies, without position 0 and outliers."""
        name = next(name for name, trainer in OURS.items() if trainer.source == source)
        store, config = self.resolved(self.settings(name, 1e-3, 0))
        weights, normalised = natural_weights(store), build_transcoder(config, store).normalised
        found = []
        for chunk in StoreRows(store, 1024, source).chunks(store.record.report_blocks, CPU):
            if weight := weights[chunk.stratum]:
                x, y = normalised(chunk.ordinary.source, chunk.ordinary.target)
                found.append(Rows(y if source == "target" else x, y, weight))
        return found


def own_settings(steps: int, k: int, d_sae: int, *assignments: str) -> list[str]:
    """Settings for a run that trains on no row of position 0, beside those of its preset."""
    kinds = [setting for setting in assignments if setting.startswith("activation.kind=")]  # drops others of the kind
    given = f"steps={steps}", f"activation.k={k}", f"transcoder.d_sae={d_sae}", f"evaluation.every={steps}"
    small = sized([], [f"{name}={value}" for name, value in VALUES.items() if name != "activation.k"])
    rest = (setting for setting in assignments if setting not in kinds)
    return [*kinds, *given, "rows.position_0=leave_out", *small, *rest]


def told_ours(config: RunConfig) -> dict[str, Any]:
    """All that decides what this trainer makes of a store."""
    return config.model_dump(mode="json", exclude={"store", "software"}) | {"code": code()}


@cache
def code() -> str:
    """A digest of this project's trainer."""
    files = sorted(path for part in ("train", "shared") for path in (ROOT / part).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def told_peer(name: str, config: RunConfig, lr: float) -> dict[str, Any]:
    """What a peer is told, and all else that decides what it makes of a store."""
    settings, shape = config.settings, config.settings.transcoder
    trainer = peer_training.TRAINERS[name]
    return {
        "trainer": name,
        "package": PACKAGES.get(name.split()[0], ""),
        "widths": [config.d_out] if settings.source == "target" else [config.d_in, config.d_out],
        "d_sae": shape.d_sae,
        "prefixes": shape.prefixes,
        "skip": shape.skip,
        "k": getattr(settings.activation, "k", None),
        "rows": settings.rows.batch_rows,
        "steps": settings.steps,
        "seed": settings.seed,
        "lr": lr,
        "dead_after": settings.auxk.dead_after(settings.steps * settings.rows.batch_rows),
        "read": config.model_dump(mode="json", exclude={"settings", "asked", "store", "software"})
        | {"rows": settings.rows.model_dump(mode="json")},
        "code": getsource(trainer.func if isinstance(trainer, partial) else trainer),
    }


def digest(told: dict[str, Any]) -> str:
    """A short name of it."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def train(store: Path, runs: Path, name: str, settings: Sequence[str], preset: str = "tiny") -> Path:
    """Train a run of a preset."""
    sets = [part for setting in settings for part in ("--set", setting)]
    options = ("--store", store, "--runs", runs, "--name", name, *sets)
    run(sys.executable, "-m", "train", "run", preset, "--quiet", *options)
    return runs / name


def last(run_: Path) -> dict[str, Any]:
    """The last row of a run's metrics."""
    found: dict[str, Any] = Log(run_ / METRICS).rows()[-1]
    return found


def train_ours(store: Store, preset: str, sets: list[str], out: Path) -> None:
    """Train by this project's command; its weights go to `out`, and of the run nothing is kept."""
    name = f"run-{out.stem}"
    shutil.rmtree(out.parent / name, ignore_errors=True)
    path = train(store.path, out.parent, name, sets, preset)
    found = load_file(checkpoint.find(path).path / checkpoint.WEIGHTS)
    kept = {name: found[name].double().numpy() for name in Weights._fields if name in found}
    assert (found["threshold"] == found["threshold"][0]).all(), "the judge has one threshold for all latents"
    said = last(path)["held_out"]["fvu"]
    kept |= {"threshold": kept["threshold"][0], "seconds": np.array(cpu_seconds(path)), "said": np.array(said)}
    partial_ = out.with_name(f"partial-{out.name}")
    np.savez(partial_, allow_pickle=False, **kept)
    partial_.replace(out)
    shutil.rmtree(path)


def cpu_seconds(path: Path) -> float:
    """CPU time of a run's steps without compiling and evaluating; of one too short to tell, of all it did."""
    settings = read_config(path).settings
    per_step, _ = cost_per_step(path, settings)
    whole: float = Log(path / TIMING).rows()[-1]["cpu_seconds"]
    return per_step * settings.steps / 1e3 if per_step else whole


def train_peer(store: Store, config: RunConfig, told: dict[str, Any], out: Path) -> None:
    """Train a peer on the rows of a run; its weights go to `out`."""
    python = environment(told["trainer"].split()[0])
    line = [python, "-I", ROOT / "tests/bench/peer_training.py", json.dumps(told | {"out": str(out)})]
    quiet = {"TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
    threads = {f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "MKL", "OPENBLAS")}
    process = subprocess.Popen(
        [str(part) for part in line],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=PLACE,
        env={**os.environ, **threads, **quiet, **TUNED},
    )
    assert process.stdin is not None
    try:
        for batch in batches(store, config):
            for side in batch:
                process.stdin.write(side.numpy().tobytes())
        process.stdin.close()
    except BrokenPipeError:
        pass  # its exit code says more
    if code := process.wait():
        sys.exit(f"{told['trainer']} ended with exit code {code}")


def batches(store: Store, config: RunConfig) -> Iterator[list[Tensor]]:
    """The rows of every step of a run, normalised: sources and targets, or the targets of an autoencoder alone."""
    settings, normalised = config.settings, build_transcoder(config, store).normalised
    blocks = range(config.first_block, config.last_block)
    reader = BatchReader(store, blocks, settings.rows, settings.seed, CPU, settings.source)
    for step in range(settings.steps):
        batch = reader.batch(step)
        assert POSITION_0 not in batch.strata
        x, y = normalised(batch.source, batch.target)
        yield [y] if settings.source == "target" else [x, y]


def from_arrays(arrays: dict[str, Any]) -> Weights:
    """What a trainer handed over."""
    parts = {name: torch.from_numpy(arrays[name]).float() for name in Weights._fields if name in arrays}
    threshold = parts.pop("threshold", None)
    return Weights(**parts, threshold=None if threshold is None else float(threshold))
