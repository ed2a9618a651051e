"""The same kills by strace, which knows nothing of libraries: system calls are counted in the kernel, by thread."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.conftest import Bench
from tests.faults.inject import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def traced(call: str, number: int, path: Path, arguments: list[object]) -> "subprocess.CompletedProcess[str]":
    """The real command, killed at the Nth such call on `path` (and of a thread)."""
    if not shutil.which("strace"):
        pytest.skip("no strace")
    inject = f"inject={call}:signal=KILL:when={number}"
    line = ["strace", "-f", "-qq", "-o", os.devnull, "-P", path, "-e", f"trace={call}", "-e", inject, "--"]
    command = [*line, sys.executable, "-m", "harvest", *arguments]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=240)
    if "Operation not permitted" in done.stderr and "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    return done


@pytest.mark.fault(2)
@pytest.mark.parametrize("call", [pytest.param("rename", marks=pytest.mark.exhaustive), "fsync"])
def test_a_harvest_killed_by_strace_resumes_to_the_same_store(harvesting: Bench, call: str) -> None:
    """At the record of the second block: its file, before it is forced to disk, and before it has its name."""
    where = harvesting.where
    (store,) = {path.split("/")[0] for path in harvesting.whole.result if "/ledger/" in path}
    record = where / store / "ledger" / "000001.json.tmp"
    killed = traced(call, 1, record, harvesting.case.first(where))
    assert killed.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), killed.stderr
    assert record.exists() and not record.with_suffix("").exists()
    assert harvesting.case.wrong(where) is None
    harvesting.ends_the_same(where)
