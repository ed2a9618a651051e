"""Kernels compile for GPUs that are not here, in a process of its own: tests run them in the interpreter of Triton."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.compile import CAPABILITIES

ROOT = Path(__file__).parents[2]
KERNELS = {
    "_keep", "_histogram", "_find", "_count", "_compact", "_row_topk",
    "_products", "_prefix_loss", "_starts", "_sums_by_latent", "_long_sums", "_add_long_sums", "_weigh",
    "_row_squares", "_noted_squares", "_clip", "_adam", "_excess", "_meet", "_quiet",
    "_prepare", "_count_fired", "_add_batch",
}  # fmt: skip
HELPERS = {"_key", "_view", "_load", "_pick", "_digits", "_order", "row_at", "rows_of_pairs", "_weighted_sum", "_group",
           "_write_sum", "_long_latent", "_value_of", "_encode", "_row_square", "_squared", "_moves", "_move_row",
           "_normalise", "_nth", "_share", "_so_often", "_with_extra", "_sum_of_shares", "_sum_of_weights"}  # fmt: skip
"""What kernels call."""


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    "capabilities", [CAPABILITIES[-1:], pytest.param(CAPABILITIES[:-1], marks=pytest.mark.exhaustive)], ids=str
)
def test_every_kernel_compiles_for_every_gpu_without_spilling_registers(capabilities: tuple[int, ...]) -> None:
    pytest.importorskip("triton", reason="triton is not installed: there is none for this platform")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-W", "ignore", "-m", "tests.gpu.compile", "--json"]
    line += [part for one in capabilities for part in ("--capability", str(one))]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    found = [json.loads(one) for one in done.stdout.splitlines()]
    assert {(one["kernel"], one["capability"]) for one in found} == {
        (kernel, capability) for kernel in KERNELS for capability in capabilities
    }, done.stderr
    assert [one for one in found if one["spilled"]] == []
    # A GPU has 65,536 registers for the threads that run at once: two programs of a kernel have room, or a large one.
    assert [
        one for one in found if one["registers"] * one["warps"] * 32 * (1 if one["warps"] == 16 else 2) > 65536
    ] == []
    assert [one for one in found if one["shared"] > 48 * 1024] == []  # more would have to be asked for
    assert done.returncode == 0, done.stderr


def test_no_kernel_of_the_project_is_left_out() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "train/model/kernels").glob("triton_*.py")))
    assert set(re.findall(r"\blaunch\(\s*(_\w+),", text)) == KERNELS
    assert set(re.findall(r"@triton.jit\ndef (\w+)", text)) - HELPERS == KERNELS
