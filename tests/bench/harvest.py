"""The harvest against the model's forward pass alone, and its writing against plain writes; then its peak memory.

python -m tests.bench.harvest [speed] [writing] [memory]: all when none is named.
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

from harvest import ledger, pipeline, plan
from harvest.blocks import block_layout
from harvest.capture import Capture, fitting_buffers, open_capture
from harvest.cli import PRESETS
from harvest.model import load_model
from harvest.plan import Target
from harvest.ranks import Ranks
from harvest.runner import Blocks
from harvest.settings import Settings
from shared.config import build, load_preset, override
from shared.layout import block_bytes, store_specs
from shared.store import read_store_record
from tests.bench.record import record, run
from tests.llms import make_gemma, texts, write_jsonl

REPEATS = 3
SPEED_BLOCKS = 3
LINE = "python -m tests.bench.harvest"


def main() -> None:
    """Measure what is named on the command line, and record."""
    wanted = sys.argv[1:] or ["speed", "writing", "memory"]
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            {"speed": speed, "writing": writing, "memory": memory}[name](Path(folder))


def planned(folder: Path, name: str, *assignments: str) -> tuple[Target, pipeline.Inputs, Settings]:
    """A store with its tokens on disk and no block yet; nothing held out."""
    given = {"label": "bench", **load_preset(PRESETS, "tiny", None)}
    settings = build(Settings, override(given, ["store.held_out_blocks=0", *assignments]), "bench")
    inputs = pipeline.identify(settings)
    request = inputs.requests[0]
    pipeline.prepare([Target(path=folder / name, request=request)], inputs, settings, force=True)
    return plan.load_target(folder / name, request), inputs, settings


def speed(folder: Path) -> None:
    """The embedded model: tokens/s of passes alone, of passes with rows put in place, and of the whole harvest."""
    tokens = f"tokens={SPEED_BLOCKS * 256 * 256}"
    target, inputs, _ = planned(folder, "0", tokens)
    request, cores = target.request, Ranks().cores
    widths = pipeline.hook_widths([target], inputs)
    blocks = [plan.read_block(target, block) for block in range(target.blocks)]
    layouts = [block_layout(request, target.strata, rows, i, ()) for i, rows in enumerate(blocks)]
    network = load_model(inputs.model.folder, "float32", "cpu", list(widths))
    batch = request.batch_sequences
    found: dict[str, list[float]] = {"forward only": [], "forward and copy": [], "whole harvest": []}
    with open_capture(network, cores, "cpu", request.storage, "joined") as capture:

        def forward() -> None:
            parts = [
                (rows.tokens[i : i + batch], layout.positions[i : i + batch])
                for rows, layout in zip(blocks, layouts, strict=True)
                for i in range(0, len(rows.tokens), batch)
            ]
            list(capture.pool.map(lambda part: capture.forward(*part), parts))

        buffers = [fitting_buffers({}, widths, len(layout.rows), request.storage) for layout in layouts]

        def copy() -> None:
            for rows, layout, into in zip(blocks, layouts, buffers, strict=True):
                passes = capture.submit(rows, layout, batch, into, lambda _: None)
            for future in passes:
                future.result()

        forward()
        for repeat in range(REPEATS):
            fresh, _, _ = planned(folder, f"{repeat + 1}", tokens)
            for name, part in (
                ("forward only", forward),
                ("forward and copy", copy),
                ("whole harvest", lambda: whole(fresh, capture, widths, batch)),  # noqa: B023
            ):
                seconds = timed(part)
                found[name].append(target.blocks * request.block_tokens / seconds)
                print(f"{name}: {found[name][-1]:,.0f} tokens/s", file=sys.stderr)
    bare = found["forward only"]
    figures: dict[str, tuple[float, str]] = {
        f"{name}, median": (median(rates), "tokens/s") for name, rates in found.items()
    }
    for name in ("forward and copy", "whole harvest"):
        ratios = [rate / base for rate, base in zip(found[name], bare, strict=True)]
        figures[f"{name} over forward only, median of {REPEATS}"] = (median(ratios), "ratio")
    record(f"harvest speed: embedded model, {cores} threads, {SPEED_BLOCKS} blocks", f"{LINE} speed", figures)


def whole(target: Target, capture: Capture, widths: dict[str, int], batch: int) -> None:
    """Capture and commit all blocks, the last one's fsync included."""
    blocks = range(target.blocks)
    with ThreadPoolExecutor(1) as writer:
        Blocks([target], {target.path: set(blocks)}, widths, batch, True).run(blocks, capture, writer, lambda _: None)


def writing(folder: Path) -> None:
    """Committing blocks of width 2,304 against plain writes of the same bytes, each file with fsync."""
    target, _, _ = planned(folder, "w", "tokens=65536", "store.unembedding=false")
    request, rng = target.request, np.random.default_rng(0)
    windows = plan.read_block(target, 0)
    layout = block_layout(request, target.strata, windows, 0, ())
    widths = dict.fromkeys((request.source_hook, request.target_hook), 2304)
    buffers = fitting_buffers({}, widths, len(layout.rows), "bfloat16")
    for rows in buffers.values():
        rows[:] = torch.from_numpy(rng.normal(size=rows.shape).astype(np.float32)).bfloat16().view(torch.uint16).numpy()
    size = block_bytes(store_specs(request, target.strata, 2304, 2304))
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
                view = memoryview(rows[first : first + stratum.rows]).cast("B")
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        first += stratum.rows


def timed(part: Callable[[], object]) -> float:
    """Seconds that `part` takes."""
    began = time.perf_counter()
    part()
    return time.perf_counter() - began


def memory(folder: Path) -> None:
    """Peak memory at the width of Gemma 2 2B, of one layer and of 26 at once, beyond two blocks and the model."""
    text = write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(8_000)])
    for layers, windows, tokens in ((1, 32, 98_304), (26, 256, 12_288)):
        sizes = {"hidden_size": 2304, "num_hidden_layers": layers + 1, "sliding_window": 512}
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
from harvest.model import load_model
load_model(Path(sys.argv[1]), "float32", "cpu", [f"blocks.{sys.argv[2]}.hook_mlp_out"])
"""


if __name__ == "__main__":
    main()
