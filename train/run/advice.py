"""What is known about the choices of a run, by the width of its rows and how much text the store holds."""

from shared.store.store import Store
from train.run.settings import RunConfig

_RATES = {
    128: "at a width of 128, 0.004 was better than 0.008 (decoder rows of norm 1, the embedded store)",
    576: "at a width of 576, 0.0056 was best (3,000 steps; for 1,000 steps 0.008 was)",
}
"""What was measured of the learning rate, by the width of rows (docs/decisions/010-recipe.md)."""
_READ_AGAIN = 2
"""Passes over the training rows up to which more text was worth little (docs/training.md, `How much ...`)."""


def advice(config: RunConfig, store: Store) -> list[str]:
    """Return lines on the choices of a run on `store`, and what is known of others.

    They are of the learning rate, k, d_sae, steps, and the weight of the whole dictionary beside its prefixes.
    """
    rows = len(config.training_blocks) * sum(one.rows for one in store.record.plan.stored_strata)
    settings = config.settings
    k, d_sae, d_in = settings.activation.expected_l0, settings.transcoder.d_sae, config.d_in
    assert isinstance(d_sae, int)
    known = _RATES.get(d_in) or "; ".join([*_RATES.values(), f"{d_in:,} was not measured"])
    if d_in > max(_RATES):
        known += ", and wider rows need less: also try a half"
    passes = settings.steps * settings.rows.batch_rows / max(rows, 1)
    more = (
        "twice as much text lowered fvu by 5 % (65,000 to 720,000 rows, read 23 to 2 times)"
        if passes > _READ_AGAIN
        else "more text would gain little"
    )
    lines = [
        f"optimizer.lr: {settings.optimizer.lr:g} here; {known} (docs/decisions/010-recipe.md)",
        f"transcoder.d_sae: {d_sae:,}, {d_sae / d_in:.3g} times the width; doubling it lowered fvu by 6 % "
        "(1,024 to 8,192 at width 576)",
        f"steps: {settings.steps:,} read each of {rows:,} training rows {passes:.2g} times; {more}; doubling the steps "
        "lowered fvu by 13 % (375 to 3,000)",
    ]
    if k:
        lines.insert(1, f"activation.k: {k:g} active latents per row; doubling it lowered fvu by 12 % (8 to 64)")
    if len(settings.transcoder.prefixes or ()) > 1:
        lines.append(
            f"transcoder.whole_weight: {settings.transcoder.whole_weight:g}; with 16 instead of 4, fvu of all latents "
            "was 3 % lower, and that of the first sixteenth of them 7 % higher (3,000 steps at width 576)"
        )
    return [*lines, "figures: docs/training.md, `How much a longer or wider run gives`"]
