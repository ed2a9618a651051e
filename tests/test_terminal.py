"""What the real commands say: panels on a terminal, plain lines elsewhere; quiet and verbose."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from shared.console import terminal
from shared.console.terminal import Verbosity, panel_shown, with_verbosity
from tests.llms import Line
from tests.llms import command as harvest
from tests.runs import SMALL, rows
from tests.stores import SyntheticStore, make_store

CONTROL = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")
WARNING = "warning: planted " + "and long " * 20 + "to its end"
PLANTED = f"""
import sys
from train.run.saver import Saver
save = Saver.save

def warning(self, *job):
    print({WARNING!r}, file=sys.stderr)
    return save(self, *job)

Saver.save = warning
sys.argv[0] = "train"
import shared.command_line
from train.cli import main
shared.command_line.run(main)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


def on_terminal(
    line: Sequence[object], columns: int = 80, more: Mapping[str, str] | None = None, interrupt_at: bytes = b""
) -> tuple[int, bytes]:
    """Run a command on a terminal of its own; returns its exit code, and all that it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")}
    environment |= {"TERM": "xterm-256color", **(more or {})}
    process = subprocess.Popen(
        [sys.executable, *map(str, line)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            read = os.read(ours, 2**16)
        except OSError:  # how Linux tells that the other side is closed
            break
        if not read:
            break
        written += read
        if interrupt_at and interrupt_at in written:
            process.send_signal(signal.SIGINT)
            interrupt_at = b""
    os.close(ours)
    return process.wait(60), written


def text_of(written: bytes) -> str:
    return CONTROL.sub(b"", written).decode().replace("\r", "")


def arguments(store: SyntheticStore, runs: Path, *more: object) -> list[object]:
    return ["run", "--store", store.path, "--runs", runs, "--name", "seen", *SMALL, *more]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, pytest.param(80, marks=pytest.mark.exhaustive)])
def test_a_run_draws_one_panel_and_loses_no_warning(store: SyntheticStore, tmp_path: Path, columns: int) -> None:
    options = arguments(store, tmp_path, "--steps", 600, "--set", "checkpoint.every=200")
    code, written = on_terminal(["-c", PLANTED, *options], columns)
    text, last = text_of(written), rows(tmp_path / "seen")[-1]
    assert code == 0 and text.splitlines()[-1] == str(tmp_path / "seen")
    assert text.count(WARNING) == 2, "a warning is lost, or broken by the panel"
    panels = text.split("╭─  train seen  ─")
    assert len(panels) > 3
    assert "600/600 steps  100%" in panels[-1] and f"{last['fvu']:.4f}" in panels[-1]
    assert f"{last['held_out']['fvu']:.4f} at 600" in panels[-1] and "not yet" in panels[-1]
    assert "╭─  samples  ─" in text
    assert {len(line) for line in panels[-1].split("╰")[0].splitlines()[1:]} == {columns}
    assert written.rindex(b"\x1b[?25h") > written.rindex(b"\x1b[?25l"), "the cursor stays hidden"


@pytest.mark.slow
def test_a_signal_leaves_the_panel_and_says_how_to_go_on(store: SyntheticStore, tmp_path: Path) -> None:
    options = arguments(store, tmp_path, "--steps", 10**6)
    code, written = on_terminal(["-m", "train", *options], interrupt_at=b"held out")
    assert code == 3
    assert re.search(r"error: stopped at step \d+; continue with: python -m train resume", text_of(written))
    code, written = on_terminal(["-m", "train", "watch", tmp_path / "seen"])
    text = text_of(written)
    assert code == 0 and "╭─  train seen  ─" in text and "╰─  stopped  ─" in text
    assert re.search(r"stopped at step \d+; continue with: python -m train resume", text.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("more", "options"), [({"TERM": "dumb"}, []), ({}, ["--quiet"]), ({"NO_COLOR": "1"}, [])])
def test_a_dumb_terminal_and_quiet_get_no_panel_and_no_color_none(
    store: SyntheticStore, tmp_path: Path, more: dict[str, str], options: list[str]
) -> None:
    code, written = on_terminal(["-m", "train", *arguments(store, tmp_path, "--steps", 30, *options)], more=more)
    assert code == 0
    colours = re.findall(rb"\x1b\[(?:[0-9]+;)*(?:3[0-7]|38;5;[0-9]+|9[0-7])(?:;[0-9]+)*m", written)
    if options:
        assert text_of(written).splitlines() == [str(tmp_path / "seen")]
    elif more.get("TERM") == "dumb":
        assert "train 30/30 steps" in text_of(written) and "╭─  train" not in text_of(written)
    else:
        assert "╭─  train seen  ─" in text_of(written)
    assert not colours


def test_a_quiet_run_says_its_path_alone(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command(*arguments(store, tmp_path, "--steps", 20), "-q")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'seen'}\n", "")
    again = command("resume", tmp_path / "seen", "--quiet")
    assert (again.code, again.out, again.err) == (0, f"{tmp_path / 'seen'}\n", "")
    assert "is finished: 20 steps" in command("resume", tmp_path / "seen").err


def test_a_verbose_run_has_a_line_for_every_row(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command(*arguments(store, tmp_path, "--steps", 20), "-v", "--set", "log_every=5")
    lines = [line for line in done.err.splitlines() if line.startswith("train ")]
    assert [line.split()[1] for line in lines] == ["5/20", "10/20", "15/20", "20/20"]
    for line, row in zip(lines, rows(done.path), strict=True):
        assert f"fvu {row['fvu']:.4f}" in line and "  reconstruction " in line and " calls " in line


def test_a_run_that_says_neither_has_one_line_in_the_end(command, store: SyntheticStore, tmp_path: Path) -> None:
    done = command(*arguments(store, tmp_path, "--steps", 20))
    [line] = [line for line in done.err.splitlines() if line.startswith("train ")]
    last = rows(done.path)[-1]
    assert line.startswith("train 20/20 steps  ") and "steps/s  0:00 left  " in line
    assert f"  fvu {last['fvu']:.4f}  l0 {last['l0_training_rule']:.1f}  dead {last['dead_share']:.1%}  " in line


@pytest.mark.parametrize("stage", ["run", "resume"])
def test_quiet_and_verbose_together_are_the_users_error(command, tmp_path: Path, stage: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    given = ["run", "--store", tmp_path] if stage == "run" else ["resume", tmp_path]
    done = command(*given, "--quiet", "--verbose")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --quiet and --verbose cannot be combined; give one of them\n"
    assert terminal.verbosity() == Verbosity.NORMAL


def test_a_quiet_harvest_says_its_path_alone(small: Line, tmp_path: Path) -> None:
    done = harvest(*small(tmp_path), "--quiet")
    assert done.code == 0 and done.err == "" and done.out == f"{done.store}\n"


def test_a_verbose_harvest_has_a_line_for_every_block(small: Line, tmp_path: Path) -> None:
    done = harvest(*small(tmp_path), "--verbose")
    lines = [line for line in done.err.splitlines() if " is written  " in line]
    assert [line.split("block ")[1].split()[0] for line in lines] == ["0", "1", "2", "3", "4"]
    assert "  5/5 blocks  " in lines[-1] and "  0 B to come  " in lines[-1] and " free  batch 4 windows" in lines[-1]
    assert harvest(*small(tmp_path), "-q", "-v").code == 2


@pytest.mark.slow
def test_a_harvest_draws_its_panel(small: Line, tmp_path: Path) -> None:
    code, written = on_terminal(["-m", "harvest", *small(tmp_path)])
    text = text_of(written)
    last = text.split("╭─  harvest  ─")[-1]
    assert code == 0 and text.splitlines()[-1].startswith(str(tmp_path))
    assert "2,560/2,560 tokens  100%" in last and re.search(r"blocks +5 of 5", last)
    assert re.search(r"to come +0 B", last) and "4 windows of 32" in last and "╭─  pack  ─" in text


def test_a_drawing_that_fails_stops_nothing(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    done = []
    with panel_shown(lambda: str(1 / 0)):
        print("warning: seen all the same", file=sys.stderr)
        done.append(1)
    err = capsys.readouterr().err
    assert done and "warning: seen all the same" in err and "the panel cannot be drawn: ZeroDivisionError" in err


def test_the_volume_is_put_back_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), with_verbosity(Verbosity.QUIET):
        raise ZeroDivisionError
    assert terminal.verbosity() == Verbosity.NORMAL
