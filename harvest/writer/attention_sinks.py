"""Find attention sinks: positions and tokens whose rows are many times as long as others."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from harvest.writer.blocks import Array
from shared.store.outliers import LISTED_ABOVE, LongRows, long_rows
from shared.store.row_arrays import SIDES
from shared.store.statistics import BINS_PER_OCTAVE, OUTLIER_RATIO, Moments, merge
from shared.store.strata import Stratum


def overall(strata: Sequence[Stratum], moments: Mapping[str, Moments], side: str) -> Moments:
    """Return the moments of one side at natural frequencies and without position 0; `moments` by `stratum/side`.

    A first stratum that is wider than one position cannot be taken apart, and is then part of it as a whole.
    """
    later = [s for s in strata if not s.is_position_0] or strata
    return merge([moments[f"{s.name}/{side}"].scaled(s.natural_rows / s.rows) for s in later])


def listed(
    strata: Sequence[Stratum], moments: Mapping[str, Moments], norms: Mapping[str, Callable[[], Array]]
) -> dict[str, LongRows]:
    """List the long rows of a block, by `stratum/side`; `moments` are those of its stored rows.

    `norms` give the norms [n] of these rows, and are called where there are long ones.
    """
    found = {}
    for side in SIDES:
        above = LISTED_ABOVE * overall(strata, moments, side).norm_quantile(0.5)
        for name in (f"{stratum.name}/{side}" for stratum in strata):
            any_long = moments[name].rows_above(above * 2 ** (-1 / BINS_PER_OCTAVE))
            found[name] = long_rows(norms[name]() if any_long else np.zeros(0), above)
    return found


def warnings(strata: Sequence[Stratum], moments: Mapping[str, Moments]) -> list[str]:
    """Tell of rows with a norm over ten times the median, a line for each stratum and side that has some.

    `moments` are those of a block. Each line says what training does with these rows, and how to change that.
    """
    lines = []
    for side in SIDES:
        median = overall(strata, moments, side).norm_quantile(0.5)
        for stratum in strata:
            found = moments[f"{stratum.name}/{side}"]
            rows, ratio = found.rows_above(OUTLIER_RATIO * median), found.norm_quantile(0.5) / max(median, 1e-30)
            if stratum.is_position_0 and ratio > OUTLIER_RATIO:
                lines.append(
                    f"position 0 is an attention sink: its {side} norm is {ratio:.3g} times the median of later "
                    "positions. Training leaves it out unless it is run with --set rows.position_0=train; a smaller "
                    "share of it takes less disk: --set store.cap.0=16"
                )
            elif rows:
                lines.append(
                    f"{rows:,.0f} of {found.rows:,.0f} rows at positions {stratum.start} to {stratum.stop - 1} of a "
                    f"block have a {side} norm over {OUTLIER_RATIO:g} times the median of {median:.3g}. They are "
                    "stored and listed as outliers; training and its figures leave them out unless it is run with "
                    "--set rows.outliers=train"
                )
    return lines
