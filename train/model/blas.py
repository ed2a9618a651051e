"""The one dense product of a step, in the faster of the two libraries that are there."""

import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from train.model import room
from train.model.kernels import numba_loops

Blas = Literal["torch", "numpy"]


def faster_here() -> Blas:
    """Return the library to take on this processor: the same at every call, since sums differ in their last bits.

    torch's wheels for x86 bring MKL, which is slow on processors of another maker; numpy's bring OpenBLAS, which is not
    (docs/benchmarks.md, "step").
    """
    other = torch.backends.mkl.is_available() and platform.machine() == "x86_64" and "GenuineIntel" not in _vendor()
    return "numpy" if other else "torch"


def bfloat16_units() -> bool:
    """Tell whether this processor multiplies bfloat16 faster than float32, and torch has what makes use of it."""
    flags = _first_line("flags").split()
    return torch.backends.mkldnn.is_available() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


@contextmanager
def tf32(on: bool = True) -> Iterator[None]:
    """Let products of float32 on CUDA run in TF32, which rounds both sides to 10 bits and sums in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def addmm(blas: Blas, bias: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """Return bias [F] + x [B, D] @ W [D, F], without gradient."""
    if blas == "torch":
        out = room.matrix(x, len(x), W.shape[1])
        return torch.addmm(bias.detach(), x.detach(), W.detach(), out=out)
    found = product(blas, x, W)
    numba_loops.add_to_rows(found.numpy(), bias.detach().numpy())
    return found


def product(blas: Blas, x: Tensor, W: Tensor) -> Tensor:
    """Return x [B, D] @ W [D, F], without gradient; by `numpy`, on CPU, each thread takes a part of the rows."""
    out = room.matrix(x, len(x), W.shape[1])
    if blas == "torch":
        return torch.mm(x.detach(), W.detach(), out=out)
    threads = max(1, min(torch.get_num_threads(), len(x)))
    size = -(-len(x) // threads)
    rows, columns, found = (tensor.detach().numpy() for tensor in (x, W, out))

    def part(low: int) -> None:
        with np.errstate(all="ignore"):  # as torch: a NaN is the run's to refuse
            np.matmul(rows[low : low + size], columns, out=found[low : low + size])

    with _libraries().limit(limits=1, user_api="blas"):
        if threads == 1:
            part(0)
        else:
            list(_pool(threads).map(part, range(0, len(x), size)))
    return out


@lru_cache(1)
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()  # finding them takes milliseconds


@lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "product")


def _vendor() -> str:
    return _first_line("vendor_id") or platform.processor()


def _first_line(name: str) -> str:
    """Return the first line of /proc/cpuinfo that begins with `name`; empty where there is none."""
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    return next((line for line in lines if line.startswith(name)), "")
