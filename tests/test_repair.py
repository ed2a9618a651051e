"""Damage to a store: what verify says, and what repair and a new run make again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from harvest.writer import ledger
from harvest.writer.target import load_target
from shared.store.checks import read_request
from shared.store.layout import ARRAYS
from shared.store.store import Store
from tests.llms import (
    BLOCK_TOKENS,
    Line,
    command,
    contents,
    edit_json,
    make_gemma,
    refused,
    write_jsonl,
)


def test_info_and_verify(finished: Path, tmp_path: Path) -> None:
    shown = command("info", finished)
    assert shown.code == 0
    for part in ("blocks.2.hook_mlp_out", "16-31", "overall 1-31", "tokens", "5 blocks, 2 of them held out"):
        assert part in shown.out
    facts = json.loads(command("info", finished, "--json").out)
    assert facts["blocks"] == 5 and facts["bytes"] == sum(map(len, contents(finished).values()))
    assert json.loads(command("verify", finished, "--json").out)["faults"] == []
    assert "intact" in command("verify", finished).out


@pytest.mark.fault(18)
def test_verify_lists_every_damaged_file_and_a_new_run_heals(small: Line, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    flipped, short, gone = (copy / ARRAYS / f"strata/004-016/{name}/c/3" for name in ("source/", "position", "target/"))
    flipped, gone = flipped / "0", gone / "0"
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    found = command("verify", copy)
    assert found.code == 1
    assert "strata/004-016/source/c/3/0: crc32c" in found.out and len(found.out.splitlines()) == 1
    flipped.write_bytes(contents(finished)[flipped.relative_to(copy).as_posix()])
    short.write_bytes(short.read_bytes()[:-1])
    gone.unlink()
    found = command("verify", copy)
    assert found.code == 1 and len(found.out.splitlines()) == 2
    assert "target/c/3/0: missing" in found.out
    healed = command(*small(tmp_path))
    assert "warning" in healed.err and healed.store == copy
    assert contents(copy) == contents(finished)


def test_a_packed_store_is_found_and_never_written(small: Line, finished: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / finished.name
    assert command("pack", finished, path).code == 0
    before = contents(path)
    assert command(*small(tmp_path)).store == path
    refused(command(*small(tmp_path, tokens=5 * BLOCK_TOKENS)), "is a packed store", "harvest unpack")
    shard = path / ARRAYS / "strata/004-016/source/c/3/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = command(*small(tmp_path))
    assert done.code == 2 and "is a packed store" in done.err.splitlines()[-1]
    refused(command("repair", path, "--model", model), "is a packed store")
    shard.write_bytes(before[shard.relative_to(path).as_posix()])
    assert contents(path) == before


def swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "kind", ["flipped", "cut", "empty", "longer", "deleted", "swapped", "tokens", "zarr.json", "ledger", "side-car"]
)
def test_repair_makes_only_what_is_damaged_anew(
    small: Line, model: Path, text: Path, finished: Path, tmp_path: Path, kind: str
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(finished, copy)
    source = copy / ARRAYS / "strata/004-016/source/c"
    blocks = {"flipped": "3", "cut": "3", "empty": "3", "longer": "3", "deleted": "3", "swapped": "2, 3", "ledger": "3"}
    if kind in ("flipped", "tokens"):
        path = source / "3/0" if kind == "flipped" else copy / ARRAYS / "tokens/c/1/0"
        data = bytearray(path.read_bytes())
        data[77] ^= 1
        path.write_bytes(data)
    elif kind in ("cut", "empty", "longer"):
        whole = (source / "3/0").read_bytes()
        (source / "3/0").write_bytes({"cut": whole[:-1], "empty": b"", "longer": whole + b"\0"}[kind])
    elif kind == "swapped":
        swap(source / "2/0", source / "3/0")
    else:
        gone = {"zarr.json": f"{ARRAYS}/strata/004-016/zarr.json", "ledger": "ledger/000003.json"}
        gone |= {"side-car": "unembedding.safetensors", "deleted": f"{ARRAYS}/strata/004-016/source/c/3/0"}
        (copy / gone[kind]).unlink()
    kept = [path for block in "014" for path in (copy / ARRAYS).rglob(f"c/{block}*/**/*") if path.is_file()]
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    assert len(stamps) == 3 * 10
    assert command("verify", copy).code == 1
    done = command("repair", copy, "--model", model, "--text", text)
    assert done.code == 0, done.err
    assert done.out.startswith("made again: ")
    if kind in blocks:
        assert done.out == f"made again: blocks {blocks[kind]}\n"
    assert contents(copy) == contents(finished)
    changed = {path for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == ({copy / ARRAYS / "tokens/c/1/0"} if kind == "tokens" else set())
    assert json.loads(command("repair", copy, "--json").out) == {"blocks": [], "token_files": [], "others": []}


def test_repair_and_recomputing_want_the_stores_own_model_and_text(
    finished: Path, text: Path, model: Path, tmp_path: Path
) -> None:
    other = make_gemma(tmp_path / "other", intermediate_size=52)
    copy = tmp_path / "store"
    shutil.copytree(finished, copy)
    refused(command("verify", copy, "--against-model", 5, "--model", other), "is not the model of the store")
    refused(command("repair", copy, "--model", other), "is not the model of the store")  # before the store is read
    (copy / ARRAYS / "tokens/c/1/0").unlink()
    renamed = shutil.copy(text, tmp_path / "renamed.jsonl")
    assert command("repair", copy, "--model", model, "--text", renamed).code == 0
    assert contents(copy) == contents(finished)
    (copy / ARRAYS / "tokens/c/1/0").unlink()
    wrong = write_jsonl(tmp_path / "text.jsonl", [{"text": "another"}])
    done = command("repair", copy, "--model", model, "--text", wrong)
    assert done.code == 2 and "is not the text it was made from" in done.err.splitlines()[-1]


def test_a_store_can_be_opened_while_its_damaged_blocks_are_made_again(finished: Path, tmp_path: Path) -> None:
    """Of several, the first is there before the others."""
    path = Path(shutil.copytree(finished, tmp_path / "store"))
    target = load_target(path, read_request(path))
    ledger.grow_arrays(target, {0, 1})
    assert Store.open(path).record.blocks == target.blocks > 2
    assert contents(path) == contents(finished)


def test_a_model_and_a_text_that_were_renamed_are_known_by_what_they_hold(
    finished: Path, text: Path, model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(finished, copy)
    (copy / ARRAYS / "tokens/c/1/0").unlink()
    renamed = shutil.copy(text, tmp_path / "renamed.jsonl"), shutil.copytree(model, tmp_path / "renamed")
    done = command("repair", copy, "--text", renamed[0], "--model", renamed[1])
    assert done.code == 0, done.err
    assert contents(copy) == contents(finished)


@pytest.mark.fault(58)
def test_a_store_a_model_and_a_text_that_were_renamed_are_taken_up_by_a_new_run(
    small: Line, finished: Path, model: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(finished, tmp_path / "cache" / "mine"))
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    text = Path(shutil.copyfile(small.text, tmp_path / "t2.jsonl"))
    for where, what in ((None, None), (moved, None), (None, text), (moved, text)):
        found = command(*small(tmp_path / "cache", model=where, text=what))
        assert found.store == mine and "mine holds what would be " in found.err
        assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == ["mine"]
    assert contents(mine) == contents(finished)
    longer = command(*small(tmp_path / "cache", model=moved, tokens=5 * BLOCK_TOKENS))
    straight = command(*small(tmp_path / "straight", tokens=3 * BLOCK_TOKENS))
    command(*small(tmp_path / "straight", tokens=5 * BLOCK_TOKENS))
    assert longer.store == mine and contents(mine) == contents(straight.store)
    other = command(*small(tmp_path / "cache", "--seed", 7))
    assert other.store != mine


@pytest.mark.fault(58)
def test_a_model_that_is_not_where_it_was_is_asked_for(
    finished: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nothing-is-remembered"))
    for line in (("verify", finished, "--against-model", 2), ("repair", damaged(finished, tmp_path))):
        refused(command(*line), "a local folder called gemma, which is not here", "--model FOLDER")
    for told in (["--model", model], []):  # where it lies is remembered
        assert command("verify", finished, "--against-model", 2, *told).code == 0


def damaged(store: Path, folder: Path) -> Path:
    """Copy a store, with a shard file of rows missing."""
    copy = Path(shutil.copytree(store, folder / store.name))
    (copy / ARRAYS / "strata/004-016/source/c/3/0").unlink()
    return copy


def test_a_row_that_is_not_the_models_is_found(finished: Path, model: Path, tmp_path: Path) -> None:
    """Checksums that agree with wrong rows: only the model can tell."""
    copy = tmp_path / "store"
    shutil.copytree(finished, copy)
    path = copy / ARRAYS / "strata/016-032/target/c/2/0"
    data = np.frombuffer(path.read_bytes(), np.uint16).copy()
    data[: 32 * 16 * 8] ^= 0x8000  # half the rows of the block change sign
    path.write_bytes(data.tobytes())
    from shared.store.checks import file_crc32c

    record = json.loads((copy / "ledger/000002.json").read_text())
    record["files"]["strata/016-032/target/c/2/0"]["crc32c"] = file_crc32c(path)
    edit_json(copy / "ledger/000002.json", **record)
    done = command("verify", copy, "--against-model", 200, "--model", model)
    assert done.code == 1 and "strata/016-032 row 5" in done.out
    assert "200 rows recomputed" in done.out
