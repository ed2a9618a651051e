"""The launch of a Triton kernel."""

from typing import Any

import torch
from torch import Tensor

_PER_WARP, _MOST_WARPS = 512, 16
"""Numbers of a block that a warp holds, 16 in each thread, and the most warps of a program."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float, **constants: int) -> None:
    """Run a kernel where its tensors are: Triton itself takes the current device, which may be another one."""
    constants = {"num_warps": max(1, min(_MOST_WARPS, constants["BLOCK"] // _PER_WARP))} | constants
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)
