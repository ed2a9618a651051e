"""Links, pipes and names in a store from a stranger: nothing outside its root is opened, and nothing is waited for."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.errors import CorruptData
from shared.files.durable import read_json
from shared.files.untrusted import read_file, refuse_links
from shared.store.layout import ARRAYS, STORE, record_path
from shared.store.store import Store
from tests import llms
from tests.llms import BLOCK_TOKENS, Line, contents
from tests.llms import command as harvest
from tests.runs import Outcome
from tests.stores import SyntheticStore, edit, make_store

Command = Callable[..., Outcome]
COMPONENTS = (
    ARRAYS,
    f"{ARRAYS}/strata",
    f"{ARRAYS}/strata/004-016",
    f"{ARRAYS}/strata/004-016/source/c/1",
    f"{ARRAYS}/strata/004-016/source/c/1/0",
    f"{ARRAYS}/tokens/zarr.json",
    "ledger",
    record_path(1),
    "tokenizer",
    "statistics-000005.safetensors",
    "plan.json",
    "request.json",
    STORE,
)
_opened: list[str] = []
_listening = False


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _listening and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str | os.PathLike):
        flags = arguments[2] if event == "open" else 0
        assert isinstance(flags, int)
        path = Path(arguments[0])
        _opened.append(str(path.parent.resolve() / path.name if flags & os.O_NOFOLLOW else path.resolve()))


sys.addaudithook(_listen)


@contextmanager
def opened_paths() -> Iterator[list[str]]:
    """What is opened or listed, links resolved."""
    global _listening
    _opened.clear()
    _listening = True
    try:
        yield _opened
    finally:
        _listening = False


@pytest.fixture
def store(tmp_path: Path) -> SyntheticStore:
    return make_store(tmp_path / "store", tokenizer=True)


def link_out(store: Path, name: str) -> Path:
    """Move a part of the store elsewhere, and leave a link to it; returns where it is."""
    outside = store.parent / "outside"
    outside.mkdir(exist_ok=True)
    moved = outside / Path(name).name
    (store / name).rename(moved)
    (store / name).symlink_to(moved)
    return outside


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", COMPONENTS)
def test_a_link_anywhere_in_a_store_is_refused_and_not_followed(
    store: SyntheticStore, command: Command, name: str, tmp_path: Path
) -> None:
    outside = link_out(store.path, name)
    before = contents(outside)
    with opened_paths() as opened:
        lines: list[Outcome | llms.Outcome] = [harvest("info", store.path), harvest("verify", store.path)]
        lines.append(command("run", "--store", store.path, "--runs", tmp_path / "runs", "--steps", 1))
    for done in lines:
        assert done.code == 1 and len(done.err.splitlines()) == 1, done
        assert f"{store.path / name} is a symbolic link" in done.err
    assert str(store.path / STORE) in opened or name == STORE  # the test sees what is opened
    assert [path for path in opened if path.startswith(str(outside))] == []
    assert contents(outside) == before and not (tmp_path / "runs").exists()


@pytest.mark.fault(22)
def test_a_link_that_no_record_names_is_refused_too(store: SyntheticStore) -> None:
    (store.path / ARRAYS / "strata/more").symlink_to("/nowhere")
    with pytest.raises(
        CorruptData, match=r"strata/more is a symbolic link; take another copy of .*store, without links"
    ):
        Store.open(store.path)


@pytest.mark.fault(22)
def test_a_packed_stores_links_are_refused(store: SyntheticStore, tmp_path: Path) -> None:
    assert harvest("pack", store.path, tmp_path / "packed").code == 0
    link_out(tmp_path / "packed", "packed.json")
    done = harvest("info", tmp_path / "packed")
    assert done.code == 1 and "packed.json is a symbolic link" in done.err


def test_the_root_itself_may_be_a_link(store: SyntheticStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.path)
    assert Store.open(tmp_path / "link").record == store.record
    assert harvest("verify", tmp_path / "link").code == 0


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["ledger", f"{ARRAYS}/strata"])
@pytest.mark.parametrize("finished_", [True, False])
def test_nothing_is_written_through_a_link(
    small: Line, finished: Path, model: Path, tmp_path: Path, name: str, finished_: bool
) -> None:
    """Repairing a damaged store, and finishing an unfinished one."""
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    (copy / record_path(3)).unlink()
    if not finished_:
        (copy / STORE).unlink()
    outside = link_out(copy, name)
    before = contents(outside)
    lines = [harvest(*small(tmp_path)), harvest(*small(tmp_path, tokens=5 * BLOCK_TOKENS))]
    lines += [harvest("repair", copy, "--model", model)] if finished_ else []
    for done in lines:
        assert done.code == 1 and f"{copy / name} is a symbolic link" in done.err.splitlines()[-1], done
    assert contents(outside) == before


@pytest.mark.fault(22)
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [name for name in COMPONENTS if "." in Path(name).name or name.endswith("/0")][1:])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(store: SyntheticStore, name: str) -> None:
    (store.path / name).unlink()
    os.mkfifo(store.path / name)
    done = harvest("verify", store.path)
    assert done.code == (2 if name == STORE else 1) and len(done.err.splitlines()) == 1
    assert ("is unfinished" if name == STORE else f"{store.path / name} is not a regular file") in done.err


@pytest.mark.timeout(60)
@pytest.mark.fault(21)
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CorruptData, match="is not a regular file"):
            read_json(path)
    with pytest.raises(CorruptData, match="link is a symbolic link; put the file itself there"):
        read_json(tmp_path / "link")
    assert read_file(tmp_path / "link", follow=True) == b"{}" and read_json(tmp_path / "file") == {}
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    (tmp_path / "file").write_bytes(b"x" * 101)
    with pytest.raises(CorruptData, match="more than 100 bytes"):
        read_file(tmp_path / "file", 100)
    assert len(read_file(tmp_path / "file", 101)) == 101


def test_what_is_removed_meanwhile_is_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    scandir = os.scandir

    def then_gone(path: str) -> object:
        found = scandir(path)
        if (tmp_path / "a").exists():
            (tmp_path / "a" / "b").rmdir()
            (tmp_path / "a").rmdir()
        return found

    monkeypatch.setattr(os, "scandir", then_gone)
    refuse_links(tmp_path)
    refuse_links(tmp_path / "none")


HOSTILE_NAMES = (
    *("../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/./b", "..", "a/", "/", "a\0b", "a\nb", "a\x1b[2Jb"),
    *("a\\b", "..\\x", "C:", "C:/x", "C:x", "~/x", "a b", "\u2025/x", "\u202ex", "a" * 256, "a/" * 600 + "a"),
)


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
@pytest.mark.parametrize("record", [STORE, record_path(0)])
def test_a_record_names_nothing_but_files_below_the_store(
    pristine: SyntheticStore, tmp_path: Path, name: str, record: str
) -> None:
    copy = tmp_path / "store"
    shutil.copytree(pristine.path, copy, copy_function=os.link)
    data = (copy / record).read_bytes()
    (copy / record).unlink()
    (copy / record).write_bytes(data)
    edit(copy / record, lambda value: value["files"].update({name: {"bytes": 0, "crc32c": "00000000"}}))
    done = harvest("verify", copy)
    said = done.err if record == STORE else done.out
    assert done.code == 1 and "is not the path of a file below the store" in said and len(said.splitlines()) == 1
    assert "\x1b" not in said


@pytest.mark.fault(22)
def test_litter_that_is_a_link_is_not_swept(synthetic: SyntheticStore, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (synthetic.path / "litter.tmp").symlink_to(tmp_path / "mine")
    done = harvest("repair", synthetic.path)
    assert done.code == 1 and f"{synthetic.path / 'litter.tmp'} is a symbolic link" in done.err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
