"""The two commands of the README from an empty cache: time, memory, and what the transcoder reaches.

    python -m tests.bench.pipeline [trained] [random] [pictures]      writes docs/benchmarks.json and docs/benchmarks.md

`pictures` go with `trained`: docs/images gets the pictures of the same run, and of one with twice the k.

Beside it stand the best linear map on the same rows, and the same transcoder on a model of the same shape with random
weights: what a figure is worth shows against what structureless activations give.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.pictures import take_pictures
from tests.bench.record import SMOKE, named, record, run, sized
from tests.llms import small_harvest
from tests.runs import SETS
from train.run.settings import read_config

COMMAND = "python -m tests.bench.pipeline"
EMBEDDED = Path(__file__).parents[2] / "harvest" / "embedded" / "model"
TRAIN = sized([], ["--steps", "20", *SETS])


def main() -> None:
    """Measure the parts that are named, or both, and record."""
    parts = named(__doc__, "trained", "random", "pictures")
    if "pictures" in parts and "trained" not in parts:
        sys.exit("pictures are of the run that `trained` makes; name both")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "trained" in parts:
            trained = pipeline(scratch / "trained")
            record("pipeline", COMMAND, costs(trained) | quality(trained["evaluation"]))
            if "pictures" in parts:
                picture(trained["run"])
        if "random" in parts:
            random = pipeline(scratch / "random", "--model", random_model(scratch / "random-model"))
            record("same transcoder on random weights", COMMAND, quality(random["evaluation"]))


def pipeline(scratch: Path, *options: object) -> dict[str, Any]:
    """Harvest, harvest again, train and evaluate with the preset `tiny`."""
    small = small_harvest(scratch) if SMOKE else []
    harvest = (sys.executable, "-m", "harvest", "run", "tiny", "--cache", scratch / "cache", *small, *options)
    first, second = run(*harvest), run(*harvest)
    store = first.out.splitlines()[-1]
    assert second.out.splitlines()[-1] == store
    train = run(sys.executable, "-m", "train", "run", "tiny", "--store", store, "--runs", scratch / "runs", *TRAIN)
    found = run(sys.executable, "-m", "train", "evaluate", train.out.splitlines()[-1], "--linear", "--json")
    metrics = (Path(train.out.splitlines()[-1]) / "metrics.jsonl").read_text().splitlines()
    return {
        "run": Path(train.out.splitlines()[-1]),
        "harvest": first,
        "again": second,
        "train": train,
        "store": json.loads((Path(store) / "store.json").read_text()),
        "evaluation": json.loads(found.out) | {"dead": json.loads(metrics[-1])["dead_share"]},
        "rows": json.loads(metrics[-1])["rows"],
    }


def picture(path: Path) -> None:
    """Take the pictures of the documents, of a run, and of it beside the same with twice the k."""
    k = read_config(path).settings.activation.expected_l0
    assert k
    more = ("--runs", path.parent, "--name", f"k{2 * k:.0f}", "--set", f"activation.k={2 * k:.0f}")
    other = run(sys.executable, "-m", "train", "run", "--like", path, *more).out.splitlines()[-1]
    run(sys.executable, "-m", "train", "report", path, "--linear")
    page = path.parent / "compare.html"
    run(sys.executable, "-m", "train", "compare", path, other, "--own-l0", "--html", page)
    take_pictures(path, page)


def costs(measured: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Seconds, bytes and rates."""
    rows = sum(stratum["rows"] for stratum in measured["store"]["strata"])
    plan, request = measured["store"]["plan"], measured["store"]["request"]
    tokens = measured["store"]["blocks"] * request["block_sequences"] * request["context_size"]
    return {
        "harvest": (measured["harvest"].seconds, "s"),
        "tokens harvested": (tokens, "tokens"),
        "training tokens": (sum(plan["segments"]) * request["block_sequences"] * request["context_size"], "tokens"),
        "training rows stored": (rows, "rows"),
        "harvest rate, start-up included": (tokens / measured["harvest"].seconds, "tokens/s"),
        "harvest peak memory": (measured["harvest"].peak_mib, "MiB"),
        "second harvest of the same request": (measured["again"].seconds, "s"),
        "train": (measured["train"].seconds, "s"),
        "rows trained on": (measured["rows"], "rows"),
        "training rate, start-up and evaluation included": (measured["rows"] / measured["train"].seconds, "rows/s"),
        "train peak memory": (measured["train"].peak_mib, "MiB"),
    }


def quality(evaluation: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """Held-out figures."""
    figures = {
        "held-out fvu": (evaluation["fvu"], ""),
        "held-out fvu of the best linear map": (evaluation["linear_fvu"], ""),
        "explained variance": (evaluation["explained_variance"], ""),
        "l0 by threshold": (evaluation["l0"], "latents"),
        "l0 by training rule": (evaluation["l0_training_rule"], "latents"),
        "held-out fvu by training rule": (evaluation["fvu_training_rule"], ""),
        "dead latents at the end of training": (evaluation["dead"], "share"),
        "latents that never fire on the report rows": (evaluation["dead_share"], "share"),
    }
    for size, part in evaluation["prefixes"].items():
        figures[f"prefix {size}: fvu"] = (part["fvu"], "")
        figures[f"prefix {size}: l0"] = (part["l0"], "latents")
    for name, part in evaluation["strata"].items():
        if part["fvu"] is not None:  # of a constant target there is none
            figures[f"positions {name}: fvu"] = (part["fvu"], "")
        figures[f"positions {name}: l0 by threshold"] = (part["l0"], "latents")
        if part["l0_training_rule"] is not None:
            figures[f"positions {name}: l0 by training rule"] = (part["l0_training_rule"], "latents")
    return figures


def random_model(folder: Path) -> Path:
    """The embedded model's shape and tokenizer with fresh weights from a fixed seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(EMBEDDED)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
