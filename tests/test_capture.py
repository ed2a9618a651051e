"""Capture: the storage types, bad values, memory that runs out, and independence of the number of workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest.llm.model import Model, load_model
from harvest.run.block_rows import HostRows
from harvest.run.capture import open_capture
from harvest.run.stored_values import as_array, to_storage
from harvest.text.packing import Windows
from shared.errors import ProjectError
from shared.store.row_arrays import FloatType
from tests.blocks import shuffled, windows
from tests.llms import make_gemma
from tests.stores import encode

HOOKS = ["blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"]
WIDTHS = dict.fromkeys(HOOKS, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma(tmp_path_factory.mktemp("models") / "gemma")


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_storage_rounds_to_nearest_even(storage: FloatType) -> None:
    values = np.random.default_rng(0).normal(0, 30, (3, 5, 7)).astype(np.float32)
    values[0, 0, :2] = 1 + 2**-8, 1 + 3 * 2**-8  # halfway in bfloat16: down and up
    found = to_storage(torch.from_numpy(values), storage, "hook", 0)
    assert (as_array(found) == encode(values.reshape(-1, 7), storage).reshape(3, 5, 7)).all()
    assert as_array(found).dtype == {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}[storage]


@pytest.mark.fault(32)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_with_their_place(bad: float) -> None:
    values = torch.zeros(4, 6, 8)
    values[2, 3, 1] = bad
    with pytest.raises(ProjectError, match=rf"blocks\.5\.x, sequence 18 of the block, position 3: .* {bad}"):
        to_storage(values, "bfloat16", "blocks.5.x", 16)


@pytest.mark.fault(33)
def test_overflow_of_the_storage_type_names_the_value() -> None:
    values = torch.zeros(1, 2, 3)
    values[0, 1, 2] = 70_000.0
    with pytest.raises(ProjectError, match=r"position 1: float16 cannot hold the value 70000; .*storage=bfloat16"):
        to_storage(values, "float16", "hook", 0)
    assert to_storage(values, "bfloat16", "hook", 0).any()


def test_rows_go_to_their_places_whatever_the_number_of_workers(folder: Path) -> None:
    given, layout, found, counted = windows(22), shuffled(22), [], list[int]()
    model = load_model(folder, "float32", "cpu", HOOKS)
    for workers in (1, 2, 3):
        rows = HostRows(WIDTHS, "float32")
        with open_capture(model, workers, "cpu", "float32", "joined") as capture:
            for future in capture.submit(given, layout, 4, rows, counted.append):
                future.result()
            capture.settle(given, layout, 4, rows)
        found.append(rows.buffers)
    with open_capture(model, 1, "cpu", "float32", "joined") as capture:
        parts = [
            capture.rows(Windows(*(p[i : i + 4] for p in given)), layout.positions[i : i + 4]) for i in range(0, 22, 4)
        ]
    for name in HOOKS:
        expected = np.concatenate([part[name] for part in parts])[layout.rows]
        assert expected.any()
        assert all((buffers[name] == expected).all() for buffers in found)
    assert sum(counted) == 3 * given.tokens.size


def test_buffers_are_used_again_when_they_are_large_enough() -> None:
    rows = HostRows(WIDTHS, "bfloat16")
    rows.begin(shuffled(2), 1)
    first = rows.buffers
    assert all(one.shape == (32, 32) and one.dtype == np.uint16 for one in first.values())
    rows.begin(shuffled(1), 1)
    assert rows.buffers is first
    rows.begin(shuffled(3), 1)
    assert len(rows.buffers[HOOKS[0]]) == 48


def test_an_error_in_a_worker_reaches_the_caller(folder: Path) -> None:
    model = load_model(folder, "float32", "cpu", HOOKS)
    with torch.no_grad():
        next(model._bridge.parameters()).fill_(float("nan"))
    layout = shuffled(8)
    rows = HostRows(WIDTHS, "bfloat16")
    with (
        open_capture(model, 2, "cpu", "bfloat16", "joined") as capture,
        pytest.raises(ProjectError, match="position 0: the value is nan"),
    ):
        for future in capture.submit(windows(8), layout, 2, rows, lambda _: None):
            future.result()


class Narrow(Model):
    """A model on a device with room for `most` windows."""

    most = 3

    def visit(self, ids: torch.Tensor, position_ids: torch.Tensor | None, take: Any) -> None:
        if len(ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().visit(ids, position_ids, take)


@pytest.mark.parametrize(("asked", "fits"), [(16, 2), (3, 3), (1, 1)])
def test_a_batch_is_halved_until_it_fits(folder: Path, asked: int, fits: int) -> None:
    model, given, layout = load_model(folder, "float32", "cpu", HOOKS), windows(16), shuffled(16)
    narrow = Narrow(model._bridge, model._hooks, model._forward)
    with open_capture(narrow, 1, "cpu", "bfloat16", "joined") as capture:
        assert capture.fitting_batch(given, layout.positions, asked) == fits


@pytest.mark.fault(16)
def test_memory_that_runs_out_later_is_one_line(folder: Path) -> None:
    model, given, layout = load_model(folder, "float32", "cpu", HOOKS), windows(16), shuffled(16)
    narrow = Narrow(model._bridge, model._hooks, model._forward)
    rows = HostRows(WIDTHS, "bfloat16")
    with open_capture(narrow, 1, "cpu", "bfloat16", "joined") as capture:
        with pytest.raises(ProjectError, match="4 windows per pass no longer fit"):
            capture.submit(given, layout, 4, rows, lambda _: None)[0].result()
        narrow.most = 0
        with pytest.raises(ProjectError, match="a single window of 16 tokens does not fit"):
            capture.fitting_batch(given, layout.positions, 16)


@pytest.mark.fault(5)
def test_no_pass_is_begun_after_a_signal(folder: Path) -> None:
    model, given, layout = load_model(folder, "float32", "cpu", HOOKS), windows(16), shuffled(16)
    rows = HostRows(WIDTHS, "bfloat16")
    counted: list[int] = []
    with open_capture(model, 2, "cpu", "bfloat16", "joined") as capture:
        before = [future.result() for future in capture.submit(given, layout, 4, rows, counted.append, [])]
        after = [future.result() for future in capture.submit(given, layout, 4, rows, counted.append, [15])]
    assert (before, after) == ([True] * 4, [False] * 4)
    assert counted == [4 * given.tokens.shape[1]] * 4
