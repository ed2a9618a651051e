"""Lengths of a run's phases, and how often the monitor reports. No torch here."""

from typing import Literal

from shared.check_settings import Unfit


def warmup_steps(name: str, given: int | None, share: float, steps: int) -> int:
    """Return the steps of a warm-up: those `given`, or else a share of the run's.

    However few steps a run has, one comes after a share of them below 1. Raises `Unfit` when none would come.
    """
    found = given
    if found is None:
        found = min(round(share * steps), max(steps - 1, 0)) if share < 1 else steps
    if found and found >= steps:
        setting, remedy = f"{name}_share = {share:g}", "lower it"
        if given is not None:
            setting, remedy = f"{name}_steps = {given:,}", f"lower it, or use {name}_share"
        raise Unfit(
            f"{setting}, and the run has {steps:,} steps, so it would end before the warm-up or with it; {remedy}",
            f"{name}_steps",
            f"{name}_share",
            "steps",
        )
    return found


def monitor_cadence(
    every: int | Literal["auto"], delay: int | Literal["auto"], steps: int, device: str, usual: int
) -> tuple[int, int]:
    """Return the steps between the monitor's reports, 0 for none, and after how many each is complete.

    `usual`: steps between reports on such a `device`, where the run is long enough.
    """
    found = max(1, min(usual, steps // 4)) if every == "auto" else every
    on_device = 0 if device == "cpu" else found // 2
    return found, on_device if delay == "auto" else delay
