"""Packed stores: bit for bit both ways, read by stock zarr and by training, and what damage comes to."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from shared.errors import CorruptData, UserError
from shared.store import packed
from shared.store.layout import ARRAYS, PACKED, STORE
from shared.store.packed import LocalFolder, pack_shard, unpack_shard
from shared.store.store import Local, Store
from tests.llms import ROOT, command, contents, edit_json, start
from tests.stores import SyntheticStore, make_store, stock_rows

SHARD = f"{ARRAYS}/strata/004-016/source/c/3/0"


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    path = tmp_path_factory.mktemp("raw") / "store"
    return make_store(path, block_sequences=64, context_size=32, tokenizer=True)


@pytest.fixture
def pair(raw: SyntheticStore, tmp_path: Path) -> tuple[Path, Path]:
    """A raw store and it packed."""
    assert command("pack", raw.path, tmp_path / "packed").out == f"{tmp_path / 'packed'}\n"
    return raw.path, tmp_path / "packed"


def test_unpacking_gives_back_every_byte(pair: tuple[Path, Path], tmp_path: Path) -> None:
    raw_path, path = pair
    assert command("unpack", path, tmp_path / "again").out == f"{tmp_path / 'again'}\n"
    assert contents(tmp_path / "again") == contents(raw_path)
    assert sum(map(len, contents(path).values())) < sum(map(len, contents(raw_path).values()))
    command("pack", raw_path, tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(path)


def test_stock_zarr_reads_a_packed_store(raw: SyntheticStore, pair: tuple[Path, Path]) -> None:
    for name, rows in raw.arrays.items():
        assert (stock_rows(pair[1], name) == rows).all()
    assert json.loads(command("verify", pair[1], "--json").out)["faults"] == []
    assert "packed: " in command("info", pair[1]).out


@pytest.mark.parametrize("most", [1, 200_000, 2**30])
def test_rows_are_those_of_the_raw_store_whatever_the_bound(pair: tuple[Path, Path], tmp_path: Path, most: int) -> None:
    theirs, ours = Store.open(pair[0]), Store.open(pair[1], Local(folder=tmp_path / "local", bytes=most))
    largest = max(spec.payload_bytes for spec in ours.arrays())
    rng = np.random.default_rng(0)
    for _ in range(300):
        name = rng.choice(list(theirs.strata))
        side = rng.choice(["source", "target", "position"])
        a, b = (getattr(store.strata[name], side) for store in (theirs, ours))
        low = int(rng.integers(0, a.rows - 1))
        high = min(a.rows, low + int(rng.integers(1, 200)))
        shape = (high - low, *([a.spec.width] if a.spec.width else []))
        found, expected = np.zeros(shape, a.spec.dtype), np.zeros(shape, a.spec.dtype)
        a.read(low, high, expected)
        b.read(low, high, found)
        assert (found == expected).all()
        local = ours._local
        assert isinstance(local, LocalFolder)
        assert local.bytes <= max(most, largest)
        files = [file for file in local.folder.rglob("*") if file.is_file()]
        assert sum(file.stat().st_blocks * 512 for file in files) <= local.bytes + 4096 * len(files)
    assert local is not None and (local.evicted > 0) == (most < 2**30)


def test_a_disk_without_room_for_unpacked_rows_is_named_before_any_is_read(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.files.durable.free_bytes", lambda _: 99_999)
    small = Store.open(pair[1], Local(folder=tmp_path / "local", bytes=90_000))
    assert small.strata["004-016"].source.shard(0).any()
    with pytest.raises(
        UserError, match=r"no room for unpacked rows \(--local-folder, --local-bytes\).* 99,999 are free"
    ):
        _ = Store.open(pair[1], Local(folder=tmp_path / "local", bytes=10**6)).strata


def test_what_a_killed_process_left_is_removed_before_room_is_measured(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    litter = tmp_path / "local" / f"{packed.PREFIX}litter"
    litter.mkdir(parents=True)
    litter.with_name(f"{litter.name}.lock").touch()
    whole = Store.open(pair[0]).shard_bytes
    monkeypatch.setattr("shared.files.durable.free_bytes", lambda _: whole - 10**6 * litter.exists())
    assert Store.open(pair[1], Local(folder=tmp_path / "local")).strata["004-016"].source.shard(0).any()


def test_inspecting_a_packed_store_takes_a_folder_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    place = ("--local-folder", tmp_path / "local", "--local-bytes", 10**7)
    found = json.loads(command("info", pair[1], "--shuffle", "--json", *place).out)
    assert len(found["shuffle"]) == 2 and (tmp_path / "local").is_dir()
    assert command("info", pair[1], *place).code == command("verify", pair[1], *place).code == 2


def test_where_to_decode_is_asked_of_packed_stores_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not packed, so nothing is decoded; leave out --local-folder"):
        Store.open(pair[0], Local(folder=tmp_path))


def test_a_packed_store_that_lost_its_record_is_told_from_a_damaged_raw_one(pair: tuple[Path, Path]) -> None:
    (pair[1] / PACKED).unlink()
    before = contents(pair[1])
    for line, code in ((("info", pair[1]), 1), (("verify", pair[1]), 1), (("repair", pair[1]), 2)):
        done = command(*line)
        assert done.code == code and "packed" in done.err and len(done.err.splitlines()) == 1
    assert contents(pair[1]) == before


def test_sizes_as_json(raw: SyntheticStore, tmp_path: Path) -> None:
    packed_, again = tmp_path / "packed", tmp_path / "again"
    done = json.loads(command("pack", raw.path, packed_, "--json").out)
    size = Store.open(raw.path).shard_bytes
    shards = [path for path in packed_.rglob("*") if path.is_file() and "/c/" in path.as_posix()]
    assert done == {
        "path": str(packed_),
        "shard_bytes": size,
        "packed_shard_bytes": sum(path.stat().st_size for path in shards),
    }
    assert json.loads(command("unpack", packed_, again, "--json").out) == {"path": str(again), "shard_bytes": size}


@pytest.mark.slow
@pytest.mark.parametrize("more", [pytest.param((), marks=pytest.mark.exhaustive), ("--local-bytes", "100000")])
def test_training_gives_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path, more: tuple[str, ...]) -> None:
    found: list[Any] = []
    sizes = ("transcoder.d_sae=64", "activation.k=4", "activation.k_start=4", "rows.batch_rows=64")
    options = [part for size in (*sizes, "checkpoint.every=10") for part in ("--set", size)]
    for path, extra in ((pair[0], ()), (pair[1], ("--local-folder", tmp_path / "local", *more))):
        runs = tmp_path / f"runs{len(found)}"
        line = [sys.executable, "-m", "train", "run", "tiny", "--store", path, "--runs", runs, "--steps", "20"]
        command_ = [str(part) for part in (*line, *options, *extra)]
        done = subprocess.run(command_, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        run = runs / "tiny-001"
        files = [run / "metrics.jsonl", *sorted(run.glob("checkpoints/*/*.safetensors"))]
        found.append({file.relative_to(run): file.read_bytes() for file in files})
        if extra:
            assert ("decoded again and again" in done.stderr) == bool(more)
            assert list((tmp_path / "local").iterdir()) == []
    assert len(found[0]) > 2 and found[0] == found[1]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda path: flip(path, 40), "crc32c"),
    "the index": (lambda path: flip(path, path.stat().st_size - 6), "crc32c"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "ledger says"),
    "missing": (lambda path: path.unlink(), "missing"),
}


@pytest.mark.fault(18)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_never_unpacked(pair: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    harm, cause = DAMAGE[kind]
    harm(pair[1] / SHARD)
    done = command("verify", pair[1])
    assert done.code == 1 and len(done.out.splitlines()) == 1
    assert SHARD in done.out and cause in done.out
    done = command("unpack", pair[1], tmp_path / "again")
    assert done.code == 1 and SHARD in done.err.splitlines()[-1]
    assert not (tmp_path / "again" / STORE).exists()


@pytest.mark.fault(18)
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_a_damaged_side_file_is_not_copied(pair: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(pair[name == "unpack"], tmp_path / "source"))
    moments = source / "ledger/000001.moments.safetensors"
    flip(moments, -1)
    done = command(name, source, tmp_path / "out")
    assert done.code == 1 and f"{moments}: crc32c" in done.err
    assert not (tmp_path / "out" / STORE).exists()


def test_a_truncated_shard_is_never_said_to_be_mended_by_repair(pair: tuple[Path, Path]) -> None:
    (pair[1] / SHARD).write_bytes(b"short")
    told = [command(line, pair[1]).err.splitlines()[-1] for line in ("info", "repair")]
    assert "expected" in told[0] and "harvest repair" not in told[0] + told[1]
    assert all("pack the store again" in line for line in told)


@pytest.mark.fault(18)
@pytest.mark.parametrize("at", [40, -6, -30])
def test_damage_that_reading_meets_names_the_file(pair: tuple[Path, Path], tmp_path: Path, at: int) -> None:
    flip(pair[1] / SHARD, at)
    store = Store.open(pair[1], Local(folder=tmp_path / "local"))
    spec = store.strata["004-016"].source.spec
    try:
        rows = store.strata["004-016"].source.shard(3)
    except CorruptData as error:
        assert SHARD in str(error)
    else:  # Blosc keeps no checksum: what decodes has the right size, and verify finds it
        assert at == 40 and rows.shape == (spec.rows_per_shard, spec.width)


@pytest.mark.fault(21)
def test_a_chunk_of_another_size_is_refused_before_it_is_decoded(raw: SyntheticStore) -> None:
    spec = Store.open(raw.path).strata["004-016"].source.spec
    data = bytearray(pack_shard(spec, (raw.path / SHARD).read_bytes()))
    data[4:8] = (2**31).to_bytes(4, "little")
    with pytest.raises(CorruptData, match="a chunk decodes to 2,147,483,648 bytes, expected 8,192"):
        unpack_shard(spec, bytes(data), Path("shard"))


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda value: value["files"].update({"../x": {"bytes": 1, "crc32c": "00000000"}}), "path of a file below"),
        (lambda value: value["files"].update({"tokens/c/99/0": {"bytes": 1, "crc32c": "00000000"}}), "tokens/c/99/0"),
        (lambda value: value["files"].pop("tokens/c/0/0"), "tokens/c/0/0"),
        (lambda value: value.update(unpacked_bytes=-1), "unpacked_bytes"),
        (lambda value: value.update(unpacked_bytes=5), "unpacked_bytes is 5"),
        (lambda value: value.update(format_version="x"), "format_version"),
        (lambda value: value.update(more=1), "unknown option 'more'"),
    ],
)
def test_a_hostile_record_is_refused(pair: tuple[Path, Path], change: Callable[[dict], object], cause: str) -> None:
    value = json.loads((pair[1] / PACKED).read_text())
    change(value)
    edit_json(pair[1] / PACKED, **value)
    done = command("info", pair[1])
    assert done.code == 1 and cause in done.err and len(done.err.splitlines()) == 1


def test_what_cannot_be_packed_or_unpacked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for line, cause in (
        (("pack", pair[1], tmp_path / "x"), "is packed already"),
        (("unpack", pair[0], tmp_path / "x"), "is not packed"),
        (("pack", pair[0], pair[1]), "exists; choose another folder"),
        (("pack", pair[0], tmp_path / "mine"), "exists; choose another folder"),
        (("pack", pair[0], tmp_path / "mine" / "thesis.txt"), "thesis.txt is a file; choose another folder"),
        (("pack", tmp_path / "none", tmp_path / "x"), "no such folder"),
    ):
        done = command(*line)
        assert done.code == 2 and cause in done.err.splitlines()[-1]
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pack", "unpack"])
def test_a_killed_command_leaves_no_store_and_a_rerun_finishes(
    pair: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    source, other = pair if name == "pack" else pair[::-1]
    process = start(name, source, tmp_path / "out")
    began = time.monotonic()
    while not list(tmp_path.glob(f"out/{ARRAYS}/strata/*/target/c/2*")):
        assert process.poll() is None and time.monotonic() - began < 60
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / STORE).exists()
    assert command("info", tmp_path / "out").code == 2
    assert command(name, source, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(other)


def test_folders_of_killed_processes_are_swept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    litter = tmp_path / "local" / f"{packed.PREFIX}litter"
    litter.mkdir(parents=True)
    (tmp_path / "local" / f"{litter.name}.lock").touch()
    first = Store.open(pair[1], Local(folder=tmp_path / "local"))
    first.strata["004-016"].source.shard(0)
    second = Store.open(pair[1], Local(folder=tmp_path / "local"))
    second.strata["004-016"].source.shard(0)
    assert first._local is not None and second._local is not None
    folders = [path for path in (tmp_path / "local").iterdir() if path.is_dir()]
    assert sorted(folders) == sorted([first._local.folder, second._local.folder])


def test_what_another_command_left_is_not_written_over(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its last step, and met by another command, by another store, and by an unfinished harvest."""
    other = make_store(tmp_path / "other", seed=5).path

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("harvest.commands.archive_target.shutil.copyfile", killed)
        assert command("pack", pair[0], tmp_path / "out").code == 3
    before = contents(tmp_path / "out")
    found = {
        one["name"]: one["state"] for one in json.loads(command("ls", "--cache", tmp_path, "--json").out)["stores"]
    }
    assert found["out"] == "unfinished pack"
    shutil.copytree(tmp_path / "out", tmp_path / "begun")
    assert command("rm", tmp_path / "begun", "--yes").code == 0 and not (tmp_path / "begun").exists()
    (other / STORE).rename(tmp_path / "kept")
    begun = contents(other)
    for line in (("unpack", pair[1], tmp_path / "out"), ("pack", pair[0], other)):
        done = command(*line)
        assert done.code == 2 and "choose another folder" in done.err
    assert contents(tmp_path / "out") == before and contents(other) == begun
    assert command("pack", pair[0], tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == contents(pair[1])


@pytest.mark.fault(21)
@pytest.mark.parametrize(("at", "value"), [(3, 4), (12, 200), (2, 0x33)])
def test_a_chunk_whose_header_lies_is_refused(raw: SyntheticStore, at: int, value: int) -> None:
    """Item size, size of the chunk, and a flag that says the rows lie there as they are."""
    spec = Store.open(raw.path).strata["004-016"].source.spec
    data = bytearray(pack_shard(spec, (raw.path / SHARD).read_bytes()))
    assert data[at] != value
    data[at] = value
    with pytest.raises(CorruptData, match=r"a chunk's header|a chunk stored as it is"):
        unpack_shard(spec, bytes(data), Path("shard"))


def test_rows_that_do_not_compress_come_back(raw: SyntheticStore) -> None:
    spec = Store.open(raw.path).strata["004-016"].source.spec
    noise = np.random.default_rng(0).integers(0, 2**16, spec.payload_bytes // 2, dtype=np.uint16).tobytes()
    data = noise + spec.footer()
    assert unpack_shard(spec, pack_shard(spec, data), Path("shard")) == data


def test_what_another_user_left_is_passed_over(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / f"{packed.PREFIX}theirs.lock").touch()
    unlink = Path.unlink

    def only_ours(path: Path, **given: bool) -> None:
        if "theirs" in path.name:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", only_ours)
        rows = Store.open(pair[1], Local(folder=folder)).strata["004-016"].source.shard(0)
    assert (folder / f"{packed.PREFIX}theirs.lock").exists()
    assert rows.any()


@pytest.mark.fault(21)
def test_an_index_whose_sums_wrap_around_is_refused(raw: SyntheticStore) -> None:
    spec = Store.open(raw.path).strata["016-032"].source.spec
    data = pack_shard(spec, (raw.path / f"{ARRAYS}/strata/016-032/source/c/3/0").read_bytes())
    end = len(data) - packed.footer_bytes(spec)
    sizes = np.zeros(spec.rows_per_shard // spec.inner_rows, "<u8")
    sizes[:2] = 2**40, (2**64 - 2**40 + end) % 2**64
    index = np.stack([np.cumsum(sizes) - sizes, sizes], axis=1).astype("<u8").tobytes()
    hostile = data[:end] + index + google_crc32c.value(index).to_bytes(4, "little")
    with pytest.raises(CorruptData, match="its index does not match its layout"):
        unpack_shard(spec, hostile, Path("shard"))
