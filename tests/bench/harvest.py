"""The harvest against the model's forward pass alone, its writing against plain writes, packing, and peak memory.

python -m tests.bench.harvest [speed] [writing] [packing] [memory]: all when none is named.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numcodecs import Blosc

from harvest.llm.model import load_model
from harvest.run import pipeline
from harvest.run.block_rows import HostRows
from harvest.run.capture import Capture, open_capture
from harvest.run.ranks import Ranks
from harvest.run.runner import Blocks
from harvest.settings import PRESETS, Settings
from harvest.writer import ledger
from harvest.writer.blocks import block_layout
from harvest.writer.target import Target, load_target, read_block
from shared.config import build, load_preset, override
from shared.store.checks import read_store_record
from shared.store.layout import block_bytes, store_specs
from shared.store.packed import LEVEL
from shared.store.row_arrays import captured_as
from shared.store.store import Store
from tests.bench.record import SMOKE, named, record, run, sized
from tests.llms import make_gemma, small_inputs, texts, write_jsonl

REPEATS = sized(3, 1)
SPEED_REPEATS, SPEED_BLOCKS, NAIVE_BATCH = sized((8, 2, 32), (1, 1, 1))
WINDOWS = sized(256, 2)
WIDE = sized(2304, 64)
"""The width of Gemma 2 2B."""
MEMORY = sized(((1, 32, 98_304), (26, 256, 12_288)), ((1, 1, 512), (2, 1, 512)))
"""Layers, windows per block at most, and tokens of harvests whose memory is measured."""
TEXTS = sized(8_000, 80)
BARE = "forward only"
LINE = "python -m tests.bench.harvest"
BLOCK, ONE_BLOCK = f"store.block_sequences={WINDOWS}", f"tokens={WINDOWS * 256}"


def main() -> None:
    """Measure what is named on the command line, and record."""
    parts = {"speed": speed, "writing": writing, "packing": packing, "memory": memory}
    wanted = named(__doc__, *parts)
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            parts[name](Path(folder))


def planned(folder: Path, name: str, *assignments: str) -> tuple[Target, pipeline.Inputs, Settings]:
    """A store with its tokens on disk and no block yet; nothing held out."""
    given = {"label": "bench", **load_preset(PRESETS, "tiny", None)}
    if SMOKE:
        model, text = small_inputs(folder / "small")
        assignments = (f"model.name={model}", f"text.name={text}", "capture.layers=[2]", *assignments)
    settings = build(Settings, override(given, ["store.held_out_blocks=0", BLOCK, *assignments]), "bench")
    inputs = pipeline.identify(settings)
    request = inputs.requests[0]
    pipeline.prepare([Target(path=folder / name, request=request)], inputs, settings, force=True)
    return load_target(folder / name, request), inputs, settings


def speed(folder: Path) -> None:
    """The embedded model: tokens/s of a naive loop, of passes alone, of passes with rows put in place, of the whole.

    The parts take turns, each time in another order; a ratio is of two parts of one round.
    """
    tokens = f"tokens={SPEED_BLOCKS * WINDOWS * 256}"
    target, inputs, _ = planned(folder, "0", tokens)
    request, cores = target.request, Ranks().cores
    widths = pipeline.hook_widths([target], inputs)
    blocks = [read_block(target, block) for block in range(target.blocks)]
    layouts = [block_layout(request, target.strata, rows, i, ()) for i, rows in enumerate(blocks)]
    network = load_model(inputs.model.folder, "float32", "cpu", list(widths))
    batch = request.batch_sequences
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with open_capture(network, cores, "cpu", captured_as(request.storage), "joined") as capture:

        def naive() -> None:
            torch.set_num_threads(cores)
            for rows in blocks:
                for i in range(0, len(rows.tokens), NAIVE_BATCH):
                    network(torch.from_numpy(rows.tokens[i : i + NAIVE_BATCH].astype(np.int64)))
            torch.set_num_threads(1)

        def forward() -> None:
            parts = [
                (rows.tokens[i : i + batch], layout.positions[i : i + batch])
                for rows, layout in zip(blocks, layouts, strict=True)
                for i in range(0, len(rows.tokens), batch)
            ]
            list(capture.pool.map(lambda part: capture.forward(*part), parts))

        buffers = [HostRows(widths, captured_as(request.storage)) for _ in layouts]

        def copy() -> None:
            passes = []
            for rows, layout, into in zip(blocks, layouts, buffers, strict=True):
                passes += capture.submit(rows, layout, batch, into, lambda _: None)
            for future in passes:
                future.result()

        forward()
        for repeat in range(SPEED_REPEATS):
            fresh, _, _ = planned(folder, f"{repeat + 1}", tokens)
            parts: list[tuple[str, Callable[[], object]]] = [
                ("naive loop", naive),
                (BARE, forward),
                ("forward and copy", copy),
                ("whole harvest", lambda: whole(fresh, capture, widths, batch)),  # noqa: B023
            ]
            for name, part in parts[repeat % len(parts) :] + parts[: repeat % len(parts)]:
                used = time.process_time()
                seconds = timed(part)
                rates.setdefault(name, []).append(target.blocks * request.block_tokens / seconds)
                cpu.setdefault(name, []).append(time.process_time() - used)
                print(f"{name}: {rates[name][-1]:,.0f} tokens/s, {cpu[name][-1]:.2f} CPU-s", file=sys.stderr)
    figures: dict[str, tuple[float, str]] = {
        f"{name}, median": (median(found), "tokens/s") for name, found in rates.items()
    }
    for name in ("naive loop", "forward and copy", "whole harvest"):
        ratios = [rate / base for rate, base in zip(rates[name], rates[BARE], strict=True)]
        figures[f"{name} over {BARE}, median of {SPEED_REPEATS}"] = (median(ratios), "ratio")
        for which, value in (("lowest", min(ratios)), ("highest", max(ratios))):
            figures[f"{name} over {BARE}, {which}"] = (value, "ratio")
        per_cpu = [base / own for own, base in zip(cpu[name], cpu[BARE], strict=True)]
        figures[f"{name} over {BARE}, tokens per CPU-second, median"] = (median(per_cpu), "ratio")
    record(f"harvest speed: embedded model, {cores} threads, {SPEED_BLOCKS} blocks", f"{LINE} speed", figures)


def whole(target: Target, capture: Capture, widths: dict[str, int], batch: int) -> None:
    """Capture and commit all blocks, the last one's fsync included."""
    blocks = range(target.blocks)
    with ThreadPoolExecutor(1) as writer:
        made = Blocks([target], {target.path: set(blocks)}, widths, "cpu", {}, True)
        made.run(blocks, batch, capture, writer, lambda _: None)


def writing(folder: Path) -> None:
    """Committing blocks of width 2,304 against plain writes of the same bytes, each file with fsync."""
    target, _, _ = planned(folder, "w", ONE_BLOCK, "store.unembedding=false")
    request, rng = target.request, np.random.default_rng(0)
    windows = read_block(target, 0)
    layout = block_layout(request, target.strata, windows, 0, ())
    widths = dict.fromkeys((request.source_hook, request.target_hook), WIDE)
    made = HostRows(widths, "bfloat16")
    made.begin(layout, 1)
    buffers = made.buffers
    for rows in buffers.values():
        rows[:] = torch.from_numpy(rng.normal(size=rows.shape).astype(np.float32)).bfloat16().view(torch.uint16).numpy()
    size = block_bytes(store_specs(request, target.strata, WIDE, WIDE))
    found: dict[str, list[float]] = {"plain": [], "commit": []}
    for repeat in range(REPEATS):
        seconds = timed(lambda: plain_writes(folder / f"plain{repeat}", target, buffers))  # noqa: B023
        found["plain"].append(size / seconds / 1e9)
        seconds = timed(lambda: ledger.commit(target, 0, layout, buffers, 16))
        found["commit"].append(size / seconds / 1e9)
    ratios = [a / b for a, b in zip(found["commit"], found["plain"], strict=True)]
    figures = {
        "plain writes with fsync, median": (median(found["plain"]), "GB/s"),
        "commit of a block, median": (median(found["commit"]), "GB/s"),
        f"commit over plain writes, median of {REPEATS}": (median(ratios), "ratio"),
        "bytes": (size, "B"),
    }
    record("writing alone at d 2,304", f"{LINE} writing", figures)


def plain_writes(folder: Path, target: Target, buffers: dict[str, np.ndarray]) -> None:
    """The rows of each stratum and hook to a file of its own, one after the other."""
    folder.mkdir()
    first = 0
    for stratum in target.strata:
        for number, rows in enumerate(buffers.values()):
            with open(folder / f"{stratum.name}-{number}", "wb", buffering=0) as file:
                view = rows[first : first + stratum.rows].data.cast("B")
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        first += stratum.rows


def packing(folder: Path) -> None:
    """Blosc on the activations of a block of the embedded model: the codec of `pack` beside other settings of it."""
    target, _, settings = planned(folder, "p", ONE_BLOCK, "store.unembedding=false")
    pipeline.harvest(settings, folder / "cache")
    store = Store.open(folder / "cache" / target.request.folder)
    rows = store.strata["064-256"]
    size = rows.source.spec.inner_rows * rows.source.spec.row_bytes
    data = b"".join(array.shard(0).tobytes() for array in (rows.source, rows.target))
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    figures: dict[str, tuple[float, str]] = {"bytes": (len(data), "B")}
    for shuffle, level in ((Blosc.SHUFFLE, 1), (Blosc.SHUFFLE, LEVEL), (Blosc.SHUFFLE, 9), (Blosc.BITSHUFFLE, LEVEL)):
        codec = Blosc("zstd", level, shuffle, 0, typesize=2)
        coded: list[bytes] = []
        times: dict[str, list[float]] = {"packing": [], "unpacking": []}
        for _ in range(REPEATS):
            times["packing"].append(timed(lambda: coded.__setitem__(slice(None), map(codec.encode, chunks))))  # noqa: B023
            times["unpacking"].append(timed(lambda: [codec.decode(chunk) for chunk in coded]))  # noqa: B023
        name = f"{'byte' if shuffle == Blosc.SHUFFLE else 'bit'} shuffle, level {level}"
        figures[f"{name}: bytes before over after"] = (len(data) / sum(map(len, coded)), "ratio")
        for what, seconds in times.items():
            figures[f"{name}: {what}, one thread, median"] = (len(data) / median(seconds) / 1e6, "MB/s")
    record(f"packing: bfloat16 rows of the embedded model; level {LEVEL} is used", f"{LINE} packing", figures)


def timed(part: Callable[[], object]) -> float:
    """Seconds that `part` takes."""
    began = time.perf_counter()
    part()
    return time.perf_counter() - began


def memory(folder: Path) -> None:
    """Peak memory at the width of Gemma 2 2B, of one layer and of 26 at once, beyond two blocks and the model."""
    text = write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(TEXTS)])
    for layers, windows, tokens in MEMORY:
        sizes = {"hidden_size": WIDE, "num_hidden_layers": layers + 1, "sliding_window": 512}
        model = make_gemma(folder / f"model{layers}", **sizes)
        base = run(sys.executable, "-c", LOAD, model, layers).peak_mib
        names = [f"--layer={layer}" for layer in range(1, layers + 1)]
        options = ["--model", model, "--text", text, "--cache", folder / f"cache{layers}", *names]
        settings = [part for one in (*SETTINGS, f"store.block_sequences={windows}") for part in ("--set", one)]
        line = ["-m", "harvest", "run", "gemma-2-2b", *options, "--tokens", tokens, *settings]
        done = run(sys.executable, *line)
        records = [read_store_record(Path(path)) for path in done.out.split()]
        specs = [store_specs(r.request, r.plan.stored_strata, r.d_in, r.d_out) for r in records]
        block = sum(block_bytes(one) for one in specs) / 2**20
        figures = {
            "peak memory": (done.peak_mib, "MiB"),
            "peak memory of loading the model": (base, "MiB"),
            "one block of all layers": (block, "MiB"),
            "windows per block": (records[0].request.block_sequences, "windows"),
            "peak memory beyond two blocks and the loaded model": (done.peak_mib - 2 * block - base, "MiB"),
        }
        record(f"harvest memory at d 2,304, {layers} of {layers + 1} layers", f"{LINE} memory", figures)


SETTINGS = (
    "model.dtype=float32",
    "store.held_out_blocks=0",
    "text.streaming=false",
    "store.unembedding=false",
    "store.max_block_bytes=1_073_741_824",
)
LOAD = """
import sys
from pathlib import Path
from harvest.llm.model import load_model
load_model(Path(sys.argv[1]), "float32", "cpu", [f"blocks.{sys.argv[2]}.hook_mlp_out"])
"""


if __name__ == "__main__":
    main()
