"""What the last bits of a forward pass depend on beside the request, and whether a store's blocks have it in common."""

from collections.abc import Sequence
from pathlib import Path

import torch

from harvest.llm.model import check_device
from harvest.writer import ledger
from harvest.writer.target import Target
from shared.errors import UserError, warn

_DRIVER = Path("/sys/module/nvidia/version")
_CHANGES_ROWS = ("gpu", "torch", "cuda")
"""Of what is recorded, what decides on the kernels that a GPU runs. The driver does not."""


def arithmetic(device: str) -> dict[str, str]:
    """Return what a block's record says of the device and the software that computed it. Raises `UserError`.

    Of a CPU: the vector instructions that torch uses there, which decide on its kernels. Of a GPU: model and driver.
    """
    check_device(device)
    found = {"torch": torch.__version__, "processor": torch.backends.cpu.get_cpu_capability()}
    if not device.startswith("cuda"):
        return found
    driver = _DRIVER.read_text().strip() if _DRIVER.is_file() else "unknown"
    cuda = torch.version.cuda or "none"
    return {**found, "gpu": torch.cuda.get_device_name(device), "driver": driver, "cuda": cuda}


def require_same(targets: Sequence[Target], now: dict[str, str], *, inexact: bool) -> None:
    """Raise `UserError` where a GPU of another kind, or other software on one, computed blocks that are there.

    With `inexact` that is a warning. What was not recorded is not compared, and nothing is on CPU.
    """
    if "gpu" not in now:
        return
    for target in targets:
        for block, then in ledger.computed_on(target).items():
            differs = [name for name in _CHANGES_ROWS if then.get(name, now[name]) != now[name]]
            if not differs:
                continue
            what = ", ".join(f"{name} {then[name]}, here {now[name]}" for name in differs)
            line = f"{target.path}: block {block} was computed with {what}: the last bits of rows can differ"
            if not inexact:
                raise UserError(f"{line}; continue with the same, or pass --inexact")
            warn(f"{line}; the ledger records what computed each block")
            return
