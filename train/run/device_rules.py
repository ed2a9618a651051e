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
    if settings["step_graph"] == "on" and (why_not := why_no_step_graph(settings, device)):
        raise Unfit(f"step_graph = on, and {why_not}; use --set step_graph=auto", "step_graph")


def why_no_step_graph(settings: Mapping[str, Any], device: str) -> str | None:
    """Tell why the steps of a run on `device` cannot be graphs; none where they can, or `auto` kernels may."""
    if device == "cpu":
        return "the device is cpu"
    if settings["parallel"]["shards"] > 1:
        return f"parallel.shards = {settings['parallel']['shards']}: a step waits for other processes"
    kernels = "triton" if settings["kernels"] == "auto" else settings["kernels"]
    return why_no_graph(kernels, settings["activation"], settings["auxk"], settings["rows"]["batch_rows"])


def why_no_graph(kernels: str, activation: Mapping[str, Any], auxk: Mapping[str, Any], rows: int) -> str | None:
    """Tell why a step on batches of `rows` cannot be a graph on CUDA; none where it can."""
    if kernels != "triton":
        return f"kernels = {kernels}: those of triton alone keep on the device all that changes"
    if "k" not in activation:
        return f"activation.kind = {activation['kind']}: how many latents are active is asked at every step"
    if auxk["coefficient"] and rows % auxk["row_stride"]:
        return f"rows.batch_rows = {rows} is not a multiple of auxk.row_stride = {auxk['row_stride']}"
    return None


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
