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
            _launch_step(width, prefixes)
    for dtype in (torch.float32, torch.bfloat16):
        _launch_selection(dtype)
    for width in WIDTHS:
        _launch_adam(width)
        _launch_rows(width)
    _launch_counts()


def _launch_selection(dtype: torch.dtype) -> None:
    from train.model.kernels.triton_kernels import Triton

    for d_sae in (4096, 18432):
        pre_acts = torch.zeros(4, d_sae, dtype=dtype)
        Triton().batch_topk(pre_acts, 32, torch.zeros(()))
        for among in (None, torch.zeros(d_sae, dtype=torch.bool)):
            Triton().row_topk(pre_acts, 32, among)


def _launch_sums(width: int, prefixes: int) -> None:
    from train.model.kernels.base import Groups
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
    from train.model.kernels.triton_adam import Moved, adam, adam_of_all, clip, noted_squares, row_squares, rows_of
    from train.model.kernels.triton_sums import norm_parts

    scalars, powers, betas = torch.zeros(5), torch.zeros(4, dtype=torch.float64), (0.9, 0.999)
    for shape, unit in (((4, width), True), ((4, width), False), ((width,), False)):
        rows, grad = torch.zeros(shape), torch.zeros(shape)
        squares, bias = torch.zeros(rows_of(rows)), torch.zeros(rows_of(rows))
        row_squares(grad, rows, unit, squares)
        clip(squares, bias, bias, 1.0, powers, torch.zeros(()), scalars)
        matrix, one = Moved(rows, grad, rows, rows, None), Moved(bias, bias, bias, bias, None)
        adam(matrix, scalars, times=1.0, betas=betas, eps=1e-8)
        if len(shape) == 1:
            continue
        vector = Moved(rows[0], rows[0], rows[0], rows[0], None)
        for low, bias_low in ((None, None), (rows.bfloat16(), bias.bfloat16())):
            encoder = matrix._replace(low=low), one._replace(low=bias_low)
            adam_of_all(matrix, vector, *encoder, scalars, unit=unit, times=1.0, betas=betas, eps=1e-8)
        if unit:
            first, second = (norm_parts(grad, rows), squares), (norm_parts(grad, None), squares)
            for noted in ([first, second], [first], [second]):
                noted_squares(noted)


def _launch_step(width: int, prefixes: int) -> None:
    """A step with terms that join its loss; of pairs so many that a latent may have a long sum."""
    from train.model.kernels.base import Groups
    from train.model.kernels.triton_pairs import co_activation, pair_loss, partners, together
    from train.model.kernels.triton_quiet import quiet_loss
    from train.model.kernels.triton_step import AuxK, Noted, Plan, pairs_loss
    from train.model.kernels.triton_sums import Every
    from train.model.sparse_latents import SparseLatents

    F, rows, each = 64, 1024, 2
    of_row, latents = torch.arange(rows * each) // each, torch.arange(rows * each) % F
    first, group = torch.arange(600) % 60, torch.zeros(F, dtype=torch.int64)
    x, dead, weight = torch.zeros(rows, width), group.bool(), torch.ones(prefixes)
    every = Every(4, torch.zeros((), dtype=torch.int64))
    bias = torch.zeros(1, width, requires_grad=True)
    W_enc, b_enc = torch.zeros(F, width).T.requires_grad_(), torch.zeros(F, requires_grad=True)
    W_dec, norms = torch.zeros(F, width, requires_grad=True), dict[str, Noted]()
    active = SparseLatents.of(of_row, latents, torch.ones(len(of_row)), torch.Size((rows, F)))
    auxk = AuxK(dead, every, 1.0, 64, torch.ones(()))
    plan = Plan(Groups(group, prefixes, weight), True, norms, unit=True, auxk=auxk)
    loss, values, left, joined = pairs_loss(x, W_enc, b_enc, W_dec, bias, x, active, plan)
    pair_loss(joined, W_dec, partners(first, first + 1, F), group, dead, (0.3, 0.7), 1.0)
    co_activation(joined, values, active, together(first, first + 1, torch.ones(600), F))
    quiet_loss(joined, W_enc, b_enc, x[:4], x[:4, :1], every.number, 4, 0.1)
    loss.backward()
    kept = of_row < rows // 4
    active = SparseLatents.of(of_row[kept], latents[kept], torch.ones(int(kept.sum())), torch.Size((rows // 4, F)))
    plan = Plan(Groups(group, 1, auxk.weight), True, norms, unit=True, among=dead, every=every)
    pairs_loss(x, W_enc, b_enc, W_dec, bias[:1], left, active, plan)[0].backward()


def _launch_rows(width: int) -> None:
    from train.model.kernels.triton_rows import Stored, prepared

    mean, scale, longest = torch.zeros(width), torch.ones(()), torch.ones(4, dtype=torch.float64)
    bad, number, places = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64), torch.arange(4)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for found, eps in ((None, None), (places, 1e-6)):
            side = Stored(torch.zeros(4, width, dtype=dtype), mean, scale, longest)
            prepared(side, side, found, bad, number, eps)


def _launch_counts() -> None:
    from train.model.kernels.triton_counts import add_batch, count_fired
    from train.model.sparse_latents import SparseLatents

    bad, number = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    active = SparseLatents.of(torch.arange(64), torch.arange(64) % 8, torch.ones(64), torch.Size((64, 64)))
    since = torch.zeros(64, dtype=torch.int64)
    count_fired(active, since, since.bool(), 5, torch.ones(()), torch.ones(()), 0.99)
    sums = torch.zeros(3 * (100 + 5 + 2) + 18, dtype=torch.float64)
    add_batch(sums, torch.ones(3, 100), torch.ones(3, 7), torch.ones(()), [torch.ones(())] * 4, bad, number)


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
