"""`batch(step)` as tensors against a naive stream."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch

from harvest.commands.archive import pack
from shared.errors import CorruptData, UserError
from shared.store.reader import RowsConfig
from shared.store.store import Local, Store
from tests.stores import SyntheticStore, flip, make_store
from tests.test_reader import naive_stream
from train.data.batches import BatchReader, Side, StoreRows, batches
from train.data.resident import ResidentRows

CPU = torch.device("cpu")


def expected_batch(store: SyntheticStore, reader: BatchReader, step: int, run: int, seed: int) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {"source": [], "target": []}
    first = store.record.request.held_out_blocks
    for stratum, count in zip(store.record.plan.stored_strata, reader.counts, strict=True):
        rows = 3 * stratum.rows
        epochs = (step + 1) * count // rows + 2
        stream = naive_stream(rows, min(run, rows), epochs, "rows", seed, stratum.name)[
            step * count : (step + 1) * count
        ]
        for side, into in parts.items():
            into.append(store.values(f"strata/{stratum.name}/{side}")[[first * stratum.rows + row for row in stream]])
    return {side: np.concatenate(values) for side, values in parts.items()}


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_batches_hold_the_rows_of_the_naive_stream_from_training_blocks_only(tmp_path: Path, storage: str) -> None:
    made = make_store(tmp_path / "store", storage=storage, keep={0: 0.5, 4: 0.4})
    store = Store.open(made.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=50, run_rows=8), seed=5, device=CPU)
    assert reader.slices() == {"001-004": slice(0, 5), "004-016": slice(5, 24), "016-032": slice(24, 50)}
    for step in (0, 1, 7, 40, 3):
        batch, expected = reader.batch(step), expected_batch(made, reader, step, 8, 5)
        assert torch.equal(batch.source, torch.from_numpy(expected["source"]))
        assert torch.equal(batch.target, torch.from_numpy(expected["target"]))


def test_a_batch_does_not_change_when_the_next_one_is_read(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), seed=0, device=CPU)
    first = reader.batch(0)
    before = first.source.clone()
    reader.batch(1)
    assert torch.equal(first.source, before)


def test_seeds_and_pinned_blocks_decide_the_rows(synthetic: SyntheticStore) -> None:
    store, config = Store.open(synthetic.path), RowsConfig(batch_rows=32)
    blocks = store.record.training_blocks
    one, same, other = (BatchReader(store, blocks, config, seed, CPU).batch(3).source for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    of_its_own = config.model_copy(update={"seed": 1})
    assert torch.equal(BatchReader(store, blocks, of_its_own, 2, CPU).batch(3).source, one)
    pinned = BatchReader(store, range(blocks.start, blocks.start + 1), config, 1, CPU)
    last = max(high for step in range(20) for _, _, high, _ in pinned.runs(step))
    assert last == (blocks.start + 1) * max(s.rows for s in store.record.plan.stored_strata)


def test_epochs_count_how_often_rows_were_seen(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), seed=0, device=CPU)
    rows = {name: 3 * s.stratum.rows for name, s in store.strata.items()}
    counts = dict(zip(rows, reader.counts, strict=True))
    assert reader.epochs(30) == {name: 30 * counts[name] / rows[name] for name in rows}


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("rows")]


@pytest.fixture(params=["raw", "packed"])
def opened(request: pytest.FixtureRequest, synthetic: SyntheticStore, tmp_path: Path) -> Store:
    """A store; the packed one is decoded again and again."""
    if request.param == "raw":
        return Store.open(synthetic.path)
    pack(synthetic.path, tmp_path / "packed")
    return Store.open(tmp_path / "packed", Local(folder=tmp_path / "local", bytes=20_000))


@pytest.mark.parametrize("side", ["source", "target"])
def test_reading_ahead_gives_the_same_bits_in_any_order_of_steps(opened: Store, side: Side) -> None:
    given = (opened, opened.record.training_blocks, RowsConfig(batch_rows=50, run_rows=8), 5, CPU, side)
    plain = BatchReader(*given)
    with BatchReader(*given) as reader:
        for step in (*range(30), 7, 8, 9, 2, 1, 0, 29, 29, 500, 501):
            found, expected = reader.batch(step), plain.batch(step)
            assert torch.equal(found.source, expected.source) and torch.equal(found.target, expected.target)
    with reader:  # again, from where a resumed run starts
        assert torch.equal(reader.batch(12).source, plain.batch(12).source)


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("how", ["resident", "three threads"])
def test_resident_rows_and_several_threads_give_the_same_bits(opened: Store, side: Side, how: str) -> None:
    given = (opened, opened.record.training_blocks, RowsConfig(batch_rows=50, run_rows=8), 5, CPU, side)
    plain, reader = BatchReader(*given), BatchReader(*given, resident=how == "resident")
    reader._threads = 3
    for _ in range(2):  # a second time after all was dropped
        with reader:
            for step in (*range(12), 7, 2, 500):
                found, expected = reader.batch(step), plain.batch(step)
                assert torch.equal(found.source, expected.source) and torch.equal(found.target, expected.target)


def test_resident_rows_are_those_of_strata_that_batches_have(synthetic: SyntheticStore) -> None:
    """Position 0 has no row in these batches: no memory is taken for it, nor for a side that is not read."""
    store = Store.open(synthetic.path)
    config, blocks = RowsConfig(batch_rows=50, max_position_0_batch_share=0), store.record.training_blocks
    rows = len(blocks) * sum(s.stratum.rows for s in store.strata.values() if not s.stratum.is_position_0)
    found = ResidentRows(BatchReader(store, blocks, config, 0, CPU, "target"), CPU)
    assert (found.rows, found.bytes) == (rows, rows * 2 * store.record.d_out)


def test_StoreRows_are_read_while_the_thread_reads_ahead(opened: Store) -> None:
    """Both decode into one small folder, and evict what the other needs."""
    blocks = opened.record.report_blocks
    expected = [chunk.source for chunk in StoreRows(opened, 7).chunks(blocks, CPU)]
    plain, reader = (BatchReader(opened, opened.record.training_blocks, RowsConfig(), 0, CPU) for _ in range(2))
    with reader:
        for step in range(8):
            batch = reader.batch(step)
            for found, chunk in zip(StoreRows(opened, 7).chunks(blocks, CPU), expected, strict=True):
                assert torch.equal(found.source, chunk)
            assert torch.equal(batch.source, plain.batch(step).source)


def test_batches_are_read_before_they_are_asked_for_by_one_thread_that_ends(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(synthetic.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), 0, CPU)
    read: Queue[tuple[int, str]] = Queue()
    fill = reader._fill

    def noted(step: int, *rest: range) -> object:
        read.put((step, threading.current_thread().name))
        return fill(step, *rest)

    monkeypatch.setattr(reader, "_fill", noted)
    with reader:
        reader.batch(4)
        assert [read.get(timeout=60) for _ in range(3)] == [(step, "rows_0") for step in (4, 5, 6)]
        reader.batch(5)
        assert read.get(timeout=60) == (7, "rows_0")
        assert reading_threads() == ["rows_0"]
    assert reading_threads() == []
    with pytest.raises(KeyboardInterrupt), reader:
        reader.batch(0)
        raise KeyboardInterrupt
    assert reading_threads() == []
    assert 0 < reader.waited < 60


def test_the_kernel_is_asked_for_every_batch_before_it_is_read(
    synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = Store.open(synthetic.path), list[str]()
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), 0, CPU)
    read = reader.read
    monkeypatch.setattr(reader, "will_need", lambda step: done.append(f"ask {step}"))

    def noted(step: int, *rest: Any) -> Any:
        done.append(f"read {step}")
        return read(step, *rest)

    monkeypatch.setattr(reader, "read", noted)
    for step in (0, 1, 7):
        reader.batch(step)
    twice = [[f"read {step}"] * 2 for step in (0, 1, 7)]
    first, second = [f"ask {step}" for step in (0, 1, 2)], [f"ask {step}" for step in (7, 8, 9)]
    assert done == [*first, *twice[0], "ask 3", *twice[1], *second, *twice[2]]


def first_step(reader: BatchReader, stratum: str, block: int) -> int:
    """The first step with rows of a stratum's block; some steps come before it."""
    found = next(
        step
        for step in range(99)
        if any(s.stratum.name == stratum and low // s.stratum.rows == block for s, low, _, _ in reader.runs(step))
    )
    assert found > 3
    return found


@pytest.mark.parametrize("kind", ["cut", "gone", "packed"])
def test_what_goes_wrong_ahead_is_raised_at_its_step(synthetic: SyntheticStore, tmp_path: Path, kind: str) -> None:
    """A shard that became too short for its rows, one that was removed, and a packed one that does not decode."""
    path = tmp_path / "packed" if kind == "packed" else synthetic.path
    if kind == "packed":
        pack(synthetic.path, path)
    store = Store.open(path, Local(folder=tmp_path / "local") if kind == "packed" else None)
    shard = path / "activations.zarr/strata/001-004/target/c/4/0"
    harm: dict[str, Callable[[], object]] = {
        "cut": lambda: shard.write_bytes(shard.read_bytes()[:2000]),
        "gone": shard.unlink,
        "packed": lambda: flip(shard, 4),
    }
    error, message = {
        "cut": (CorruptData, f"{shard}: 2,000 bytes, its rows take 2,304; repair block 4"),
        "gone": (FileNotFoundError, str(shard)),
        "packed": (CorruptData, f"{shard}: a chunk"),
    }[kind]
    harm[kind]()
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=24, run_rows=8), 7, CPU)
    bad = first_step(reader, "001-004", 4)
    with pytest.raises(error, match=message), reader:
        for step in range(bad + 1):
            reader.batch(step)
    assert step == bad and reading_threads() == []
    with reader:  # again and again, and other steps are as they were
        for _ in range(2):
            with pytest.raises(error, match=message):
                reader.batch(bad)
            reader.batch(bad - 1)


def test_with_the_target_as_source_the_source_is_never_read(synthetic: SyntheticStore) -> None:
    store, config = Store.open(synthetic.path), RowsConfig(batch_rows=50, run_rows=8)
    for stratum in store.strata:
        shutil.rmtree(synthetic.path / f"activations.zarr/strata/{stratum}/source/c")
    reader = BatchReader(store, store.record.training_blocks, config, 5, CPU, "target")
    for step in (0, 7):
        batch = reader.batch(step)
        assert torch.equal(batch.source, torch.from_numpy(expected_batch(synthetic, reader, step, 8, 5)["target"]))
        assert torch.equal(batch.target, batch.source)
    blocks = store.record.report_blocks
    for chunk in StoreRows(store, 10**9, "target").chunks(blocks, CPU):
        rows = store.strata[chunk.stratum].stratum.rows
        expected = synthetic.values(f"strata/{chunk.stratum}/target")[blocks.start * rows : blocks.stop * rows]
        assert torch.equal(chunk.source, torch.from_numpy(expected)) and torch.equal(chunk.target, chunk.source)


def test_StoreRows_are_all_rows_of_their_blocks_in_order(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    for blocks in (store.record.calibration_blocks, store.record.report_blocks):
        chunks = list(StoreRows(store, 7).chunks(blocks, CPU))
        assert max(len(chunk.source) for chunk in chunks) <= 7
        for name, stratum in store.strata.items():
            rows = slice(blocks.start * stratum.stratum.rows, blocks.stop * stratum.stratum.rows)
            for side in ("source", "target"):
                found = torch.cat([getattr(chunk, side) for chunk in chunks if chunk.stratum == name])
                assert torch.equal(found, torch.from_numpy(synthetic.values(f"strata/{name}/{side}")[rows]))


def test_batches_from_python_are_those_of_the_reader_from_any_step_on(synthetic: SyntheticStore) -> None:
    store, rows = Store.open(synthetic.path), RowsConfig(batch_rows=24)
    view = store.excluding(rows.exclusion(store, figures=True))
    reader = BatchReader(view, rows.training_blocks(store), rows, 3, torch.device("cpu"), "target")
    found = list(batches(str(synthetic.path), 5, first=2, seed=3, rows=rows, source="target"))
    assert len(found) == 5
    for step, batch in enumerate(found, 2):
        expected = reader.batch(step)
        assert torch.equal(batch.source, expected.source) and torch.equal(batch.target, expected.target)
        assert batch.strata == expected.strata
    with pytest.raises(UserError, match="rows.blocks = 999"):
        batches(store, 1, rows=RowsConfig(blocks=999))
