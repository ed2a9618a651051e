"""The one process policy: how idle threads wait, and what becomes of freed memory."""

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEEP = 2**30


def set_policy() -> None:
    """Set both, unless the user's environment does; call it before torch is imported.

    Idle OpenMP threads sleep instead of spin: spinning gains little on an idle machine, and costs most of the speed
    where another process holds a core. Freed buffers of up to 1 GiB are kept by the process: given back, they are
    mapped and cleared anew at every step.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if platform.libc_ver()[0] == "glibc" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _KEEP)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEEP)
