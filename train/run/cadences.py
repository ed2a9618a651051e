"""How often a run logs, reports, evaluates and saves, where the settings leave that to it; and when it merges latents.

How often is chosen by the kind of device and by operations that are counted, not timed: a function of the settings and
the store. On CPU the cadences suit steps of a second. A CUDA device does as many steps in moments, and what is done
between them, much of it by the host, would take longer than they do.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from train.model.schedule import monitor_cadence

_OPERATIONS = 5e13
"""Of the encoder's product that a CUDA device is taken to do in a second. It is not measured: it sets an order of
magnitude."""
_LEAST_SECONDS = 1e-3
"""That a step is taken to last at least: so long the host needs to launch it."""
_LOG, _REPORT, _SAVE = 0.25, 1.0, 60.0
"""Seconds of such steps between rows of the logs, reports, and checkpoints."""
_EVALUATION_SHARE = 0.1
"""Rows of an evaluation by rows of the steps between two: both cost a product."""


Cadence = int | Literal["auto"]
"""Of the settings: steps, or left to the device."""


class Cadences(NamedTuple):
    """Steps between what is done now and then."""

    log: int
    monitor: int
    """0: never"""
    evaluation: int
    checkpoint: int

    @classmethod
    def of(cls, log: Cadence, monitor: Cadence, evaluation: Cadence, checkpoint: Cadence) -> Self:
        """Return those of a run's settings, which are resolved."""
        found = (log, monitor, evaluation, checkpoint)
        assert all(isinstance(one, int) for one in found), "resolve the settings first"
        return cls(*map(int, found))


ON_CPU = Cadences(log=50, monitor=100, evaluation=2000, checkpoint=500)


def chosen(device: str, steps: int, batch_rows: int, d_in: int, d_sae: int, evaluated_rows: int) -> Cadences:
    """Return the cadences of a run on a kind of device; none is shorter than on CPU.

    A kill costs a quarter of the run at most, however fast it is. `evaluated_rows`: those that an evaluation passes
    through the encoder.
    """
    if device == "cpu":
        return ON_CPU
    seconds = max(2 * batch_rows * d_in * d_sae / _OPERATIONS, _LEAST_SECONDS)
    found = Cadences(
        log=_round(_LOG / seconds),
        monitor=_round(_REPORT / seconds),
        evaluation=_round(evaluated_rows / (_EVALUATION_SHARE * batch_rows)),
        checkpoint=min(_round(_SAVE / seconds), steps // 4),
    )
    return Cadences(*map(max, found, ON_CPU))


def resolved(
    settings: Mapping[str, Any], device: str, d_in: int, d_sae: int, evaluated_rows: int
) -> tuple[Cadences, int]:
    """Return the cadences of a run: those that its settings say, and for `auto` those of the device.

    `settings`: tables within each other, with all defaults. Also returns after how many steps a report of the monitor
    is complete.
    """
    steps, monitor = settings["steps"], settings["monitor"]
    usual = chosen(device, steps, settings["rows"]["batch_rows"], d_in, d_sae, evaluated_rows)
    every, delay = monitor_cadence(monitor["every"], monitor["delay"], steps, device, usual.monitor)
    asked = settings["log_every"], settings["evaluation"]["every"], settings["checkpoint"]["every"]
    log, evaluation, checkpoint = (
        auto if one == "auto" else one for one, auto in zip(asked, (usual.log, *usual[2:]), strict=True)
    )
    return Cadences(log=log, monitor=every, evaluation=evaluation, checkpoint=checkpoint), delay


def merge_steps(at: Sequence[float], steps: int) -> list[int]:
    """Return after how many steps each of the shares `at` of a run of `steps` steps merges latents."""
    return [max(1, round(share * steps)) for share in at]


def _round(steps: float) -> int:
    """Return the largest of 1, 2, 5, 10, 20, 50, ... that is not above `steps`, 1 at least."""
    size = 1
    while size * 10 <= steps:
        size *= 10
    return next((size * lead for lead in (5, 2) if size * lead <= steps), size)
