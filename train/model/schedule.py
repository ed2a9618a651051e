"""Lengths of a run's phases."""

from shared.errors import UserError


def warmup_steps(name: str, given: int | None, share: float, steps: int) -> int:
    """Return the steps of a warm-up: those `given`, or else a share of the run's.

    Raises `UserError` naming the setting when no step would come after the warm-up.
    """
    found = round(share * steps) if given is None else given
    if found and found >= steps:
        setting, remedy = f"{name}_share = {share:g}", "lower it"
        if given is not None:
            setting, remedy = f"{name}_steps = {given:,}", f"lower it, or use {name}_share"
        raise UserError(
            f"{setting}, and the run has {steps:,} steps, so it would end before the warm-up or with it; {remedy}"
        )
    return found
