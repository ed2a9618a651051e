"""Rows of one byte: what they stand for, how far they are from what was captured, and all that is done with them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import CorruptData
from shared.store import int8_rows
from shared.store.layout import ARRAYS
from shared.store.reader import RowReader, RowsConfig
from shared.store.row_arrays import BLOCK_UNITS, ROW_SCALE
from shared.store.store import Local, Store
from tests.llms import BLOCK_TOKENS, Line, command, contents
from tests.object_server import Bucket
from tests.stores import SIDES, SyntheticStore, decode, encode, make_store, record_as_it_is, stock_array, stock_rows
from tests.test_harvest import check_statistics, plain_rows
from train.data.batches import BatchReader, StoreRows
from train.data.dataset import StoreDataset

GROUP = "strata/004-016"


def hard_rows(n: int = 300, d: int = 40) -> np.ndarray:
    """Rows [n, d] with a large mean, a dimension a thousand times as large, one that is constant, and a sink."""
    rng = np.random.default_rng(0)
    rows = 3 * rng.normal(size=d) + np.exp(rng.normal(size=d)) * rng.normal(size=(n, d))
    rows[:, 7] *= 1000
    rows[:, 11] = 5
    rows[17] *= 500
    return rows.astype(np.float32)


def exact(found: int8_rows.Int8Rows) -> np.ndarray:
    """The numbers in float64."""
    scale, unit, mean = (one.astype(np.float64) for one in (found.row_scale, found.unit, found.mean))
    return found.values.astype(np.float64) * scale[:, None] * unit + mean


def test_no_value_is_more_than_half_a_step_away():
    rows = hard_rows()
    found = int8_rows.encode(rows)
    step = found.row_scale[:, None].astype(np.float64) * found.unit
    rounding = 1e-6 * (np.abs(rows) + np.abs(found.mean) + 127 * step)
    assert (np.abs(exact(found) - rows) <= step / 2 + rounding).all()
    assert (np.abs(found.values).max(axis=1) == 127).all()
    assert (np.abs(found[:] - exact(found)) <= rounding).all()
    np.testing.assert_allclose(found.errors, np.square(found[:].astype(np.float64) - rows).sum(axis=1), rtol=1e-4)


def test_long_rows_and_large_dimensions_take_nothing_from_others():
    rows = hard_rows().astype(np.float64)
    norms, found = np.linalg.norm(rows, axis=1), int8_rows.encode(rows.astype(np.float32))
    kept = norms <= 4 * np.median(norms)
    assert not kept[17]
    deviation, mean = rows[kept].std(axis=0), rows[kept].mean(axis=0)
    deviation[11] = 1e-3 * np.median(deviation)  # the constant one
    np.testing.assert_allclose(found.unit, deviation, rtol=1e-4)
    np.testing.assert_allclose(found.mean, mean, rtol=1e-4, atol=1e-3)
    small = (exact(found) - rows)[kept] / deviation
    assert np.square(small).mean(axis=0).max() < 1e-3  # of each dimension's own variance


def test_constant_and_zero_rows_are_kept():
    same = np.tile(np.linspace(-300, 300, 16, dtype=np.float32), (20, 1))
    for rows in (same, np.zeros((20, 16), np.float32), same[:1]):
        np.testing.assert_allclose(int8_rows.encode(rows)[:], rows, rtol=1e-6)


def test_bfloat16_rows_are_read_as_their_numbers_and_slices_are_of_the_whole():
    bits = encode(hard_rows(), "bfloat16")
    found, other = int8_rows.encode(bits), int8_rows.encode(decode(bits, "bfloat16"))
    assert (found.values == other.values).all() and (found[:] == other[:]).all()
    assert (found[20:50] == found[:][20:50]).all() and found.shape == (300, 40) and len(found) == 300
    chosen = np.arange(300) % 3 == 0
    assert (found.where(chosen)[:] == found[:][chosen]).all()


def test_a_row_that_float32_cannot_hold_in_these_units_does_not_pass_as_finite():
    rows = np.float32(1e-12) * hard_rows()
    rows[17] = 1e30
    assert not np.isfinite(int8_rows.encode(rows)[17:18]).all()


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("int8") / "store", storage="int8", tokenizer=True, histograms=True)


def test_the_formula_beside_the_rows_gives_their_numbers(int8: SyntheticStore) -> None:
    """What whoever opens the array with stock Zarr is told."""
    store = Store.open(int8.path)
    arrays = {name: stock_rows(int8.path, f"{GROUP}/{name}") for name in (*SIDES, ROW_SCALE, BLOCK_UNITS)}
    for side in SIDES:
        formula, where = str(stock_array(int8.path, f"{GROUP}/{side}").attrs["value"]).split(", block = ")
        for row in (0, 200, len(arrays[side]) - 1):
            names = {**arrays, "row": row, "block": eval(where, {"row": row})}
            found = getattr(store.strata["004-016"], side).room(1)
            getattr(store.strata["004-016"], side).read(row, row + 1, found)
            np.testing.assert_array_equal(found[0], eval(formula, names))


def assert_same_rows(store: Store, int8: SyntheticStore) -> None:
    for name, part in store.strata.items():
        per_block = part.stratum.rows
        runs = [(3, 9), (2 * per_block - 4, 2 * per_block + 5), (0, 2), (part.source.rows - 1, part.source.rows)]
        for side in SIDES:
            array, expected = getattr(part, side), int8.values(f"strata/{name}/{side}")
            out = array.room(sum(high - low for low, high in runs))
            array.will_need(runs)
            array.gather(runs, out)
            np.testing.assert_array_equal(out, np.concatenate([expected[low:high] for low, high in runs]))
            size = array.spec.rows_per_shard
            np.testing.assert_array_equal(array.shard(1), expected[size : 2 * size])


def test_runs_within_and_across_blocks(int8: SyntheticStore) -> None:
    assert_same_rows(Store.open(int8.path), int8)


def test_packed_and_in_object_storage(int8: SyntheticStore, bucket: Bucket, tmp_path: Path) -> None:
    assert command("pack", int8.path, tmp_path / "packed").code == 0
    assert command("unpack", tmp_path / "packed", tmp_path / "again").code == 0
    assert contents(tmp_path / "again") == contents(int8.path)
    assert_same_rows(Store.open(tmp_path / "packed", Local(folder=tmp_path / "local")), int8)
    assert_same_rows(Store.open(bucket.upload(int8.path, "cache/store")), int8)


def test_whatever_trains_on_the_rows_gets_the_same_numbers(int8: SyntheticStore) -> None:
    store, config, cpu = Store.open(int8.path), RowsConfig(batch_rows=96, run_rows=8), torch.device("cpu")
    reader = RowReader(store, store.record.training_blocks, config, 0)
    for resident in (False, True):
        with BatchReader(store, store.record.training_blocks, config, 0, cpu, resident=resident) as batches:
            batch = batches.batch(2)
        for stratum, low, high, at in reader.runs(2):
            for side, rows in zip(SIDES, (batch.source, batch.target), strict=True):
                expected = int8.values(f"strata/{stratum.stratum.name}/{side}")[low:high]
                np.testing.assert_array_equal(rows[at : at + high - low].numpy(), expected)
    dataset = next(iter(StoreDataset(store, rows=config, first=2, steps=1)))
    assert dataset.source.dtype == torch.float32 and (dataset.source == batch.source).all()
    held_out = {name: [] for name in store.strata}  # type: dict[str, list[torch.Tensor]]
    for chunk in StoreRows(store).chunks(range(1), cpu):
        held_out[chunk.stratum].append(chunk.target)
    for name, parts in held_out.items():
        expected = int8.values(f"strata/{name}/target")[: store.strata[name].stratum.rows]
        np.testing.assert_array_equal(torch.cat(parts).numpy(), expected)


@pytest.mark.parametrize("array", [ROW_SCALE, BLOCK_UNITS])
def test_a_damaged_scale_is_noticed_by_the_rows(int8: SyntheticStore, tmp_path: Path, array: str) -> None:
    """Where the checksum does not tell: the bit of an exponent, in a block that is trained on."""
    path = tmp_path / "store"
    shutil.copytree(int8.path, path)
    file = path / ARRAYS / f"{GROUP}/{array}/c/3/0"
    data = bytearray(file.read_bytes())
    data[4 * (16 + 24) + 3 if array == BLOCK_UNITS else 3] ^= 0x40  # the first unit, or the first row's scale
    file.write_bytes(data)
    record_as_it_is(path, file)
    with pytest.raises(CorruptData, match="source/c/3/0.*harvest repair"):
        for _ in StoreRows(Store.open(path)).chunks(range(3, 4), torch.device("cpu")):
            pass


@pytest.fixture(scope="module")
def harvested(small: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return command(*small(tmp_path_factory.mktemp("cache"), "--set", "store.storage=int8")).store


def captured(path: Path, model: Path, side: str, stratum: str) -> np.ndarray:
    """What plain transformers gives for the rows of a stratum, rounded to bfloat16, in float64."""
    store = Store.open(path)
    rows = plain_rows(model, store.request.layer, stock_rows(path, "tokens"), store.request.batch_sequences, "float32")
    at = stock_rows(path, f"strata/{stratum}/sequence"), stock_rows(path, f"strata/{stratum}/position")
    return decode(encode(rows[side][at], "bfloat16"), "bfloat16").astype(np.float64)


def test_a_harvest_keeps_rows_within_half_a_step_and_says_what_is_lost(harvested: Path, model: Path) -> None:
    store = Store.open(harvested)
    check_statistics(store)
    floors = store.record.storage_floor
    assert floors
    for side in SIDES:
        error = variance = 0.0
        for name, part in store.strata.items():
            array, rows = getattr(part, side), part.stratum.rows
            found, wanted = array.room(array.rows), captured(harvested, model, side, name)
            array.read(0, array.rows, found)
            units = stock_rows(harvested, f"strata/{name}/{BLOCK_UNITS}")
            units = units[:, : store.record.d_in] if side == "source" else units[:, store.record.d_in :]
            scale = stock_rows(harvested, f"strata/{name}/{ROW_SCALE}")[:, SIDES.index(side)]
            step = scale[:, None] * np.repeat(units[1::2], rows, axis=0)
            assert (np.abs(found - wanted) <= 0.5 * step + 1e-6 * (np.abs(wanted) + 127 * step)).all()
            if name == "000-001":
                continue
            weight = part.stratum.natural_rows / rows
            for low in range(store.request.held_out_blocks * rows, array.rows, rows):
                block, back = wanted[low : low + rows], found[low : low + rows].astype(np.float64)
                error += weight * np.square(back - block).sum()
                variance += weight * np.square(back - back.mean(axis=0)).sum()
        assert getattr(floors, side) == pytest.approx(error / variance, rel=1e-4)
        assert 1e-6 < getattr(floors, side) < 1e-3


def test_info_and_verify(harvested: Path, model: Path) -> None:
    shown = command("info", harvested)
    assert "int8 took" in shown.out and "At most 0.1%: yes" in shown.out
    assert json.loads(command("info", harvested, "--json").out)["storage_floor"].keys() == set(SIDES)
    assert "context 32, int8" in command("ls", "--cache", harvested.parent).out
    found = command("verify", harvested, "--against-model", 60, "--model", model)
    assert found.code == 0, found.err
    assert "60 equal bit for bit" in found.out


def test_rows_that_lose_too_much_are_warned_of(small: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harvest.writer.int8_blocks.MOST_LOST", 1e-6)
    done = command(*small(tmp_path, "--set", "store.storage=int8"))
    assert done.code == 0
    assert [line for line in done.err.splitlines() if "of the variance of the target rows" in line]
    monkeypatch.setattr("harvest.commands.describe.MOST_LOST", 1e-6)
    assert "NO" in command("info", done.store).out


@pytest.mark.fault(1, 18)
def test_what_is_missing_or_damaged_is_made_again_byte_for_byte(
    small: Line, harvested: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / harvested.name
    shutil.copytree(harvested, path)
    for name in ("ledger/000003.json", "ledger/000004.json", "store.json", f"{ARRAYS}/{GROUP}/{ROW_SCALE}/c/4/0"):
        (path / name).unlink()
    assert command(*small(tmp_path, "--set", "store.storage=int8")).store == path
    assert contents(path) == contents(harvested)
    for array, block in ((ROW_SCALE, 1), (BLOCK_UNITS, 2)):
        file = path / ARRAYS / f"{GROUP}/{array}/c/{block}/0"
        file.write_bytes(file.read_bytes()[::-1])
    assert len(command("verify", path).out.splitlines()) == 2
    assert command("repair", path, "--model", model, "--text", text).out == "made again: blocks 1, 2\n"
    assert contents(path) == contents(harvested)


def test_extending_leaves_the_rows_that_are_there(small: Line, harvested: Path, tmp_path: Path) -> None:
    path = tmp_path / harvested.name
    shutil.copytree(harvested, path)
    again = command(*small(tmp_path, "--set", "store.storage=int8", tokens=4 * BLOCK_TOKENS))
    assert again.store == path and Store.open(path).record.blocks == 6
    before, after = contents(harvested), contents(path)
    assert all(after[name] == before[name] for name in before if "/strata/" in name and "/c/" in name)
    assert Store.open(path).record.storage_floor


def test_a_plan_has_the_bytes_of_a_harvest(small: Line, harvested: Path, tmp_path: Path) -> None:
    arguments = small(tmp_path, "--set", "store.storage=int8")[1:]
    planned = json.loads(command("plan", *arguments, "--json").out)
    assert planned["stores"][0]["shard_bytes"] == Store.open(harvested).shard_bytes


def test_imported_pairs(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(3), tmp_path / "rows"
    folder.mkdir()
    rows = {side: rng.normal(size=(64, 16, 12)).astype(np.float32) for side in SIDES}
    for side, values in rows.items():
        np.save(folder / f"{side}.npy", values)
    small = ("--set", "store.block_sequences=16", "--set", "store.storage=int8")
    done = command("import", folder, "--format", "npy", "--cache", tmp_path / "cache", *small)
    assert done.code == 0, done.err
    store = Store.open(done.store)
    floors = store.record.storage_floor
    assert floors and 1e-6 < floors.source < 1e-3 and 1e-6 < floors.target < 1e-3
    part = store.strata["004-016"]
    found, at = part.target.room(part.target.rows), []
    part.target.read(0, part.target.rows, found)
    for array in (part.sequence, part.offset):
        at.append(array.room(array.rows))
        array.read(0, array.rows, at[-1])
    windows = store.documents.room(store.documents.rows)
    store.documents.read(0, store.documents.rows, windows)
    wanted = rows["target"][windows[at[0], 0], at[1]]
    np.testing.assert_allclose(found, wanted, atol=0.05)
    assert np.square(found - wanted).mean() < 1e-3
