"""`tests.bench.same_answer`: its judge against plain figures over rows repeated as often as they count; its grid."""

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.store.store import Store
from tests import reference
from tests.bench import peer_training, same_rows
from tests.bench.judge import COSINE, Part, Rows, Weights, judge
from tests.bench.same_answer import measure, search
from tests.bench.same_rows import SameRows, batches, from_arrays
from tests.stores import SyntheticStore
from train.data.batches import BatchReader
from train.run.load_run import build_transcoder

D, O, F, K = 8, 6, 64, 4


def some_weights() -> Weights:
    """Of a transcoder in which some latents say the same, some nearly, and some nothing."""
    torch.manual_seed(0)
    W_enc, b_enc, W_dec = torch.randn(D, F), torch.randn(F), 0.1 * torch.randn(F, O)
    b_enc[:4] = torch.tensor([3.0, 3.01, 3.0, 3.0])  # no ties
    W_enc[:, 1], W_enc[:, 3] = W_enc[:, 0], W_enc[:, 2] + 0.1 * torch.randn(D)
    W_enc[:, 5], b_enc[5] = 0, -1
    W_dec[7] = 0.5 * W_dec[6]
    W_dec[9] = W_dec[8] + 0.01 * torch.randn(O)
    W_dec[5] = W_dec[4]
    return Weights(W_enc, b_enc, W_dec, torch.randn(O), threshold=1.0, W_skip=torch.randn(D, O))


def some_rows() -> list[Rows]:
    sources = torch.randn(300, D), torch.randn(900, D) + 1
    return [Rows(x, torch.randn(len(x), O) + x[:, :O], weight) for x, weight in zip(sources, (3.0, 1.0), strict=True)]


def repeated(weights: Weights, rows: list[Rows]) -> list[torch.Tensor]:
    """Sources, targets and pre-activations, each as often as it counts; and what K of a row are above on average."""
    parts = [(part.source, part.target, part.source @ weights.W_enc + weights.b_enc) for part in rows]
    x, y, pre_acts = (
        torch.cat([sides[i].repeat(round(part.weight), 1) for sides, part in zip(parts, rows, strict=True)])
        for i in range(3)
    )
    return [x, y, pre_acts, pre_acts.flatten().sort(descending=True).values[K * len(x)]]


def test_the_judge_weighs_rows_and_evaluates_at_the_l0_that_it_is_asked_for() -> None:
    weights, rows = some_weights(), some_rows()
    found = judge(weights, rows, K)

    x, y, pre_acts, equal = repeated(weights, rows)
    kept_by = {"own": pre_acts > 1.0, "equal": pre_acts > equal, "per_row": reference.top_of_rows(pre_acts, K)}
    for name, kept in kept_by.items():
        assert weights.W_skip is not None
        expected = reference.fvu(y, (pre_acts * kept) @ weights.W_dec + weights.b_dec + x @ weights.W_skip)
        part: Part = getattr(found, name)
        assert part.fvu == pytest.approx(expected, rel=1e-4)
        assert part.l0 == pytest.approx(float(kept.sum()) / len(x), abs=1e-2)
    assert K - 3 / len(x) <= found.equal.l0 <= K


def test_the_judge_counts_dead_latents_and_pairs_that_say_the_same_at_that_l0() -> None:
    weights, rows = some_weights(), some_rows()
    found = judge(weights, rows, K)

    _, _, pre_acts, equal = repeated(weights, rows)
    live = (pre_acts > equal).any(0)
    assert 0 < found.dead == pytest.approx(1 - float(live.double().mean()))

    thinned = torch.cat([rows[0].source, rows[1].source[:300]])  # at natural frequencies without repeating any
    pre_acts = (thinned @ weights.W_enc + weights.b_enc).double()
    latents = (pre_acts * (pre_acts > equal)).numpy()
    correlations = together = 0
    for i in range(F):
        for j in range(i + 1, F):
            both = ((latents[:, i] > 0) & (latents[:, j] > 0)).sum()
            together += both >= 10
            correlations += both >= 10 and np.corrcoef(latents[:, i], latents[:, j])[0, 1] > 0.8
    assert 1 <= found.correlated == correlations < together

    unit = weights.W_dec / weights.W_dec.norm(dim=1, keepdim=True)
    close = [(i, j) for i in range(F) for j in range(i + 1, F) if unit[i] @ unit[j] > COSINE and live[i] and live[j]]
    assert (6, 7) in close and (4, 5) not in close, "a dead latent has no pairs"
    assert found.parallel == len(close)


def test_a_map_without_a_threshold_of_its_own_and_one_that_diverged_are_judged_too() -> None:
    weights, rows = some_weights(), some_rows()
    assert judge(weights._replace(threshold=None), rows, K)[:3] == (None, *judge(weights, rows, K)[1:3])
    assert judge(weights._replace(b_dec=torch.full((O,), torch.nan)), rows, K).equal.fvu == math.inf


@pytest.mark.parametrize(("optimum", "tried"), [(2, 3), (1, 4), (16, 6), (0.25, 6)])
def test_a_grid_grows_until_its_best_rate_is_not_at_an_edge(optimum: float, tried: int) -> None:
    found: list[float] = []

    def fvu_at(lr: float) -> float:
        found.append(lr)
        return abs(math.log2(lr / optimum)) if lr < 64 else math.inf

    assert search(fvu_at, (1, 2, 4), most=9) == (optimum, True)
    assert len(found) == len(set(found)) == tried


def test_a_grid_that_stops_growing_says_that_its_best_rate_is_at_an_edge() -> None:
    assert search(lambda lr: 1 / lr, (1, 2, 4), most=5) == (16, False)


def options(store: Path, work: Path, **given: Any) -> Namespace:
    """Of a bench of seconds."""
    shape = {"steps": 3, "k": 4, "d_sae": 128, "seeds": 2, "most": 4}
    sets = ["rows.batch_rows=16", "monitor.every=0", "diversity.co_activation.weight=0"]
    return Namespace(store=store, work=work, preset="tiny", rates=None, **shape, set=sets, **given)


@pytest.mark.parametrize("name", ["ours, Matryoshka BatchTopK", "ours, autoencoder"])
def test_peers_get_the_rows_of_our_run_without_position_0(pristine: SyntheticStore, tmp_path: Path, name: str) -> None:
    bench = SameRows(options(pristine.path, tmp_path))
    store, config = bench.resolved(bench.settings(name, 1e-3, 5))
    reader = BatchReader(
        store,
        range(config.first_block, config.last_block),
        config.settings.rows,
        5,
        torch.device("cpu"),
        config.settings.source,
    )
    found = list(batches(store, config))
    assert len(found) == 3
    for step, sides in enumerate(found):
        batch = reader.batch(step)
        assert batch.strata.keys() == {"001-004", "004-016", "016-032"}
        expected = build_transcoder(config, store).normalised(batch.source, batch.target)
        wanted = expected[1:] if name == "ours, autoencoder" else expected
        assert all(torch.equal(side, one) for side, one in zip(sides, wanted, strict=True))


def test_a_bench_that_was_killed_goes_on_with_what_it_has(
    pristine: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    store = Store.open(pristine.path)

    def train(_: Store, preset: str, sets: list[str], out: Path) -> None:
        trained.append(out.stem)
        if len(trained) == 3:
            raise KeyboardInterrupt
        torch.manual_seed(len(trained))
        shapes = {"W_enc": (store.record.d_in, 128), "b_enc": (128,), "W_dec": (128, store.record.d_out)}
        shapes["b_dec"] = (store.record.d_out,)
        arrays = {name: torch.randn(shape).numpy() for name, shape in shapes.items()}
        np.savez(out, allow_pickle=False, **arrays, seconds=np.array(1.0))

    monkeypatch.setattr(same_rows, "train_ours", train)
    given = options(pristine.path, tmp_path)
    name = "ours, Matryoshka BatchTopK"
    with pytest.raises(KeyboardInterrupt):
        measure(SameRows(given), name, given)
    figures, seeds = measure(SameRows(given), name, given)
    assert len(trained) - 1 == len(set(trained)), "only what was on its way is trained again"
    again = measure(SameRows(given), name, given)
    assert again == (figures, seeds) and len(trained) - 1 == len(set(trained))

    changed = options(pristine.path, tmp_path)
    changed.steps = 2
    SameRows(changed).result(name, 2e-3, 0)
    assert len(trained) == len(set(trained)) + 1, "another run is another training"


def test_what_a_peer_hands_over_is_checked_against_its_own_module() -> None:
    weights, x = some_weights(), torch.randn(50, D)
    folded = {name: getattr(weights, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}

    def trained(**other: torch.Tensor) -> peer_training.Trained:
        return peer_training.Trained(weights.pre_acts, lambda z: z @ weights.W_dec + weights.b_dec, folded | other)

    peer_training.check(trained(), x, K)
    peer_training.check(trained(threshold=torch.tensor(1.0)), x, K)
    for name in folded:
        with pytest.raises(AssertionError):
            peer_training.check(trained(**{name: folded[name] * 1.1}), x, K)


def test_arrays_of_a_trainer_become_weights() -> None:
    arrays = {name: np.ones(2) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    assert from_arrays(arrays | {"seconds": np.array(1.0)}).threshold is None
    assert from_arrays(arrays | {"threshold": np.array(0.5), "W_skip": np.ones(2)}).threshold == 0.5
