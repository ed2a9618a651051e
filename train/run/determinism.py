"""What the last bits of training depend on beside settings and rows: threads, processor and libraries."""

import numba
import numpy as np
import torch
from threadpoolctl import threadpool_info

from shared.errors import UserError


def arithmetic(device: str) -> dict[str, str]:
    """Return what the last bits depend on in this process; recorded in every checkpoint."""
    found = {
        "threads": str(torch.get_num_threads()),
        "loop_threads": str(numba.get_num_threads()),
        "processor": torch.backends.cpu.get_cpu_capability(),
        **{name: module.__version__ for name, module in (("torch", torch), ("numpy", np), ("numba", numba))},
    }
    if kernels := sorted({pool["architecture"] for pool in threadpool_info() if pool.get("architecture")}):
        found["openblas"] = " ".join(kernels)  # which of its loops it takes on this processor
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def require_same(recorded: dict[str, str], now: dict[str, str], what: str) -> None:
    """Raise `UserError` where a run would not go on with the same bits. What was not recorded is not compared."""
    if differs := {name: value for name, value in recorded.items() if now.get(name) != value}:
        changes = ", ".join(f"{name} {value}, here {now.get(name, 'none')}" for name, value in sorted(differs.items()))
        threads = f" --threads {differs['threads']}" if "threads" in differs else ""
        raise UserError(
            f"{what} was trained with {changes}: the last bits would differ; "
            + (f"continue with{threads}, or with " if threads else "continue anyway with ")
            + "--inexact"
        )
