"""The experiment on the diversity loss: arms, three seeds each, on three stores; figures by `train compare`.

    python -m tests.bench.diversity [SETTING ...] [--arms NAME ...] [--seeds N] [--jobs N] [--folder DIR] [--no-record]
    python -m tests.bench.diversity given --store STORE --label "real model" [...]

Settings: `narrow` is d_sae 4,096 on the store of `make harvest`; `short` is the same for 1,500 steps, and runs if it is
named; `wide` is d_sae 8,192 on one that keeps every row of position 0, where latents repeat each other more; `given` is
d_sae 4,096 on a store of any model, with the preset `base`. From scratch through the real commands: harvest (but for
`given`), train, compare. A run that is there already is kept, so that a stopped experiment goes on; each trains on one
thread, `--jobs` of them at a time. An hour and a half on two cores.

Arms: `baseline` has no diversity loss; `ortsae` the penalty on random chunks of decoder rows alone (arXiv 2509.22033),
of half of all rows or a quarter, every 5 steps; `mined` the one on the closest pairs of all; `full` is that and the
penalty on correlated pairs, as the presets have it; `double` and `strong` have two and three times the second. `merge`
has no diversity loss and merges redundant latents after four fifths and nine tenths of the steps;
`both` is that with `full`. All have the same margins. `mined`, `double`, `strong`, `merge` and `both` run if they are
named.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench.record import ROOT, SMOKE, record, run, sized
from tests.llms import small_harvest
from tests.runs import VALUES
from train.compare.arms import Comparison
from train.compare.comparison_table import print_comparison

Values = dict[str, float | list[float]]
OFF: Values = {f"diversity.{term}.weight": 0 for term in ("orthogonality", "mined", "co_activation", "position")}
OFF["diversity.merge.at"] = []
FULL: Values = {"diversity.mined.weight": 1, "diversity.co_activation.weight": 1}
MERGE: Values = {"diversity.merge.at": [0.8, 0.9]}
ARMS: dict[str, Values] = {
    "baseline": {},
    "ortsae": {
        "diversity.orthogonality.weight": 1,
        "diversity.orthogonality.rows": 2048,
        "diversity.orthogonality.every": 5,
    },
    "mined": {"diversity.mined.weight": 1},
    "full": FULL,
    "double": {"diversity.mined.weight": 1, "diversity.co_activation.weight": 2},
    "strong": {"diversity.mined.weight": 1, "diversity.co_activation.weight": 3},
    "merge": MERGE,
    "both": FULL | MERGE,
}
SETTINGS: dict[str, tuple[list[str], dict[str, float]]] = {
    "short": ([], {"steps": 1500, "transcoder.d_sae": 4096}),
    "narrow": ([], {"steps": 2000, "transcoder.d_sae": 4096}),
    "wide": (
        ["store.keep={}"],
        {"steps": 1500, "transcoder.d_sae": 8192, "activation.k_warmup_steps": 500},
    ),
    "given": ([], {"steps": 1000, "transcoder.d_sae": 4096}),
}
"""What the harvest is told, and what all runs are."""
TINY: dict[str, float] = sized({}, {"steps": 20, "activation.k_warmup_steps": 5, **VALUES})
"""Of every run, before what its arm is."""
SHOWN = {
    "fvu": "",
    "live": "latents",
    "dead_share": "share",
    "share_above_0_7": "",
    "pairs_cosine_above_0_9": "pairs",
    "pairs_correlated_above_0_5": "pairs",
    "pairs_correlated_above_0_8": "pairs",
    "clusters": "",
    "latents_in_clusters": "latents",
    "merged.removed": "latents",
    "merged.fvu_rise": "",
    "merged.fvu_rise_random": "",
    "redundant": "latents",
    "redundant_fvu_rise": "",
    "effective_number": "latents",
    "position_0_share_of_top": "",
    "cpu_ms_per_step": "ms",
}


def main() -> None:
    """Make what is missing, compare, and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.diversity")
    parser.add_argument("settings", nargs="*", choices=[[], *SETTINGS], default=[])
    parser.add_argument("--store", type=Path, help="of the setting `given`")
    parser.add_argument("--label", default="given", help="of that store in the title")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["baseline", "ortsae", "full"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=(SMOKE or Path("runs")) / "diversity")
    parser.add_argument("--no-record", action="store_true")
    options = parser.parse_args()
    os.environ |= {f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    chosen = options.settings or ["narrow", "wide"]
    if "given" in chosen and options.store is None:
        parser.error("`given` needs --store STORE")
    for setting in chosen:
        found = experiment(setting, options)
        print_comparison(found)
        (options.folder / f"{setting}.json").write_text(json.dumps(found.model_dump(mode="json"), indent=2) + "\n")
        if not options.no_record:
            of = options.label if setting == "given" else setting
            title = f"diversity, {of}: {describe(setting)}, {options.seeds} seeds"
            store = " --store STORE" if setting == "given" else ""
            command = f"python -m tests.bench.diversity {setting}{store} --arms {' '.join(options.arms)}"
            record(title, command, figures(found))


def experiment(setting: str, options: argparse.Namespace) -> Comparison:
    """Harvest, train and compare one setting."""
    python = [sys.executable, "-m"]
    store = str(options.store.resolve()) if setting == "given" else harvested(setting)
    wanted: list[tuple[str, int]] = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        at_once = pool.map if options.jobs > 1 else map
        runs = list(at_once(lambda one: train(store, setting, one[0], one[1], options.folder), wanted))
    by_arm = sorted(runs, key=lambda path: options.arms.index(path.name.split("-")[1]))
    return Comparison.model_validate_json(run(*python, "train", "compare", *by_arm, "--json").out)


def harvested(setting: str) -> str:
    """The store of a setting."""
    told = [part for assignment in SETTINGS[setting][0] for part in ("--set", assignment)]
    small = ["--cache", SMOKE / "cache", *small_harvest(SMOKE)] if SMOKE else []
    return run(sys.executable, "-m", "harvest", "run", "tiny", *small, *told).out.splitlines()[-1]


def train(store: str, setting: str, arm: str, seed: int, folder: Path) -> Path:
    """The finished run of one arm and seed."""
    path = folder / f"{setting}-{arm}-{seed}"
    shape = SETTINGS[setting][1] | TINY
    done = (ROOT / path / "checkpoints" / f"step-{shape['steps']:06d}").exists()
    if not (ROOT / path / "config.json").exists():
        values = {"threads": 1, "seed": seed, "checkpoint.keep_last": 1, "samples.rows": 0} | shape | OFF | ARMS[arm]
        told = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
        preset = "base" if setting == "given" else "tiny"
        line = ("run", preset, "--store", store, "--runs", folder, "--name", path.name, *told)
        run(sys.executable, "-m", "train", *line)
    elif not done:
        run(sys.executable, "-m", "train", "resume", path)
    return path


def describe(setting: str) -> str:
    """What its runs are, in words."""
    values = SETTINGS[setting][1] | TINY
    return f"d_sae {values['transcoder.d_sae']:,}, {values['steps']:,} steps of 1,024"


def figures(found: Comparison) -> dict[str, tuple[float, str]]:
    """Means and deviations by arm."""
    kept: dict[str, tuple[float, str]] = {}
    for arm in found.arms:
        name = arm.name.split("-")[1]
        spreads = {key: arm.spread[key] for key in SHOWN if key in arm.spread}
        if arm.pw_mcc and arm.in_all_seeds:
            spreads |= {"pw_mcc": arm.pw_mcc, "in_all_seeds": arm.in_all_seeds}
        for key, spread in spreads.items():
            kept[f"{name}: {key}"] = spread.mean, SHOWN.get(key, "")
            if spread.deviation is not None:
                kept[f"{name}: {key}, deviation over seeds"] = spread.deviation, SHOWN.get(key, "")
    return kept


if __name__ == "__main__":
    main()
