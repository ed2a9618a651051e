"""Pairs that are tracked over all rows: their sums beside a float64 reference, and a rare pair that samples miss."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.test_monitor import ALIVE, dense_of, make_monitor, make_step
from train.duplicates import tracked
from train.duplicates.co_activation import correlated_pairs
from train.duplicates.correlation_report import change_of
from train.duplicates.directions import Pairs
from train.duplicates.monitor_limits import MOST_TRACKED_PAIRS, TRACKED_PAIRS_BYTES
from train.duplicates.tracked import TrackedPairs
from train.model.sparse_latents import SparseLatents

F, B, RARE = 64, 1024, (11, 40)
EVERYTHING = Pairs(*torch.combinations(torch.arange(F)).T)


def dense_batch(seed: int) -> NDArray[np.float64]:
    """[B, F] values of latents, each active on a row of sixteen; those of `RARE` on a row of 20,000, together."""
    rng = np.random.default_rng(seed)
    dense = rng.lognormal(0, 0.5, (B, F)) * (rng.random((B, F)) < 1 / 16)
    together = rng.random(B) < 1 / 20_000
    dense[:, RARE[0]] = together * rng.lognormal(0, 0.5, B)
    dense[:, RARE[1]] = dense[:, RARE[0]] * rng.lognormal(0, 0.1, B)
    return dense.astype(np.float32).astype(np.float64)


def sparse(dense: NDArray[np.float64]) -> SparseLatents:
    """The same as triples, with others beside them whose values are not above 0."""
    there = torch.from_numpy((dense > 0) | (np.random.default_rng(0).random(dense.shape) < 0.1))
    rows, latents = there.nonzero(as_tuple=True)
    values = torch.from_numpy(dense).float()[rows, latents]
    return SparseLatents.of(rows, latents, torch.where(values > 0, values, -1.0), torch.Size(dense.shape))


def test_sums_are_those_of_a_dense_reference_whose_old_rows_fade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracked, "_HALF_LIFE", 3000)
    pairs, left_out, batches = TrackedPairs(F, 0.5), slice(0, 100), [dense_batch(seed) for seed in range(4)]
    pairs.propose(EVERYTHING, torch.ones(len(EVERYTHING.first)))
    for dense in batches:
        pairs.add(sparse(dense), left_out)
    found = pairs.found(1.0)
    kept = np.concatenate([dense[100:] for dense in batches])
    weight = np.concatenate([np.full(B - 100, 0.5 ** ((B - 100) * (3 - i) / 3000)) for i in range(4)])
    total, active = weight.sum(), kept > 0
    mean, square = weight @ kept / total, weight @ kept**2 / total
    spread = np.sqrt(np.maximum(square - mean**2, 1e-30))  # of a latent that is never active, too
    r = ((kept * weight[:, None]).T @ kept / total - np.outer(mean, mean)) / np.outer(spread, spread)
    both, alone = (active * weight[:, None]).T @ active, weight @ active
    expected = {
        (i, j) for i in range(F) for j in range(i + 1, F) if both[i, j] >= 1 and r[i, j] > 0
    }  # fmt: skip
    keys = list(zip(*(side.tolist() for side in found.correlated.pairs), strict=True))
    assert set(keys) == expected and len(keys) == len(expected) > 500
    at = tuple(np.array(keys).T)
    assert found.correlated.correlation.numpy() == pytest.approx(r[at], abs=1e-12)
    assert (found.correlated.correlation.diff() <= 0).all()
    assert found.correlated.scale.numpy() == pytest.approx(np.outer(spread, spread)[at], rel=1e-9)
    assert found.measures.rows.numpy() == pytest.approx(both[at], abs=0.5)
    assert found.measures.jaccard.numpy() == pytest.approx(both[at] / (alone[:, None] + alone - both)[at], rel=1e-9)
    assert (found.rows == round(total)).all()


def test_a_rare_pair_is_found_over_many_rows_where_samples_miss_it() -> None:
    """Of ten samples none has it on four rows, which a sample needs to list it."""
    pairs, seen, listed = TrackedPairs(F, 0.5), [], set()
    kept: list[SparseLatents] = []
    for step in range(400):
        dense = dense_batch(1000 + step)
        active = sparse(dense)
        pairs.add(active)
        seen.append(dense[:, RARE])
        kept = [*kept, active][-8:]
        if (step + 1) % 40 == 0:
            sample = SparseLatents.joined(kept).positive()
            of_sample, _ = correlated_pairs(sample, 4, 8)
            strong = of_sample.pairs.kept(of_sample.correlation > 0.5)
            listed |= set(zip(*(side.tolist() for side in strong), strict=True))
            found = pairs.follow(sample, 4, 8, new=False)
    assert RARE not in listed and found is not None
    assert (int(found.correlated.pairs.first[0]), int(found.correlated.pairs.second[0])) == RARE
    assert float(found.correlated.correlation[0]) > 0.9
    assert found.figures((0.5, 0.8)).pairs_above == {"0.5": 1, "0.8": 1}
    since = np.concatenate(seen)[-int(found.rows[0]) :]
    assert 4 <= int(found.measures.rows[0]) <= int((since > 0).all(1).sum() + 20)


def test_a_pair_that_rows_decide_against_is_dropped_and_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracked, "_TRIAL", 1.5 * B)
    pairs, dense = TrackedPairs(F, 0.5), dense_batch(1)
    dense[:, 5] = 0.5 * dense[:, 4]
    chance, copies = (2, 3), (4, 5)
    pairs.propose(Pairs(*torch.tensor([copies, chance]).T), torch.tensor([9, 1]))
    nothing = Pairs(*torch.zeros(2, 0, dtype=torch.int64))
    for left in ({chance, copies}, {copies}):
        pairs.add(sparse(dense), slice(0, 0))
        pairs.propose(nothing, nothing.first)
        assert set(zip(*(side.tolist() for side in pairs.pairs), strict=True)) == left
    pairs.start_anew(torch.tensor([5]))
    assert len(pairs.pairs.first) == 0 == len(pairs.found(0).rows)


def test_where_there_is_no_room_for_all_those_that_met_most_are_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracked, "MOST_TRACKED_PAIRS", 3)
    pairs = TrackedPairs(F, 0.5)
    proposed = Pairs(torch.tensor([0, 1, 2, 3]), torch.tensor([9, 9, 9, 9]))
    assert pairs.propose(proposed, torch.tensor([1, 4, 1, 2])) == 1
    assert pairs.pairs.first.tolist() == [1, 3, 0]
    assert pairs.propose(Pairs(torch.tensor([7]), torch.tensor([9])), torch.tensor([8])) == 1
    assert pairs.pairs.first.tolist() == [1, 3, 0]  # on trial


def test_tracking_continues_from_its_state_and_of_an_old_checkpoint_begins_anew(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, resumed = TrackedPairs(F, 0.0), TrackedPairs(F, 0.0)
    whole.propose(EVERYTHING, torch.ones(len(EVERYTHING.first)))
    whole.add(sparse(dense_batch(1)))
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    resumed.load(state, begun=True)
    for one in (whole, resumed):
        one.add(sparse(dense_batch(2)))
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[name])
    size = sum(tensor.nbytes for tensor in state.values())
    assert size * MOST_TRACKED_PAIRS == TRACKED_PAIRS_BYTES * len(EVERYTHING.first)
    with pytest.raises(ValueError, match="'tracked.second' holds"):
        resumed.load(state | {"tracked.second": torch.full_like(state["tracked.second"], F)}, begun=True)
    with pytest.raises(ValueError, match="'tracked.sums' is"):
        resumed.load(state | {"tracked.sums": state["tracked.sums"][1:]}, begun=True)
    old = TrackedPairs(F, 0.0)
    old.load({}, begun=True)
    assert len(old.pairs.first) == 0 and capsys.readouterr().err.count("before correlated pairs were tracked") == 1


def test_the_second_report_lists_pairs_by_all_rows_since_the_first(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, every=5)
    reports, since = [], []
    for done in range(1, 11):
        step = make_step(done)
        monitor.add(step, done)
        if done > 5:
            since.append(dense_of(step)[4:].double())  # without position 0
        if monitor.due(done):
            reports.append(monitor.report(done, ALIVE))
    first, second = reports
    assert first.tracked is None and all(pair.rows == 72 for pair in first.pairs)
    assert second.tracked is not None and second.tracked.rows == 180 == second.pairs[0].rows
    assert second.pairs[0].key == (3, 20) and second.pairs[0].reports == 2
    assert second.tracked.pairs_above["0.8"] == 1 and second.tracked.largest == pytest.approx(1)
    dense = torch.cat(since)
    assert second.pairs[0].rows_together == pytest.approx(int((dense[:, 3] > 0).sum()), abs=1)
    assert second.change is not None and second.change.pairs_above_0_8 == 0
    assert second.tracked.rows != second.without_position_0.rows
    by_chance = first.without_position_0.model_copy(update={"pairs_above": {"0.8": 8}})
    change = change_of(second, first.model_copy(update={"without_position_0": by_chance}))  # of samples, both
    assert change is not None and change.pairs_above_0_8 == second.without_position_0.pairs_above["0.8"] - 8
    more = second.tracked.model_copy(update={"pairs_above": {"0.8": 5}})
    change = change_of(second.model_copy(update={"tracked": more}), second)
    assert change is not None and change.pairs_above_0_8 == 4
    assert monitor.correlated.pairs.first[0] == 3 and len(monitor.correlated.correlation) > 1  # those of the sample


def test_where_a_first_sample_proposes_nothing_the_next_reports_count_none_and_not_the_samples_pairs() -> None:
    pairs, nothing = TrackedPairs(F, 0.5), sparse(np.zeros((B, F)))
    assert pairs.follow(nothing, 3, 8, new=False) is None
    found = pairs.follow(sparse(dense_batch(3)), 3, 8, new=False)
    assert found and found.figures((0.5, 0.8)).pairs_above == {"0.5": 0, "0.8": 0} and found.without_room == 0
    resumed = TrackedPairs(F, 0.5)
    resumed.load(pairs.state(), begun=True)
    assert resumed.follow(nothing, 3, 8, new=False) is not None
