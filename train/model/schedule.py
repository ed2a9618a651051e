"""Lengths of a run's phases."""

from shared.errors import UserError


def warmup_steps(name: str, given: int | None, share: float, steps: int) -> int:
    """Return the steps of a warm-up: those `given`, or else a share of the run's.

    Raises `UserError` naming the setting when the run ends before the warm-up does.
    """
    if given is not None and given > steps:
        raise UserError(
            f"{name}_steps = {given:,}, and the run has {steps:,} steps, so it would end before the warm-up; "
            f"lower it, or use {name}_share"
        )
    return round(share * steps) if given is None else given
