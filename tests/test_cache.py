"""The cache of stores through its commands: listing, removing, and the store that is nearest to a new one."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harvest.commands import stores
from harvest.commands.describe import describe, show
from harvest.writer.request_differences import differences, explain_new, find_same
from shared.console.panel import size
from shared.errors import UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from shared.store.find_store import find_store
from shared.store.layout import PLAN, REQUEST, STORE, record_path
from tests.llms import ROOT, command, edit_json
from tests.stores import make_request, make_store

BLOCKS = 5


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with one finished store, `whole`."""
    make_store(tmp_path / "cache" / "whole")
    return tmp_path / "cache"


def listed(cache: Path) -> dict[str, dict]:
    done = command("ls", "--cache", cache, "--json")
    assert done.code == 0, done.err
    return {entry["name"]: entry for entry in json.loads(done.out)["stores"]}


@contextmanager
def holding(path: Path, shared: bool) -> Iterator[int]:
    """Another process that holds the lock of `path`; gives its number."""
    code = """
        import sys
        from pathlib import Path
        from shared.files.durable import lock
        with lock(Path(sys.argv[1]), "it", shared=sys.argv[2] == "True"):
            print("held", flush=True)
            sys.stdin.read()
    """
    line = [sys.executable, "-c", textwrap.dedent(code), str(path), str(shared)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.kill()


def test_ls_says_what_is_there(cache: Path) -> None:
    shutil.copytree(cache / "whole", cache / "begun")
    for name in (STORE, record_path(3), record_path(4)):
        (cache / "begun" / name).unlink()
    shutil.copytree(cache / "begun", cache / "packing")
    (cache / "packing" / PLAN).unlink()
    shutil.copytree(cache / "whole", cache / "broken")
    (cache / "broken" / REQUEST).write_text("{")
    (cache / "notes.txt").write_text("no store")
    found = listed(cache)
    assert list(found) == ["begun", "broken", "packing", "whole"]
    assert found["whole"]["state"] == "complete"
    assert found["begun"]["state"] == f"3 of {BLOCKS} blocks"
    assert found["packing"]["state"] == "packing"
    assert found["broken"]["state"].startswith("damaged: ") and "not valid JSON" in found["broken"]["state"]
    whole = found["whole"]
    assert (whole["model"], whole["layer"], whole["context_size"]) == ("synthetic", 3, 32)
    assert whole["hooks"] == "hook_resid_mid -> hook_mlp_out"
    assert whole["tokens"] == whole["rows"] == 3 * 16 * 32
    assert whole["bytes"] == sum(path.stat().st_size for path in (cache / "whole").rglob("*") if path.is_file())
    assert whole["used_by"] == [] and 0 <= whole["age_seconds"] < 600
    table = command("ls", "--cache", cache).out
    assert "4 stores" in table and "3 of 5 blocks" in table
    assert max(map(len, table.splitlines())) <= 80 and f" {3 * 16 * 32:,} tokens" in table


def test_a_list_fits_80_columns_and_breaks_no_name_of_usual_length_and_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name, model = "meta-llama-3-8b-instruct-L12-193c1e", "meta-llama/Meta-Llama-3-8B-Instruct"
    entry = stores.Entry(
        name=name,
        state="complete; extended: 12 of 40 blocks",
        bytes=3 * 2**40,
        age_seconds=9e5,
        used_by=["process 22621 (python): run k16"],
        model=model,
        layer=12,
        hooks="hook_resid_mid -> hook_mlp_out",
        context_size=1024,
        tokens=10**11,
        rows=10**11 + 1,
    )
    stores.show([entry], tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for whole in (name, model, "100,000,000,000 tokens", "100,000,000,001", "3 TiB", *entry.used_by, "10 d old"):
        assert any(whole in line for line in lines), whole


def test_info_fits_80_columns_without_cutting_a_number(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = describe(cache / "whole")
    facts["overall"]["natural_rows"] = 123_456_789_012
    facts["plan"]["segments"], facts["plan"]["packing"] = [3] * 5, facts["plan"]["packing"] * 5
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        show(facts)
    text = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "123,456,789,012" in text and "segment 4" in text


def test_a_store_is_found_by_its_name_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_CACHE", str(cache))
    assert json.loads(command("info", "whole", "--json").out)["path"] == str(cache / "whole")
    assert find_store(cache / "whole", tmp := cache / "none") == cache / "whole" and find_store(tmp) == tmp
    for given in (cache, "hole"):
        done = command("info", given)
        assert done.code == 2 and "whole" in done.err


def test_an_empty_or_missing_cache_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        done = command("ls", "--cache", folder)
        assert done.code == 0 and done.out == f"no stores in {folder}\n"
        assert json.loads(command("ls", "--cache", folder, "--json").out)["stores"] == []


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="only Linux tells who holds a lock")
def test_ls_says_who_uses_a_store(cache: Path) -> None:
    with holding(cache / "whole" / REQUEST, shared=True) as reader, holding(cache / "whole.lock", False) as writer:
        used = listed(cache)["whole"]["used_by"]
    assert [f"process {reader} " in used[0], f"process {writer} " in used[1], "harvesting" in used[1]] == [True] * 3
    assert listed(cache)["whole"]["used_by"] == []


def test_rm_refuses_a_store_in_use_and_then_removes_it(cache: Path) -> None:
    with holding(cache / "whole" / REQUEST, shared=True) as reader:
        for more in ([], ["--dry-run"]):
            done = command("rm", "whole", "--cache", cache, *more)
            assert done.code == 2 and f"store whole is locked: process {reader} " in done.err
    with holding(cache / "whole.lock", shared=False) as writer:
        done = command("rm", cache / "whole")
        assert done.code == 2 and f"process {writer} " in done.err
    assert listed(cache)["whole"]["state"] == "complete"
    taken = size(listed(cache)["whole"]["bytes"])
    assert command("rm", "whole", "--cache", cache, "--dry-run").out == f"would remove {cache / 'whole'}: {taken}\n"
    unasked = command("rm", "whole", "--cache", cache)
    assert unasked.code == 2 and "pass --yes to remove it" in unasked.err and unasked.out == ""
    assert (cache / "whole" / STORE).exists()
    assert command("rm", "whole", "--yes", "--cache", cache).out == f"removed {cache / 'whole'}: {taken}\n"
    assert list(cache.iterdir()) == []


def test_rm_refuses_what_is_no_store(cache: Path) -> None:
    (cache / "mine").mkdir()
    missing = f"no store nothing here or in {cache}; its stores: "
    for name, told in (("mine", "mine is not a store"), ("nothing", missing)):
        done = command("rm", name, "--cache", cache)
        assert done.code == 2 and told in done.err
    assert (cache / "mine").is_dir()


def test_a_removal_that_was_killed_leaves_no_part_of_a_store(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(folder: Path, **_: object) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        assert command("rm", "whole", "--yes", "--cache", cache).code == 3
    assert listed(cache) == {}
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["whole.tmp"]
    make_store(cache / "other")
    (cache / "other.spool.tmp").write_bytes(b"of a harvest that runs")
    with holding(cache / "other.lock", shared=False):
        stores.sweep(cache)
    assert sorted(path.name for path in cache.iterdir()) == ["other", "other.lock", "other.spool.tmp"]


def test_a_file_with_two_names_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "b" / "file").hardlink_to(tmp_path / "a" / "file")
    (tmp_path / "b" / "own").write_bytes(b"x" * 10)
    assert size_of(tmp_path / "b") == 1010 == size_of(tmp_path / "a", tmp_path / "b")


def test_the_nearest_store_and_what_differs(cache: Path) -> None:
    assert explain_new(cache / "none" / "new", make_request()) is None
    make_store(cache / "far", seed=3, context_size=16, storage="float32")
    line = explain_new(cache / "new", make_request(seed=4))
    assert line == "new store new; the nearest in the cache is whole: seed 0 there, 4 here"
    edit_json(cache / "whole" / REQUEST, seed="x")  # a store that cannot be read is passed over
    line = explain_new(cache / "new", make_request(seed=4))
    assert line is not None and "is far: " in line
    assert "context_size 16 there, 32 here" in line and "storage float32 there, bfloat16 here" in line
    many = make_request().model_copy(
        update={f"{name}_hook": "x" for name in ("source", "target")} | {"label": "a" * 50}
    )
    assert differences(make_request(), many)["label"] == ("synthetic", "a" * 50)
    assert "aaaaaaaaaaaa... here" in str(explain_new(cache / "new", many))


@pytest.mark.fault(58)
def test_a_store_is_found_by_what_it_holds_under_any_name(cache: Path) -> None:
    request = make_request()
    renamed = request.model.model_copy(update={"name": "moved", "revision": "0" * 40})
    same = request.model_copy(update={"model": renamed, "corpus": request.corpus.model_copy(update={"name": "x.txt"})})
    assert find_same(cache, same) == (cache / "whole", request)
    shutil.copytree(cache / "whole", cache / "begun")
    (cache / "begun" / STORE).unlink()
    assert find_same(cache, same) == (cache / "whole", request)  # the finished one, though `begun` sorts first
    assert find_same(cache, request.model_copy(update={"seed": 4})) is None
    other = request.model_copy(update={"model": renamed.model_copy(update={"weights": "0" * 64})})
    assert find_same(cache, other) is None
    assert find_same(cache / "none", request) is None
    assert command("pack", cache / "whole", cache / "packed").code == 0
    shutil.rmtree(cache / "whole")
    assert find_same(cache, request) == (cache / "begun", request)
    shutil.rmtree(cache / "begun")
    assert find_same(cache, request) is None  # a packed one is only read


def test_a_lock_file_that_was_removed_meanwhile_is_not_mistaken_for_the_lock(tmp_path: Path) -> None:
    path, opened = tmp_path / "lock", durable._open_to_lock

    def removed_after_opening(given: Path, make: bool) -> int:
        descriptor = opened(given, make)
        if not swapped:
            swapped.append(given)
            given.unlink()
            given.touch()
        return descriptor

    swapped: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable, "_open_to_lock", removed_after_opening)
        with durable.lock(path, "it"):
            patch.undo()
            with pytest.raises(UserError, match="locked"), durable.lock(path, "it"):
                pass
    assert swapped


def test_an_exclusive_lock_can_be_shared(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with durable.lock(path, "it") as first:
        with pytest.raises(UserError, match="locked"), durable.lock(path, "it", shared=True):
            pass
        first.share()
        with durable.lock(path, "it", shared=True):
            pass
        with pytest.raises(UserError, match="locked"), durable.lock(path, "it"):
            pass
    with durable.lock(path, "it"):
        pass


@pytest.mark.slow
def test_a_store_is_not_removed_under_a_training_run(cache: Path, tmp_path: Path) -> None:
    sizes = ("transcoder.d_sae=64", "activation.k=4", "activation.k_start=4", "rows.batch_rows=64")
    options = [part for size in sizes for part in ("--set", size)]
    line = [
        sys.executable,
        "-m",
        "train",
        "run",
        "tiny",
        "--store",
        cache / "whole",
        "--runs",
        tmp_path / "runs",
        "--steps",
        400,
    ]
    with subprocess.Popen([str(part) for part in (*line, *options)], cwd=ROOT, stdout=-1, stderr=-1, text=True) as run:
        while not (tmp_path / "runs/tiny-001/config.json").exists():
            assert run.poll() is None
        done = command("rm", "whole", "--cache", cache)
        assert done.code == 2 and f"process {run.pid} " in done.err
        out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "runs/tiny-001")
    assert command("rm", "whole", "--yes", "--cache", cache).code == 0
