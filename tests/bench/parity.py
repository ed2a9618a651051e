"""What other libraries trained beside what this one trained, measured by this one's commands on the same rows.

    python -m tests.bench.parity STORE [--steps N] [--k N] [--d-sae N] [--work FOLDER]

Each trainer gets the same rows in the same order, as in `tests.bench.same_answer`, at the middle one of the learning
rates that its grid begins with there, and one seed. Each dictionary is saved by its own library in its own format, the
shift and scale of the rows folded in (dictionary_learning's tensors as safetensors: its own file is a pickle), then
imported with `train import` and measured with `train compare` at k active latents per row. SAELens and
dictionary_learning train no transcoders: their autoencoders of the target are set against this trainer's with
`source=target`.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.bench.peers import PLACE, environment
from tests.bench.record import ROOT, record, run, sized
from tests.bench.same_rows import OURS, TRAINERS, SameRows, told_peer, train, train_peer
from train.compare.arms import Comparison
from train.compare.comparison_table import print_comparison
from train.interchange.plain_transcoder import PlainTranscoder
from train.run.load_run import build_transcoder

_FIGURES = {
    "fvu": "",
    "l0": "latents",
    "dead_share": "share",
    "pairs_cosine_above_0_9": "pairs",
    "pairs_correlated_above_0_8": "pairs",
}
"""Of `train compare`, with their units."""


def main() -> None:
    """Train, save, import, compare and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.parity")
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=sized(1000, 20))
    parser.add_argument("--k", type=int, default=sized(32, 6))
    parser.add_argument("--d-sae", type=int, default=sized(1024, 64))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "parity", help="what was trained is kept here")
    options = parser.parse_args()
    options.preset, options.set, options.work = "tiny", [], options.work.absolute()
    torch.set_num_threads(1)
    rows, figures = SameRows(options), dict[str, tuple[float, str]]()
    for kind in dict.fromkeys(trainer.map for trainer in TRAINERS.values()):
        names = [name for name in TRAINERS if TRAINERS[name].map == kind]
        figures |= compared(kind, names, [made(rows, name, options) for name in names], options.k)
    shape = f"d_sae {options.d_sae:,}, k {options.k}, {options.steps:,} steps of 1,024"
    line = f"python -m tests.bench.parity STORE --steps {options.steps} --d-sae {options.d_sae}"
    record(f"parity: {shape}", line, figures)


def made(rows: SameRows, name: str, options: argparse.Namespace) -> Path:
    """Train with one trainer, or take what was trained before; returns a run, imported if it is another's."""
    rates, folder = TRAINERS[name].rates, name.replace(",", "").replace(" ", "-")
    lr, path = rates[len(rates) // 2], options.work / folder
    sets = rows.settings(name, lr, 0)
    if path.exists():
        return path
    if name in OURS:
        return train(options.store, options.work, folder, sets)
    saved = saved_by_its_library(rows, name, sets, lr, options)
    run(sys.executable, "-m", "train", "import", saved, "--store", options.store, "--runs", options.work,
        "--name", folder, "--quiet")  # fmt: skip
    return path


def saved_by_its_library(rows: SameRows, name: str, sets: list[str], lr: float, options: argparse.Namespace) -> Path:
    """Train a peer, and let its library write the file. Returns what `train import` takes."""
    store, config = rows.resolved(sets)
    weights = options.work / f"{name.replace(',', '').replace(' ', '-')}.npz"
    if not weights.exists():
        train_peer(store, config, told_peer(name, config, lr), weights)
    arrays = {key: torch.from_numpy(array).double() for key, array in np.load(weights).items()}
    model = build_transcoder(config, store)
    with torch.no_grad():
        for key in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
            if key in arrays:
                getattr(model, key).copy_(arrays[key])
    threshold = arrays.get("threshold", torch.zeros(())).float().expand(model.d_sae)
    plain = PlainTranscoder.of(model, threshold)
    folded = {key: getattr(plain, key).numpy() for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if plain.W_skip is not None:
        folded["W_skip"] = plain.W_skip.numpy()
    whole, out = weights.with_name(f"folded-{weights.name}"), weights.with_suffix("")
    out = out.with_name(f"{out.name}-saved")
    np.savez(whole, allow_pickle=False, **folded, threshold=threshold[0].numpy())
    line = [environment(name.split()[0]), "-I", ROOT / "tests/bench/peer_saving.py", name, whole, out, options.k]
    quiet = {"HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
    subprocess.run([str(part) for part in line], check=True, cwd=PLACE, env={**os.environ, **quiet})
    return out / "ae.safetensors" if (out / "ae.safetensors").exists() else out


def compared(kind: str, names: Sequence[str], runs: Sequence[Path], k: int) -> dict[str, tuple[float, str]]:
    """Compare runs of one map; prints the table, and returns its figures."""
    done = run(sys.executable, "-m", "train", "compare", *runs, "--l0", k, "--json")
    found = Comparison.model_validate_json(done.out)
    print_comparison(found)
    return {
        f"{kind}, {name}: {figure}": (arm.spread[figure].mean, unit)
        for name, arm in zip(names, found.arms, strict=True)
        for figure, unit in _FIGURES.items()
    }


if __name__ == "__main__":
    main()
