"""Runs of the real commands that begin at once: a process that has imported everything forks one for each.

`Server("harvest", ...)` starts `python -m tests.faults.server harvest`, which reads requests, a JSON object per line,
and answers each with how the run ended. The commands are those of `python -m harvest` and `python -m train` with their
arguments, in a process of their own; only its start is shared.
"""

import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.faults import inject
from tests.faults.inject import Fault
from tests.forks import ONE_THREAD, code_of, leave

SECONDS, WARM_SECONDS = 120, 600
"""Most that a run may take; the first one on a machine compiles loops."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    code: int
    """The exit code; a negative number is the signal that killed it."""
    out: str
    err: str
    seconds: float


class Server:
    """A process that runs one stage's commands, one at a time."""

    def __init__(self, stage: str, scratch: Path) -> None:
        """`scratch`: a folder for what runs print."""
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        line = [*_private(), sys.executable, "-m", "tests.faults.server", stage]
        environment = {**os.environ, **ONE_THREAD, "LD_PRELOAD": str(inject.library())}
        self._process = subprocess.Popen(
            line, cwd=inject.ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(SECONDS)

    @property
    def root(self) -> Path:
        """Its file system as other processes see it, with what is mounted there alone."""
        return Path(f"/proc/{self.pid}/root")

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def mount(self, folder: Path, *options: str) -> str:
        """Mount a tmpfs at `folder`, for the runs alone; or change one, with the option `remount`. Says what failed."""
        names = ["nsenter", "--target", str(self.pid), "--user", "--mount", "--preserve-credentials"]
        what = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(folder)]
        return subprocess.run([*names, *what], capture_output=True, text=True).stderr.strip()

    def warm(self, *arguments: object) -> None:
        """Run once, and keep what that imported for later runs; of a harvest all that it cached, too.

        A harvest is run in the server itself, and leaves no thread there; compiled loops of training would.
        """
        result = self._ask({"arguments": list(map(str, arguments)), "warm": True})
        assert result.code == 0, result.err

    def run(self, *arguments: object, fault: Fault | None = None, limits: dict[str, int] | None = None) -> Result:
        """Run `python -m STAGE ARGUMENTS` to its end. `limits`: of `resource`, by name."""
        request = {
            "arguments": list(map(str, arguments)),
            "fault": asdict(fault) if fault else None,
            "limits": limits or {},
            "warm": False,
        }
        return self._ask(request)

    def _ask(self, request: dict[str, Any]) -> Result:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "scratch": str(self._scratch)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        out, err = ((self._scratch / name).read_text() for name in ("out", "err"))
        assert line, f"the server of runs ended: {err}"
        answer = json.loads(line)
        assert answer["threads"] == 1, "a fork of a process with several threads can hang"
        assert answer["code"] is not None, f"a run took more than {SECONDS} s: {err}"
        return Result(answer["code"], out, err, answer["seconds"])


def _private() -> list[str]:
    """What starts a process with mounts of its own, where that is allowed."""
    line = ["unshare", "--user", "--map-root-user", "--mount"]
    allowed = shutil.which("unshare") and subprocess.run([*line, "true"], capture_output=True).returncode == 0
    return line if allowed else []


def _command(stage: str) -> Callable[[], None]:
    """What `python -m STAGE` calls."""
    if stage == "harvest":
        from harvest.cli import main

        return main
    import shared.command_line
    import train.cli
    from shared.console.process import keep_freed_memory

    def run() -> None:
        keep_freed_memory()
        shared.command_line.run(train.cli.main)

    return run


def _serve(stage: str) -> None:
    """Answer requests until there are no more."""
    command, answers = _command(stage), os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request, began = json.loads(line), time.monotonic()
        modules = Path(request["scratch"], "modules")
        if stage == "harvest" and request["warm"]:
            _become(stage, request)
            code: int | None = code_of(command)
            sys.stdout.flush()
        elif child := os.fork():
            code = _wait(child, WARM_SECONDS if request["warm"] else SECONDS)
        else:
            _become(stage, request)
            code = code_of(command)
            if request["warm"]:
                modules.write_text("\n".join(sorted(sys.modules)))
            leave(code)
        if request["warm"]:
            if stage == "train" and modules.exists():
                _import(modules.read_text().split())
            gc.collect()
            gc.freeze()  # so that collections in forks touch, and copy, only what is theirs
        answer = {"code": code, "seconds": time.monotonic() - began, "threads": len(os.listdir("/proc/self/task"))}
        print(json.dumps(answer), file=answers, flush=True)


def _import(names: Sequence[str]) -> None:
    for name in names:
        with suppress(ModuleNotFoundError):  # parts of compiled modules, which are in none by that name
            importlib.import_module(name)


def _wait(child: int, seconds: float) -> int | None:
    """The exit code of a child; None when it took too long, and was killed."""
    deadline, code = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return code


def _become(stage: str, request: dict[str, Any]) -> None:
    """Turn this process into the run that a request asks for."""
    null = os.open(os.devnull, os.O_RDONLY)
    if not request["warm"]:
        os.dup2(null, 0)
    for number, name in ((1, "out"), (2, "err")):
        target = os.open(Path(request["scratch"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, number)
        os.close(target)
    os.close(null)
    sys.argv = [stage, *request["arguments"]]
    for name, size in request.get("limits", {}).items():
        resource.setrlimit(getattr(resource, name), (size, size))
    if request.get("fault"):
        Fault(**request["fault"]).arm()


if __name__ == "__main__":
    _serve(sys.argv[1])
