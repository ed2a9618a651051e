"""`batch(step)` as tensors against a naive stream."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.reader import RowsConfig
from shared.store import Store
from tests.stores import SyntheticStore, make_store
from tests.test_reader import naive_stream
from train.rows import BatchReader, held_out_rows

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
    pinned = BatchReader(store, range(blocks.start, blocks.start + 1), config, 1, CPU)
    last = max(high for step in range(20) for _, _, high, _ in pinned.runs(step))
    assert last == (blocks.start + 1) * max(s.rows for s in store.record.plan.stored_strata)


def test_epochs_count_how_often_rows_were_seen(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), seed=0, device=CPU)
    rows = {name: 3 * s.stratum.rows for name, s in store.strata.items()}
    counts = dict(zip(rows, reader.counts, strict=True))
    assert reader.epochs(30) == {name: 30 * counts[name] / rows[name] for name in rows}


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
    for chunk in held_out_rows(store, blocks, 10**9, CPU, "target"):
        rows = store.strata[chunk.stratum].stratum.rows
        expected = synthetic.values(f"strata/{chunk.stratum}/target")[blocks.start * rows : blocks.stop * rows]
        assert torch.equal(chunk.source, torch.from_numpy(expected)) and torch.equal(chunk.target, chunk.source)


def test_held_out_rows_are_all_rows_of_their_blocks_in_order(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    for blocks in (store.record.calibration_blocks, store.record.report_blocks):
        chunks = list(held_out_rows(store, blocks, 7, CPU))
        assert max(len(chunk.source) for chunk in chunks) <= 7
        for name, stratum in store.strata.items():
            rows = slice(blocks.start * stratum.stratum.rows, blocks.stop * stratum.stratum.rows)
            for side in ("source", "target"):
                found = torch.cat([getattr(chunk, side) for chunk in chunks if chunk.stratum == name])
                assert torch.equal(found, torch.from_numpy(synthetic.values(f"strata/{name}/{side}")[rows]))
