"""How much the monitor tracks and keeps, and how many bytes that takes. No torch here: imported before it."""

import math

MOST_TRACKED_PAIRS = 2048
"""Pairs that are tracked at once: half a millisecond of a step of 1,024 rows with 32 active latents each."""
TRACKED_PAIRS_BYTES = MOST_TRACKED_PAIRS * 8 * (2 + 9)
"""Of their state."""
MOST_PARTNERS = 8
"""Latents that are listed for each latent: those with which it correlates most."""
MOST_SAMPLED_MEETINGS = 2**27
"""Of two latents on a row, each pair of them twice, in a report: about a third of a second on one core."""


def state_bytes(every: int, delay: int, sample_rows: int, batch_rows: int, per_row: int, d_sae: int) -> int:
    """Return the most bytes of a monitor's state, with so many rows in a batch and active latents on a row.

    `every`, `delay` and `sample_rows` (`monitor.rows`) are its settings, as numbers.
    """
    rows = -(-sample_rows // batch_rows) * batch_rows if every else 0
    pending = 32 * MOST_PARTNERS * d_sae if delay else 0
    tracked = TRACKED_PAIRS_BYTES if every else 0
    return tracked + 20 * min(rows * per_row, math.isqrt(2 * MOST_SAMPLED_MEETINGS * rows)) + 24 * rows + pending
