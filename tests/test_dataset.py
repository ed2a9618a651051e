"""The torch data set: the same batches as a run's, whoever reads them, each row once per epoch."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from shared.errors import CorruptData, UserError
from shared.store.reader import RowsConfig
from shared.store.store import Store
from tests.stores import SyntheticStore, make_store
from train import StoreDataset, batches
from train.data.dataset import TaggedRows

ROWS = RowsConfig(batch_rows=96, run_rows=8)
SHARED = [(workers, processes) for workers in (1, 2, 3) for processes in (1, 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("dataset") / "store", training_blocks=3, sinks={7: 30.0})


def read(dataset: StoreDataset, workers: int = 0) -> list[TaggedRows]:
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


def same(a: Sequence[TaggedRows], b: Sequence[TaggedRows]) -> bool:
    assert len(a) == len(b)
    return all(
        torch.equal(x, y) for one, other in zip(a, b, strict=True)
        for x, y in zip((*one[:2], *one.tags), (*other[:2], *other.tags), strict=True)
    )  # fmt: skip


def of_processes(monkeypatch: pytest.MonkeyPatch, dataset: StoreDataset, workers: int, processes: int):
    """Every process's batches, as if torch.distributed had started so many."""
    found = []
    for rank in range(processes):
        monkeypatch.setattr("train.data.dataset._process", lambda rank=rank: (rank, processes))
        found.append(read(dataset, workers))
    return found


def keys(batch: TaggedRows) -> list[tuple[int, int, int]]:
    tags = batch.tags
    return list(zip(tags.stratum.tolist(), tags.sequence.tolist(), tags.offset.tolist(), strict=True))


def test_batches_are_those_that_a_run_trains_on(store: SyntheticStore) -> None:
    found = read(StoreDataset(store.path, rows=ROWS, seed=3, steps=5))
    for batch, expected in zip(found, batches(store.path, 5, seed=3, rows=ROWS), strict=True):
        assert torch.equal(batch.source, expected.source) and torch.equal(batch.target, expected.target)
        assert batch.source.dtype == torch.float32


def test_tags_say_where_a_row_is_from(store: SyntheticStore) -> None:
    dataset = StoreDataset(store.path, rows=ROWS, steps=3)
    for batch in read(dataset):
        for i, (stratum, sequence, offset) in enumerate(keys(batch)):
            folder = f"strata/{dataset.strata[stratum]}"
            places = (store.arrays[f"{folder}/sequence"] == sequence) & (store.arrays[f"{folder}/offset"] == offset)
            (row,) = np.flatnonzero(places)
            assert store.arrays[f"{folder}/position"][row] == batch.tags.position[i] == offset
            assert (store.values(f"{folder}/source")[row] == batch.source[i].numpy()).all()
            assert (store.values(f"{folder}/target")[row] == batch.target[i].numpy()).all()


@pytest.mark.parametrize(("workers", "processes"), SHARED)
def test_each_row_comes_once_in_an_epoch_over_workers_and_processes(
    store: SyntheticStore, monkeypatch: pytest.MonkeyPatch, workers: int, processes: int
) -> None:
    """Counted by hand: the training blocks' rows, less position 0 and rows over ten times the median norm."""
    dataset = StoreDataset(store.path, rows=ROWS)
    steps = -(-dataset.steps_per_epoch // processes) * processes
    dataset = StoreDataset(store.path, rows=ROWS, steps=steps)
    alone, ranks = read(dataset), of_processes(monkeypatch, dataset, workers, processes)
    assert all(same(found, alone[rank::processes]) for rank, found in enumerate(ranks))
    in_order = [ranks[step % processes][step // processes] for step in range(steps)]
    drawn: dict[int, list[tuple[int, int, int]]] = {}
    for batch in in_order:
        for key in keys(batch):
            drawn.setdefault(key[0], []).append(key)
    expected = wanted_rows(store, dataset)
    assert {stratum for stratum in expected if expected[stratum]} == set(drawn)
    for stratum, rows in drawn.items():
        epoch = len(expected[stratum])
        assert Counter(rows[:epoch]) == Counter(expected[stratum])
        assert max(Counter(rows).values()) <= 2


def wanted_rows(store: SyntheticStore, dataset: StoreDataset) -> dict[int, list[tuple[int, int, int]]]:
    medians = {
        side: getattr(store.record.overall, side).norm_quantiles["0.5"] for side in ("source", "target")
    }  # fmt: skip
    first = store.record.request.held_out_blocks * store.record.request.block_sequences
    found: dict[int, list[tuple[int, int, int]]] = {}
    for number, name in enumerate(dataset.strata):
        arrays = {part: store.arrays[f"strata/{name}/{part}"] for part in ("sequence", "offset")}
        norms = {side: np.linalg.norm(store.values(f"strata/{name}/{side}"), axis=1) for side in medians}
        kept = (arrays["sequence"] >= first) & (name != "000-001")
        for side, median in medians.items():
            kept &= norms[side] <= 10 * median
        rows = zip(arrays["sequence"][kept].tolist(), arrays["offset"][kept].tolist(), strict=True)
        found[number] = [(number, sequence, offset) for sequence, offset in rows]
    assert any(len(rows) % 8 for rows in found.values()), "no outlier makes an epoch uneven"
    return found


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (3, 2)])
def test_it_resumes_from_a_step(
    store: SyntheticStore, monkeypatch: pytest.MonkeyPatch, workers: int, processes: int
) -> None:
    whole, rest = (StoreDataset(store.path, rows=ROWS, first=first, steps=12 - first) for first in (0, 4))
    all_ = of_processes(monkeypatch, whole, workers, processes)
    for before, after in zip(all_, of_processes(monkeypatch, rest, workers, processes), strict=True):
        assert same(before[4 // processes :], after)


def test_rows_keep_the_stores_dtype_without_a_conversion(store: SyntheticStore) -> None:
    (plain,), (half,) = (
        read(StoreDataset(store.path, rows=ROWS, steps=1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.source.dtype == half.target.dtype == torch.bfloat16
    assert torch.equal(half.source.float(), plain.source) and torch.equal(half.target.float(), plain.target)


def test_batches_of_an_iteration_are_not_overwritten(store: SyntheticStore) -> None:
    dataset = StoreDataset(store.path, rows=ROWS, steps=6)
    kept = [batch.source for batch in dataset]
    assert all(torch.equal(a, b.source) for a, b in zip(kept, read(dataset), strict=True))


def test_held_out_rows_on_demand(store: SyntheticStore) -> None:
    record = Store.open(store.path).record
    dataset = StoreDataset(store.path, rows=ROWS, steps=4, blocks=record.report_blocks)
    size = record.request.block_sequences
    wanted = {sequence for block in record.report_blocks for sequence in range(block * size, (block + 1) * size)}
    assert {key[1] for batch in read(dataset) for key in keys(batch)} <= wanted


def test_a_worker_that_is_not_forked_knows_its_process(store: SyntheticStore, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = StoreDataset(store.path, rows=ROWS, steps=4)
    alone = read(dataset)
    monkeypatch.setattr("train.data.dataset._process", lambda: (1, 2))
    there = pickle.dumps(dataset)
    monkeypatch.undo()
    assert same(read(pickle.loads(there)), alone[1::2])


def test_wrong_input_is_one_error(store: SyntheticStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="blocks are range"):
        StoreDataset(store.path, blocks=range(3, 9))
    with pytest.raises(UserError, match="cannot be negative|neither can be negative"):
        StoreDataset(store.path, first=-1)
    with pytest.raises(UserError):
        StoreDataset(tmp_path / "none")
    monkeypatch.setattr("train.data.dataset._process", lambda: (0, 2))
    with pytest.raises(UserError, match="5 steps cannot be shared evenly by 2 processes"):
        next(iter(StoreDataset(store.path, rows=ROWS, steps=5)))


def test_processes_of_torch_distributed_are_found(store: SyntheticStore, tmp_path: Path) -> None:
    """Two real processes, each with two workers that are not forked."""
    line = [sys.executable, "-m", "tests.test_dataset", str(store.path), str(tmp_path)]
    root = Path(__file__).parents[1]
    started = [subprocess.Popen([*line, str(rank)], cwd=root) for rank in range(2)]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    alone = read(StoreDataset(store.path, rows=ROWS, steps=4))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == 2 and all(torch.equal(a, b.target) for a, b in zip(found, alone[rank::2], strict=True))


def one_process(path: str, folder: str, rank: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=int(rank), world_size=2)
    loader = DataLoader(
        StoreDataset(path, rows=ROWS, steps=4), batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    torch.save([batch.target for batch in loader], Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_row_is_named(tmp_path: Path, workers: int) -> None:
    made = make_store(tmp_path / "store", training_blocks=1)
    dataset = StoreDataset(made.path, rows=ROWS)
    dataset = StoreDataset(made.path, rows=ROWS, steps=dataset.steps_per_epoch)
    (path,) = (made.path / "activations.zarr/strata/004-016/target/c/2").iterdir()
    with open(path, "r+b") as file:
        file.seek(2 * 24 * 5)
        file.write(np.full(24, 0x7F80, np.uint16).tobytes())
        os.fsync(file.fileno())
    with pytest.raises(CorruptData, match="row 5 is not finite; repair block 2"):
        read(dataset, workers)


if __name__ == "__main__":
    one_process(*sys.argv[1:])
