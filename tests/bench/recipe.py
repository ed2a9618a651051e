"""What each part of the recipe is worth: one change at a time, several seeds, on any store.

    python -m tests.bench.recipe NAME STORE [--preset base] [--arms A ...] [--seeds 0 1 2] [--set a.b=value ...]
                                 [--work DIR]

writes docs/benchmarks.json and docs/benchmarks.md under "recipe, NAME". Each run is the real command's. Runs are judged
alike, at the threshold at which rows have k active latents, on both halves of the held-out blocks: the *choosing* half,
by which the recipe was chosen, and the *reporting* half, which no choice looked at. Outliers and position 0 are left
out of both, whatever a run was trained on. What was trained and judged is kept in `--work`, and not done again.
"""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from shared.files import durable
from shared.store.store import Store
from tests.bench.judge import Rows, Weights, judge
from tests.bench.record import record, run, sized
from tests.bench.same_rows import CPU, code, last
from tests.runs import VALUES
from train.data.batches import StoreRows
from train.evaluation.evaluate import natural_weights
from train.live.run_files import CONFIG, TIMING
from train.model import checkpoint
from train.run.load_run import build_transcoder
from train.run.metrics import Log
from train.run.settings import RunConfig, Settings, load_settings, read_config, resolve_exclusion

COMMAND = "python -m tests.bench.recipe"
SMALL: list[str] = sized(
    [], [*(f"{name}={value}" for name, value in VALUES.items()), "steps=20", "evaluation.every=20"]
)
BEFORE = (
    "transcoder.skip=false", "optimizer.decoder_rate=1", "rows.outliers=train", "rows.position_0=train",
    "evaluation.outliers=with_others",
)  # fmt: skip
FREE = ("transcoder.decoder_norm=free", "optimizer.decoder_rate=1", "optimizer.decay_share=1")
ARMS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "before": BEFORE,
    "before, outliers and position 0 left out": BEFORE[:2],
    "no skip": ("transcoder.skip=false",),
    "decoder rate 1": ("optimizer.decoder_rate=1",),
    "decoder rate 2": ("optimizer.decoder_rate=2",),
    "decoder rate 8": ("optimizer.decoder_rate=8",),
    "lr half": ("optimizer.lr={half}",),
    "lr double": ("optimizer.lr={double}",),
    "lr fourfold": ("optimizer.lr={fourfold}",),
    "aux-k 0.25, lr double": ("auxk.coefficient=0.25", "optimizer.lr={double}"),
    "aux-k 0.25, lr fourfold": ("auxk.coefficient=0.25", "optimizer.lr={fourfold}"),
    "beta2 0.99": ("optimizer.beta2=0.99",),
    "aux-k 0.06": ("auxk.coefficient=0.06",),
    "aux-k 0.25": ("auxk.coefficient=0.25",),
    "aux-k 0.5": ("auxk.coefficient=0.5",),
    "aux-k 0.25, beta2 0.99": ("auxk.coefficient=0.25", "optimizer.beta2=0.99"),
    "decay over the whole run": ("optimizer.decay_share=1",),
    "decay over the last fifth": ("optimizer.decay_share=0.2",),
    "no k warm-up": ("activation.k_start={k}",),
    "k falls over 0.15 of the run": ("activation.k_warmup_share=0.15",),
    "k falls over half of the run": ("activation.k_warmup_share=0.5",),
    "k falls over 0.95 of the run": ("activation.k_warmup_share=0.95",),
    "k falls from twice": ("activation.k_start=2x",),
    "k falls from four times": ("activation.k_start=4x",),
    "encoder scale 1": ("transcoder.encoder_scale=1",),
    "clip 1": ("optimizer.max_grad_norm=1",),
    "whole weighs 2": ("transcoder.whole_weight=2",),
    "whole weighs 4": ("transcoder.whole_weight=4",),
    "whole weighs 8": ("transcoder.whole_weight=8",),
    "whole weighs 16": ("transcoder.whole_weight=16",),
    "no Matryoshka": ("transcoder.prefixes=[{d_sae}]",),
    "free decoder norm": (*FREE, "optimizer.lr={double}"),
    "free decoder norm, lr as it was": FREE,
    "unit decoder rows": ("transcoder.decoder_norm=unit",),
    "unit decoder rows, decay over the last half": ("transcoder.decoder_norm=unit", "optimizer.decay_share=0.5"),
    "decay over the last half": ("optimizer.decay_share=0.5",),
    "quiet 0.1": ("quiet.weight=0.1",),
    "quiet 0.4": ("quiet.weight=0.4",),
}
"""Changes of the preset."""


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, judge, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("store", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value")
    parser.add_argument("--work", type=Path, default=Path(".recipe"))
    options = parser.parse_args(arguments)
    figures: dict[str, tuple[float, str]] = {}
    for arm in options.arms:
        found = [measured(options, arm, seed) for seed in options.seeds]
        figures |= summary(arm, found)
        print(
            f"{arm}: " + ", ".join(f"{key} {value:.4g}" for key, (value, _) in summary("", found).items()), flush=True
        )
    extra = "".join(f" {assignment}" for assignment in options.set)
    record(f"recipe, {options.name}", f"{COMMAND} {options.name} STORE --preset {options.preset} --set{extra}", figures)


def summary(arm: str, found: list[dict[str, float]]) -> dict[str, tuple[float, str]]:
    """Means over seeds, and the deviation of the reported fvu."""
    units = {"active on a row of position 0": "latents", "pairs above 0.8": "pairs", "cosines above 0.9": "pairs",
             "training": "CPU-s"}  # fmt: skip
    head = f"{arm}: " if arm else ""
    means = {name: statistics.mean(one[name] for one in found) for name in found[0]}
    figures = {f"{head}{name}": (value, units.get(name, "")) for name, value in means.items()}
    if len(found) > 1:
        spread = statistics.stdev(one["fvu, reported"] for one in found)
        figures[f"{head}fvu, reported: deviation of {len(found)} seeds"] = (spread, "")
    return figures


def measured(options: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """One run's figures; trained and judged if they are not kept."""
    given = [*options.set, *SMALL]
    base = load_settings(options.preset, given)
    store = Store.open(options.store)
    shape = base.transcoder.resolve(store.record.d_in, base.activation.resolve(base.steps))
    lr, d_sae = base.optimizer.resolve(base.steps, store.record.d_in, shape.decoder_norm == "unit").lr, shape.d_sae
    assert isinstance(lr, float) and base.activation.kind == "batchtopk"
    values = {"half": lr / 2, "double": lr * 2, "fourfold": lr * 4, "k": base.activation.k, "d_sae": d_sae}
    changes = [change.format(**values) for change in ARMS[arm]]
    return run_and_judge(store, options.preset, [*given, f"seed={seed}", *changes], options.work)


def run_and_judge(store: Store, preset: str, settings: list[str], work: Path) -> dict[str, float]:
    """Train a run with these settings and judge it, or find what was judged before; a killed one is resumed."""
    settings = [*settings, "threads=1", "samples.rows=0"]
    told = [code(), store.request.digest, store.record.blocks, preset, *settings]
    name = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
    kept = work.resolve() / f"{name}.json"
    if not kept.exists():
        path = kept.parent / f"run-{name}"
        sets = [part for one in settings for part in ("--set", one)]
        line = ["run", preset, "--store", store.path.resolve(), "--runs", kept.parent, "--name", path.name, *sets]
        begun = (path / CONFIG).exists()
        run(sys.executable, "-m", "train", *(["resume", path] if begun else line), "--quiet")
        durable.publish_bytes(kept, json.dumps(figures_of(path, store)).encode())
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def figures_of(path: Path, store: Store) -> dict[str, float]:
    """What a finished run reaches on both halves of the held-out rows, and what it took."""
    config, row = read_config(path), last(path)
    k = config.settings.activation.k if config.settings.activation.kind == "batchtopk" else 0
    found = load_file(checkpoint.find(path).path / checkpoint.WEIGHTS)
    weights = Weights(**{name: found[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")},
                      W_skip=found.get("W_skip"), threshold=float(found["threshold"][0]))  # fmt: skip
    halves = {
        half: judge(weights, rows(store, blocks, config), k)
        for half, blocks in (("chosen by", store.record.calibration_blocks), ("reported", store.record.report_blocks))
    }
    reported = halves["reported"]
    held_out: dict[str, Any] = row["held_out"]
    at_0 = next((part for name, part in held_out["strata"].items() if name == "000-001"), None)
    return {
        **{f"fvu, {half}": part.equal.fvu for half, part in halves.items()},
        "l0": reported.equal.l0,
        "dead": reported.dead,
        "dead in training": row["dead_share"],
        "pairs above 0.8": reported.correlated,
        "cosines above 0.9": reported.parallel,
        "fvu on training rows": row["fvu_natural"],
        **({"active on a row of position 0": at_0["l0"]} if at_0 else {}),
        **({"fvu of the skip connection alone": held_out["fvu_of_skip"]} if held_out["fvu_of_skip"] else {}),
        "training": Log(path / TIMING).rows()[-1]["cpu_seconds"],
    }


def rows(store: Store, blocks: range, config: RunConfig) -> list[Rows]:
    """Normalised held-out rows as the run's transcoder reads them, at natural frequencies, none of them an outlier."""
    judged, weights = store.excluding(resolve_exclusion(store, Settings())), natural_weights(store)
    normalised = build_transcoder(config, store.excluding(config.exclusion)).normalised
    found = []
    for chunk in StoreRows(judged, 1024, config.settings.source).chunks(blocks, CPU):
        if weight := weights[chunk.stratum]:
            found.append(Rows(*normalised(chunk.ordinary.source, chunk.ordinary.target), weight))
    return found


if __name__ == "__main__":
    main()
