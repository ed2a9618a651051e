"""Processes of this Python that begin at once: forks of one that has imported what they need.

`Forks("torch", ...)` starts `python -m tests.forks torch ...`, which imports, reads requests, a JSON object per line,
and answers each with how the process ended. Whatever such a process starts with `sys.executable` begins likewise. A
process with several threads is not forked: what it starts is a new one. None of the forks waits for the disk.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from unittest.mock import patch

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
SECONDS = 250
"""Most that a process may take; pytest ends a test after 300."""

ONE_THREAD = {
    **{f"{pool}_NUM_THREADS": "1" for pool in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA")},
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""An environment in which libraries begin no thread: only a process with one can be forked."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None
    """The exit code; none when it took too long, and was killed with all that it started."""
    out: str
    err: str


class Forks:
    """A process that has imported modules, and runs one fork at a time."""

    def __init__(self, *modules: str) -> None:
        line = [sys.executable, "-m", "tests.forks", *modules]
        environment = {**os.environ, **ONE_THREAD}
        self._process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)

    def run(self, *arguments: object, scratch: Path, env: Mapping[str, str]) -> Ended:
        """Run `python -m ARGUMENTS` to its end. `scratch`: where what it prints is kept; `env`: of its environment."""
        assert self._process.stdin is not None and self._process.stdout is not None
        scratch.mkdir(parents=True, exist_ok=True)
        request = {"arguments": list(map(str, arguments)), "scratch": str(scratch), "env": dict(env)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, "the process that is forked has ended"
        return Ended(json.loads(line), (scratch / "out").read_text(), (scratch / "err").read_text())


class Fork(subprocess.Popen[Any]):
    """`subprocess.Popen` that forks this process instead of starting the same Python again, where that is safe."""

    def __init__(self, args: Any, **options: Any) -> None:
        environment, line = _split(args)
        if line and _can_be_forked() and "preexec_fn" not in options:
            environment = {**(os.environ if options.get("env") is None else options["env"]), **environment}
            options["preexec_fn"] = partial(_become, line, environment)
            sys.stdout.flush()
            sys.stderr.flush()
        super().__init__(args, **options)


def do_not_wait(descriptor: int) -> None:
    """In place of `os.fsync`; a file that is closed is an error as there."""
    os.fstat(descriptor)


def code_of(part: Callable[[], object]) -> int:
    """The exit code of a process that does `part`; what it raises is printed."""
    try:
        part()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """Do what the interpreter does at its end, but taking thousands of modules apart, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]  # ends pools, and waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _split(args: Any) -> tuple[dict[str, str], list[str]]:
    """What a command sets of the environment, and its arguments if it is this Python; else none."""
    words = [os.fspath(word) for word in args] if isinstance(args, list | tuple) else []
    environment = {}
    if words[:1] == ["env"]:
        words.pop(0)
        while "=" in words[0]:
            name, _, environment[name] = words.pop(0).partition("=")
    return environment, words[1:] if words[:1] == [sys.executable] else []


def _can_be_forked() -> bool:
    """Whether no other thread holds what a fork would wait for; GNU's OpenMP ends a fork of a process that used it."""
    return len(os.listdir("/proc/self/task")) == 1 and "numba.np.ufunc.omppool" not in sys.modules


def _become(line: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Do in this fork what `python LINE` does."""
    os.closerange(3, 2**16)
    atexit._clear()  # temporary folders of the parent stay
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = os.fdopen(0, closefd=False)
    words = list(line)
    while words[0] in ("-I", "-P"):
        words.pop(0)
    kind, rest = words[0], words[1:]
    if kind in ("-m", "-c"):
        sys.argv = [kind, *rest[1:]]
        part = partial(_run_module, rest[0]) if kind == "-m" else partial(_run_text, rest[0])
    else:
        sys.argv, part = words, partial(_run_file, kind)
    leave(code_of(part))


def _run_module(name: str) -> None:
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_file(path: str) -> None:
    runpy.run_path(path, run_name="__main__")


def _run_text(text: str) -> None:
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def _serve(modules: Sequence[str]) -> None:
    """Import, and answer requests until there are no more."""
    for name in modules:
        importlib.import_module(name)
    tqdm.monitor_interval = 0  # or it begins a thread
    gc.collect()
    gc.freeze()  # so that collections in forks touch, and copy, only what is theirs
    with (
        patch.object(subprocess, "Popen", Fork),
        patch.object(os, "fsync", do_not_wait),
        os.fdopen(os.dup(1), "w") as answers,
    ):
        os.dup2(2, 1)
        for request in sys.stdin:
            print(json.dumps(_run(json.loads(request))), file=answers, flush=True)


def _run(request: dict[str, Any]) -> int | None:
    """The exit code of what is asked for."""
    line, env = [sys.executable, "-m", *request["arguments"]], {**os.environ, **request["env"]}
    out, err = (Path(request["scratch"], name) for name in ("out", "err"))
    with out.open("w") as to_out, err.open("w") as to_err:
        process = Fork(
            line, env=env, stdin=subprocess.DEVNULL, stdout=to_out, stderr=to_err, cwd=ROOT, start_new_session=True
        )
        try:
            code: int | None = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing that it started stays
        process.wait()
    return code


if __name__ == "__main__":
    leave(code_of(partial(_serve, sys.argv[1:])))
