"""Every Triton kernel compiled for GPUs that are not here, by the compiler that a GPU would get it from.

    python -m tests.gpu.compile               prints registers, spills and shared memory of every kernel
    python -m tests.gpu.compile --json        the same as JSON lines

Kernels are launched by the project's own code on tensors on CPU; each launch ends after compiling. What is compiled is
therefore what would run, with the constants, the types and the divisibilities of that launch. Needs no CUDA.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CAPABILITIES = (80, 86, 89, 90)
"""Of an A100, an RTX 3090 or A10, an RTX 4090 or L4, and an H100 or H200."""
WIDTHS = (128, 576, 2304, 8192)
"""Of rows: the embedded model's, those of SmolLM 135M and Gemma 2 2B, and the widest."""
PREFIXES = (1, 5)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What ptxas says of one kernel."""

    kernel: str
    variant: str
    """The type of what it reads first, and its constants"""
    capability: int
    warps: int
    registers: int
    """Of each thread; at most 255"""
    spilled: int
    """Bytes of each thread that are stored to memory for want of registers, and read again"""
    shared: int
    """Bytes of shared memory of each program"""


def compile_all(capabilities: Sequence[int] = CAPABILITIES) -> list[Compiled]:
    """Compile what training launches. Raises what Triton raises; `TRITON_INTERPRET` must not be set."""
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: dict[tuple[int, str], Compiled] = {}
    knobs.nvidia.dump_ptxas_log = True

    def compile_only(self: Any, grid: object) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            with redirect_stdout(StringIO()) as said:
                kernel = self.run(*arguments, grid=grid, warmup=True, **constants)
            if (capability, kernel.hash) not in found:
                found[capability, kernel.hash] = _measured(
                    kernel, said.getvalue(), _variant(arguments, constants), capability
                )

        return launch

    with patch.object(JITFunction, "__getitem__", compile_only):
        for capability in capabilities:
            driver.set_active(_Absent(capability))
            launch_all()
    return list(found.values())


def launch_all() -> None:
    """Launch every kernel in every variant that training has."""
    for width in WIDTHS:
        for prefixes in PREFIXES:
            _launch_sums(width, prefixes)
    for dtype in (torch.float32, torch.bfloat16):
        _launch_selection(dtype)
    for width in WIDTHS:
        _launch_adam(width)
        _launch_pairs(width)


def _launch_selection(dtype: torch.dtype) -> None:
    from train.model.kernels.triton_kernels import Triton

    for d_sae in (4096, 18432):
        pre_acts = torch.zeros(4, d_sae, dtype=dtype)
        Triton().batch_topk(pre_acts, 32, torch.zeros(()))
        for among in (None, torch.zeros(d_sae, dtype=torch.bool)):
            Triton().row_topk(pre_acts, 32, among)


def _launch_sums(width: int, prefixes: int) -> None:
    from train.model.kernels.sparse_ops import Groups
    from train.model.kernels.triton_kernels import Triton
    from train.model.sparse_latents import SparseLatents

    ops, F, pairs = Triton(), 64, 1024  # so many that a latent may have a long sum
    rows, latents = torch.arange(pairs) // (pairs // 4), torch.arange(pairs) % F
    active = SparseLatents.of(rows, latents, torch.ones(pairs), torch.Size((4, F)))
    x, W, bias = torch.zeros(4, width), torch.zeros(F, width), torch.zeros(F)
    group = torch.zeros(F, dtype=torch.int64)
    ops.products(active, x, W, bias)
    for base in (x[:1], x):
        weights: Tensor = torch.ones(())
        ops.errors_and_gradients(active.values, W, base, x, active, Groups(group, prefixes, weights))
    for add in (False, True):
        ops.sums_by_latent(active, active.values, x, W.clone(), add=add, alone=bias)
        table, groups = torch.zeros(4 * prefixes, width), Groups(group, prefixes, 1.0)
        ops.sums_by_latent(active, active.values, table, W.clone(), add=add, groups=groups, times=torch.ones(()))


def _launch_adam(width: int) -> None:
    from train.model.kernels import triton_adam

    scalars, powers = torch.zeros(5), torch.zeros(4, dtype=torch.float64)
    for shape, unit in (((4, width), True), ((4, width), False), ((width,), False)):
        rows, grad, low = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16)
        along, squares = torch.zeros(2, triton_adam.rows_of(rows))
        triton_adam.row_squares(grad, rows, unit, along, squares)
        for shadow in (None, low):
            rest = {"unit": unit, "times": 1.0, "betas": (0.9, 0.999), "eps": 1e-8}
            triton_adam.adam(rows, grad, (rows.clone(), rows.clone()), along, shadow, scalars, **rest)  # type: ignore[arg-type]
        triton_adam.clip(squares, 1.0, powers, scalars)


def _launch_pairs(width: int) -> None:
    from train.model.kernels.triton_pairs import co_activation, pair_loss, partners, together
    from train.model.sparse_latents import SparseLatents

    first = torch.arange(600) % 60
    rows, group = torch.zeros(64, width, requires_grad=True), torch.zeros(64, dtype=torch.int64)
    pairs = partners(first, first + 1, 64)
    pair_loss(rows, pairs, group, group.bool(), (0.3, 0.7), 1.0).backward()
    active = SparseLatents.of(torch.arange(64), group, torch.ones(64), torch.Size((64, 64)))
    co_activation(active.values, active, together(first, first + 1, torch.ones(600), 64))


class _Absent:
    """A driver of a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _measured(kernel: Any, said: str, variant: str, capability: int) -> Compiled:
    """Read what ptxas `said` of a kernel."""
    registers, spilled = (re.search(pattern, said) for pattern in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
    assert registers and spilled, said
    meta = kernel.metadata
    return Compiled(kernel.name, variant, capability, meta.num_warps, int(registers[1]), int(spilled[1]), meta.shared)


def _variant(arguments: tuple[Any, ...], constants: dict[str, int]) -> str:
    """Name the type of what a kernel reads first, and its constants."""
    kind = next(str(one.dtype).removeprefix("torch.") for one in arguments if isinstance(one, Tensor))
    return " ".join([kind, *(f"{name}={value}" for name, value in constants.items() if name != "num_warps")])


def table(found: Sequence[Compiled]) -> Iterator[str]:
    """Lines of a table, one for each kernel and variant, the registers and spilled bytes of each GPU beside it."""
    capabilities = sorted({one.capability for one in found})
    yield f"{'kernel':64} warps  shared  registers/spilled bytes: " + "  ".join(f"sm_{c}" for c in capabilities)
    rows: dict[tuple[str, int, int], list[str]] = {}
    for one in sorted(found, key=lambda one: one.capability):
        name = f"{one.kernel} {one.variant}"
        rows.setdefault((name, one.warps, one.shared), []).append(f"{one.registers}/{one.spilled}")
    for (name, warps, shared), numbers in rows.items():
        yield f"{name:64} {warps:5} {shared:7}  " + "  ".join(numbers)


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--capability", type=int, action="append", help="of a GPU, for example 90; default: four")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:  # what was compiled before would hide an error
        os.environ["TRITON_CACHE_DIR"] = cache
        found = compile_all(options.capability or CAPABILITIES)
    for line in [json.dumps(asdict(one)) for one in found] if options.json else table(found):
        print(line)
    sys.exit(any(one.spilled for one in found))


if __name__ == "__main__":
    main()
