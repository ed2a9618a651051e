"""Rules about d_sae, prefixes and k, which are checked before torch is imported, since that takes seconds.

The components call the same functions when a run is resolved.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from shared.errors import UserError
from shared.store.layout import StoreRecord
from train.model.schedule import warmup_steps


def check_sizes(settings: Mapping[str, Any], store: StoreRecord) -> None:
    """Check `settings`, tables with all defaults, of a run on a store. Raises `UserError`."""
    transcoder, activation = settings["transcoder"], settings["activation"]
    d_in = store.d_out if settings["source"] == "target" else store.d_in
    start = None
    if "k" in activation:
        start = k_at_start(**{name: activation[name] for name in _OF_K}, steps=settings["steps"])[0]
    d_sae = multiple("transcoder.d_sae", transcoder["d_sae"], d_in, "8x")
    if transcoder["prefixes"]:
        check_prefixes(transcoder["prefixes"], d_sae)
    if "k" in activation:
        check_k(activation["k"], start, d_sae)


_OF_K = ("k", "k_start", "k_warmup_steps", "k_warmup_share")


def k_at_start(
    k: int, k_start: int | str | None, k_warmup_steps: int | None, k_warmup_share: float, steps: int
) -> tuple[int | None, int]:
    """Return the k of step 0, none where there is no warm-up, and the steps of the warm-up. Raises `UserError`."""
    warmup = warmup_steps("activation.k_warmup", k_warmup_steps, k_warmup_share, steps)
    start = None if k_start is None else multiple("activation.k_start", k_start, k, "3x")
    asked = k_warmup_share if k_warmup_steps is None else k_warmup_steps
    if start not in (None, k) and not asked:
        raise UserError(
            f"activation.k_start = {k_start}, and no warm-up leads from it to k = {k}: every step would "
            "have k; set activation.k_warmup_share above 0, or leave out k_start"
        )
    if start is None and asked:
        raise UserError(
            f"a warm-up of k ({asked:g} by activation.k_warmup_share or k_warmup_steps) has nothing to start from: "
            "set activation.k_start, such as 3x, or the warm-up to 0"
        )
    return start, warmup


def multiple(name: str, value: int | str, unit: int, example: str) -> int:
    """Return a number that is given as such, or as a multiple of `unit`. Raises `UserError` when it is neither."""
    text = str(value)
    number = text.removesuffix("x")
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"{name} must be a positive number or a multiple such as {example}, got {text}")
    return int(number) * (unit if text.endswith("x") else 1)


def check_prefixes(prefixes: Sequence[int], d_sae: int) -> None:
    """Raise `UserError` when prefixes do not rise to `d_sae`."""
    if any(a >= b for a, b in pairwise((0, *prefixes))):
        raise UserError(f"transcoder.prefixes must rise from 1 up, got {list(prefixes)}")
    if prefixes[-1] != d_sae:
        raise UserError(f"transcoder.prefixes must end at d_sae = {d_sae}, got {list(prefixes)}")


def check_k(k: int, start: int | None, d_sae: int) -> None:
    """Raise `UserError` when k is more than there are latents."""
    for name, value in (("k", k), ("k_start", start or 0)):
        if value > d_sae:
            raise UserError(
                f"activation.{name} = {value} is more than d_sae = {d_sae}; lower it or raise transcoder.d_sae"
            )
