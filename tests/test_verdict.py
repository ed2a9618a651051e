"""What a report says of good runs, and of planted faults."""

import re

import pytest

from tests.reports import check
from train.report.report_record import Report
from train.report.verdict import verdict


def test_a_finished_good_run_is_told_from_a_bad_one(report: Report) -> None:
    assert check(report, "finished").state == "good" and check(report, "usage").state == "good"
    assert {one.name for one in report.verdict} == {
        "finished", "reconstruction", "generalisation", "convergence", "stability", "l0", "dead", "directions",
        "correlations", "redundancy", "position 0", "outliers", "strata", "usage", "reading",
    }  # fmt: skip
    assert report.verdict == verdict(report)
    for one in report.verdict:
        assert re.search(r"\d", one.said), one


def test_the_run_that_this_project_starts_from_would_have_failed(report: Report) -> None:
    """Latents that correlate 0.92 to 0.99 and fire at position 0 only, and components that never ran."""
    assert report.duplicates and report.at_position_0 and report.usage
    live = report.duplicates.directions.live
    idle = {
        name: one.model_copy(update={"calls": 0, "effect": 0.0}) if name in ("mined", "monitor") else one
        for name, one in report.usage.components.items()
    }
    alike = {"0.5": 1.0, "0.7": 0.9, "0.8": 0.9, "0.9": 0.9}
    bad = report.model_copy(
        update={
            "duplicates": report.duplicates.model_copy(
                update={
                    "pairs_above": {"0.5": 9 * live, "0.8": live, "0.9": live},
                    "largest_correlation": 0.99,
                    "directions": report.duplicates.directions.model_copy(update={"share_with_neighbour_above": alike}),
                }
            ),
            "at_position_0": report.at_position_0.model_copy(update={"counts": [5, *[0] * 18, 5]}),
            "usage": report.usage.model_copy(update={"components": idle}),
        }
    )
    for name in ("directions", "correlations", "position 0"):
        assert check(bad, name).state == "bad", name
    assert check(bad, "position 0").said == "5 of 10 live latents have half or more of their active rows at position 0."
    usage = check(bad, "usage")
    assert usage.state == "look" and usage.said.endswith("had no effect: mined, monitor.")


def test_a_merge_that_found_nothing_is_good_and_one_that_never_looked_is_not(report: Report) -> None:
    assert report.usage
    parts = report.usage.components
    for calls, state in ((2, "good"), (0, "look")):
        merge = next(iter(parts.values())).model_copy(update={"calls": calls, "effect": 0.0})
        usage = report.usage.model_copy(update={"components": parts | {"merge": merge}})
        found = check(report.model_copy(update={"usage": usage}), "usage")
        assert found.state == state and found.said.endswith(
            f"All {len(parts)} components that are on had an effect; merge looked and found nothing to do."
            if calls
            else f"1 of {len(parts) + 1} components that are on had no effect: merge."
        )


@pytest.mark.parametrize(
    ("name", "changed", "state"),
    [
        ("reconstruction", {"fvu": 1.2}, "bad"),
        ("reconstruction", {"fvu": 0.7}, "look"),
        ("reconstruction", {"fvu": 0.2}, "good"),
        ("dead", {"dead_share": 0.6}, "bad"),
        ("dead", {"dead_share": 0.2}, "look"),
        ("dead", {"dead_share": 0.0}, "good"),
        ("l0", {"l0": 3.0}, "look"),
        ("l0", {"l0": 12.1}, "bad"),
        ("l0", {"l0": 6.1}, "good"),
        ("generalisation", {"fvu_training_rule": 1e9}, "bad"),
    ],
)
def test_limits_of_held_out_figures(report: Report, name: str, changed: dict[str, float], state: str) -> None:
    assert report.k == 6
    assert (
        check(report.model_copy(update={"held_out": report.held_out.model_copy(update=changed)}), name).state == state
    )


def test_worse_than_the_best_linear_map_is_worth_a_look(report: Report) -> None:
    held_out = report.held_out.model_copy(update={"fvu": 0.3})
    worse = check(report.model_copy(update={"held_out": held_out, "linear_fvu": 0.2}), "reconstruction")
    assert worse.state == "look" and "the best linear map leaves 0.2000" in worse.said
    for fvu in (0.4, 1.5):  # of few rows, or wide ones, the best map is worse than the mean on others
        better = check(report.model_copy(update={"held_out": held_out, "linear_fvu": fvu}), "reconstruction")
        assert better.state == "good"


@pytest.mark.parametrize(
    ("name", "values", "state", "words"),
    [
        (
            "convergence",
            [1, 1, 1, 1.0, 0.99, 0.5, 0.4, 0.3, 0.2, 0.1],
            "good",
            "fell by 1.0%: a longer run at this rate",
        ),
        (
            "convergence",
            [1, 1, 1, 1.0, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1],
            "look",
            "fell by 20.0%: a longer run would still",
        ),
        ("convergence", [1, 1, 1, 1.0, 1.5, 0.5, 0.4, 0.3, 0.2, 0.1], "good", "rose by 50.0%"),
        ("stability", [1.0] * 8 + [1.0, 0.5], "good", "fell by 50.0%."),
        ("stability", [1.0] * 8 + [1.0, 1.1], "look", "rose by 10.0%."),
        ("stability", [1.0] * 8 + [1.0, 2.0], "bad", "rose by 100.0%."),
    ],
)
def test_convergence_is_judged_before_the_rate_falls_and_stability_at_the_end(
    report: Report, name: str, values: list[float], state: str, words: str
) -> None:
    assert report.decay_share == 0.5
    training = report.training.model_copy(
        update={"steps": [12 * (i + 1) for i in range(10)], "series": {"fvu_natural": values}}
    )
    found = check(report.model_copy(update={"training": training}), name)
    assert found.state == state and words in found.said
