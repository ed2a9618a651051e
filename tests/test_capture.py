"""Capture: the storage types, bad values, and independence of the number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.capture import open_capture, to_storage
from harvest.model import load_model
from shared.errors import ProjectError
from tests.llms import make_gemma
from tests.stores import encode

HOOKS = ["blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_storage_rounds_to_nearest_even(storage: str) -> None:
    values = np.random.default_rng(0).normal(0, 30, (3, 5, 7)).astype(np.float32)
    values[0, 0, :2] = 1 + 2**-8, 1 + 3 * 2**-8  # halfway in bfloat16: down and up
    found = to_storage(torch.from_numpy(values), storage, "hook", 0)
    assert (found == encode(values.reshape(-1, 7), storage).reshape(3, 5, 7)).all()
    assert found.dtype == {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[storage]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_with_their_place(bad: float) -> None:
    values = torch.zeros(4, 6, 8)
    values[2, 3, 1] = bad
    with pytest.raises(ProjectError, match=rf"blocks\.5\.x, sequence 18 of the block, position 3: .* {bad}"):
        to_storage(values, "bfloat16", "blocks.5.x", 16)


def test_overflow_of_the_storage_type_names_the_value() -> None:
    values = torch.zeros(1, 2, 3)
    values[0, 1, 2] = 70_000.0
    with pytest.raises(ProjectError, match=r"position 1: .*float16: 70000.*storage=bfloat16"):
        to_storage(values, "float16", "hook", 0)
    assert to_storage(values, "bfloat16", "hook", 0).any()


def test_bytes_do_not_depend_on_the_number_of_workers(folder: Path) -> None:
    tokens = np.random.default_rng(0).integers(4, 300, (22, 16), dtype=np.int32)
    widths = dict.fromkeys(HOOKS, 32)
    found, counted = [], []
    for workers in (1, 2, 3):
        model = load_model(folder, "float32", "cpu", HOOKS)
        with open_capture(model, workers, "cpu", "float32") as capture:
            found.append(capture.block(tokens, 4, widths, counted.append))
    for name in HOOKS:
        assert found[0][name].shape == (22, 16, 32) and found[0][name].any()
        assert (found[0][name] == found[1][name]).all() and (found[0][name] == found[2][name]).all()
    assert sum(counted) == 3 * tokens.size


def test_an_error_in_a_worker_reaches_the_caller(folder: Path) -> None:
    model = load_model(folder, "float32", "cpu", HOOKS)
    tokens = np.full((8, 16), 5, np.int32)
    with torch.no_grad():
        next(model._bridge.parameters()).fill_(float("nan"))
    with open_capture(model, 2, "cpu", "float32") as capture, pytest.raises(ProjectError, match="position 0"):
        capture.block(tokens, 2, dict.fromkeys(HOOKS, 32), lambda _: None)
