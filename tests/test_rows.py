"""`batch(step)` against a naive stream, and the mixture's counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import UserError
from shared.keyed import permutation
from shared.store import Store
from shared.strata import Stratum
from tests.stores import SyntheticStore, make_store
from train.rows import BatchReader, RowsConfig, RowStream, held_out_rows, rows_per_stratum

CPU = torch.device("cpu")


def strata(*natural: int) -> list[Stratum]:
    return [Stratum(start=i, stop=i + 1, natural_rows=n, rows=n) for i, n in enumerate(natural)]


@pytest.mark.parametrize(
    ("natural", "settings", "expected"),
    [
        ((256, 768, 3072, 12288, 49152), {"batch_rows": 1024}, [4, 12, 48, 192, 768]),
        ((256, 768, 3072, 12288, 49152), {"batch_rows": 1024, "max_bos_batch_share": 0.001}, [1, 12, 48, 193, 770]),
        ((256, 768, 3072, 12288, 49152), {"batch_rows": 1024, "max_bos_batch_share": 0}, [0, 12, 48, 193, 771]),
        ((100, 100, 100), {"batch_rows": 10, "alpha": 0, "max_bos_batch_share": 1}, [4, 3, 3]),
        ((100, 900), {"batch_rows": 10, "alpha": 0.5, "max_bos_batch_share": 0.2}, [2, 8]),
        ((100,), {"batch_rows": 7, "max_bos_batch_share": 1}, [7]),
    ],
)
def test_a_batch_has_exact_counts_per_stratum(natural: tuple[int, ...], settings: dict, expected: list[int]) -> None:
    assert rows_per_stratum(strata(*natural), RowsConfig(**settings)) == expected


def test_a_cap_on_the_only_stratum_is_a_users_error() -> None:
    with pytest.raises(UserError, match="max_bos_batch_share"):
        rows_per_stratum(strata(100), RowsConfig(batch_rows=10, max_bos_batch_share=0.5))


def naive_stream(rows: int, run: int, epochs: int, *key: int | str) -> list[int]:
    """All rows of the first epochs, one by one."""
    runs = [list(range(low, min(low + run, rows))) for low in range(0, rows, run)]
    return [row for epoch in range(epochs) for i in permutation(len(runs), *key, epoch) for row in runs[i]]


@pytest.mark.parametrize(("rows", "run"), [(64, 8), (61, 8), (5, 64), (1, 1), (129, 64), (7, 1)])
def test_a_stream_is_a_keyed_permutation_of_runs_per_epoch(rows: int, run: int) -> None:
    stream, expected = RowStream(rows, run, "k", 1), naive_stream(rows, min(run, rows), 4, "k", 1)
    found = [row for low, high in stream.runs(0, 3 * rows) for row in range(low, high)]
    assert found == expected[: 3 * rows]
    assert sorted(found[:rows]) == sorted(found[rows : 2 * rows]) == list(range(rows))
    for start in range(2 * rows):  # every position, in any order of asking
        count = min(11, rows)
        assert [r for a, b in stream.runs(start, count) for r in range(a, b)] == expected[start : start + count]


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
    last = max(high for step in range(20) for _, _, high, _ in pinned._runs(step))
    assert last == (blocks.start + 1) * max(s.rows for s in store.record.plan.stored_strata)


def test_epochs_count_how_often_rows_were_seen(synthetic: SyntheticStore) -> None:
    store = Store.open(synthetic.path)
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=32), seed=0, device=CPU)
    rows = {name: 3 * s.stratum.rows for name, s in store.strata.items()}
    counts = dict(zip(rows, reader.counts, strict=True))
    assert reader.epochs(30) == {name: 30 * counts[name] / rows[name] for name in rows}


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
