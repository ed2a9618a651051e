"""Did it work, and what is worth a look: one line each, with the number that says so. Pure.

Limits are this project's, from its own runs and from the run it started from, whose latents correlated 0.92 to 0.99 and
fired at position 0 alone. Each is in the report beside its figure.
"""

from collections.abc import Iterator

from shared.store.strata import POSITION_0, positions
from train.live.log_rows import MAY_FIND_NOTHING
from train.live.run_files import METRICS, TIMING, USAGE
from train.report.report_record import Check, Report, State
from train.run.metrics import LOWER_LR, describe_missing, diverged, logged_steps

_TENTH = 0.1
"""Of the run: what fvu is averaged over."""


def verdict(report: Report) -> list[Check]:
    """List all checks that the report has figures for, in the order in which a reader asks."""
    return [
        *_finished(report),
        *_records(report),
        *_reconstruction(report),
        *_generalisation(report),
        *_convergence(report),
        *_stability(report),
        *_l0(report),
        *_dead(report),
        *_directions(report),
        *_correlations(report),
        *_redundancy(report),
        *_position_0(report),
        *_outliers(report),
        *_strata(report),
        *_usage(report),
        *_reading(report),
    ]


def _check(name: str, said: str, figure: float, look: float, bad: float, see: str) -> Check:
    """Judge a figure that is worse the larger it is; where `look` is above `bad`, the smaller."""
    sign = 1 if bad >= look else -1
    state: State = "bad" if sign * figure > sign * bad else "look" if sign * figure > sign * look else "good"
    return Check(name=name, state=state, said=said, figure=figure, look_beyond=look, bad_beyond=bad, see=see)


def _finished(report: Report) -> Iterator[Check]:
    if report.imported:
        yield _check("finished", f"Imported, not trained here: {report.imported}.", 1.0, 1.0, 0.0, "settings")
        return
    share = report.step / report.steps
    made = [f"made longer at step {one.step:,}, when it had {one.steps_before:,} steps" for one in report.extensions]
    said = "; ".join([f"Trained for all of its {report.steps:,} steps", *made]) + "."
    if share < 1 and report.usage and report.usage.step == report.steps:
        said = f"An earlier checkpoint: step {report.step:,} of a run that went on to its last one, {report.steps:,}."
    elif share < 1:
        said = f"At step {report.step:,} of {report.steps:,}: continue with `python -m train resume`."
    yield _check("finished", said, share, 1.0, 0.0, "curves")


def _records(report: Report) -> Iterator[Check]:
    """Name rows of the logs and files that the run wrote and that are not there; nothing where all are."""
    expected = _logged(report)
    for log, steps in ((METRICS, report.training.steps), (TIMING, report.timing.steps)):
        if missing := sorted(set(expected) - set(steps)):
            said = f"{log}: {describe_missing(missing)}; figures over steps are of the others."
            yield _check(log, said, len(missing) / len(expected), 0.0, 0.999, "curves")
    if expected and not report.usage:
        said = f"{USAGE} is missing or damaged: what each component did is not known."
        yield _check(USAGE, said, 1.0, 0.0, 1.0, "usage")


def _logged(report: Report) -> list[int]:
    """List the steps that the logs should have rows of."""
    if report.imported:
        return []
    settings = report.settings
    return logged_steps(settings["log_every"], settings["evaluation"]["every"], report.steps, report.step)


def _reconstruction(report: Report) -> Iterator[Check]:
    fvu = report.held_out.fvu
    l0 = report.held_out.l0
    said = f"Held out, {fvu:.4f} of the target's variance is unexplained (fvu), at {l0:.1f} latents per row"
    if diverged(fvu):
        said = f"The training diverged; {LOWER_LR}. {said}"
    if report.linear_fvu is not None:
        yield _check("reconstruction", f"{said}; the best linear map leaves {report.linear_fvu:.4f}.", fvu,
                     min(report.linear_fvu, 1.0), 1.0, "strata")  # fmt: skip
    else:
        yield _check("reconstruction", f"{said}; the mean alone leaves 1.", fvu, 0.5, 1.0, "strata")


def _generalisation(report: Report) -> Iterator[Check]:
    trained = [value for value in report.training.series.get("fvu_natural", []) if value is not None]
    newest_is_there = set(_logged(report)[-1:]) <= set(report.training.steps)
    if trained and trained[-1] > 0 and newest_is_there:
        ratio = report.held_out.fvu_training_rule / trained[-1]
        said = (
            f"By the training rule, fvu is {report.held_out.fvu_training_rule:.4f} on held-out rows "
            f"and {trained[-1]:.4f} on the last training rows, a ratio of {ratio:.2f}."
        )
        yield _check("generalisation", said, ratio, 1.25, 2.0, "curves")


def _convergence(report: Report) -> Iterator[Check]:
    """Check whether fvu still falls before the learning rate does: after that it falls in any case."""
    end = report.steps * (1 - report.decay_share)
    if report.step >= end and (fall := _fall(report, end)) is not None:
        said = f"In the last tenth before the learning rate falls, fvu {_moved(fall)}"
        more = ": a longer run would still gain." if fall > 0.02 else ": a longer run at this rate would gain little."
        yield _check("convergence", said + more, fall, 0.02, 1.0, "curves")


def _stability(report: Report) -> Iterator[Check]:
    if (fall := _fall(report, report.step)) is not None:
        yield _check("stability", f"Over the last tenth of training fvu {_moved(fall)}.", -fall, 0.02, 0.2, "curves")


def _fall(report: Report, end: float) -> float | None:
    """Return by what share fvu is lower over the tenth of the run before step `end` than over the tenth before."""
    fvus = report.training.series.get("fvu_natural", [])
    found = [(step, value) for step, value in zip(report.training.steps, fvus, strict=True) if value is not None]
    tenth = report.steps * _TENTH
    last = [value for step, value in found if end - tenth < step <= end]
    before = [value for step, value in found if end - 2 * tenth < step <= end - tenth]
    if not last or not before or not (earlier := sum(before) / len(before)) > 0:
        return None
    return 1 - sum(last) / len(last) / earlier


def _moved(fall: float) -> str:
    return f"{'fell' if fall >= 0 else 'rose'} by {abs(fall):.1%}"


def _l0(report: Report) -> Iterator[Check]:
    if report.k and report.k_trained not in (None, report.k):
        off = abs(report.k_trained / report.k - 1) if report.k_trained else 0.0
        said = (
            f"k is still warming up: trained so far with {report.k_trained:g} latents per row; "
            f"the goal is {report.k:g}. Figures are at a k that this transcoder was not trained with."
        )
        yield _check("l0", said, off, 0.0, 0.5, "curves")
    elif report.k:
        off = abs(report.held_out.l0 / report.k - 1)
        said = f"On average {report.held_out.l0:.1f} latents are active on a held-out row; k is {report.k:g}."
        yield _check("l0", said, off, 0.1, 0.5, "curves")


def _dead(report: Report) -> Iterator[Check]:
    share, d_sae = report.held_out.dead_share, report.d_sae
    said = f"{share:.1%} of {d_sae:,} latents are active on none of {report.held_out.rows:,} held-out rows."
    yield _check("dead", said, share, 0.15, 0.5, "density")


def _directions(report: Report) -> Iterator[Check]:
    if report.duplicates:
        found = report.duplicates.directions
        share = found.share_with_neighbour_above["0.8"]  # above what training pushes pairs to, by default 0.7
        said = (
            f"{share:.2%} of live latents have another with a cosine above 0.8; the closest pair has "
            f"{found.largest:.2f}, that of as many random directions {report.nearest.random_largest:.2f}."
        )
        yield _check("directions", said, share, 0.02, 0.2, "nearest")


def _correlations(report: Report) -> Iterator[Check]:
    if found := report.duplicates:
        pairs = found.pairs_above["0.8"]
        share = pairs / max(found.directions.live, 1)
        said = (
            f"{pairs:,} {'pair' if pairs == 1 else 'pairs'} of latents correlated above 0.8 over {found.rows:,} rows, "
            f"{share:.2%} of the number of live latents; the largest correlation is "
            f"{found.largest_correlation:.2f}."
        )
        yield _check("correlations", said, share, 0.005, 0.05, "pairs")


def _redundancy(report: Report) -> Iterator[Check]:
    if found := report.redundancy:
        judged = found.live - found.not_judged
        share = found.redundant / max(judged, 1)
        said = (
            f"{found.redundant:,} of {judged:,} latents are redundant: merging them into others costs less than "
            f"{found.largest_share:.0%} of what they explain; {found.not_judged:,} were too rare to judge."
        )
        yield _check("redundancy", said, share, 0.01, 0.1, "redundancy")


def _position_0(report: Report) -> Iterator[Check]:
    if found := report.at_position_0:
        total = sum(found.counts)
        most = sum(count for low, count in zip(found.edges, found.counts, strict=False) if low >= 0.5 - 1e-9)
        said = f"{most:,} of {total:,} live latents have half or more of their active rows at position 0."
        yield _check("position 0", said, most / max(total, 1), 0.01, 0.1, "density")


def _outliers(report: Report) -> Iterator[Check]:
    """Check whether rows that are enormous or constant take latents from the others: outliers, and position 0."""
    first, out = report.held_out.strata.get(POSITION_0), report.held_out.outliers
    named = [("position 0", first.l0) if first else None, ("an outlier", out.l0) if out else None]
    found = [part for part in named if part]
    if found and report.held_out.l0 > 0:
        name, most = max(found, key=lambda part: part[1])
        said = (
            f"{most:,.0f} {'latent is' if round(most) == 1 else 'latents are'} active on a row of {name}, "
            f"{most / report.held_out.l0:.1f} times as many as on an ordinary row."
        )
        yield _check("outliers", said, most / report.held_out.l0, 4.0, 16.0, "strata")


def _strata(report: Report) -> Iterator[Check]:
    strata = report.held_out.strata.items()
    fvus = {name: part.fvu for name, part in strata if name != POSITION_0 and part.fvu is not None}
    if len(fvus) > 1 and report.held_out.fvu > 0:
        name, fvu = max(fvus.items(), key=lambda item: item[1])
        ratio = fvu / report.held_out.fvu
        said = f"Positions {positions(name)} are explained worst: fvu {fvu:.4f}, {ratio:.2f} times the overall fvu."
        yield _check("strata", said, ratio, 1.5, 4.0, "strata")


def _usage(report: Report) -> Iterator[Check]:
    if report.usage:
        every = report.usage.components
        resting = [name for name in MAY_FIND_NOTHING if name in every and every[name].calls and not every[name].effect]
        idle = [name for name, one in every.items() if not one.effect and name not in resting]
        said = f"All {len(every) - len(resting)} components that are on had an effect."
        if resting:
            said = f"{said[:-1]}; {' and '.join(resting)} looked and found nothing to do."
        if idle:
            said = f"{len(idle)} of {len(every)} components that are on had no effect: {', '.join(idle)}."
        yield _check("usage", said, len(idle) / max(len(every), 1), 0.0, 0.999, "usage")


def _reading(report: Report) -> Iterator[Check]:
    shares = [value for value in report.timing.series.get("data_wait_share", []) if value is not None]
    if shares:
        share = sum(shares) / len(shares)
        yield _check("reading", f"Steps waited for rows {share:.1%} of the time.", share, 0.1, 0.5, "curves")
