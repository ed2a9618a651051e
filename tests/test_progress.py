"""Plain lines of progress: when they come, and how much of them."""

import time

import pytest

from shared.console.progress import Progress
from shared.console.terminal import Verbosity, with_verbosity


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def steps(clock: list[float]) -> None:
    with Progress("train", 40, "steps", done=10) as bar:
        for done in range(11, 41):
            clock[0] += 0.4
            logged = done % 10 == 0
            bar.update(done, f"fvu {done}" if logged else "", f"fvu {done} and all else" if logged else "")


def test_lines_come_every_five_seconds_and_at_the_end(clock, capsys: pytest.CaptureFixture[str]) -> None:
    steps(clock)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "train 23/40 steps  2.5 steps/s  0:07 left  fvu 20",
        "train 36/40 steps  2.5 steps/s  0:02 left  fvu 30",
        "train 40/40 steps  2.5 steps/s  0:00 left  fvu 40",
    ]


def test_a_verbose_command_prints_every_detail_at_once(clock, capsys: pytest.CaptureFixture[str]) -> None:
    with with_verbosity(Verbosity.VERBOSE):
        steps(clock)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("left  ")[1] for line in lines] == [
        "fvu 20 and all else", "fvu 30 and all else", "fvu 40 and all else",
    ]  # fmt: skip


def test_a_quiet_command_prints_none(clock, capsys: pytest.CaptureFixture[str]) -> None:
    with with_verbosity(Verbosity.QUIET):
        steps(clock)
    assert capsys.readouterr() == ("", "")


def test_work_that_fails_or_does_nothing_has_no_last_line(clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), Progress("verify", 9, "bytes") as bar:
        bar.update(3)
        raise ZeroDivisionError
    with Progress("verify", 9, "bytes"):
        pass
    assert capsys.readouterr().err == ""


def test_work_that_ends_before_its_total_has_no_last_line(clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pack", 9000, "tokens") as bar:
        clock[0] += 5
        bar.update(3000)
        clock[0] += 1
        bar.update(4000)
    assert capsys.readouterr().err == "pack 3,000/9,000 tokens  600 tokens/s  0:10 left\n"
