"""Stopping in good order: signals are noted, and the work looks at them where it can stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, NoReturn

from shared.errors import Stopped, printable, tell

STOP: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
"""Ctrl-C, a request to end, what SLURM sends ahead of its limit when asked to (`--signal=USR1@120`), and the end of the
terminal. The last is left alone where it is ignored, as `nohup` has it."""

_ANSWER, _AGAIN = "finishing this step", "; Ctrl-C again exits now"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that the signals of `STOP` fill, and put the handlers back at the end.

    The first is answered on stderr at once; a second SIGINT raises `KeyboardInterrupt`.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not received:  # by a thread: what the signal interrupted may be printing
            answer = _ANSWER + (_AGAIN if number == signal.SIGINT else "")
            threading.Thread(target=tell, args=(answer,), daemon=True).start()
        received.append(number)

    before = {number: signal.signal(number, note) for number in _heeded()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cursor_back_on_quit(stream: IO[str]) -> Iterator[None]:
    """Let SIGQUIT (Ctrl and a backslash) show the cursor that a panel on `stream` hides, and then end the process."""

    def quit_process(number: int, frame: FrameType | None) -> None:
        with suppress(OSError):
            os.write(stream.fileno(), b"\n\x1b[?25h")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGQUIT, quit_process)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def stop_at_once() -> None:
    """Let every signal of `STOP` raise `KeyboardInterrupt`, as Ctrl-C does: for work that a kill does not hurt."""
    for number in _heeded():
        signal.signal(number, signal.default_int_handler)


def _heeded() -> list[signal.Signals]:
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP if not (nohup and number == signal.SIGHUP)]


def leave(message: str) -> NoReturn:
    """End the process without waiting for its threads, as a kill would, with the exit code of `Stopped`."""
    under_panel = getattr(sys.stderr, "rich_proxied_file", None)  # the terminal; a panel ends without a line's end,
    shown = "\n\x1b[?25h" if under_panel else ""  # and hides the cursor
    print(f"{shown}error: {printable(message)}", file=under_panel or sys.stderr, flush=True)
    os._exit(Stopped.exit_code)
