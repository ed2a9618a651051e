"""Names and texts of strangers reach a terminal as text: no markup, no control sequence, no emoji's name."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from harvest.commands.stores import list_stores
from shared.console.terminal import PlainConsole, show_path
from shared.errors import printable, warn
from shared.store.checks import read_request
from tests import llms
from tests.llms import command as harvest
from tests.runs import Outcome
from tests.stores import SyntheticStore, edit, make_store

Command = Callable[..., Outcome]
FOLDERS = ["[red]x", ":smile:", "a\x1b[2Jb", "a\x9b31mb", "\u202eevil"]
NAMES = [*FOLDERS, "[/b]x", "[link=http://evil]x[/link]"]


@pytest.mark.parametrize("given", ["plain", "tab\tand\nline", "é 日本 →", ""])
def test_text_that_a_terminal_can_show_stays(given: str) -> None:
    assert printable(given) == given


@pytest.mark.fault(55)
def test_what_a_terminal_would_obey_or_cannot_show_is_escaped() -> None:
    assert (
        printable("a\x1b[31m\x9b1m\x7f\r\0\u202e\u2028\udcff") == "a\\x1b[31m\\x9b1m\\x7f\\r\\x00\\u202e\\u2028\\udcff"
    )


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("terminal", [True, False])
def test_every_kind_of_drawing_shows_a_name_as_it_stands(name: str, terminal: bool) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    table.add_row(Text(name))
    out = io.StringIO()
    console = PlainConsole(file=out, force_terminal=terminal, width=60, color_system="truecolor", highlight=False)
    console.print(Group(table, Panel(name, title=Text(name)), name, Text(name)))
    assert out.getvalue().count(printable(name)) == 8
    plain = out.getvalue().replace("\x1b[1m", "").replace("\x1b[3m", "").replace("\x1b[0m", "").replace("\x1b[1;3m", "")
    assert printable(plain) == plain
    borders = [len(line) for line in plain.splitlines() if line.startswith("│")]
    assert len(borders) == 3 and borders[0] == borders[1]


def test_columns_of_zero_are_no_reason_to_print_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    out = io.StringIO()
    PlainConsole(file=out).print("held-out fvu")
    assert out.getvalue() == "held-out fvu\n"


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_store_with_any_model_name_is_listed_and_described(tmp_path: Path, name: str) -> None:
    made = make_store(tmp_path / "cache" / "store")
    for record in ("request.json", "store.json"):
        path = made.path / record
        edit(path, lambda value: value.get("request", value)["model"].update(name=name))
    for done in (harvest("ls", "--cache", tmp_path / "cache"), harvest("info", made.path)):
        assert printable(done.out + done.err) == done.out + done.err
        assert "Traceback" not in done.err
    assert "store" in harvest("ls", "--cache", tmp_path / "cache").out


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", FOLDERS, ids=ascii)
def test_a_cache_and_a_store_of_any_name(tmp_path: Path, name: str) -> None:
    empty = harvest("ls", "--cache", tmp_path / name)
    assert empty.code == 0 and printable(name) in empty.out.replace("\n", "")
    made = make_store(tmp_path / name / "store")
    moved = made.path.rename(tmp_path / name / f"{name}-2")
    for done in (harvest("ls", "--cache", moved.parent), harvest("info", moved), harvest("verify", moved)):
        assert done.code == 0, done.err
        assert printable(f"{name}-2") in done.out and printable(done.out) == done.out
    gone = harvest("verify", tmp_path / f"{name}-3")
    assert gone.code == 2 and printable(f"{name}-3") in gone.err and printable(gone.err) == gone.err


@pytest.mark.fault(55)
@pytest.mark.parametrize("name", FOLDERS, ids=ascii)
def test_a_run_of_any_name(command: Command, trained: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(trained, tmp_path / name))
    for what in (("checkpoints",), ("watch", "--once"), ("evaluate",), ("resume",)):
        done = command(what[0], run, *what[1:])
        assert done.code == 0, done.err
        said = (done.out + done.err).replace(f"{run}\n", "")  # a result's path is what it is where no one looks
        assert printable(said) == said
        assert what[0] == "resume" or printable(name) in said.replace("\n", "")


@pytest.mark.fault(55)
def test_a_column_with_control_sequences(tmp_path: Path) -> None:
    text = llms.write_jsonl(tmp_path / "a.jsonl", [{"\x1b[31mred": 1}])
    model = llms.make_gemma(tmp_path / "model")
    done = harvest("run", "--model", model, "--text", text, "--cache", tmp_path / "cache", "--layer", 2, *llms.SMALL)
    llms.refused(done, "\\x1b[31mred")
    assert "\x1b" not in done.err


@pytest.mark.fault(55)
def test_a_warning_is_one_line_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    warn("a\x1b[2J\nerror: b")
    assert capsys.readouterr().err == "warning: a\\x1b[2J error: b\n"


def test_a_path_is_printed_exactly_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    show_path(Path("a\x1bb"))
    assert capsys.readouterr().out == "a\x1bb\n"


def test_a_name_that_is_no_unicode(tmp_path: Path) -> None:
    cache = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(cache)
    line: list[str | bytes] = [sys.executable, "-m", "harvest", "ls", "--cache", cache]
    done = subprocess.run(line, cwd=llms.ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b"" and b"caf\\udce9" in done.stdout.replace(b"\n", b"")


def test_stores_that_cannot_be_read_hide_no_others(synthetic: SyntheticStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_store(synthetic.path.with_name("zz-other")).path

    def refused(path: Path) -> object:
        if path == synthetic.path:
            raise PermissionError(13, "Permission denied", str(path / "request.json"))
        return read_request(path)

    monkeypatch.setattr("harvest.commands.stores.read_request", refused)
    found = {entry.name: entry.state for entry in list_stores(synthetic.path.parent)}
    assert found[other.name] == "complete"
    assert found[synthetic.path.name] == f"cannot be read: {synthetic.path / 'request.json'}: Permission denied"
    done = harvest("ls", "--cache", synthetic.path / "request.json")
    assert done.code == 2 and "is a file, and stores lie in a folder" in done.err
