"""What is harvested on CUDA, on a fake device: the rows of CPU, without a device fault or a wait in a block."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from harvest.llm.model import Model, load_model
from harvest.run import block_rows
from harvest.run.block_rows import BlockRows, DeviceMemory, DeviceRows, HostRows, sums_of
from harvest.run.capture import Capture, open_capture
from harvest.run.stored_values import as_tensor
from shared.errors import ProjectError
from shared.store.layout import STATISTICS, STORE, record_path
from shared.store.row_arrays import FloatType
from shared.store.statistics import moments_from_sums, moments_of
from tests.blocks import shuffled, windows
from tests.gpu.device_log import DeviceLog
from tests.gpu.fake_device import fake_cuda
from tests.llms import Line, command, contents, edit_json
from tests.stores import encode

HOOKS = ["blocks.1.hook_resid_mid", "blocks.2.hook_mlp_out"]
WIDTHS = dict.fromkeys(HOOKS, 32)
BLOCKS, PASSES = 5, 4
"""Of the harvest of a second, and passes of each block."""
VARIANTS = {
    "float16": ["store.storage=float16", "store.max_norm_quantile=0.9", "windows.documents=apart"],
    "float32": ["store.storage=float32", "store.exclude_special=true"],
}


@pytest.fixture
def log() -> Iterator[DeviceLog]:
    with fake_cuda() as log:
        yield log


def on(device: str, small: Line, cache: Path, *assignments: str) -> Path:
    options = [part for one in (f"model.device={device}", *assignments) for part in ("--set", one)]
    return command(*small(cache, *options)).store


def rows_of(store: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(store).items() if name.startswith("activations.zarr/strata/")}


@pytest.fixture(scope="module")
def harvested(small: Line, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeviceLog, list[str]]:
    """A store, what the device was asked to do, and the rows that the host put to their places one by one."""
    scattered: list[str] = []
    with fake_cuda() as log, patch.object(HostRows, "take", lambda self, start, stop: scattered.append("rows")):
        store = on("cuda", small, tmp_path_factory.mktemp("cuda"))
        kept = DeviceLog(faults=[*log.faults], ops=[*log.ops], syncs=[*log.syncs, *log.syncs_beside],
                         copies=[*log.copies], fetches=[*log.fetches])  # fmt: skip
    return store, kept, scattered


def test_rows_are_those_of_a_harvest_on_cpu(harvested: tuple[Path, DeviceLog, list[str]], finished: Path) -> None:
    """Byte for byte; statistics, which are in float64 on the device, to what float32 leaves of them on CPU."""
    store, log, scattered = harvested
    assert log.faults == [] and scattered == []
    assert rows_of(store) == rows_of(finished)
    found, expected = (load_file(next(path.glob(STATISTICS))) for path in (store, finished))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_block_is_fetched_once_and_nothing_waits_for_it(harvested: tuple[Path, DeviceLog, list[str]]) -> None:
    """But for a check of transformers at the start of a pass, and the one pass that shows whether it fits."""
    _, log, _ = harvested
    of_rows = [one for one in log.fetches if one.startswith("pinned") and one.endswith(" end")]
    assert len(of_rows) == BLOCKS * 2  # source and target
    waits = Counter(one.split(" @ ")[1].split(":")[0] for one in log.syncs)
    assert waits["harvest/run/stored_values.py"] == 2 * 2  # of the first pass
    assert waits["harvest/run/block_rows.py"] == BLOCKS  # the writer, for what is copied beside the next block's passes
    assert waits["harvest/run/capture.py"] == 0
    assert all(one.startswith("pinned") for one in log.copies if "harvest/run" in one)
    assert [op.name for op in log.ops if op.name == "index_copy_"] == []


def test_the_plan_tells_the_memory_that_blocks_take(small: Line, log: DeviceLog, tmp_path: Path) -> None:
    plans = []
    for device in ("cpu", "cuda"):
        line = small(tmp_path, "--set", f"model.device={device}", "--set", "store.keep={0 = 0.5, 16 = 0.25}")
        done = command("plan", *line[1:], "--json")
        assert done.code == 0, done.err
        plans.append(json.loads(done.out)["block_memory"])
    rows = 16 * (0.5 + 3 + 12 + 0.25 * 16)  # of 16 windows of 32 positions
    assert plans[0] == {"host": 2 * 2 * 32 * 2 * rows, "device": 0}  # blocks, hooks, width, bytes
    memory = DeviceMemory("cuda", WIDTHS, "bfloat16", 16 * 32, int(rows))
    held = sum(one.nbytes for group in (memory.filling, memory.leaving) for one in group.values())
    assert plans[1] == {"host": 2 * 2 * 2**15, "device": held}  # a power of two for each hook


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_store_has_the_rows_of_cpu(small: Line, tmp_path: Path, variant: str) -> None:
    expected = on("cpu", small, tmp_path, *VARIANTS[variant])
    with fake_cuda() as log:
        store = on("cuda", small, tmp_path, *VARIANTS[variant])
    assert log.faults == []
    assert rows_of(store) == rows_of(expected)


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_moments_on_the_device_are_those_of_the_rows(
    storage: FloatType, log: DeviceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64 on the host; rows are taken in parts, one of which is a thousand times as long."""
    monkeypatch.setattr(block_rows, "_VALUES_AT_ONCE", 5 * 64)
    values = np.random.default_rng(0).normal(3, 2, (300, 5)).astype(np.float32)
    values[7] *= 1000
    stored = encode(values, storage)
    rows = as_tensor(stored).to("cuda")
    shift, first, second, squares = (one.cpu().numpy() for one in sums_of(rows))
    found, exact = moments_from_sums(shift, first, second, squares), as_tensor(stored).double()
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, exact.var(0, correction=0), rtol=1e-9)
    np.testing.assert_allclose(squares, exact.square().sum(1), rtol=1e-14)
    assert np.abs(found.norms - moments_of(stored).norms).sum() <= 2  # a norm beside the edge of a bin
    assert log.faults == []


def captured(model: Model, rows: BlockRows, storage: FloatType = "bfloat16") -> BlockRows:
    given, layout = windows(10), shuffled(10)
    with open_capture(model, 1, "cuda", storage, "joined") as capture:
        for future in capture.submit(given, layout, 4, rows, lambda _: None):
            future.result()
        capture.settle(given, layout, 4, rows)
    return rows


def device_rows(storage: FloatType = "bfloat16") -> DeviceRows:
    return DeviceRows(DeviceMemory("cuda", WIDTHS, storage, 160, 160), measure=True)


@pytest.mark.fault(32)
def test_a_value_that_is_not_finite_is_named_as_on_cpu(model: Path, log: DeviceLog) -> None:
    """Also where the row is stored in no place: its pass was made again."""
    network = load_model(model, "float32", "cuda", HOOKS)
    token = int(windows(10).tokens[6, 3])
    with torch.inference_mode():
        network.embedding[token] = float("inf")
    with pytest.raises(ProjectError, match=r"hook_resid_mid, sequence \d+ of the block, position \d+: the value is"):
        captured(network, device_rows())
    assert log.faults == []


def test_a_device_that_computes_differently_twice_is_told(
    model: Path, log: DeviceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value is not finite in the first of two equal passes only."""
    network, visit, made = load_model(model, "float32", "cuda", HOOKS), Model.visit, []

    def once(self: Model, ids: Any, positions: Any, take: Any) -> None:
        made.append(len(ids))
        wrong = len(made) == 2
        visit(self, ids, positions, lambda name, values: take(name, values * float("inf") if wrong else values))

    monkeypatch.setattr(Model, "visit", once)
    with pytest.raises(ProjectError, match="from window 4 of the block .* does not compute the same twice"):
        captured(network, device_rows())
    assert made == [4, 4, 2, 4]


def test_finite_values_whose_sum_is_not_are_stored(
    model: Path, log: DeviceLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, visit = load_model(model, "float32", "cuda", HOOKS), Model.visit
    huge = lambda self, ids, positions, take: visit(  # noqa: E731
        self, ids, positions, lambda name, values: take(name, torch.full_like(values, 3e38))
    )
    monkeypatch.setattr(Model, "visit", huge)
    rows = captured(network, device_rows())
    assert (rows.buffers[HOOKS[0]] == encode(np.full((1, 1), 3e38, np.float32), "bfloat16")).all()


@pytest.mark.fault(16)
def test_a_device_without_room_for_blocks_is_one_line(
    small: Line, log: DeviceLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*shape: Any, device: Any = None, **options: Any) -> Any:
        if device is not None and str(device).startswith("cuda"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return empty(*shape, device=device, **options)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", full)
    done = command(*small(tmp_path, "--set", "model.device=cuda"))
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith("error: the device has no room for the rows of two blocks, ")
    assert "store.max_block_bytes=" in done.err


@pytest.mark.slow
@pytest.mark.fault(16)
def test_what_was_committed_before_the_device_was_full_is_continued(
    small: Line, finished: Path, log: DeviceLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit, made = Capture.forward, []

    def full(self: Capture, *args: Any) -> None:
        made.append(1)
        if len(made) > 1 + 2 * PASSES:  # the one that shows whether it fits, and two blocks
            raise torch.OutOfMemoryError("CUDA out of memory")
        visit(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Capture, "forward", full)
        done = command(*small(tmp_path, "--set", "model.device=cuda"))
    assert done.code == 1 and "4 windows per pass no longer fit on the device" in done.err.splitlines()[-1]
    assert len(list(tmp_path.glob("*/ledger/*.json"))) == 2
    store = on("cuda", small, tmp_path)
    assert rows_of(store) == rows_of(finished)


@pytest.mark.slow
def test_a_gpu_of_another_kind_is_refused_unless_asked_for(
    harvested: tuple[Path, DeviceLog, list[str]], small: Line, log: DeviceLog, tmp_path: Path, monkeypatch: Any
) -> None:
    """On the way, in a repair and where a store is extended; a block without a record of its GPU is not compared."""
    store = Path(shutil.copytree(harvested[0], tmp_path / harvested[0].name))
    line = small(tmp_path, "--set", "model.device=cuda")
    records = [store / record_path(block) for block in range(BLOCKS)]
    before = [json.loads(path.read_text())["computed_on"] for path in records]
    assert all(one["gpu"] == "fake" and one["torch"] == torch.__version__ and one["driver"] for one in before)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "other")
    (store / STORE).unlink()
    records[4].unlink()
    done = command(*line)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "block 0 was computed with gpu fake, here other: the last bits of rows can differ; " in done.err
    assert done.err.rstrip().endswith("--inexact")
    assert not records[4].exists()

    done = command(*line, "--inexact")
    assert done.code == 0 and "warning: " in done.err and "gpu fake, here other" in done.err
    assert [json.loads(path.read_text())["computed_on"]["gpu"] for path in records] == ["fake"] * 4 + ["other"]
    assert rows_of(store) == rows_of(harvested[0])

    records[1].unlink()
    done = command("repair", store, "--model", small.model)
    assert done.code == 2 and "gpu fake, here other" in done.err
    for path in records[:1] + records[2:4]:
        edit_json(path, computed_on=None)
    assert command("repair", store, "--model", small.model).code == 0
    assert json.loads(records[1].read_text())["computed_on"]["gpu"] == "other"
