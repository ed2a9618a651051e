"""The controller and the cadence of scans; the terms themselves are in test_duplicates and test_usage."""

import pytest
import torch

from train.duplicates.co_activation import Correlated
from train.duplicates.correlation_report import CorrelationReport, Correlations, Directions, Sample
from train.duplicates.directions import Pairs
from train.duplicates.diversity import ControllerConfig, Diversity, DiversityConfig
from train.model.activations import BatchTopK
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig


def make(config: dict, d_sae: int = 64) -> Diversity:
    shape = TranscoderConfig(d_sae=d_sae).resolve(8, BatchTopK(k=4))
    model = Transcoder(8, 8, shape, BatchTopK(k=4), Normalisation(torch.zeros(8), 1.0, torch.zeros(8), 1.0))
    model.initialise(0)
    return Diversity(model, DiversityConfig.model_validate(config), torch.ones(32), slice(0, 2), 0)


@pytest.mark.parametrize(
    ("scale", "found", "goal", "expected"),
    [
        (1.0, 0.3, 0.1, 2.0),
        (1.0, 0.1, 0.1, 1.0),
        (1.0, 0.05, 0.1, 1.0),
        (1.0, 0.04, 0.1, 0.5),
        (3.0, 0.3, 0.1, 4.0),
        (0.3, 0.0, 0.1, 0.25),
        (1.0, 0.3, None, 1.0),
        (1.0, 0.0, 0.0, 1.0),
    ],
)
def test_a_weight_moves_toward_its_goal_within_bounds(
    scale: float, found: float, goal: float | None, expected: float
) -> None:
    assert ControllerConfig(gain=2.0, most=4.0).moved(scale, found, goal) == expected


def test_the_cost_share_sets_the_steps_between_scans() -> None:
    """A scan of 64 rows of 8 costs half of 2 * 64 * 64 * 8 operations, a step's product 2 * 32 * 8 * 64."""
    assert make({"mined": {"weight": 1, "cost_share": 1.0}}).scan_every == 1
    assert make({"mined": {"weight": 1, "cost_share": 0.05}}).scan_every == 20
    assert make({"mined": {"weight": 1, "cost_share": 0.05}}, d_sae=128).scan_every == 40


def test_terms_keep_to_their_cadence_and_scale() -> None:
    alive = torch.zeros(64, dtype=torch.bool)
    diversity = make({"orthogonality": {"weight": 1.0, "every": 3, "rows": 64}, "mined": {"weight": 1.0}})
    assert [set(diversity.direction_terms(alive, step)) for step in (0, 1, 3)] == [
        {"orthogonality", "mined"}, {"mined"}, {"orthogonality", "mined"}
    ]  # fmt: skip
    once = {name: float(term.detach()) for name, term in diversity.direction_terms(alive, 0).items()}
    diversity.scales["direction"] = 2.0
    for name, term in diversity.direction_terms(alive, 0).items():
        assert float(term.detach()) == pytest.approx(2 * once[name]) and once[name] > 0


def test_pairs_of_other_groups_have_a_margin_of_their_own() -> None:
    alive = torch.zeros(64, dtype=torch.bool)
    near, far = ({"mined": {"weight": 1.0}, "cross_margin": margin} for margin in (0.3, 0.99))
    both, within = (make(config).direction_terms(alive, 0)["mined"] for config in (near, far))
    assert 0 < float(within.detach()) < float(both.detach())


def test_pairs_between_two_margins_are_found_whichever_is_the_smaller() -> None:
    alive = torch.zeros(64, dtype=torch.bool)
    diversity = make({"mined": {"weight": 1.0}, "margin": 0.5, "cross_margin": 0.2})
    diversity.direction_terms(alive, 0)
    cosines = torch.linalg.vecdot(*(diversity._transcoder.W_dec.detach()[side] for side in diversity.mined))
    group = diversity._transcoder.group
    across = group[diversity.mined.first] != group[diversity.mined.second]
    assert ((cosines < 0.5) & across).any()


def test_only_the_closest_pairs_are_kept() -> None:
    alive = torch.zeros(64, dtype=torch.bool)
    few, every = (make({"mined": {"weight": 1.0, "pairs": pairs}, "cross_margin": 0.3}) for pairs in (5, 9999))
    for diversity in (few, every):
        diversity.direction_terms(alive, 0)
    rows = every._transcoder.W_dec.detach()
    cosines = torch.linalg.vecdot(rows[every.mined.first], rows[every.mined.second])
    kept = torch.linalg.vecdot(rows[few.mined.first], rows[few.mined.second])
    assert len(kept) == 5 and torch.equal(kept.sort().values, cosines.topk(5).values.sort().values)


def report_of(step: int, scanned: int, share: float) -> CorrelationReport:
    correlations = Correlations(rows=1, largest=0, pairs_above={"0.8": 0})
    directions = Directions(
        step=scanned, live=1, share_with_neighbour_above={"0.7": share}, share_within_segment_above={}, largest=1,
        effective_number=1, effective_rank=1,
    )  # fmt: skip
    return CorrelationReport(
        step=step, sample=Sample(rows_of="training steps", first_step=1, last_step=step, strata={}), least_together=2,
        without_position_0=correlations, with_position_0=correlations, strata=None, directions=directions, pairs=[],
        clusters=[], persisting_pairs=0, change=None,
    )  # fmt: skip


def test_a_weight_moves_once_for_every_scan() -> None:
    diversity = make({"mined": {"weight": 1.0}, "controller": {"max_share_above_0_7": 0.1, "gain": 2.0}})
    moved = [
        diversity.follow(report_of(step, scanned, 0.5), Correlated.none())
        for step, scanned in ((4, 4), (8, 4), (12, 12))
    ]
    assert moved == [True, False, True] and diversity.scales["direction"] == 4.0


def test_dead_latents_are_not_penalised() -> None:
    dead = torch.ones(64, dtype=torch.bool)
    diversity = make({"orthogonality": {"weight": 1.0}, "mined": {"weight": 1.0}})
    assert all(float(term.detach()) == 0 for term in diversity.direction_terms(dead, 0).values())
    diversity.direction_terms(~dead, 0)
    assert len(diversity.mined.first) and float(diversity.direction_terms(dead, 1)["mined"].detach()) == 0


def test_state_continues() -> None:
    config = {"mined": {"weight": 1.0}, "co_activation": {"weight": 1.0}}
    first, second = make(config), make(config)
    first.direction_terms(torch.zeros(64, dtype=torch.bool), 0)
    first.scales["direction"] = 1.5
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    assert second.scales == first.scales
    assert all(torch.equal(a, b) for a, b in zip(first.mined, second.mined, strict=True))


def listed(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(*(side.tolist() for side in pairs), strict=True))


def test_pairs_of_latents_that_start_anew_are_dropped() -> None:
    diversity = make({"mined": {"weight": 1.0}, "co_activation": {"weight": 1.0}})
    diversity.direction_terms(torch.zeros(64, dtype=torch.bool), 0)
    pairs = Pairs(torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7]))
    found = Correlated(pairs, torch.tensor([0.9, 0.8, 0.7]).double(), torch.tensor([1.0, 2.0, 4.0]).double())
    diversity.follow(report_of(4, 4, 0.5), found)
    before, strength, changes = diversity.mined, diversity._strength, diversity.changes
    new = {2, int(before.first[0])}
    diversity.start_anew(torch.tensor(sorted(new)))
    assert diversity.changes > changes
    left = [pair for pair in listed(before) if not new & set(pair)]
    assert listed(diversity.mined) == left and len(left) < len(before.first)
    kept = [i for i, pair in enumerate(listed(pairs)) if not new & set(pair)]
    assert diversity.correlated.first.tolist() == pairs.first[kept].tolist() and 1 not in kept
    assert torch.equal(diversity._strength, strength[kept])
