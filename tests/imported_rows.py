"""Rows as other software writes them, the command that imports them, and the rows that must come of it."""

from pathlib import Path

import numpy as np
import torch

from shared.store.statistics import decode
from shared.store.store import Store
from tests.llms import Outcome, command

S, T, D = 70, 32, 16
SIXTEEN = ("--set", "store.block_sequences=16")
Arrays = dict[str, np.ndarray]


def pairs(sequences: int = S) -> Arrays:
    """Rows with a sink at position 0, which bfloat16 holds exactly, and a token for each."""
    rng = np.random.default_rng(0)
    source = rng.normal(3, 1, (sequences, T, D)).astype(np.float32)
    source[:, 0] = 60
    target = np.tanh(source @ rng.normal(size=(D, 24))).astype(np.float32)
    tokens = rng.integers(1, 300, (sequences, T))
    tokens[:, 0] = 0
    exact = [torch.from_numpy(rows).bfloat16().float().numpy() for rows in (source, target)]
    return {"source": exact[0], "target": exact[1], "tokens": tokens}


def write_npy(folder: Path, arrays: Arrays, parts: int = 2) -> Path:
    folder.mkdir(parents=True)
    for name, rows in arrays.items():
        for number, part in enumerate(np.array_split(rows, parts)):
            np.save(folder / f"{name}-{9 + number}.npy", part)  # -9 and -10: not in the order of letters
    return folder


def imported(folder: Path, cache: Path, *more: object, kind: str = "npy") -> Outcome:
    return command("import", folder, "--format", kind, "--cache", cache, *SIXTEEN, *more)


def rows_of(store: Store) -> dict[tuple[int, int], tuple[int, int, bytes, bytes]]:
    """By sequence of the files and offset: position, token, and both stored rows."""
    windows = [
        np.concatenate([a.shard(i) for i in range(store.record.blocks)]) for a in (store.documents, store.tokens)
    ]
    found = {}
    for part in store.strata.values():
        for shard in range(part.source.rows // part.source.spec.rows_per_shard):
            arrays = [
                getattr(part, name).shard(shard) for name in ("sequence", "offset", "position", "source", "target")
            ]
            for sequence, offset, position, source, target in zip(*arrays, strict=True):
                place = int(windows[0][sequence, offset]), int(offset)
                token = int(windows[1][sequence, offset])
                found[place] = int(position), token, decode(source).tobytes(), decode(target).tobytes()
    return found


def expected_rows(arrays: Arrays, sequences: int) -> dict[tuple[int, int], tuple[int, int, bytes, bytes]]:
    return {
        (s, t): (t, int(arrays["tokens"][s, t]), arrays["source"][s, t].tobytes(), arrays["target"][s, t].tobytes())
        for s in range(sequences)
        for t in range(T)
    }


def flat(arrays: Arrays) -> Arrays:
    return {name: rows.reshape(S * T, *rows.shape[2:]) for name, rows in arrays.items()}
