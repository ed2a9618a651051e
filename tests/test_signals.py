"""Signals that are noted, those that end at once, and what is put back."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from shared.console.signals import STOP, cursor_back_on_quit, stop_signals


@pytest.mark.fault(5)
@pytest.mark.parametrize("number", STOP)
def test_a_signal_is_noted_and_its_handler_put_back(number: signal.Signals) -> None:
    ours = signal.signal(number, signal.SIG_DFL)  # tests may run under nohup, which ignores SIGHUP
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert stop == []
        os.kill(os.getpid(), number)
        assert stop == [number]
    assert signal.getsignal(number) == before
    signal.signal(number, ours)


@pytest.mark.fault(5)
def test_only_a_second_ctrl_c_interrupts() -> None:
    with stop_signals() as stop, pytest.raises(KeyboardInterrupt):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop == [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (signal.SIGTERM, "finishing this step\n"),
        (signal.SIGINT, "finishing this step; Ctrl-C again exits now\n"),
    ],
)
def test_the_first_signal_is_answered_at_once_and_others_are_not(
    first: signal.Signals, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())  # servers of other tests are among them
    with stop_signals():
        for number in (first, signal.SIGTERM):
            os.kill(os.getpid(), number)
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
    assert capfd.readouterr().err == said


def test_signals_of_the_scheduler_are_among_them() -> None:
    assert STOP == (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.fault(5)
def test_nohup_keeps_a_closed_terminal_from_being_noted() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault(5)
def test_leaving_does_not_wait_for_threads() -> None:
    code = (
        "import threading, time; from shared.console.signals import leave\n"
        "threading.Thread(target=time.sleep, args=(600,)).start(); leave('stopped at once')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "error: stopped at once\n")


@pytest.mark.fault(5)
def test_ctrl_backslash_ends_the_process_as_always_with_the_cursor_shown() -> None:
    code = (
        "import os, signal, sys; from shared.console.signals import cursor_back_on_quit\n"
        "signal.signal(signal.SIGQUIT, signal.SIG_DFL)\n"  # a shell's background ignores it
        "with cursor_back_on_quit(sys.stderr): os.kill(os.getpid(), signal.SIGQUIT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGQUIT, "\n\x1b[?25h")
    before = signal.getsignal(signal.SIGQUIT)
    with cursor_back_on_quit(sys.stderr):
        pass
    assert signal.getsignal(signal.SIGQUIT) == before
