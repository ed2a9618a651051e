"""What a planted attention sink costs a run: the embedded model with a BOS embedding 60 times as long.

    python -m tests.bench.sinks [--tokens 300000] [--steps 1000]     writes docs/benchmarks.json and docs/benchmarks.md

Its rows at position 0 have about 30 times the median norm at layer 8. Three runs of the preset tiny: the default one,
one that leaves out position 0 by name and nothing else, and one that trains on every row, as runs did before there were
exclusions. All are judged on the same held-out rows, none of them of position 0 or an outlier.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from harvest.embedded import MODEL_FOLDER
from shared.store.store import Store
from tests.bench.recipe import figures_of
from tests.bench.record import record, run, sized
from tests.runs import VALUES

SMALL = sized(["threads=1"], [f"{name}={value}" for name, value in VALUES.items()])
TIMES = 60.0
BOS_ROW = "model.embed_tokens.weight"
RUNS = {
    "default": (),
    "position 0 left out by name": ("rows.outlier_ratio=0", "rows.position_0=leave_out"),
    "every row trained on": ("rows.outlier_ratio=0", "rows.position_0=train"),
}


def main(arguments: list[str] | None = None) -> None:
    """Harvest, train three times, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=sized(300_000, 1))
    parser.add_argument("--steps", type=int, default=sized(1000, 20))
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = ("run", "tiny", "--model", sink_model(scratch / "sink"), "--cache", scratch / "cache")
        small = sized((), ("--set", "windows.context_size=32", "--set", "store.block_sequences=16"))
        harvested = run(sys.executable, "-m", "harvest", *source, "--tokens", options.tokens, *small, "--quiet")
        store, figures = Store.open(Path(harvested.out.splitlines()[-1])), dict[str, tuple[float, str]]()
        first, overall = store.record.strata[0].source, store.record.overall.source
        ratio = first.norm_quantiles["0.5"] / overall.norm_quantiles["0.5"]
        figures["norm at position 0 over the median"] = (ratio, "times")
        for name, changes in RUNS.items():
            sets = [part for one in (*changes, *options.set, *SMALL, "samples.rows=0") for part in ("--set", one)]
            line = ("run", "tiny", "--store", store.path, "--runs", scratch / "runs", "--name", name.replace(" ", "-"))
            done = run(sys.executable, "-m", "train", *line, "--steps", options.steps, *sets, "--quiet")
            found = figures_of(Path(done.out.splitlines()[-1]), store)
            figures[f"{name}: fvu"] = (found["fvu, reported"], "")
            figures[f"{name}: dead"] = (found["dead"], "")
            figures[f"{name}: active on a row of position 0"] = (found["active on a row of position 0"], "latents")
    ratio = figures["default: fvu"][0] / figures["position 0 left out by name: fvu"][0]
    figures["fvu of the default over that without position 0"] = (ratio, "times")
    record("planted sink", "python -m tests.bench.sinks", figures)


def sink_model(folder: Path) -> Path:
    """Copy the embedded model, its BOS embedding `TIMES` times as long."""
    shutil.copytree(MODEL_FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    weights[BOS_ROW] = weights[BOS_ROW].clone()
    weights[BOS_ROW][bos_token(folder)] *= TIMES
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def bos_token(folder: Path) -> int:
    """The number of the model's BOS."""
    found: int = json.loads((folder / "config.json").read_text())["bos_token_id"]
    return found


if __name__ == "__main__":
    main()
