"""Which held-out blocks an evaluation reads. No torch here."""

from shared.store.layout import StoreRecord


def calibration_blocks(store: StoreRecord) -> range:
    """Return the held-out blocks that thresholds are calibrated on: where there is one block alone, that one."""
    return store.calibration_blocks or store.report_blocks


def evaluated_rows(store: StoreRecord) -> int:
    """Return how many rows an evaluation passes through the encoder: report rows by both rules, and to calibrate."""
    blocks = 2 * len(store.report_blocks) + len(calibration_blocks(store))
    return blocks * sum(s.rows for s in store.plan.stored_strata)
