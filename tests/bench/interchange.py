"""What exports and imports take: of a run, by the commands, and of stores from elsewhere.

    python -m tests.bench.interchange export RUN     `train export` with its reload, and `train import` of that
    python -m tests.bench.interchange stores         `harvest import` of each format; synthetic rows

MB/s are of the rows that a store is made of, over the whole command, hashing and Python's start included. Where other
work shares the machine, CPU seconds say more than seconds.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from shared.files import durable
from tests.bench.record import Finished, record, run, sized
from train.run.settings import read_config

SEQUENCES, CONTEXT, D, BLOCK = sized((512, 128, 1024, 64), (12, 8, 8, 2))
FORMATS = sized(("npy", "safetensors", "vllm", "clt-forge", "saelens"), ("vllm",))
KINDS = sized(("saelens", "sparsify"), ("saelens",))
HOOKS = ("blocks.1.hook_resid_pre:0", "blocks.2.hook_resid_pre:1")
COLUMNS = ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")
OPTIONS = {
    "vllm": ("--source", HOOKS[0], "--target", HOOKS[1], "--context-size", CONTEXT),
    "clt-forge": ("--layer", 1),
    "saelens": ("--source", COLUMNS[0], "--target", COLUMNS[1]),
}
LINE = "python -m tests.bench.interchange"
Figures = dict[str, tuple[float, str]]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("export", "stores"))
    parser.add_argument("run", type=Path, nargs="?", help="of `export`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "stores":
            stores(Path(folder))
        elif options.run is None:
            parser.error("export needs a RUN")
        else:
            exports(options.run, Path(folder))


def exports(path: Path, folder: Path) -> None:
    """Export a run, reloaded and compared by the command itself; import it as a run."""
    config, train = read_config(path), (sys.executable, "-m", "train")
    figures: Figures = {}
    for kind in KINDS:
        figures |= took(
            f"export {kind} and reload", run(*train, "export", path, "--format", kind, "--out", folder / kind)
        )
    line = ("import", folder / "saelens", "--store", config.store, "--runs", folder, "--name", "back")
    figures |= took("import it as a run", run(*train, *line))
    shape = f"{config.settings.transcoder.d_sae:,} latents of {config.d_in} values"
    record(f"interchange: a run of {shape}", f"{LINE} export RUN", figures)


def took(name: str, done: Finished) -> Figures:
    """Return the time of a command, and the time of its threads."""
    return {name: (done.seconds, "s"), f"{name}, of one core": (done.cpu_seconds, "CPU-s")}


def stores(folder: Path) -> None:
    """Import the same rows in every format."""
    size = 2 * SEQUENCES * CONTEXT * D * 4
    durable.require_space(folder, 5 * size, "the bench's rows and stores")
    rng = np.random.default_rng(0)
    source, target = (rng.standard_normal((SEQUENCES, CONTEXT, D), np.float32) for _ in range(2))
    tokens = rng.integers(1, 1000, (SEQUENCES, CONTEXT))
    figures: Figures = {}
    for kind in FORMATS:
        bits = WRITERS[kind](folder / "rows", source, target, tokens)
        line = ("import", folder / "rows", "--format", kind, "--cache", folder / "cache", *OPTIONS.get(kind, ()))
        done = run(sys.executable, "-m", "harvest", *line, "--set", f"store.block_sequences={BLOCK}", "--quiet")
        megabytes = size * bits / 32 / 1e6
        figures |= {
            f"{kind}, {bits} bits a value": (megabytes / done.seconds, "MB/s"),
            f"{kind}, {bits} bits a value, of one core": (megabytes / done.cpu_seconds, "MB/CPU-s"),
        }
        for made in (folder / "rows", folder / "cache"):
            shutil.rmtree(made)
    record(f"interchange: stores of {size / 1e6:,.0f} MB of float32", f"{LINE} stores", figures)


def npy(folder: Path, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> int:
    """Write two files of each array."""
    folder.mkdir()
    for name, array in (("source", source), ("target", target), ("tokens", tokens)):
        for number, part in enumerate(np.array_split(array, 2)):
            np.save(folder / f"{name}-{number}.npy", part)
    return 32


def safetensors(folder: Path, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> int:
    """Write one file of bfloat16."""
    folder.mkdir()
    tensors = {"source": torch.from_numpy(source).bfloat16(), "target": torch.from_numpy(target).bfloat16()}
    save_file(tensors | {"tokens": torch.from_numpy(tokens)}, folder / "all.safetensors")
    return 16


def vllm(folder: Path, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> int:
    """Write a file for each sequence, some tokens longer than what is taken of it."""
    folder.mkdir()
    for number in range(SEQUENCES):
        more = number % 7
        states = torch.zeros(CONTEXT + more, 2, D, dtype=torch.bfloat16)
        states[:CONTEXT] = torch.from_numpy(np.stack([source[number], target[number]], axis=1)).bfloat16()
        ids = torch.from_numpy(np.pad(tokens[number], (0, more)))
        save_file({"hidden_states": states, "token_ids": ids}, folder / f"{number}.safetensors")
    return 16


def clt_forge(folder: Path, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> int:
    """Write two layers of each token, one after the other."""
    place = folder / f"ctx_{CONTEXT}"
    place.mkdir(parents=True)
    sides = {
        name: torch.from_numpy(np.stack([rows[::-1], rows], axis=2).reshape(-1, 2, D)).bfloat16()
        for name, rows in (("act_in", source), ("act_out", target))
    }
    save_file(sides | {"tokens": torch.from_numpy(tokens.ravel())}, place / "activations_split_0.safetensors")
    return 16


def saelens(folder: Path, source: np.ndarray, target: np.ndarray, tokens: np.ndarray) -> int:
    """Save what SAELens' runner saves, both hooks as columns of one folder."""
    from datasets import Array2D, Dataset, Features, Sequence, Value

    features = {hook: Array2D(shape=(CONTEXT, D), dtype="float32") for hook in COLUMNS}
    features["token_ids"] = Sequence(Value("int32"), length=CONTEXT)
    columns = {COLUMNS[0]: source, COLUMNS[1]: target, "token_ids": tokens.astype(np.int32)}
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(folder, num_shards=2)
    return 32


Writer = Callable[[Path, np.ndarray, np.ndarray, np.ndarray], int]
WRITERS: dict[str, Writer] = {
    "npy": npy, "safetensors": safetensors, "vllm": vllm, "clt-forge": clt_forge, "saelens": saelens,
}  # fmt: skip
"""Of each format, what writes rows to a folder, and returns the bits of a value."""


if __name__ == "__main__":
    main()
