"""Rules about widths, d_sae, prefixes and k. No torch here: they are checked before it is imported."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from shared.check_settings import Unfit
from shared.store.layout import StoreRecord
from train.model.schedule import warmup_steps


def source_width(store: StoreRecord, source: Literal["source", "target"]) -> int:
    """Return `d_in` of a transcoder that reads this side of the store's pairs."""
    return store.d_in if source == "source" else store.d_out


def k_at_start(
    k: int, k_start: int | str | None, k_warmup_steps: int | None, k_warmup_share: float, steps: int
) -> tuple[int | None, int]:
    """Return the k of step 0, none where there is no warm-up, and the steps of the warm-up.

    Raises `Unfit` where `k_start` would have no effect, save in a run of one step, which has no room for a warm-up.
    """
    warmup = warmup_steps("activation.k_warmup", k_warmup_steps, k_warmup_share, steps)
    start = None if k_start is None else multiple("activation.k_start", k_start, k, "3x")
    asked = k_warmup_share if k_warmup_steps is None else k_warmup_steps
    if start not in (None, k) and not warmup and not (asked and steps == 1):
        short = f" (activation.k_warmup_share = {asked:g} of {steps:,} steps is less than 1)" if asked else ""
        remedy = "raise it" if asked else "set activation.k_warmup_share above 0"
        raise Unfit(
            f"activation.k_start = {k_start}, and no warm-up leads from it to k = {k}{short}: every step would "
            f"have k; {remedy}, or leave out k_start",
            *_OF_START,
            *(["steps"] if asked else []),
        )
    if start is None and asked:
        raise Unfit(
            f"a warm-up of k ({asked:g} by activation.k_warmup_share or k_warmup_steps) has nothing to start from: "
            "set activation.k_start, such as 3x, or the warm-up to 0",
            *_OF_START,
        )
    return start if warmup else None, warmup


_OF_START = ("activation.k_start", "activation.k_warmup_steps", "activation.k_warmup_share")


def multiple(name: str, value: int | str, unit: int, example: str) -> int:
    """Return a number that is given as such, or as a multiple of `unit`. Raises `Unfit` when it is neither."""
    text = str(value)
    number = text.removesuffix("x")
    if not re.fullmatch("[0-9]{1,18}", number) or int(number) < 1:
        raise Unfit(f"{name} must be a positive number or a multiple such as {example}, got {text}", name)
    return int(number) * (unit if text.endswith("x") else 1)


def check_prefixes(prefixes: Sequence[int], d_sae: int) -> None:
    """Raise `Unfit` when there are no prefixes, or they do not rise to `d_sae`."""
    if not prefixes:
        said = f"transcoder.prefixes is an empty list; for one group use --set transcoder.prefixes=[{d_sae}]"
        raise Unfit(said, "transcoder.prefixes")
    if any(a >= b for a, b in pairwise((0, *prefixes))):
        raise Unfit(f"transcoder.prefixes must rise from 1 up, got {list(prefixes)}", "transcoder.prefixes")
    if prefixes[-1] != d_sae:
        said = f"transcoder.prefixes must end at d_sae = {d_sae}, got {list(prefixes)}"
        raise Unfit(said, "transcoder.prefixes", "transcoder.d_sae")


def check_decoder_norm(norm: str, kind: str, *, needs_unit: bool) -> None:
    """Raise `Unfit` when decoder rows are free, and the penalty of the activation's `kind` needs norm 1."""
    if norm == "free" and needs_unit:
        raise Unfit(
            f"transcoder.decoder_norm = free and activation.kind = {kind}: its penalty is on latent values, which "
            "would shrink while decoder rows grow; use --set transcoder.decoder_norm=unit",
            "transcoder.decoder_norm",
            "activation.kind",
        )


def check_k(k: int, start: int | None, d_sae: int) -> None:
    """Raise `Unfit` when k is more than there are latents."""
    for name, value in (("k", k), ("k_start", start or 0)):
        if value > d_sae:
            raise Unfit(
                f"activation.{name} = {value} is more than d_sae = {d_sae}; lower it or raise transcoder.d_sae",
                f"activation.{name}",
                "activation.k",
                "transcoder.d_sae",
            )
