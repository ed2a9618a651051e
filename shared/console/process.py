"""Process-wide policy: how idle threads wait, and what becomes of freed memory."""

import ctypes
import os
import platform
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEEP = 2**30


def let_idle_threads_sleep() -> None:
    """Let OpenMP threads sleep at barriers, unless the user's environment says otherwise; call it before torch loads.

    Spinning gains little on an idle machine, and costs most of the speed where another process holds a core.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """Let the process keep freed buffers of up to 1 GiB, unless the user's environment says otherwise.

    Given back, they are mapped and cleared again at every training step. A harvest, whose buffers differ in size, would
    pay with memory.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)


def give_back_freed_memory() -> None:
    """Return to the system what the process has freed, on all threads; milliseconds, and only with glibc."""
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.default_memory_pool().release_unused()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
