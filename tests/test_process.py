"""The process policy: set by default, never over the user's own choice."""

import os
import subprocess
import sys

import pytest

from shared.console.process import let_idle_threads_sleep

FAULTS = """
import resource, sys
from shared.console.process import keep_freed_memory
if sys.argv[1] == "on":
    keep_freed_memory()
import numpy as np
for _ in range(3):
    np.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(2**22)  # 32 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    let_idle_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.skipif(sys.platform != "linux", reason="the policy on freed memory is glibc's, on Linux")
def test_freed_buffers_are_used_again_without_page_faults() -> None:
    def faults(policy: str) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, policy], capture_output=True, check=True).stdout)

    assert faults("on") < faults("off") / 10
