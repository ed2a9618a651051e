"""Which settings go with a kind of device. No torch here: they are checked before it is imported."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from shared.check_settings import Unfit


def check_on_device(settings: Mapping[str, Any], device: str) -> None:
    """Raise `Unfit` where settings ask for what a device does not have."""
    on_cpu, kernels = device == "cpu", settings["kernels"]
    if settings["resident_rows"] == "on" and on_cpu:
        said = "resident_rows = on is for CUDA, and the device is cpu; use --set resident_rows=auto"
        raise Unfit(said, "resident_rows", "device")
    if settings["blas"] == "numpy" and not on_cpu:
        raise Unfit(f"blas = numpy is for the CPU, and the device is {device}; use --set blas=torch", "blas", "device")
    if kernels == "compiled" and not on_cpu:
        said = f"kernels = compiled is for the CPU, and the device is {device}; use --set kernels=auto"
        raise Unfit(said, "kernels", "device")
    if kernels == "triton" and on_cpu and not os.environ.get("TRITON_INTERPRET"):
        said = f"kernels = triton is for CUDA, and the device is {device}; use --set kernels=auto"
        raise Unfit(said, "kernels", "device")
    if kernels == "triton" and find_spec("triton") is None:
        said = "kernels = triton needs the package triton: pip install triton, or use --set kernels=plain"
        raise Unfit(said, "kernels")
    _check_product(settings["product_dtype"], kernels, settings["activation"]["kind"], device)


def _check_product(wanted: str, kernels: str, kind: str, device: str) -> None:
    if kernels == "auto":
        kernels = default_kernels(device)
    if wanted == "guarded-bfloat16" and (kernels, kind) != ("compiled", "batchtopk"):
        raise Unfit(
            "product_dtype = guarded-bfloat16 is for activation.kind = batchtopk on kernels = compiled, got "
            f"{kind} on {kernels}; use --set product_dtype=float32",
            "product_dtype",
            "activation.kind",
            "kernels",
        )
    if wanted == "tf32" and device == "cpu":
        said = "product_dtype = tf32 is for CUDA, and the device is cpu; use --set product_dtype=float32"
        raise Unfit(said, "product_dtype", "device")


def default_kernels(device: str) -> Literal["compiled", "plain"]:
    """Return the kernels that a device has in any case."""
    return "compiled" if device == "cpu" else "plain"
