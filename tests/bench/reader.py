"""Reading batches of pairs from a store, warm and cold, beside raw copies, zarr's slices and HF datasets.

python -m tests.bench.reader [256] [2304]      both widths when none is named; writes about 5 GB to a temporary folder

A row is a pair. Readers take turns; a ratio is the median over rounds of two rates of one round. Warm: by CPU time of
all threads. Cold: by wall time; a reader opens the files again, their pages are dropped, and it reads a sixteenth of
the rows: with more of them, large read-arounds would pay that do not in a store larger than memory.
"""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow
import torch
from datasets import Dataset, disable_progress_bars, load_from_disk

from shared.console.process import keep_freed_memory
from shared.files import durable
from shared.store.layout import ARRAYS
from shared.store.reader import RowReader, RowsConfig
from shared.store.row_arrays import StorageType
from shared.store.store import Store
from tests.bench.record import named, record, sized
from tests.stores import Array, make_store, stock_array
from train.data.batches import BatchReader

BLOCKS = sized({256: 16, 2304: 2}, {16: 1})
"""Blocks of 65,536 rows by width: about 1.1 GB."""
CONTEXT, WINDOWS = 256, sized(256, 16)
B, RUN = 1024, 64
ROUNDS = sized(7, 1)
SPACE = sized(6 * 2**30, 2**20)
LEAST_BYTES = sized(2**20, 2**12)
"""Of a file whose pages are dropped."""
MAPPED = sized(0.1, 1.0)
"""Share of a file's pages that may stay in memory: opening a dataset maps the head of every record batch."""
WARM_SECONDS, COLD_SECONDS = sized((0.3, 3.0), (0.01, 0.01))
"""A reader's turn: at least and at most."""
SIDES = ("source", "target")
LINE = "python -m tests.bench.reader"

Batches = Generator[int, None, None]
Reader = Callable[[], Batches]
"""Opens the files and yields 0, then reads batch after batch and yields how many rows."""


def main() -> None:
    """Measure the widths named on the command line, and record."""
    torch.set_num_threads(1)
    keep_freed_memory()
    disable_progress_bars()
    for d in map(int, named(__doc__, *map(str, BLOCKS))):
        with tempfile.TemporaryDirectory() as folder:
            durable.require_space(Path(folder), SPACE, "the bench's stores")
            measure(d, Path(folder))


def measure(d: int, folder: Path) -> None:
    """All readers of one width. `batches` and `datasets` give float32, and so read what the others give and more."""
    path, int8 = write_store(folder / "store", d), write_store(folder / "int8", d, "int8")
    write_dataset(path, folder / "dataset", d)
    readers: dict[str, Reader] = {
        "sequential copy": lambda: sequential(path, d),
        f"raw runs of {RUN}": lambda: raw_runs(path, d, RUN),
        "batches": lambda: batches(path, ahead=True),
        "batches, without the thread": lambda: batches(path, ahead=False),
        "batches of int8": lambda: batches(int8, ahead=True),
        "zarr slices of 64": lambda: zarr_slices(path),
        "datasets, runs of 64": lambda: from_dataset(folder / "dataset", "torch", RUN),
        "datasets, runs of 64, as stored": lambda: from_dataset(folder / "dataset", "arrow", RUN),
        "datasets, random rows": lambda: from_dataset(folder / "dataset", "torch", 1),
    }
    rows_alone: dict[str, Reader] = {
        f"{name} of {run}": made
        for run in (RUN, 8, 5, 1)
        for name, made in (
            ("raw runs", lambda run=run: raw_runs(path, d, run)),
            ("rows of a batch in runs", lambda run=run: rows(path, run)),
            ("int8 rows of a batch, as float32, in runs", lambda run=run: rows(int8, run)),
        )
    }
    figures: dict[str, tuple[float, str]] = {}
    rates = {"warm": turns("warm", readers | rows_alone, folder, d), "cold": turns("cold", readers, folder, d)}
    for state, found in rates.items():
        unit = "rows/CPU-s" if state == "warm" else "rows/s"
        figures |= {f"{state}: {name}": (median(each), unit) for name, each in found.items()}
        pairs = [("batches", base) for base in readers if base != "batches" and "as stored" not in base]
        if state == "warm":  # rows as stored beside rows as stored
            alone = f"rows of a batch in runs of {RUN}"
            pairs += [(alone, base) for base in ("sequential copy", "zarr slices of 64")]
            pairs += [(alone, "datasets, runs of 64, as stored")]
            pairs += [(f"rows of a batch in runs of {run}", f"raw runs of {run}") for run in (RUN, 8, 5, 1)]
            pairs += [(f"int8 rows of a batch, as float32, in runs of {run}", f"rows of a batch in runs of {run}")
                      for run in (RUN, 8, 5, 1)]  # fmt: skip
        for ours, base in pairs:
            ratio = median(a / b for a, b in zip(found[ours], found[base], strict=True))
            figures[f"{state}: {ours} over {base}"] = (ratio, "times as fast")
    record(f"reading: d {d}, pairs of bfloat16, batches of {B}, one thread of torch's", f"{LINE} {d}", figures)


def turns(state: str, readers: dict[str, Reader], folder: Path, d: int) -> dict[str, list[float]]:
    """Rows per second of each reader in each round."""
    found: dict[str, list[float]] = {name: [] for name in readers}
    most_rows, most = (2**30, WARM_SECONDS) if state == "warm" else (BLOCKS[d] * WINDOWS * CONTEXT // 16, COLD_SECONDS)
    clock = time.process_time if state == "warm" else time.perf_counter
    for _ in range(ROUNDS):
        for name, reader in readers.items():
            gc.collect()  # pages that are mapped cannot be dropped
            read = reader()
            next(read)
            if state == "cold":
                drop(folder)
            else:
                next(read)
            began, count = clock(), 0
            while (seconds := clock() - began) < most and count < most_rows:
                count += next(read)
            read.close()
            found[name].append(count / seconds)
            print(f"{state}: {name}: {count / seconds:,.0f} rows/s", file=sys.stderr)
    return found


def drop(folder: Path) -> None:
    """Have no page of the files in memory, but for what opening them has mapped."""
    for path in (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > LEAST_BYTES):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            for _ in range(100):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                places = range(0, path.stat().st_size, 2**18)
                if sum(in_memory(file.fileno(), at) for at in places) <= MAPPED * len(places):
                    break
                time.sleep(0.02)  # pages that are still being read ahead stay
            else:
                sys.exit(f"{path} is still in memory")


def in_memory(file: int, at: int) -> bool:
    """Whether a page of the file is."""
    try:
        return bool(os.preadv(file, [bytearray(1)], at, os.RWF_NOWAIT))
    except BlockingIOError:
        return False


def write_store(path: Path, d: int, storage: StorageType = "bfloat16") -> Path:
    """A store of random rows."""
    pool = np.random.default_rng(0).normal(size=(4096, d)).astype(np.float32)

    def draw(tokens: Array, position: Array, shared: object) -> dict[str, Array]:
        return dict.fromkeys(SIDES, np.resize(pool, (len(tokens), d)))

    return make_store(
        path,
        d_in=d,
        d_out=d,
        training_blocks=BLOCKS[d],
        held_out_blocks=0,
        draw=draw,
        storage=storage,
        context_size=CONTEXT,
        block_sequences=WINDOWS,
        edges=(0, 1, 4, 16, 64),
    ).path


def shards(path: Path, d: int) -> list[tuple[Array, ...]]:
    """Maps of the shard files of every stratum but the first, source beside target [rows, d]."""
    names = [file for file in path.glob(f"{ARRAYS}/strata/*/source/c/*/0") if "000-001" not in str(file)]
    maps = []
    for name in sorted(names):
        files = [Path(str(name).replace("/source/", f"/{side}/")) for side in SIDES]
        sides = [np.memmap(file, np.uint16, "r") for file in files]
        maps.append(tuple(side[: len(side) // d * d].reshape(-1, d) for side in sides))
    return maps


def write_dataset(path: Path, into: Path, d: int) -> None:
    """The same rows as columns of fixed-size lists; their bits stand for float16 there."""
    kind = pyarrow.list_(pyarrow.float16(), d)
    parts = [
        pyarrow.table(
            {
                side: pyarrow.FixedSizeListArray.from_arrays(
                    pyarrow.array(rows.reshape(-1).view(np.float16)), type=kind
                )
                for side, rows in zip(SIDES, pair, strict=True)
            }
        )
        for pair in shards(path, d)
    ]
    Dataset(pyarrow.concat_tables(parts)).save_to_disk(into)


def sequential(path: Path, d: int) -> Batches:
    """Both sides of shard after shard."""
    out, maps = np.empty((2, B, d), np.uint16), shards(path, d)
    yield 0
    while True:
        for pair in maps:
            for low in range(0, len(pair[0]) - B + 1, B):
                for side, rows_ in enumerate(pair):
                    out[side] = rows_[low : low + B]
                yield B


def raw_runs(path: Path, d: int, run: int) -> Batches:
    """Runs in random order, a tight loop."""
    maps, out, rng = shards(path, d), np.empty((2, B, d), np.uint16), np.random.default_rng(1)
    every = [(i, low) for i, pair in enumerate(maps) for low in range(0, len(pair[0]) - run + 1, run)]
    yield 0
    while True:
        order = rng.permutation(len(every)).tolist()
        for start in range(0, len(order) - B // run + 1, B // run):
            chosen = [every[i] for i in order[start : start + B // run]]
            for side in range(2):
                at = 0
                for i, low in chosen:
                    out[side, at : at + run] = maps[i][side][low : low + run]
                    at += run
            yield at


def rows(path: Path, run: int) -> Batches:
    """Batches as they are read, one after the other, in one thread; nothing is asked for ahead."""
    store = Store.open(path)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=B, run_rows=run), 0)
    first, step = next(iter(store.strata.values())), 0
    out = [getattr(first, side).room(B) for side in SIDES]
    yield 0
    while True:
        for side, into in zip(SIDES, out, strict=True):
            reader.read(step, side, into)
        step += 1
        yield B


def batches(path: Path, ahead: bool) -> Batches:
    """Batches as training gets them, as float32, the next ones asked for ahead."""
    store = Store.open(path)
    config = RowsConfig(batch_rows=B, run_rows=RUN)
    reader, step = BatchReader(store, store.record.training_blocks, config, 0, torch.device("cpu")), 0
    yield 0
    with reader if ahead else nullcontext():
        while True:
            yield len(reader.batch(step).source)
            step += 1


def zarr_slices(path: Path) -> Batches:
    """The runs of the same batches through zarr."""
    store = Store.open(path)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=B, run_rows=RUN), 0)
    arrays = {name: [stock_array(path, f"strata/{name}/{side}") for side in SIDES] for name in store.strata}
    step = 0
    yield 0
    while True:
        for stratum, low, high, _ in reader.runs(step):
            for array in arrays[stratum.stratum.name]:
                array[low:high]
        step += 1
        yield B


def from_dataset(path: Path, kind: str, run: int) -> Batches:
    """Batches of random runs, as float32 tensors or as Arrow's columns."""
    data, rng = load_from_disk(path).with_format(kind), np.random.default_rng(1)
    yield 0
    while True:
        starts = rng.integers(0, len(data) // run, B // run) * run
        found = data[(starts[:, None] + np.arange(run)).reshape(-1).tolist()]
        yield len(found.combine_chunks() if kind == "arrow" else found["source"])  # Arrow's own are slices, not read


if __name__ == "__main__":
    main()
