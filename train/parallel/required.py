"""What a cut dictionary asks of a run's other settings."""

from collections.abc import Mapping

from shared.errors import UserError
from train.model.activations import Activation
from train.parallel.ranks import Ranks


def required(
    shards: int, asked: Mapping[str, object], activation: Activation, d_sae: int, device: str
) -> dict[str, object]:
    """Return the settings that `shards` fix, by name; none for one. `asked`: what the user has for them.

    Raises `UserError` where others are asked for, where the run cannot be cut so, and where the processes that there
    are cannot share it.
    """
    Ranks().mine(shards)
    if shards == 1:
        return {}
    if d_sae % shards:
        raise UserError(f"transcoder.d_sae = {d_sae} is no multiple of parallel.shards = {shards}; change either")
    if activation.kind != "batchtopk":
        raise UserError(
            f"parallel.shards = {shards} is for activation.kind = batchtopk, got {activation.kind}; use "
            "parallel.shards=1"
        )
    if device.startswith("cuda:"):
        raise UserError(f"device = {device} is one device, and each process takes its own; use device=cuda")
    fixed: dict[str, object] = {
        "threads": 1,
        "kernels": "compiled" if device == "cpu" else "triton",
        "product_dtype": "float32",
    }
    for name, value in fixed.items():
        if asked[name] not in (value, "auto", 0):
            raise UserError(
                f"parallel.shards = {shards} needs {name} = {value}, got {asked[name]}; leave it out, or use "
                "parallel.shards=1"
            )
    return fixed
