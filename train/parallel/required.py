"""What a cut dictionary asks of a run's other settings. No torch here."""

from collections.abc import Mapping

from shared.check_settings import Unfit


def required(shards: int, asked: Mapping[str, object], kind: str, d_sae: int, device: str) -> dict[str, object]:
    """Return the settings that `shards` fix, by name; none for one. `asked`: what the user has for them.

    `kind`: that of the activation. Raises `Unfit` where others are asked for, and where the run cannot be cut so.
    """
    if shards == 1:
        return {}
    if d_sae % shards:
        said = f"transcoder.d_sae = {d_sae} is not a multiple of parallel.shards = {shards}; change either"
        raise Unfit(said, "parallel.shards", "transcoder.d_sae")
    if kind != "batchtopk":
        said = f"parallel.shards = {shards} is for activation.kind = batchtopk, got {kind}; use --set parallel.shards=1"
        raise Unfit(said, "parallel.shards", "activation.kind")
    if device.startswith("cuda:"):
        said = f"device = {device} is one device, and each process takes its own; use --set device=cuda"
        raise Unfit(said, "parallel.shards", "device")
    fixed: dict[str, object] = {
        "threads": 1,
        "kernels": "compiled" if device == "cpu" else "triton",
        "product_dtype": "float32",
    }
    for name, value in fixed.items():
        if asked[name] not in (value, "auto", 0):
            raise Unfit(
                f"parallel.shards = {shards} needs {name} = {value}, got {asked[name]}; leave it out, or use "
                "--set parallel.shards=1",
                "parallel.shards",
                name,
            )
    return fixed


def mine(shards: int, rank: int, processes: int) -> range:
    """Return the shards of one of some processes. Raises `Unfit` where they cannot share them evenly."""
    if shards == 1 and processes > 1:
        raise Unfit(
            f"torchrun started {processes} processes, and parallel.shards = 1 leaves them nothing to share; start "
            "a new run with --set parallel.shards=8, or one process with: python -m train",
            "parallel.shards",
        )
    if shards % processes:
        raise Unfit(
            f"{processes} processes cannot share parallel.shards = {shards} evenly; start as many as divide it: "
            "torchrun --nproc-per-node=N",
            "parallel.shards",
        )
    each = shards // processes
    return range(rank * each, (rank + 1) * each)
