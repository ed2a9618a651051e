"""Rows of a block as int8, and what is lost by it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from harvest.writer.attention_sinks import overall
from harvest.writer.blocks import Array
from shared.store.row_arrays import BLOCK_UNITS, ROW_SCALE, SIDES
from shared.store.statistics import OUTLIER_RATIO, Moments, RowParts, moments_of
from shared.store.strata import Stratum

if TYPE_CHECKING:
    from shared.store.int8_rows import Int8Rows

MOST_LOST = 1e-3
"""The floor that is warned of above, as a share of fvu."""
_LOST = "lost"


class Encoded(NamedTuple):
    """A stratum of a block."""

    arrays: dict[str, Array]
    """As they are written, by name."""
    rows: "dict[str, Int8Rows]"


def encoded(arrays: Mapping[str, Array], pool: Executor) -> Encoded:
    """Return a stratum's arrays with its rows as int8."""
    from shared.store.int8_rows import encode  # numba, which other harvests do without

    rows = dict(zip(SIDES, pool.map(encode, [arrays[side] for side in SIDES]), strict=True))
    scales = [one.row_scale for one in rows.values()]
    units = [np.stack([one.mean, one.unit]) for one in rows.values()]
    values: dict[str, Array] = {side: one.values for side, one in rows.items()}
    both = {ROW_SCALE: np.stack(scales, axis=1), BLOCK_UNITS: np.concatenate(units, axis=1)}
    return Encoded({**arrays, **values, **both}, rows)


def pack_lost(
    strata: Sequence[Stratum],
    moments: Mapping[str, Moments],
    rows: Mapping[str, RowParts],
    norms: Mapping[str, Callable[[], Array]],
) -> dict[str, Array]:
    """Return tensors [2] to save for each `stratum/side` of a block, beside its moments.

    They are the squared error of its rows, and their squared distance from their mean. Rows over ten times the block's
    median norm count for neither: training leaves them out, and their variance would hide what the others lose.
    """
    found = {}
    for side in SIDES:
        limit = OUTLIER_RATIO * overall(strata, moments, side).norm_quantile(0.5)
        for name in (f"{stratum.name}/{side}" for stratum in strata):
            some, m2 = cast("Int8Rows", rows[name]), moments[name].m2
            if moments[name].rows_above(limit):
                some = some.where(norms[name]() <= limit)
                m2 = moments_of(some).m2
            found[f"{name}/{_LOST}"] = np.array([some.errors.sum(), m2.sum()])
    return found


def floors(strata: Sequence[Stratum], blocks: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return by side what rows lost, as a share of their variance: no transcoder that is trained on them has less fvu.

    `blocks` are what `pack_lost` saved of each. At natural frequencies, without position 0 where that is a stratum
    among others. The variance is that within blocks and strata, so the share is rather too large.
    """
    later = [s for s in strata if not s.is_position_0] or strata
    found = {}
    for side in SIDES:
        parts = [s.natural_rows / s.rows * block[f"{s.name}/{side}/{_LOST}"] for block in blocks for s in later]
        error, squares = np.sum(parts, axis=0).tolist()
        found[side] = error / squares if squares else 0.0
    return found


def warnings(found: Mapping[str, float]) -> list[str]:
    """Tell of sides whose rows lost too much."""
    return [
        f"int8 takes {share:.2%} of the variance of the {side} rows, and no transcoder trained on them gets an fvu "
        f"below that; up to {MOST_LOST:.1%} is usual. Harvest with --set store.storage=bfloat16 to keep them"
        for side, share in found.items()
        if share > MOST_LOST
    ]
