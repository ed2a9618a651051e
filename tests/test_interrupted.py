"""Extensions that were cut off, records that were lost: what the next command makes of them.

Each ends with rows that are the model's own: `verify --against-model`, not checksums alone.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from harvest.commands import archive
from harvest.writer import finish
from shared.files import durable
from shared.store import checks, packed
from shared.store import store as store_module
from shared.store.layout import ARRAYS, PLAN, REQUEST, STORE
from shared.store.store import Store
from tests.llms import BLOCK_TOKENS, Line, command, contents, edit_json, refused, texts, write_jsonl


def flip(path: Path, at: int = 3) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


Extended = Callable[..., list[object]]


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """A finished store of three training blocks, in a cache of its own."""
    shutil.copytree(finished, tmp_path / "cache" / finished.name)
    return tmp_path / "cache" / finished.name


@pytest.fixture
def line(small: Line, store: Path) -> Extended:
    """The arguments of a harvest into that cache."""

    def given(*more: object, blocks: int = 3) -> list[object]:
        return small(store.parent, *more, tokens=blocks * BLOCK_TOKENS)

    return given


def cut_off(line: Extended, blocks: int, where: str) -> None:
    """Extend to `blocks` training blocks; ended before the last steps, or between statistics and store.json."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    publish = durable.publish_json
    with pytest.MonkeyPatch.context() as patch:
        if where == "before finishing":
            patch.setattr(finish, "finish", killed)
        else:
            patch.setattr(durable, "publish_json", lambda p, v: killed() if p.name == STORE else publish(p, v))
        assert command(*line(blocks=blocks)).code == 3


def check(store: Path, model: Path, training_blocks: int) -> None:
    """Intact, of so many blocks, and every row the model's own."""
    assert len(Store.open(store).record.training_blocks) == training_blocks
    found = json.loads(command("verify", store, "--against-model", 10**6, "--model", model, "--json").out)
    assert found["faults"] == [] and found["against_model"]["wrong"] == []
    assert found["against_model"]["rows"] == found["against_model"]["equal"] > 1000


@pytest.mark.parametrize("where", ["before finishing", "before store.json"])
def test_repair_during_an_extension_that_was_cut_off(line: Extended, store: Path, model: Path, where: str) -> None:
    """The old blocks are mended, the plan of the longer store stays, and another length is refused or finishes."""
    before = contents(store)
    cut_off(line, 4, where)
    assert Store.open(store).record.blocks == 5
    check(store, model, 3)
    assert "complete; extended: " in command("ls", "--cache", store.parent, "--json").out
    flip(next((store / ARRAYS).glob("strata/*/source/c/2/0")))
    assert command("repair", store, "--model", model).out == "made again: blocks 2\n"
    assert json.loads((store / PLAN).read_text())["segments"] == [3, 1]
    check(store, model, 3)
    assert command(*line(blocks=5)).store == store
    check(store, model, 5)
    shards = [name for name in before if "/c/" in name]
    assert all((store / name).read_bytes() == before[name] for name in shards)


def test_a_plan_that_was_lost_is_found_in_store_json(line: Extended, store: Path, model: Path) -> None:
    before = contents(store)
    (store / PLAN).unlink()
    assert command("verify", store).code == 1
    done = command(*line(blocks=5))
    assert done.store == store and "plan.json: missing" in done.err
    check(store, model, 5)
    assert all((store / name).read_bytes() == data for name, data in before.items() if "/c/" in name)


def test_rows_of_a_longer_plan_that_was_lost_are_not_taken_for_those_of_a_new_one(
    line: Extended, store: Path, model: Path
) -> None:
    """Its last block's tokens come from windows shuffled in another way."""
    cut_off(line, 5, "before finishing")
    (store / PLAN).unlink()
    assert command(*line(blocks=4)).store == store
    check(store, model, 4)
    assert not (store / "ledger/000006.json").exists()


@pytest.mark.parametrize("name", [PLAN, REQUEST, "ledger/000000.json", "statistics-000005.safetensors", STORE])
@pytest.mark.parametrize("way", ["run", "repair"])
def test_a_record_that_does_not_parse_is_written_anew(
    line: Extended, store: Path, model: Path, name: str, way: str
) -> None:
    before = contents(store)
    (store / name).write_text('{"block": 0')
    if (name, way) == (STORE, "repair"):
        assert command("repair", store).code == 1
        return
    if (name, way) == ("ledger/000000.json", "run"):  # a finished store is found by its records; verify reads all
        assert command("verify", store).code == 1
        (store / STORE).unlink()
    done = command(*line()) if way == "run" else command("repair", store, "--model", model)
    assert done.code == 0, done.err
    assert contents(store) == before


def test_an_extension_does_not_pass_a_damaged_unembedding_on(line: Extended, store: Path) -> None:
    path = store / "unembedding.safetensors"
    before = path.read_bytes()
    flip(path, 5000)
    assert command(*line(blocks=4)).store == store
    assert path.read_bytes() == before
    assert command("verify", store).code == 0


def test_repair_with_another_tokenizer_is_refused(store: Path, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    edit_json(tmp_path / "other/tokenizer_config.json", model_max_length=7)
    flip(next((store / ARRAYS).glob("strata/*/source/c/2/0")))
    done = command("repair", store, "--model", tmp_path / "other")
    assert done.code == 2 and "its tokenizer files have the digest" in done.err


@pytest.mark.parametrize("kept", [PLAN, "nothing"])
def test_rows_in_other_numbers_than_a_new_plan_has_are_made_again(
    small: Line, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Documents apart: rows of a block depend on the poorest block, and held-out blocks are the same in any plan."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": one} for one in texts(400)])

    def line(blocks: int) -> list[object]:
        more = ("--set", "windows.documents=apart", "--set", "store.keep={}")
        return small(tmp_path / "cache", *more, text=text, tokens=blocks * BLOCK_TOKENS)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finish, "finish", killed)
        assert command(*line(12)).code == 3
    path = next((tmp_path / "cache").glob("*/plan.json")).parent
    if kept == PLAN:
        refused(command(*line(1)), "was planned with 12 training blocks")
        assert command(*line(12)).store == path
        return check(path, model, 12)
    (path / PLAN).unlink()
    assert command(*line(1)).store == path
    check(path, model, 1)
    assert contents(path) == contents(command(*small(tmp_path / "new", *line(1)[-4:], text=text, tokens=1)).store)


def test_opening_a_store_while_an_extension_finishes_gives_one_or_the_other(
    line: Extended, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shard, extended = checks.check_shard, list[bool]()

    def slow(*given: object) -> None:
        if not extended:
            extended.append(True)
            assert command(*line(blocks=4)).code == 0
        check_shard(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "check_shard", slow)
    assert Store.open(store).record.blocks == 6


@pytest.mark.fault(1)
def test_a_kill_in_the_last_step_of_an_extension_leaves_no_litter_behind(
    line: Extended, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store / "statistics-000005.safetensors"
    data = old.read_bytes()
    assert command(*line(blocks=4)).store == store
    whole = contents(store)
    old.write_bytes(data)
    assert Store.open(store).record.blocks == 6
    assert command(*line(blocks=4)).store == store
    assert contents(store) == whole


def test_packing_a_store_that_is_extended_meanwhile_gives_the_one_that_was_opened(
    line: Extended, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, each = contents(store), archive.for_each

    def extended_behind(*given: object) -> None:
        each(*given)  # type: ignore[arg-type]
        assert command(*line(blocks=4)).code == 0

    with monkeypatch.context() as patch:
        patch.setattr(archive, "for_each", extended_behind)
        assert command("pack", store, tmp_path / "packed").code == 0
    assert len(Store.open(store).record.training_blocks) == 4
    assert command("verify", tmp_path / "packed").code == 0
    assert command("unpack", tmp_path / "packed", tmp_path / "again").code == 0
    assert contents(tmp_path / "again") == before


def test_packing_goes_on_where_the_rest_just_fits(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packing, count = packed.pack_shard, 0

    def killed(*given: object) -> bytes:
        nonlocal count
        count += 1
        if count > 60:
            raise KeyboardInterrupt
        return packing(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(archive, "pack_shard", killed)
        assert command("pack", store, tmp_path / "packed").code == 3
    there = sum(file.stat().st_size for file in (tmp_path / "packed").rglob("*") if file.is_file())
    size = Store.open(store).shard_bytes + sum(
        file.stat().st_size for file in store.rglob("*") if file.suffix == ".safetensors" or "ledger" in file.parts
    )
    with monkeypatch.context() as patch:
        patch.setattr("shared.files.durable.free_bytes", lambda _: size - there - 10**5)
        assert command("pack", store, tmp_path / "packed").code == 2
    monkeypatch.setattr("shared.files.durable.free_bytes", lambda _: size - there + 10**5)
    assert command("pack", store, tmp_path / "packed").code == 0


def test_a_target_inside_the_store_is_refused(store: Path) -> None:
    refused(command("pack", store, store / "packed"), "lies inside the store")
    assert not (store / "packed").exists()


def test_stores_named_by_a_dot(store: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    assert command("repair", ".", "--model", model).out == "nothing is damaged\n"
    refused(command("unpack", store, "."), "is not packed")
    assert command("rm", ".", "--yes").code == 0
    assert not store.exists()


def test_removing_leaves_what_is_not_a_stores_alone(store: Path, tmp_path: Path) -> None:
    cache = store.parent
    (cache / "thesis.tmp").mkdir()
    (cache / "notes.tmp").write_text("years of work")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(store, tmp_path / "elsewhere" / store.name)
    store.symlink_to(tmp_path / "elsewhere" / store.name)
    refused(command("rm", store.name, "--cache", cache, "--yes"), "is a symbolic link to")
    assert command("rm", tmp_path / "elsewhere" / store.name, "--cache", cache, "--yes").code == 0
    assert sorted(path.name for path in cache.iterdir()) == sorted(["notes.tmp", store.name, "thesis.tmp"])
