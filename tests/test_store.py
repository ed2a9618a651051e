"""What `Store.open` and `Store.verify` catch in shard files, and that what they let through reads exactly."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shared.errors import CorruptData
from shared.store import arrays, layout
from shared.store.checks import buffers_record, fault, file_crc32c, read_store_record
from shared.store.mapped_array import RowArray
from shared.store.store import Store
from tests.stores import SyntheticStore, cut, faults, flip, make_store

SOURCE = "strata/004-016/source"
STATISTICS = layout.statistics_path(5)
SHARD = f"{layout.ARRAYS}/{SOURCE}/c/1/0"
SHARDS = [SHARD, "activations.zarr/tokens/c/4/0", "activations.zarr/strata/000-001/position/c/0"]


def read(array: RowArray, start: int, stop: int) -> np.ndarray:
    shape = (stop - start,) if array.spec.width is None else (stop - start, array.spec.width)
    out = np.full(shape, 77, array.spec.dtype)
    array.read(start, stop, out)
    return out


# A sound store


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_every_row_is_read_as_it_was_written(tmp_path, storage):
    made = make_store(tmp_path / "s", storage=storage, keep={0: 0.5, 4: 0.5}, held_out_blocks=1)
    store = Store.open(made.path)
    assert list(store.strata) == ["000-001", "001-004", "004-016", "016-032"]
    seen = {"tokens": store.tokens, "documents": store.documents}
    for name, rows in store.strata.items():
        assert rows.stratum.name == name
        for part in ("source", "target", "position", "sequence", "offset"):
            seen[f"strata/{name}/{part}"] = getattr(rows, part)
    assert sorted(seen) == sorted(made.arrays)
    for name, array in seen.items():
        assert array.rows == len(made.arrays[name])
        assert read(array, 0, array.rows).tobytes() == made.arrays[name].tobytes()


def test_rows_belong_to_their_tokens(pristine):
    """Position and sequence of a row lead to its token; position 0 is one and the same row."""
    store = Store.open(pristine.path)
    tokens = read(store.tokens, 0, store.tokens.rows)
    for rows in store.strata.values():
        position, sequence = (read(a, 0, a.rows).astype(int) for a in (rows.position, rows.sequence))
        assert ((rows.stratum.start <= position) & (position < rows.stratum.stop)).all()
        assert ((tokens[sequence, position] == 0) == (position == 0)).all()
    bos = pristine.values("strata/000-001/source")
    assert (bos == bos[0]).all()


def test_the_context_of_a_row_is_the_window_that_it_is_from(pristine):
    store = Store.open(pristine.path)
    name, row = "001-004", 5
    window, place = store.context_of(name, row)
    part = store.strata[name]
    sequence = int(read(part.sequence, row, row + 1)[0])
    assert place == int(read(part.offset, row, row + 1)[0])
    assert window.tolist() == read(store.tokens, sequence, sequence + 1)[0].tolist()
    rows = store.record.blocks * part.stratum.rows
    with pytest.raises(IndexError, match=f"stratum 001-004 has {rows:,} rows, not row {rows}"):
        store.context_of(name, rows)


@pytest.fixture(scope="module")
def cut_store(tmp_path_factory) -> SyntheticStore:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "MAX_SHARD_BYTES", 2**13)
        path = tmp_path_factory.mktemp("cut") / "s"
        return make_store(path, context_size=19, edges=(0, 1, 4, 16), block_sequences=256, training_blocks=2)


@pytest.fixture
def small_shards(cut_store, monkeypatch) -> SyntheticStore:
    """Three shard files per block of the last stratum's source."""
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", 2**13)
    return cut_store


def test_reads_across_shard_borders(small_shards):
    store = Store.open(small_shards.path)
    array, expected = store.strata["016-019"].source, small_shards.arrays["strata/016-019/source"]
    size = array.spec.rows_per_shard
    assert (size, array.spec.shards_per_block, array.rows) == (256, 3, 3072)
    for start in [0, 1, size - 1, size, size + 1, 3 * size - 1, 5 * size + 100, array.rows - 1]:
        for length in [0, 1, 2, size - 1, size, size + 1, 2 * size + 2, 700]:
            stop = min(start + length, array.rows)
            assert (read(array, start, stop) == expected[start:stop]).all(), (start, stop)
    assert (array.shard(7) == expected[7 * size : 8 * size]).all()


def test_reading_touches_only_the_rows_asked_for(small_shards):
    array = Store.open(small_shards.path).strata["016-019"].source
    out = np.full((10, array.spec.width or 0), 7, array.spec.dtype)
    array.read(250, 256, out)
    assert (out[:6] == small_shards.arrays["strata/016-019/source"][250:256]).all()
    assert (out[6:] == 7).all()


def test_reading_ahead_is_only_advice(small_shards):
    store = Store.open(small_shards.path)
    for rows in store.strata.values():
        for array in (rows.source, rows.position):
            for start, stop in [(0, 1), (0, array.rows), (array.rows - 1, array.rows), (3, min(900, array.rows))]:
                array.will_need([(start, stop)])


def test_the_oldest_maps_of_shard_files_go_for_new_ones(pristine, monkeypatch):
    """Linux has a limit on maps, and a store of a billion tokens has more shard files than that."""
    monkeypatch.setattr("shared.store.mapped_array.MOST_MAPS", 3)
    store = Store.open(pristine.path)
    for name in 2 * ["strata/001-004/source", "strata/004-016/source", "strata/004-016/target"]:
        array, rows = getattr(store.strata[name.split("/")[1]], name.split("/")[2]), pristine.arrays[name]
        array.will_need([(0, array.rows)])
        assert read(array, 0, array.rows).tobytes() == rows.tobytes()
        for shard in range(array.rows // array.spec.rows_per_shard):
            assert (
                array.shard(shard).tobytes() == np.split(rows, array.rows // array.spec.rows_per_shard)[shard].tobytes()
            )
            mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(pristine.path) in line]
            assert 0 < len(mapped) <= 3


def test_mapped_rows_cannot_be_written(pristine):
    shard = Store.open(pristine.path).strata["004-016"].source.shard(0)
    with pytest.raises(ValueError, match="read-only"):
        shard[0, 0] = 1


def test_verify_reads_every_file_of_a_sound_store(pristine):
    results = dict(Store.open(pristine.path).verify())
    assert set(results.values()) == {None}
    below = {str(path.relative_to(pristine.path)) for path in pristine.path.rglob("*") if path.is_file()}
    records = {"store.json", "plan.json", "request.json"} | {layout.record_path(block) for block in range(5)}
    assert set(results) == {name for name in below - records if not name.endswith("zarr.json")}


def test_block_ranges(pristine):
    record = Store.open(pristine.path).record
    assert (record.calibration_blocks, record.report_blocks, record.training_blocks) == (
        range(0, 1),
        range(1, 2),
        range(2, 5),
    )


def test_statistics_are_those_of_the_training_rows(pristine):
    store = Store.open(pristine.path)
    first = store.request.held_out_blocks
    assert list(store.statistics) == ["overall", *(s.name for s in store.record.plan.stored_strata)]
    for stratum in store.record.plan.stored_strata:
        for side in ("source", "target"):
            rows = pristine.values(f"strata/{stratum.name}/{side}")[first * stratum.rows :].astype(np.float64)
            found = store.statistics[stratum.name][side]
            np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(found.variance, rows.var(axis=0), rtol=1e-6, atol=1e-6)
    parts = [pristine.values(f"strata/{s.name}/target")[first * s.rows :] for s in store.record.plan.stored_strata[1:]]
    everything = np.concatenate(parts).astype(np.float64)  # nothing dropped: natural frequencies are the stored ones
    np.testing.assert_allclose(store.statistics["overall"]["target"].mean, everything.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(store.statistics["overall"]["target"].variance, everything.var(axis=0), rtol=1e-5)


def test_opening_does_not_read_rows_or_import_torch(pristine):
    """Opening a terabyte must not take a pass over it: only footers and records are read."""
    import subprocess
    import sys

    code = f"""
import sys
from pathlib import Path
from shared.store.store import Store
store = Store.open(Path({str(pristine.path)!r}))
assert not any("maps" in k and v for k, v in vars(store.strata["004-016"].source).items()), "mapped at open"
assert "torch" not in sys.modules
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert done.returncode == 0, done.stderr


def test_a_store_can_be_moved(synthetic, tmp_path):
    moved = shutil.move(synthetic.path, tmp_path / "elsewhere")
    assert faults(Path(moved)) == {}


# Damaged shard files


def empty(path: Path) -> None:
    path.write_bytes(b"")


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_index(path: Path) -> None:
    flip(path, -6)


def flip_crc(path: Path) -> None:
    flip(path, -1)


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to(path.with_name("moved"))


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "{less} bytes, expected {size}"),
        (empty, "0 bytes, expected {size}"),
        (extend, "{more} bytes, expected {size}"),
        (flip_index, "its index does not match its layout"),
        (flip_crc, "its index does not match its layout"),
        (Path.unlink, "is missing"),
        (link, "is a symbolic link; take another copy"),
    ],
)
@pytest.mark.parametrize("name", SHARDS)
def test_open_catches_a_damaged_shard_and_names_it(synthetic, damage, message, name):
    size = (synthetic.path / name).stat().st_size
    damage(synthetic.path / name)
    with pytest.raises(CorruptData) as error:
        Store.open(synthetic.path)
    assert str(synthetic.path / name) in str(error.value)
    assert message.format(size=f"{size:,}", less=f"{size - 1:,}", more=f"{size + 1:,}") in str(error.value)


@pytest.mark.fault(18)
def test_the_error_says_which_block_to_harvest_again(synthetic):
    cut(synthetic.path / SHARD)
    with pytest.raises(CorruptData, match="repair block 1: harvest repair"):
        Store.open(synthetic.path)


@pytest.mark.fault(18)
@pytest.mark.parametrize("offset", [0, 100, 6143])
def test_only_verify_catches_a_flipped_bit_in_the_rows(synthetic, offset):
    before = file_crc32c(synthetic.path / SHARD)
    flip(synthetic.path / SHARD, offset)
    after = file_crc32c(synthetic.path / SHARD)
    assert faults(synthetic.path) == {SHARD: f"crc32c {after}, ledger says {before}"}


@pytest.mark.fault(18)
def test_only_verify_catches_swapped_shards(synthetic):
    first, second = synthetic.path / SHARD, (synthetic.path / SHARD).parent.parent / "3" / "0"
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    assert sorted(faults(synthetic.path)) == [SHARD, SHARD.replace("/1/0", "/3/0")]


@pytest.mark.fault(18)
def test_only_verify_catches_flipped_tokens_and_moments(synthetic):
    names = ["activations.zarr/tokens/c/2/0", layout.moments_path(3)]
    for name in names:
        flip(synthetic.path / name, (synthetic.path / name).stat().st_size // 2)
    assert sorted(faults(synthetic.path)) == sorted(names)


@pytest.mark.fault(18)
def test_verify_names_several_faults_at_once_and_goes_on(synthetic):
    store = Store.open(synthetic.path)
    flip(synthetic.path / SHARD, 5)
    (synthetic.path / layout.moments_path(0)).unlink()
    cut(synthetic.path / "activations.zarr/tokens/c/0/0")
    results = list(store.verify())
    wrong = {name: why for name, why in results if why}
    assert sorted(wrong) == sorted([SHARD, layout.moments_path(0), "activations.zarr/tokens/c/0/0"])
    assert wrong[layout.moments_path(0)] == "missing"
    assert wrong["activations.zarr/tokens/c/0/0"] == "2,067 bytes, ledger says 2,068"
    assert len(results) == len(dict(results)) > 80


@pytest.mark.fault(18)
def test_verify_names_a_missing_ledger_record(synthetic):
    (synthetic.path / layout.record_path(2)).unlink()
    with pytest.raises(CorruptData, match=r"ledger/000002.json is missing; repair block 2"):
        Store.open(synthetic.path)
    store = Store(synthetic.path, read_store_record(synthetic.path))
    wrong = {name: why for name, why in store.verify() if why}
    assert list(wrong) == [layout.record_path(2)]
    assert wrong[layout.record_path(2)].endswith("000002.json is missing; run the same harvest to make block 2 again")


# Checksums


def test_a_record_of_buffers_is_the_record_of_their_file(tmp_path):
    rows = np.arange(3_000_000, dtype=np.uint16).reshape(-1, 6)
    record = buffers_record([rows, b"footer"])
    (tmp_path / "f").write_bytes(rows.tobytes() + b"footer")
    assert (record.bytes, record.crc32c) == (6_000_006, file_crc32c(tmp_path / "f"))
    assert fault(tmp_path / "f", record) is None
    assert rows.flags.writeable


def test_a_known_checksum(tmp_path):
    (tmp_path / "f").write_bytes(b"123456789")
    assert file_crc32c(tmp_path / "f") == "e3069283"
    (tmp_path / "empty").write_bytes(b"")
    assert file_crc32c(tmp_path / "empty") == "00000000"
