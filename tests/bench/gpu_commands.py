"""Both stages on a GPU by their real commands: a training run from a store, the harvest of a model of random weights.

Where the model's and the store's values come from makes no difference to their speed, and both are made on the spot.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared.store.layout import ARRAYS, record_path
from tests.bench.gpu_setup import AUXK, GIB, MAIN, D, K
from tests.bench.record import ROOT, sized
from tests.llms import save_model, texts, write_jsonl
from tests.stores import SIDES, make_store

Figures = dict[str, tuple[float, str]]
STEPS = sized(4882, 8)
"""Of the preset `gemma-2-2b`."""
CONTEXT, LAYERS, BLOCKS = sized((1024, 9, 5), (32, 2, 3))
"""Of the harvest: tokens of a window, layers that run, and blocks that are written."""
GEMMA = sized(
    {
        "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4,
        "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
    {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "query_pre_attn_scalar": 16, "sliding_window": 8,
    },
)  # fmt: skip
"""Gemma 2 2B but for its vocabulary, of which the layers see nothing."""

_AT_ONCE = 2**14
"""Rows that are drawn at once."""


class DeviceRows:
    """Draws rows on the device: a token's vector plus noise, and a map of the source with one hidden layer."""

    def __init__(self, device: str, vocabulary: int = 61) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._vectors, self._up, self._down = (
            self._draw(*shape) for shape in ((vocabulary, D), (D, 2 * D), (2 * D, D))
        )

    def __call__(self, tokens: NDArray[Any], position: NDArray[Any], shared: object) -> dict[str, NDArray[Any]]:
        """Return rows by side [n, D] as stored, bfloat16; that of position 0 is one, and twenty times as long."""
        found = {side: np.empty((len(tokens), D), np.uint16) for side in SIDES}
        for low in range(0, len(tokens), _AT_ONCE):
            some = slice(low, low + _AT_ONCE)
            for side, rows in zip(SIDES, self._rows(tokens[some], position[some]), strict=True):
                found[side][some] = rows.bfloat16().view(torch.uint16).cpu().numpy()
        return found

    def _rows(self, tokens: NDArray[Any], position: NDArray[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._vectors.device
        source = self._vectors[torch.from_numpy(tokens).long().to(device)] + 0.3 * self._draw(len(tokens), D)
        source[torch.from_numpy(position == 0).to(device)] = 20 * self._vectors[0]
        return source, (source @ self._up / D**0.5).relu() @ self._down / D**0.5

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator, device=self._generator.device)


def block_windows(folder: Path, blocks: int) -> int:
    """Windows in each of a store's blocks: 256, as in the preset, or fewer where disk or memory is short."""
    windows = sized(256, 16)
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while windows > 16 and blocks * windows * CONTEXT * 4 * D > min(shutil.disk_usage(folder).free / 2, memory / 4):
        windows //= 2
    return windows


def run(folder: Path, device: str) -> Figures:
    """`train run gemma-2-2b` in a process of its own, everything at its default, from an empty folder to samples.

    The store has two held-out blocks and one to train on, which is read over and over.
    """
    windows, began = block_windows(folder, 3), time.monotonic()
    store = make_store(
        folder / "store", d_in=D, d_out=D, training_blocks=1, context_size=CONTEXT, block_sequences=windows,
        edges=sized((0, 1, 4, 16, 64, 256), (0, 1, 4, 16)), keep=sized({0: 1 / 16}, {}), tokenizer=True,
        draw=DeviceRows(sized(device, "cpu")), histograms=True,
    )  # fmt: skip
    torch.cuda.empty_cache()  # the device is for the command
    print(f"a store of {windows} windows a block, made in {time.monotonic() - began:.1f} s", flush=True)
    small = [f"transcoder.d_sae={MAIN.d_sae}", f"activation.k={K}", f"rows.batch_rows={MAIN.rows}", AUXK,
             "monitor.every=4", "samples.rows=256"]  # fmt: skip
    settings = sized([], [part for one in small for part in ("--set", one)])
    line = ["train", "run", "gemma-2-2b", "--store", store.path, "--runs", folder, "--name", "run", "--steps", STEPS]
    seconds = _command(*line, *settings)
    rows = [json.loads(one) for one in (folder / "run" / "timing.jsonl").read_text().splitlines()]
    quiet = [
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise([{"seconds": 0.0, "step": 0}, *rows])
    ]
    return {
        "whole command": (seconds, "s"),
        "training loop, with all that happens between two steps": (rows[-1]["seconds"], "s"),
        "training loop, waiting for rows": (sum(row["data_wait"] for row in rows), "s"),
        "a step, median of the log's intervals": (1e3 * statistics.median(quiet), "ms"),
        "before and after the loop: start, held-out report, samples": (seconds - rows[-1]["seconds"], "s"),
        "rows of the store's training block": (windows * CONTEXT, "rows"),
    }


def harvest(folder: Path, device: str) -> Figures:
    """`harvest run` of nine layers of Gemma 2 2B's shape, and the same model's forward pass alone.

    The rate is between the first block's record and the last one's, so that it is without the start and that block.
    """
    model, began = folder / "model", time.monotonic()
    save_model(model, lambda: _gemma(sized(device, "cpu")))
    windows = block_windows(folder, BLOCKS)
    tokens = BLOCKS * windows * CONTEXT
    text = write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(tokens // sized(40, 20))])
    torch.cuda.empty_cache()
    print(f"a model and a text, made in {time.monotonic() - began:.1f} s", flush=True)
    settings = [
        f"windows.context_size={CONTEXT}", f"store.block_sequences={windows}", "store.held_out_blocks=0",
        f"model.dtype={sized('bfloat16', 'float32')}", f"model.device={sized(device, 'cpu')}",
    ]  # fmt: skip
    line = ["harvest", "run", "gemma-2-2b", "--model", model, "--text", text, "--layer", LAYERS - 1, "--tokens", tokens]
    seconds = _command(*line, "--cache", folder / "cache", *(part for one in settings for part in ("--set", one)))
    (store,) = (path.parent for path in (folder / "cache").glob("*/store.json"))
    done = [os.stat(store / record_path(block)).st_mtime for block in range(BLOCKS)]
    rate = (BLOCKS - 1) * windows * CONTEXT / (done[-1] - done[0])
    batch = json.loads((store / record_path(0)).read_text())["batch_sequences"]
    size = sum(path.stat().st_size for path in (store / ARRAYS).rglob("*") if path.is_file())
    shutil.rmtree(store)
    bare = forward_rate(model, sized(device, "cpu"), batch)
    return {
        "harvest": (rate, "tokens/s"),
        f"forward pass alone, {batch} windows": (bare, "tokens/s"),
        "harvest over forward pass alone": (rate / bare, "ratio"),
        "whole command": (seconds, "s"),
        "bytes of the store": (size / GIB, "GiB"),
    }


@torch.inference_mode()
def forward_rate(folder: Path, device: str, batch: int) -> float:
    """Tokens per second of transformers' model on random windows, its attention as the harvest has it."""
    from transformers import AutoModelForCausalLM

    kind = sized(torch.bfloat16, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="eager").to(device).eval()
    ids = torch.randint(3, 300, (batch, CONTEXT), generator=torch.Generator().manual_seed(0)).to(device)
    passes = sized(20, 2)
    for number in range(passes + 3):
        if number == 3:
            _wait(device)
            began = time.perf_counter()
        model(ids, use_cache=False, logits_to_keep=1)
    _wait(device)
    return passes * ids.numel() / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _gemma(device: str) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **GEMMA, vocab_size=320, num_hidden_layers=LAYERS, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1
    )
    with torch.device(device):
        return Gemma2ForCausalLM(config).to(sized(torch.bfloat16, torch.float32))


def _command(*arguments: object) -> float:
    """Run `python -m ARGUMENTS`, its messages shown; returns its seconds. Raises `CalledProcessError`."""
    line = [sys.executable, "-m", *map(str, arguments)]
    print("$ " + " ".join(line), flush=True)
    began = time.monotonic()
    subprocess.run(line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began
