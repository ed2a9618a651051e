"""Exports in the libraries they are for: `make interop`, or `python -m tests.interop [--folder DIR]`.

Every layer of the embedded model is harvested in one pass, a transcoder is trained on each, and the exports are loaded
by SAELens, sparsify and circuit-tracer, each in an environment of its own (made at first use: gigabytes, minutes). Each
gets the same held-out rows; what it makes of them is compared with the run. circuit-tracer also makes an attribution
graph of a prompt; delphi reads its cache of latents, SAEDashboard and Neuronpedia's client the files for Neuronpedia.
The trainers of SAELens, dictionary_learning and sparsify train on a store, and activations that SAELens caches become
one. Figures go to docs/benchmarks.md under "interop". What is in the folder already is not made again.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.store.store import Store
from tests.bench.peers import environment
from tests.bench.record import ROOT, record, run
from tests.interop.picture import draw
from train import Transcoder
from train.data.batches import StoreRows
from train.interchange.sampled import activations_of
from train.run.load_run import load_run
from train.run.settings import read_config

MODEL = ROOT / "harvest" / "embedded" / "model"
LAYERS, LAYER, ROWS = 10, 8, 1024
SAMPLED, WANTED = 20_000, range(64)
"""Rows of samples; latents whose activations are compared one by one."""
HERE = Path(__file__).parent
PICTURE = ROOT / "docs" / "images" / "attribution-graph.svg"
LIBRARIES = {"saelens": "SAELens", "sparsify": "sparsify", "circuit-tracer": "circuit_tracer"}
READERS = {"delphi": "delphi", "neuronpedia": "SAEDashboard"}
"""What reads which export of what latents do."""
HARVEST = ("--tokens", 65_536, "--set", f"capture.layers={list(range(LAYERS))}")
TRAIN = ("--steps", 300, "--set", "transcoder.d_sae=1024", "--set", "samples.rows=0")
TRAINERS = {"saelens": "SAELens", "dictionary_learning": "dictionary_learning", "sparsify": "sparsify"}
CACHED, COMPARED = ("blocks.8.hook_resid_mid", "blocks.8.hook_mlp_out"), 200
"""Hooks that SAELens caches, and rows of them that the model computes again."""
STEPS, MOST_FVU = 300, 0.5
"""Of another library's training on a store, and the most of the variance that it may leave; the mean leaves all."""
SAME = 1e-5
"""A row's error over its norm that is still rounding."""


def main() -> None:
    """Make what is missing, export, load, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "interop")
    folder = parser.parse_args().folder.resolve()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    runs = trained(folder)
    exports = {kind: exported(runs, kind, folder / "exports" / kind) for kind in LIBRARIES}
    figures = dict[str, tuple[float, str]]()
    for kind, library in LIBRARIES.items():
        figures |= {f"{library}: {name}": value for name, value in read(runs[LAYER], kind, exports[kind]).items()}
    for kind, library in READERS.items():
        told = read_latents(runs[LAYER], kind, library, folder / "exports" / kind)
        figures |= {f"{library}: {name}": (value, "") for name, value in told.items()}
    sizes = graph(exports["circuit-tracer"], folder / "graph.json")
    figures |= {f"circuit_tracer, attribution graph: {name}": (value, "") for name, value in sizes.items()}
    trained_by = {library: by_their_trainer(runs[LAYER], name, library) for name, library in TRAINERS.items()}
    for library, found in trained_by.items():
        figures |= {f"{library}, trained on the store: {name}": (value, "") for name, value in found.items()}
    cached = cached_by_saelens(folder)
    figures |= {f"SAELens, cached activations imported: {name}": (value, "") for name, value in cached.items()}
    for name, (value, unit) in figures.items():
        print(f"{name}: {value:.6g} {unit}")
    record(f"interop: embedded model, {LAYERS} layers", "python -m tests.interop", figures)
    wrong = [name for name, (value, _) in figures.items() if "largest error of a row" in name and value > SAME]
    if wrong or sizes["layers with latents"] != LAYERS:
        sys.exit(f"not the same: {wrong or sizes}")
    if cached["rows that the model gives again"] != COMPARED:
        sys.exit(f"imported activations are not the model's: {cached}")
    poor = {
        library: found
        for library, found in trained_by.items()
        if not (found["fvu"] < MOST_FVU and found["last loss"] < found["first loss"] / 2)
    }
    if poor:
        sys.exit(f"trained on the store and did not learn: {poor}")


def trained(folder: Path) -> list[Path]:
    """A short run of every layer of the embedded model."""
    python = (sys.executable, "-m")
    runs = [folder / f"layer-{layer}" for layer in range(LAYERS)]
    if not all((path / "checkpoints" / "step-000300").exists() for path in runs):
        stores = run(*python, "harvest", "run", "tiny", *HARVEST, "--cache", folder / "cache").out.splitlines()
        for store, path in zip(stores[-LAYERS:], runs, strict=True):
            if not path.exists():
                run(*python, "train", "run", "tiny", "--store", store, "--runs", folder, "--name", path.name, *TRAIN)
    return runs


def exported(runs: list[Path], kind: str, path: Path) -> Path:
    """The export of one run, or of all of them as circuit-tracer's set."""
    wanted = [*runs, "--layers", LAYERS] if kind == "circuit-tracer" else [runs[LAYER]]
    if not path.exists():
        run(sys.executable, "-m", "train", "export", *wanted, "--format", kind, "--out", path)
    return path


def read(path: Path, kind: str, export: Path) -> dict[str, tuple[float, str]]:
    """What a library makes of held-out rows, beside the run."""
    rows, out = export.parent / "rows.npz", export.parent / f"{kind}.npz"
    x = held_out(path)
    np.savez(rows, source=x.numpy())
    python = environment(LIBRARIES[kind])
    run(python, HERE / "reader.py", kind.replace("-", "_"), export, LAYER, rows, out)
    transcoder = Transcoder.load(path)
    with torch.no_grad():
        latents, target = transcoder.encode(x, dense=True).numpy(), transcoder(x).reconstruction.numpy()
    theirs = np.load(out)
    same = ((theirs["latents"] != 0) == (latents != 0)).all(axis=1)
    errors = np.linalg.norm(theirs["target"] - target, axis=1) / np.linalg.norm(target, axis=1)
    return {
        "rows with the same latents active": (float(same.mean()), "share"),
        "largest error of a row over its norm, same latents active": (float(errors[same].max(initial=0)), ""),
        "active latents per row": (float((theirs["latents"] != 0).sum(axis=1).mean()), ""),
        "active latents per row of the run": (float((latents != 0).sum(axis=1).mean()), ""),
    }


def read_latents(path: Path, kind: str, library: str, export: Path) -> dict[str, float]:
    """What a library makes of exported latents, beside the run's own activations."""
    if not list(path.glob("samples/*")):
        run(sys.executable, "-m", "train", "samples", path, "--rows", SAMPLED)
    exported([path] * (LAYER + 1), kind, export)
    found = activations_of(load_run(path), SAMPLED if kind == "neuronpedia" else None)
    values, out = export.parent / f"{kind}.npz", export.parent / f"{kind}.json"
    own = {f: found.values[found.starts[f] : found.starts[f + 1]] for f in WANTED}
    np.savez(values, allow_pickle=False, **{str(f): one for f, one in own.items() if len(one)})
    run(environment(library), HERE / "latents_reader.py", library, export, values, out)
    told: dict[str, float] = json.loads(out.read_text())
    return told


def held_out(path: Path) -> torch.Tensor:
    """The first rows of the last stratum's report blocks."""
    store = Store.open(read_config(path).store)
    *_, last = store.strata
    chunks = StoreRows(store, ROWS).chunks(store.record.report_blocks, torch.device("cpu"))
    return next(chunk.source for chunk in chunks if chunk.stratum == last)


def graph(export: Path, out: Path) -> dict[str, float]:
    """The sizes of an attribution graph, and its picture in the docs."""
    if not out.exists():
        run(environment("circuit_tracer"), HERE / "graph.py", export, MODEL, out)
    found: dict[str, Any] = json.loads(out.read_text())
    PICTURE.write_text(draw(found["picture"]))
    sizes: dict[str, float] = found["sizes"]
    return sizes


def by_their_trainer(path: Path, name: str, library: str) -> dict[str, float]:
    """What another library's own trainer reaches on the store of a run, fed by `StoreDataset`."""
    out = path.parent / f"trained-by-{name}.json"
    packages = Path(np.__file__).parents[1]
    environ = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "SPARSIFY_DISABLE_TRITON": "1"}
    line = (environment(library), "-P", HERE / "trainers.py", name, read_config(path).store, STEPS, out, packages)
    if not out.exists():
        run("env", *(f"{key}={value}" for key, value in environ.items()), *line)
    found: dict[str, float] = json.loads(out.read_text())
    return found


def cached_by_saelens(folder: Path) -> dict[str, float]:
    """What SAELens' own runner cached, imported, and compared with the model's rows."""
    cached = [folder / "cached" / hook for hook in CACHED]
    if not all((path / "state.json").exists() for path in cached):
        run(environment("SAELens"), HERE / "cache.py", MODEL, folder / "cached", *CACHED)
    harvest, settings = (sys.executable, "-m", "harvest"), ("--set", "store.block_sequences=32", "--json")
    line = ("import", *cached, "--format", "saelens", "--cache", folder / "cache", "--model", MODEL, *settings)
    made = json.loads(run(*harvest, *line).out)
    found = json.loads(
        run(*harvest, "verify", made["path"], "--against-model", COMPARED, "--model", MODEL, "--json").out
    )
    against = found["against_model"]
    rows = sum(stratum["rows"] for stratum in made["strata"])
    return {
        "rows": rows,
        "rows that the model gives again": against["rows"] - len(against["wrong"]),
        "largest difference of a row over its norm": against["largest"],
    }


if __name__ == "__main__":
    main()
