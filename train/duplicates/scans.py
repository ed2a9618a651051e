"""Scans of all decoder rows for close ones, shared by the monitor and the mined pairs.

Legend: F latents, O d_out, N pairs.
"""

import math

from torch import Tensor

from train.duplicates.directions import Pairs, close_pairs, steps_between_scans
from train.model.transcoder import Transcoder

_SELDOM = 1e-9
"""Expected pairs of random rows below which a scan of them is taken to find none."""


class Scans:
    """Finds close pairs of the present decoder rows; what two ask for after the same step is found once."""

    def __init__(self, transcoder: Transcoder, reports_every: int = 0, *, random_at_start: bool = False) -> None:
        """Scan the rows of `transcoder`.

        `reports_every`: steps between the monitor's reports, 0 without. `random_at_start`: step 0 has random rows.
        """
        self._transcoder, self._random_at_start = transcoder, random_at_start
        self.at_reports = transcoder.W_dec.device.type == "cuda" and reports_every > 0
        """Whether scans fall on reports, so that these and mined pairs share them."""
        self._reports_every = reports_every
        self._mined: tuple[int, float] | None = None
        self._kept: tuple[int, Pairs, Tensor] | None = None

    def steps_between(self, rows: int, cost_share: float) -> int:
        """Return the steps between scans, as `steps_between_scans`; on CUDA rounded up to a multiple of reports."""
        found = steps_between_scans(self._transcoder.W_enc, self._transcoder.W_dec, rows, cost_share)
        return math.ceil(found / self._reports_every) * self._reports_every if self.at_reports else found

    def expect(self, every: int, floor: float) -> None:
        """Say that `mined` is going to be asked for pairs above `floor` every so many steps."""
        self._mined = every, floor

    def reported(self, done: int, live: Tensor, floor: float) -> tuple[Pairs, Tensor]:  # cosines [N]
        """Return the pairs of `live` [n] latents with a cosine above `floor`, and the cosines, after `done` steps.

        They are kept where mined pairs are to be found under the same weights.
        """
        self._kept = None
        if not self._mined or done % self._mined[0]:
            return self._found(live, floor)
        pairs, cosines = self._found(live, min(floor, self._mined[1]))
        self._kept = done, pairs, cosines
        return _above(pairs, cosines, floor)

    def mined(self, done: int, live: Tensor, floor: float) -> tuple[Pairs, Tensor]:  # cosines [N]
        """Return the same, from what was found for the report of this step if there was one."""
        kept, self._kept = self._kept, None
        return _above(*kept[1:], floor) if kept and kept[0] == done else self._found(live, floor)

    def forget(self) -> None:
        """Drop what was found: rows have changed since, and no step was taken."""
        self._kept = None

    def _found(self, live: Tensor, floor: float) -> tuple[Pairs, Tensor]:
        return close_pairs(self._transcoder.unit_decoder(), live, floor, self._transcoder.blas)

    def none_at(self, step: int, floor: float) -> bool:
        """Tell whether rows at `step` are random ones of which no two can be expected to be as close as `floor`."""
        F, O = self._transcoder.W_dec.shape
        # Of two random directions, the cosine is above m with a probability of at most (1 - m^2)^((O - 1) / 2).
        expected = F * F * (1 - floor * floor) ** ((O - 1) / 2)
        return step == 0 and self._random_at_start and expected < _SELDOM


def _above(pairs: Pairs, cosines: Tensor, floor: float) -> tuple[Pairs, Tensor]:
    above = cosines > floor
    return pairs.kept(above), cosines[above]
