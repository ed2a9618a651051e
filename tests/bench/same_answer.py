"""Do the fast step and the dense one, and this trainer and others, reach the same answer on the same rows?

    python -m tests.bench.same_answer STORE [reference] [peers] [--steps N] [--k N] [--rates LR ...] [--own] [--jobs N]

`reference`: two runs of the preset `tiny` with one seed and so one batch order, one on the fast kernels and one on the
dense fp32 reference (`--kernels A B` compares others). Held-out fvu must agree within half a percent.

`peers`: two other trainers' Matryoshka BatchTopK autoencoders of the store's target, and this trainer with
`source=target`, which is the same map. All see the same rows in the same order, shifted and scaled by the store's
statistics, at the same width, prefixes and k. Every trainer is trained with each of `--rates`, peers with `--own` also
with the rate that they recommend, and the best one of each counts. What a trainer hands over is one affine map, a
threshold and another affine map; a plain dense evaluator, the same for all, gives their fvu on the report rows at
natural frequencies without position 0: under the trainer's own threshold, and under the one at which these very rows
have k active latents on average, so that no trainer gains by being less sparse. tests/bench/peer_training.py says what
else peers are given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shared.store import Store
from tests.bench import peer_training
from tests.bench.peers import PLACE, TUNED, environment, others
from tests.bench.record import ROOT, record, run, sized
from tests.runs import SMALL
from train import checkpoint
from train.evaluate import natural_weights
from train.rows import BatchReader, held_out_rows
from train.settings import RunConfig, read_config

LIMIT = 0.005
"""Relative difference of fvu that still counts as the same answer."""
CPU = torch.device("cpu")
TRAINERS = others(peer_training.TRAINERS)


class Weights(NamedTuple):
    """An autoencoder of normalised rows: latents are the pre-activations above `threshold`."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: float

    def pre_acts(self, x: Tensor) -> Tensor:
        """[B, F]"""
        return x @ self.W_enc + self.b_enc


class Rows(NamedTuple):
    """Normalised held-out rows of one stratum."""

    values: Tensor
    """[B, D]"""
    weight: float
    """How often each counts at natural frequencies."""


def main() -> None:
    """Measure the parts that are named, or both, and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.same_answer")
    parser.add_argument("store", type=Path)
    parser.add_argument("parts", nargs="*", choices=[[], "reference", "peers"], default=[])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3, 4e-3], help="learning rates for everyone")
    parser.add_argument("--own", action="store_true", help="peers also at the rate that they recommend")
    parser.add_argument("--jobs", type=int, default=1, help="peers that train side by side, on a thread each")
    parser.add_argument("--kernels", nargs=2, default=["compiled", "dense"], help="what `reference` compares")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    line = f"python -m tests.bench.same_answer STORE {{}} --steps {options.steps}"
    for part, measure in (("reference", reference), ("peers", peers)):
        if options.parts and part not in options.parts:
            continue
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(options, Path(folder))
        title = f"same answer, {part}: d_sae 4,096, k {options.k}, {options.steps:,} steps of 1,024"
        for name, (value, unit) in figures.items():
            print(f"{name}: {value:.6g} {unit}")
        if not options.no_record:
            record(title, line.format(part), figures)
        worst = figures.get("relative difference of held-out fvu", (0.0, ""))[0]
        if worst > LIMIT:
            sys.exit(f"held-out fvu differs by {worst:.2%}, more than {LIMIT:.1%}")


def train(store: Path, runs: Path, name: str, steps: int, *assignments: str) -> Path:
    """A run of the preset `tiny` with its warm-ups shortened as the run is."""
    warmups = f"activation.k_warmup_steps={steps // 7}", f"optimizer.warmup_steps={min(100, steps // 20)}"
    settings = (*warmups, f"evaluation.every={steps}", *assignments)
    sets = [part for setting in settings for part in ("--set", setting)] + sized([], SMALL)
    command = ("train", "run", "tiny", "--store", store, "--runs", runs, "--name", name, "--steps", steps, *sets)
    run(sys.executable, "-m", *command)
    return runs / name


def last(run_: Path) -> dict[str, Any]:
    """The last row of a run's metrics."""
    found: dict[str, Any] = json.loads((run_ / "metrics.jsonl").read_text().splitlines()[-1])
    return found


def reference(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """Two runs that differ in their kernels only."""
    found = {}
    for kernels in options.kernels:
        setting = (f"kernels={kernels}", f"activation.k={options.k}")
        found[kernels] = last(train(options.store, folder, kernels, options.steps, *setting))
    figures: dict[str, tuple[float, str]] = {}
    for kernels, row in found.items():
        figures[f"{kernels}: held-out fvu"] = (row["held_out"]["fvu"], "")
        figures[f"{kernels}: l0 by threshold"] = (row["held_out"]["l0"], "latents")
        figures[f"{kernels}: dead latents at the end"] = (row["dead_share"], "share")
    ours, dense = (row["held_out"]["fvu"] for row in found.values())
    return figures | {"relative difference of held-out fvu": (abs(ours / dense - 1), "")}


def peers(options: argparse.Namespace, folder: Path) -> dict[str, tuple[float, str]]:
    """This trainer and the others on the same rows, judged alike."""
    store = Store.open(options.store)
    rows, best = list(report_rows(store)), dict[str, dict[str, tuple[float, float]]]()
    figures: dict[str, tuple[float, str]] = {}

    def note(trainer: str, lr: float, weights: Weights) -> dict[str, tuple[float, float]]:
        found = judge(weights, rows, options.k)
        show(figures, f"{trainer}, lr {lr:.2g}", found)
        if trainer not in best or found["equal"][0] < best[trainer]["equal"][0]:
            best[trainer] = found
        return found

    for lr in options.rates:
        setting = ("source=target", f"activation.k={options.k}", f"activation.k_start={options.k}")
        own = train(options.store, folder, f"ours-{lr:g}", options.steps, *setting, f"optimizer.lr={lr}")
        found, said = note("ours", lr, ours(own, store)), last(own)["held_out"]["fvu"]
        assert abs(found["own"][0] / said - 1) < 1e-3, f"judged {found}, the run says {said}"
    config = read_config(own)
    wanted: list[tuple[str, float | None]] = [
        (trainer, lr) for trainer in TRAINERS for lr in (*([None] * options.own), *options.rates)
    ]
    for trainer in TRAINERS:
        environment(trainer.split()[0])
    with ThreadPoolExecutor(options.jobs) as pool:
        at_once = pool.map if options.jobs > 1 else map
        outs = list(at_once(lambda one: train_peer(store, config, one[0], one[1], folder), wanted))
    for (trainer, _), out in zip(wanted, outs, strict=True):
        arrays = np.load(out)
        note(trainer, float(arrays["lr"]), from_arrays(arrays))
        figures[f"{trainer}, lr {float(arrays['lr']):.2g}: training"] = (float(arrays["seconds"]), "CPU-s")
    for trainer in TRAINERS:
        ratio = best["ours"]["equal"][0] / best[trainer]["equal"][0]
        figures[f"fvu at l0 {options.k}: ours over {trainer}, each at its best rate"] = (ratio, "times")
    least = min(best[trainer]["equal"][0] for trainer in TRAINERS)
    figures[f"fvu at l0 {options.k}: ours over the best peer"] = (best["ours"]["equal"][0] / least, "times")
    return figures


def show(figures: dict[str, tuple[float, str]], name: str, found: dict[str, tuple[float, float]]) -> None:
    """Put what the judge found among the figures."""
    figures[f"{name}: fvu at equal l0"] = (found["equal"][0], "")
    figures[f"{name}: l0 there"] = (found["equal"][1], "latents")
    figures[f"{name}: fvu by its own threshold"] = (found["own"][0], "")
    figures[f"{name}: l0 by its own threshold"] = (found["own"][1], "latents")


def normalisation(store: Store) -> tuple[Tensor, float]:
    """Mean and scale of the target, as `train.loop.build_transcoder` has them."""
    side = store.statistics["overall"]["target"]
    return torch.from_numpy(side.mean).float(), float(np.sqrt(side.variance.mean()))


def ours(path: Path, store: Store) -> Weights:
    """The newest checkpoint of a run with `source=target`."""
    found = load_file(checkpoint.find(path).path / checkpoint.WEIGHTS)
    mean, scale = normalisation(store)
    for side in ("source", "target"):
        assert torch.allclose(found[f"{side}_mean"], mean), f"{side} is not shifted as the target is"
        assert abs(float(found[f"{side}_scale"]) / scale - 1) < 1e-6, f"{side} is not scaled as the target is"
    W_enc, b_enc, W_dec, b_dec = (found[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return Weights(W_enc, b_enc, W_dec, b_dec, float(found["threshold"][0]))


def from_arrays(arrays: Any) -> Weights:
    """What a peer exported."""
    W_enc, b_enc, W_dec, b_dec = (
        torch.from_numpy(arrays[name]).float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    return Weights(W_enc, b_enc, W_dec, b_dec, float(arrays["threshold"]))


def train_peer(store: Store, config: RunConfig, trainer: str, lr: float | None, folder: Path) -> Path:
    """Train a peer on the rows of a run; returns the file of its weights."""
    settings, shape = config.settings, config.settings.transcoder
    out = folder / f"{trainer.split()[0]}-{lr}.npz"
    told = {
        "trainer": trainer,
        "d": config.d_out,
        "d_sae": shape.d_sae,
        "prefixes": shape.prefixes,
        "k": getattr(settings.activation, "k", None),
        "rows": settings.rows.batch_rows,
        "steps": settings.steps,
        "lr": lr,
        "dead_after": settings.auxk.dead_after(settings.steps * settings.rows.batch_rows),
        "threads": 1,
        "out": str(out),
    }
    line = [environment(trainer.split()[0]), "-I", ROOT / "tests/bench/peer_training.py", json.dumps(told)]
    quiet = {"TQDM_DISABLE": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    threads = {f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "MKL", "OPENBLAS")}
    print(f"training {trainer}, lr {lr or 'its own'}", file=sys.stderr, flush=True)
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
            process.stdin.write(batch.numpy().tobytes())
        process.stdin.close()
    except BrokenPipeError:
        pass  # its exit code says more
    if code := process.wait():
        sys.exit(f"{trainer} ended with exit code {code}")
    return out


def batches(store: Store, config: RunConfig) -> Iterator[Tensor]:
    """The target rows of every step of a run, normalised."""
    settings, (mean, scale) = config.settings, normalisation(store)
    reader = BatchReader(store, range(config.first_block, config.last_block), settings.rows, settings.seed, CPU)
    for step in range(settings.steps):
        yield (reader.batch(step).target - mean) / scale


def report_rows(store: Store) -> Iterator[Rows]:
    """The report blocks' target rows, without position 0."""
    weights, (mean, scale) = natural_weights(store), normalisation(store)
    for chunk in held_out_rows(store, store.record.report_blocks, 1024, CPU):
        if weight := weights[chunk.stratum]:
            yield Rows((chunk.target - mean) / scale, weight)


@torch.no_grad()
def judge(weights: Weights, rows: list[Rows], k: int) -> dict[str, tuple[float, float]]:
    """The (fvu, l0) under a trainer's own threshold and under that of l0 = k, densely."""
    equal = threshold_at(weights, rows, k)
    return {"own": fvu(weights, rows, weights.threshold), "equal": fvu(weights, rows, equal)}


def threshold_at(weights: Weights, rows: list[Rows], k: int) -> float:
    """The threshold above which the rows, at natural frequencies, have k latents on average."""
    kept, counts, floor, total = [], [], 0.0, 0.0
    for part in rows:
        found = weights.pre_acts(part.values).relu().view(-1)
        top = found.topk(min(8 * k * len(part.values), found.numel()), sorted=False).values
        floor = max(floor, float(top.min()))
        kept.append(top)
        counts.append(torch.full_like(top, part.weight, dtype=torch.float64))
        total += part.weight * len(part.values)
    values, order = torch.cat(kept).sort(descending=True)
    place = int(torch.searchsorted(torch.cat(counts)[order].cumsum(0), k * total, right=True))
    threshold = float(values[place]) if place < len(values) else 0.0
    assert threshold >= floor, "some rows have more than 8 k latents above the threshold"
    return threshold


def fvu(weights: Weights, rows: list[Rows], threshold: float) -> tuple[float, float]:
    """Squared error over squared distance from the mean, and active latents per row, at natural frequencies."""
    errors = squares = active = n = 0.0
    mean = torch.zeros_like(weights.b_dec, dtype=torch.float64)
    for part in rows:
        x, pre_acts = part.values, weights.pre_acts(part.values)
        kept = pre_acts > threshold
        error = x - (pre_acts * kept) @ weights.W_dec - weights.b_dec
        errors += part.weight * float(error.double().square().sum())
        squares += part.weight * float(x.double().square().sum())
        active += part.weight * float(kept.sum())
        mean += part.weight * x.double().sum(0)
        n += part.weight * len(x)
    return errors / (squares - float(mean.square().sum()) / n), active / n


if __name__ == "__main__":
    main()
