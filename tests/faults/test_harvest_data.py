"""Values that are not finite, or do not fit the stored type, in the activations of a real harvest."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.store.layout import LEDGER
from shared.store.store import Store
from tests.llms import Line, command, make_gemma

WIDTH, CONTEXT = 32, 32


def scaled(folder: Path, factor: float, token: int) -> Path:
    """A small model that has the embedding of a token multiplied."""
    make_gemma(folder, tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] *= factor
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def written(cache: Path) -> list[Path]:
    """Files of rows, and records, of the first block; another one, which is sound, may be written before it."""
    return [*cache.glob("*/activations.zarr/strata/*/*/c/0/**/*"), *cache.glob(f"*/{LEDGER}/000000*")]


@pytest.mark.fault(32)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_by_layer_sequence_and_position(
    small: Line, finished: Path, tmp_path: Path, bad: float
) -> None:
    """The embedding of one token is bad: of those in the first block, the one that is met last."""
    tokens = Store.open(finished).tokens
    rows = np.empty((16, CONTEXT), np.int32)
    tokens.read(0, 16, rows)
    places = {int(token): np.argwhere(rows == token)[0].tolist() for token in np.unique(rows)}
    token, (sequence, position) = max(places.items(), key=lambda item: item[1])
    assert sequence > 3  # not in the first pass
    folder = scaled(tmp_path / "model", bad, token)
    hook = "blocks.0.hook_resid_pre"  # attention gives a NaN to every position of a window
    done = command(*small(tmp_path / "cache", "--set", f"capture.source={hook}", model=folder))
    assert done.code == 1
    value = f"{hook}, sequence {sequence} of the block, position {position}: the value is "
    assert value + ("nan" if bad != bad else "inf") in done.err or value + "-inf" in done.err
    assert written(tmp_path / "cache") == []


@pytest.mark.fault(33)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_a_value_that_the_stored_type_cannot_hold_is_an_error_before_it_is_written(
    small: Line, tmp_path: Path, storage: str
) -> None:
    """bfloat16 rounds the largest float32 to infinity."""
    largest = {"float16": 1e5, "bfloat16": torch.finfo(torch.float32).max}[storage]
    folder = make_gemma(tmp_path / "model", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 3] = largest / WIDTH**0.5  # which the model multiplies it by
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    hook = "blocks.0.hook_resid_pre"
    options = [part for value in (f"capture.source={hook}", f"store.storage={storage}") for part in ("--set", value)]
    done = command(*small(tmp_path / "cache", *options, model=folder))
    assert done.code == 1
    assert f"{hook}, sequence 0 of the block, position 0: {storage} cannot hold the value" in done.err
    assert f"{largest:g}" in done.err
    assert written(tmp_path / "cache") == []
