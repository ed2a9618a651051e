"""Damaged chunks and metadata, through the commands that meet them: named, never read as zeros, never made again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.store.layout import ARRAYS, record_path
from shared.store.store import Store
from tests import llms
from tests.llms import command as harvest
from tests.llms import contents
from tests.runs import Outcome
from tests.stores import SyntheticStore, cut, edit, flip, make_store, stock_rows

Command = Callable[..., Outcome]
SHARDS = f"{ARRAYS}/strata/004-016/source/c"
SHARD, OTHER = f"{SHARDS}/1/0", f"{SHARDS}/3/0"


def swap(first: Path, second: Path) -> None:
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda store: cut(store / SHARD),
    "empty": lambda store: (store / SHARD).write_bytes(b""),
    "missing": lambda store: (store / SHARD).unlink(),
    "longer": lambda store: (store / SHARD).write_bytes((store / SHARD).read_bytes() + b"\0"),
    "a bit of the index": lambda store: flip(store / SHARD, -6),
    "a bit of the rows": lambda store: flip(store / SHARD, 100),
    "zeroed": lambda store: (store / SHARD).write_bytes(bytes((store / SHARD).stat().st_size)),
    "swapped": lambda store: swap(store / SHARD, store / OTHER),
}
UNSEEN = ("a bit of the rows", "swapped")
"""What only reading every byte can tell."""


@pytest.mark.fault(18)
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_is_named_by_every_command(
    synthetic: SyntheticStore, command: Command, tmp_path: Path, kind: str
) -> None:
    DAMAGE[kind](synthetic.path)
    before = contents(synthetic.path)
    verified = harvest("verify", synthetic.path)
    named = [line.split(":")[0] for line in verified.out.splitlines()]
    assert verified.code == 1 and sorted(named) == ([SHARD, OTHER] if kind == "swapped" else [SHARD])
    causes = {"cut": "6,163 bytes", "empty": "0 bytes", "missing": "missing", "longer": "6,165 bytes"}
    assert causes.get(kind, "crc32c") in verified.out
    faults = json.loads(harvest("verify", synthetic.path, "--json").out)["faults"]
    assert [fault["file"] for fault in faults] == named
    opened = harvest("info", synthetic.path)
    if kind in UNSEEN:
        assert opened.code == 0
    else:
        trained = command("run", "--store", synthetic.path, "--runs", tmp_path / "runs", "--steps", 1)
        for done in (opened, trained):
            assert done.code == 1 and len(done.err.splitlines()) == 1
            assert SHARD in done.err and "repair block 1: harvest repair" in done.err
        assert not (tmp_path / "runs").exists()
    assert contents(synthetic.path) == before


@pytest.mark.fault(19)
def test_chunks_that_are_zero_by_right_are_written_and_read(tmp_path: Path, command: Command) -> None:
    """Zarr itself leaves such chunks out, and then cannot tell them from lost ones."""

    def zeros(tokens: np.ndarray, position: np.ndarray, shared: Any) -> dict[str, np.ndarray]:
        late = (position >= 4)[:, None]
        return {
            side: np.where(late, 0, 1.5).repeat(d, 1).astype(np.float32) for side, d in (("source", 16), ("target", 24))
        }

    store = make_store(tmp_path / "store", draw=zeros).path
    shard = store / SHARD
    rows = Store.open(store).strata["004-016"].source
    assert set(shard.read_bytes()[: rows.spec.payload_bytes]) == {0}
    assert harvest("verify", store).code == 0
    out = np.ones((rows.rows, 16), np.uint16)
    rows.read(0, rows.rows, out)
    assert not out.any()
    shard.unlink()
    assert not stock_rows(store, "strata/004-016/source").any()  # the danger: a stock reader notices nothing
    for done in (
        harvest("verify", store),
        harvest("info", store),
        command("run", "--store", store, "--runs", tmp_path / "runs", "--steps", 1),
    ):
        assert done.code == 1 and SHARD in done.out + done.err and "missing" in done.out + done.err


@pytest.mark.fault(19)
def test_a_harvest_writes_the_chunks_that_are_zero(finished: Path, tmp_path: Path) -> None:
    """Positions in the stratum of position 0."""
    name = f"{ARRAYS}/strata/000-001/position/c/3"
    spec = Store.open(finished).strata["000-001"].position.spec
    assert (finished / name).read_bytes() == bytes(spec.payload_bytes) + spec.footer()
    shutil.copytree(finished, tmp_path / "store")
    (tmp_path / "store" / name).unlink()
    done = harvest("verify", tmp_path / "store")
    assert done.code == 1 and done.out == f"{name}: missing\n"


METADATA = f"{ARRAYS}/strata/004-016/source/zarr.json"
EDITS: dict[str, Callable[[Any], object]] = {
    "data_type": lambda value: value.update(data_type="int16"),
    "codecs": lambda value: value["codecs"][0]["configuration"]["codecs"][0]["configuration"].update(endian="big"),
    "shape": lambda value: value.update(shape=[10, 16]),
    "fill_value": lambda value: value.update(fill_value=7),
    "chunk_grid": lambda value: value["chunk_grid"]["configuration"].update(chunk_shape=[10**12, 16]),
}


@pytest.mark.fault(20)
@pytest.mark.parametrize("kind", [*EDITS, "deleted", "empty"])
def test_edited_metadata_is_refused_and_left_alone(
    synthetic: SyntheticStore, command: Command, tmp_path: Path, kind: str
) -> None:
    path = synthetic.path / METADATA
    if kind == "deleted":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        edit(path, EDITS[kind])
    before = contents(synthetic.path)
    lines: list[Outcome | llms.Outcome] = [
        harvest("info", synthetic.path),
        command("run", "--store", synthetic.path, "--runs", tmp_path / "runs", "--steps", 1),
    ]
    for done in lines:
        assert done.code == 1 and len(done.err.splitlines()) == 1 and str(path) in done.err
        assert {"deleted": "is missing", "empty": "not valid JSON"}.get(kind, f"zarr.json: {kind} is ") in done.err
    verified = harvest("verify", synthetic.path)
    assert verified.code == 1 and str(path) in verified.out
    assert contents(synthetic.path) == before  # reading recreates nothing


@pytest.mark.fault(20)
def test_metadata_of_a_group_is_not_made_anew_by_reading(synthetic: SyntheticStore) -> None:
    (synthetic.path / ARRAYS / "strata/zarr.json").unlink()
    before = contents(synthetic.path)
    for line in ("info", "verify"):
        done = harvest(line, synthetic.path)
        assert done.code == 1 and "strata/zarr.json is missing or changed" in done.out + done.err
    assert contents(synthetic.path) == before


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["store.json", "request.json", "plan.json", record_path(1)])
def test_a_record_cut_anywhere_is_one_error(synthetic: SyntheticStore, name: str) -> None:
    whole = (synthetic.path / name).read_bytes()
    for length in range(0, len(whole) - 2, max(1, len(whole) // 12)):
        (synthetic.path / name).write_bytes(whole[:length])
        done = harvest("verify", synthetic.path)
        assert done.code == 1 and len((done.out + done.err).splitlines()) == 1
        assert name in done.out + done.err and "not valid JSON" in done.out + done.err
    (synthetic.path / name).write_bytes(whole)
    assert harvest("verify", synthetic.path).code == 0
