"""Attention sinks: positions and tokens whose rows are many times as long as others."""

from collections.abc import Mapping, Sequence

from shared.statistics import OUTLIER_RATIO, Moments, merge
from shared.strata import Stratum


def overall(strata: Sequence[Stratum], moments: Mapping[str, Moments], side: str) -> Moments:
    """Moments of one side at natural frequencies and without position 0; `moments` by `stratum/side`.

    A first stratum that is wider than one position cannot be taken apart, and is then part of it as a whole.
    """
    later = [s for s in strata if s.stop > 1] or strata
    return merge([moments[f"{s.name}/{side}"].scaled(s.natural_rows / s.rows) for s in later])


def warnings(strata: Sequence[Stratum], moments: Mapping[str, Moments]) -> list[str]:
    """What a user should know of sources with a norm over ten times the median, a line each, with what to do."""
    median = overall(strata, moments, "source").norm_quantile(0.5)
    lines = []
    for stratum in strata:
        found = moments[f"{stratum.name}/source"]
        rows, ratio = found.rows_above(OUTLIER_RATIO * median), found.norm_quantile(0.5) / max(median, 1e-30)
        if (stratum.start, stratum.stop) == (0, 1) and ratio > OUTLIER_RATIO:
            lines.append(
                f"position 0 is an attention sink: its source norm is {ratio:.3g} times the median of later positions. "
                "Statistics leave it out, and training bounds its share (rows.max_bos_batch_share); store less of it "
                "with --set store.cap.0=16"
            )
        elif rows:
            lines.append(
                f"{rows:,.0f} of {found.rows:,.0f} rows at positions {stratum.start} to {stratum.stop - 1} have a "
                f"source norm over {OUTLIER_RATIO:g} times the median of {median:.3g}, and can dominate the loss; "
                f"leave them out with --set store.max_norm_quantile={_quantile(rows / found.rows)}, or special tokens "
                "with --set store.exclude_special=true"
            )
    return lines


def _quantile(share: float) -> float:
    """A quantile that leaves out somewhat more than `share`."""
    return next((q for q in (0.9999, 0.999, 0.99, 0.98, 0.95) if 1 - q >= share), 0.9)
