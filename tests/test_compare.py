"""`train compare`: every figure against a dense one in float64, arms, spreads, and what it refuses."""

import json
import os
import re
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.store.store import Store
from tests.runs import SMALL, SMALL_WITHOUT_K, Outcome
from tests.stores import SyntheticStore, make_store
from train.compare.arms import Comparison, Spread, _common_name, spread
from train.compare.comparison_table import _COUNT, _cell
from train.compare.consistency import SAME, Consistency, consistency, densest
from train.compare.measure import cost_per_step, measure_run, position_0_share_of_top
from train.compare.merging import _refitted, alike, densest_of, merge, without
from train.data.batches import StoreRows
from train.evaluation.evaluate import evaluate, evaluate_whole, natural_weights, threshold_at
from train.evaluation.held_out import HeldOutActive, held_out_active
from train.model import checkpoint
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder
from train.redundancy.measure_redundancy import measure_redundancy
from train.report import comparison_page
from train.run.load_run import build_transcoder
from train.run.settings import Settings, read_config, resolve_exclusion

CPU = torch.device("cpu")
Command = Callable[..., Outcome]


@pytest.fixture
def store(tmp_path: Path) -> SyntheticStore:
    """Of which position 0 is stored whole, and other strata in part."""
    return make_store(tmp_path / "store", keep={4: 0.5, 16: 0.75}, held_out_blocks=4)


def train(command: Command, store: SyntheticStore, name: str, *options: object, small: Sequence[str] = SMALL) -> Path:
    found = command("run", "--store", store.path, "--runs", store.path.parent, "--name", name, "--steps", 30,
                    *small, "--set", "evaluation.every=20", "--set", "log_every=2", *options)  # fmt: skip
    assert found.code == 0, found.err
    return found.path


def loaded(run: Path, store: Store) -> Transcoder:
    model = build_transcoder(read_config(run), store)
    model.load_checkpoint(checkpoint.find(run))
    return model


def dense_rows(model: Transcoder, store: Store, threshold: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Latents [R, F] of all report rows in float64, and their strata."""
    latents, strata = [], []
    for chunk in StoreRows(store, 10**9).chunks(store.record.report_blocks, CPU):
        x = model.normalised(chunk.source, chunk.target)[0].double()
        pre_acts = x @ model.W_enc.detach().double() + model.b_enc.detach().double()
        latents.append(pre_acts * (pre_acts > threshold))
        strata += [chunk.stratum] * len(x)
    return torch.cat(latents), strata


def test_figures_equal_those_of_dense_activations(command: Command, store: SyntheticStore) -> None:
    run, opened = train(command, store, "a"), Store.open(store.path)
    found, model = measure_run(run, opened, l0=5.0).figures, loaded(run, opened)
    threshold = threshold_at(model, StoreRows(opened, 1000), 5.0)
    dense, strata = dense_rows(model, opened, threshold)
    weights, blocks = natural_weights(opened), len(opened.record.report_blocks)
    per_block = {name: s.stratum.rows for name, s in opened.strata.items()}
    most, numbers, seen = max(weights.values()), [], dict.fromkeys(per_block, 0)
    for i, name in enumerate(strata):  # thinned to natural frequencies, position 0 as it is
        place = seen[name] % per_block[name]
        seen[name] += 1
        if not weights[name] or place < round(per_block[name] * weights[name] / most):
            numbers.append(i)
    assert 0 < len(numbers) < len(strata) and seen["000-001"] == blocks * per_block["000-001"]
    at_0 = torch.tensor([strata[i] == "000-001" for i in numbers])
    every = dense[numbers]
    rest = every[~at_0]

    live = (every > 0).any(0).nonzero().squeeze(1)
    assert found.live == len(live) and found.dead_share == pytest.approx(1 - len(live) / 64)
    W_dec = model.W_dec.detach().double()[live]
    cosines = (W_dec @ W_dec.T).fill_diagonal_(-1)
    near = cosines.amax(1)
    assert found.nearest.median == pytest.approx(float(near.quantile(0.5)), abs=1e-6)
    assert found.nearest.p99 == pytest.approx(float(near.quantile(0.99)), abs=1e-6)
    assert found.nearest.largest == pytest.approx(float(near.max()), abs=1e-6)
    assert found.share_above_0_7 == float((near > 0.7).double().mean())
    assert found.effective_number == pytest.approx(float((1 / (1 + (cosines > 0.7).sum(1).double())).sum()))
    both = (rest > 0).double().T @ (rest > 0).double()
    correlation = torch.corrcoef(rest.T).nan_to_num().masked_fill(both < 10, 0).triu(1)
    assert found.pairs_correlated_above_0_5 == int((correlation > 0.5).sum()) > 0
    assert found.pairs_correlated_above_0_8 == int((correlation > 0.8).sum())
    assert found.largest_correlation == pytest.approx(float(correlation.max()))

    evaluation = evaluate(model, StoreRows(opened, 100), threshold, seed=0)
    assert found.fvu == pytest.approx(evaluation.fvu, rel=1e-5) and found.l0 == pytest.approx(evaluation.l0)
    assert found.l0 == pytest.approx(5.0, rel=0.3)  # calibrated on other rows
    assert found.cpu_ms_per_step and found.ms_per_step


def test_the_whole_alone_is_evaluated_as_with_all_prefixes(command: Command, store: SyntheticStore) -> None:
    opened = Store.open(store.path)
    model = loaded(train(command, store, "a"), opened)
    threshold = threshold_at(model, StoreRows(opened, 64), 3.0)
    whole, part = (
        evaluate_whole(model, StoreRows(opened, 50), threshold),
        evaluate(model, StoreRows(opened, 64), threshold, seed=0),
    )
    for name in ("fvu", "explained_variance", "l0"):
        assert getattr(whole, name) == pytest.approx(getattr(part, name), rel=1e-6)


def test_a_common_l0_moves_learned_thresholds_together(command: Command, store: SyntheticStore) -> None:
    opened = Store.open(store.path)
    model = loaded(train(command, store, "j", "--set", "activation.kind=jumprelu", small=SMALL_WITHOUT_K), opened)
    learned = model.thresholds().detach()
    for l0 in (2.0, 9.0):
        found = threshold_at(model, StoreRows(opened, 77), l0)
        moved = found[found > 0] - learned[found > 0]
        torch.testing.assert_close(moved, moved[:1].expand_as(moved), atol=1e-5, rtol=0)
        rows = held_out_active(model, StoreRows(opened, 1000), opened.record.calibration_blocks, found)
        assert len(rows.without_position_0.rows) / int((~rows.at_position_0).sum()) == pytest.approx(l0, rel=0.1)


def planted(values: list[tuple[int, int, float]], at_0: list[bool], weight: float, d_sae: int = 4) -> HeldOutActive:
    rows, latents, found = zip(*sorted(values), strict=True)
    shape = torch.Size((len(at_0), d_sae))
    return HeldOutActive(
        active=SparseLatents.of(torch.tensor(rows), torch.tensor(latents), torch.tensor(found), shape),
        stratum=torch.tensor([0 if first else 1 for first in at_0]),
        strata=("000-001", "001-004"),
        weight_of_position_0=weight,
    )


def test_the_share_of_position_0_among_the_strongest_counts_rows_at_natural_frequencies() -> None:
    at_0 = [True, True] + [False] * 20
    rows = [(0, 0, 9.0), (1, 0, 8.5), *((i, 0, i / 10) for i in range(2, 22))]  # both, then 10 - 2 w others
    rows += [(i, 1, 1.0) for i in range(5, 9)]  # never at position 0
    rows += [(0, 2, 1.0)]  # at position 0 alone
    for weight, share in ((1.0, 0.2), (4.0, 0.8), (16.0, 1.0), (0.5, 0.1)):
        found = position_0_share_of_top(planted(rows, at_0, weight))
        assert found.tolist() == pytest.approx([share, 0.0, 1.0, 0.0])


def test_pw_mcc_is_the_best_matching() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator)) for n in (4, 6))
    best = max(
        np.mean([float(first[i].double() @ second[j].double()) for i, j in enumerate(order)])
        for order in permutations(range(6), 4)
    )
    assert consistency([first, second]).pw_mcc == pytest.approx([best], abs=1e-6)
    assert consistency([second, first]).pw_mcc == pytest.approx([best], abs=1e-6)
    same = consistency([first, first[torch.tensor([2, 0, 3, 1])]])
    assert same.pw_mcc == pytest.approx([1], abs=1e-6) and same.in_all == [1, 1]
    assert densest(torch.tensor([1, 3, 4]), torch.tensor([9, 2, 0, 5, 7]), 2).tolist() == [4, 3]


def test_latents_that_all_seeds_have_are_matched_closely_in_each_other() -> None:
    axes, between = torch.eye(8), torch.tensor([[SAME + 0.01, (1 - (SAME + 0.01) ** 2) ** 0.5]])
    first = axes[:4]
    second = torch.cat([axes[1:4], axes[7:]])  # lacks axis 0
    third = torch.cat([axes[3:4], between @ axes[[2, 6]], axes[4:6]])  # axis 3, nearly axis 2, and not axis 1
    found = consistency([first, second, third])
    assert found.in_all == [2 / 4, 2 / 4, 2 / 4]
    assert found.pw_mcc == pytest.approx([3 / 4, (2 - 0.29) / 4, (2 - 0.29) / 4], abs=1e-6)
    assert consistency([first, axes[4:5]]) == Consistency([0.0], [0.0, 0.0])


def test_copies_merge_for_nothing_and_others_do_not(command: Command, store: SyntheticStore) -> None:
    """One latent split into two of half the effect, which fire together: merging must bring back the whole."""
    opened = Store.open(store.path)
    model = loaded(train(command, store, "a", "--set", "transcoder.skip=false"), opened)
    threshold = threshold_at(model, StoreRows(opened, 100), 5.0)
    density = torch.bincount(
        held_out_active(model, StoreRows(opened, 100), opened.record.report_blocks, threshold).active.latents,
        minlength=64,
    )
    one, other = density.argsort(descending=True)[:2].tolist()
    with torch.no_grad():
        model.W_enc[:, other], model.b_enc[other] = model.W_enc[:, one], model.b_enc[one]
        model.W_dec[one] *= 0.5
        model.W_dec[other] = model.W_dec[one]
    before = evaluate_whole(model, StoreRows(opened, 100), threshold).fvu
    weights = model.W_dec.detach().clone()
    kept, dropped = densest_of([[one, other]], density)
    assert (kept.tolist(), dropped.tolist()) == ([one], [other])
    merged = merge(model, StoreRows(opened, 100), kept, dropped, threshold)
    assert torch.equal(model.W_dec, weights)
    assert merged < 1.005 * before  # fitted on other rows, and never worse on those
    removed = without(model, StoreRows(opened, 100), torch.tensor([other]), threshold)
    assert removed > merged
    y, latents = reference_rows(model, opened, opened.record.calibration_blocks, threshold)
    with torch.no_grad():
        rest = y - (latents @ model.W_dec.double() + model.b_dec.double())
        rest += latents[:, [one, other]] @ model.W_dec[[one, other]].double()
        fitted = torch.linalg.lstsq(latents[:, [one]], rest).solution[0]
        model.W_dec[one] = fitted
    alone = without(model, StoreRows(opened, 100), torch.tensor([other]), threshold)
    assert merged == pytest.approx(alone, rel=1e-4)
    silent = threshold.clone()
    silent[one] = torch.inf  # active on no row: its decoder row stays
    assert _refitted(model, StoreRows(opened, 100), torch.tensor([one]), silent).equal(model.W_dec[[one]])


def reference_rows(
    model: Transcoder, store: Store, blocks: range, threshold: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets less the bias, with it put back, and latents [R, F], both by the roots of the rows' weights."""
    ys, latents = [], []
    for chunk in StoreRows(store, 10**9).chunks(blocks, CPU):
        scale = natural_weights(store)[chunk.stratum] ** 0.5
        if scale:
            x, y = (side.double() for side in model.normalised(chunk.source, chunk.target))
            pre_acts = x @ model.W_enc.detach().double() + model.b_enc.detach().double()
            ys.append((y - model.b_dec.detach().double()) * scale + model.b_dec.detach().double())
            latents.append(pre_acts * (pre_acts > threshold) * scale)
    return torch.cat(ys), torch.cat(latents)


def test_others_of_like_density_are_drawn_once_each() -> None:
    density = torch.tensor([100, 101, 5, 6, 50, 99])
    found = alike(torch.tensor([0, 2]), torch.tensor([1, 3, 4, 5]), density, seed=0, choices=1)
    assert found.tolist() == [1, 3]
    drawn = alike(torch.tensor([0, 2]), torch.tensor([1, 3]), density, seed=1, choices=8)
    assert sorted(drawn.tolist()) == [1, 3]
    assert alike(torch.tensor([0, 2]), torch.tensor([5]), density, seed=0).tolist() == [5]


def test_seeds_are_one_arm_with_their_spread(command: Command, store: SyntheticStore) -> None:
    runs = [train(command, store, f"base-{seed}", "--seed", seed) for seed in (0, 1)]
    wide = train(command, store, "wide", "--set", "transcoder.d_sae=96")
    found = command("compare", *runs, wide, "--json")
    assert found.code == 0, found.err
    data = json.loads(found.out)
    base, other = data["arms"]
    assert (base["name"], other["name"]) == ("base", "wide") and data["l0"] == 6
    assert base["differs"]["transcoder.d_sae"] == 64 and other["differs"]["transcoder.d_sae"] == 96
    assert "seed" not in base["differs"] and set(base["runs"]) == {str(run) for run in runs}
    values = [figures["fvu"] for figures in base["runs"].values()]
    assert base["spread"]["fvu"]["mean"] == pytest.approx(np.mean(values))
    assert base["spread"]["fvu"]["deviation"] == pytest.approx(np.std(values, ddof=1)) and values[0] != values[1]
    assert other["pw_mcc"] is None and other["spread"]["fvu"]["deviation"] is None
    opened = Store.open(store.path)
    opened = opened.excluding(resolve_exclusion(opened, Settings()))
    rows = [measure_run(run, opened, 6.0) for run in runs]
    expected = consistency([one.W_dec[one.live] for one in rows])
    assert base["pw_mcc"]["mean"] == pytest.approx(expected.pw_mcc[0])
    assert base["in_all_seeds"]["mean"] == pytest.approx(np.mean(expected.in_all)) and other["in_all_seeds"] is None
    model, of_run = loaded(runs[0], opened), StoreRows(opened, 1024)
    redundancy = measure_redundancy(model, of_run, threshold_at(model, of_run, 6.0))
    figures = base["runs"][str(runs[0])]
    assert figures["redundant"] == redundancy.redundant
    assert figures["redundant_fvu_rise"] == pytest.approx(redundancy.merged.fvu_rise_at_equal_l0, abs=1e-9)
    table = command("compare", *runs, wide)
    assert table.code == 0 and "PW-MCC" in table.out and "base" in table.out


def test_the_trade_off_is_that_of_the_same_weights_at_other_thresholds(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    runs = [train(command, store, name, "--seed", seed) for name, seed in (("a-0", 0), ("a-1", 1))]
    runs.append(train(command, store, "b", "--set", "optimizer.lr=0.001"))
    page = tmp_path / "pages" / "compare.html"
    done = command("compare", *runs, "--html", page, "--json")
    assert done.code == 0, done.err
    arms = json.loads(done.out)["arms"]
    opened = Store.open(store.path)
    for run in runs:
        model, points = loaded(run, opened), next(arm["tradeoff"] for arm in arms if str(run) in arm["runs"])[str(run)]
        figures = next(arm["runs"][str(run)] for arm in arms if str(run) in arm["runs"])
        assert [point["l0"] for point in points] == sorted(point["l0"] for point in points)
        assert {"l0": figures["l0"], "fvu": figures["fvu"]} in points and len(points) == 5
        for wanted, point in zip((3.0, 4.2, 6.0, 8.4, 12.0), points, strict=True):
            assert point["l0"] == pytest.approx(wanted, rel=0.15)
            threshold = threshold_at(model, StoreRows(opened, 10**9), wanted)
            latents, strata = dense_rows(model, opened, threshold)
            counted = latents[[name != "000-001" for name in strata]]
            assert point["l0"] == pytest.approx(float((counted > 0).sum(1).double().mean()), rel=0.05)
    text = page.read_text()
    drawn = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    names = [trace["name"] for trace in drawn["tradeoff"]["data"]]
    assert names == ["a", "b"]
    mean = [sum(point["l0"] for point in pair) / 2 for pair in zip(*arms[0]["tradeoff"].values(), strict=True)]
    assert drawn["tradeoff"]["data"][0]["x"] == pytest.approx(mean)
    assert len(drawn["share_above_0_7"]["data"][0]["x"]) == 2 and len(drawn["training"]["data"]) == 3
    assert "optimizer.lr=0.001" in text and not re.search(r"(src|href)=.https?:", text.split('id="figures">')[0])


def test_a_page_names_each_point_by_its_run_and_no_name_is_markup(command: Command, store: SyntheticStore) -> None:
    names = ("a<b>bold<", "b<b>bold<")
    runs = [train(command, store, name, "--seed", seed) for seed, name in enumerate(names)]
    found = Comparison.model_validate_json(command("compare", *runs, "--json").out)
    costs = {
        path: figures.model_copy(update={"cpu_ms_per_step": 3.0 if path == str(runs[1]) else None})
        for path, figures in found.arms[0].runs.items()
    }
    arm = found.arms[0].model_copy(update={"name": names[0], "runs": costs})
    text = comparison_page.html(found.model_copy(update={"arms": [arm]})).decode()
    drawn = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    (cost,) = drawn["cpu_ms_per_step"]["data"]
    assert (cost["x"], cost["text"]) == ([3.0], ["b&lt;b&gt;bold&lt;"])
    assert drawn["tradeoff"]["data"][0]["name"] == "a&lt;b&gt;bold&lt;"
    assert "<b>bold" not in text and ">a&lt;b&gt;bold&lt;<br>" in text  # the table is no plot: escaped once


def test_names_in_brackets_are_printed(command: Command, store: SyntheticStore) -> None:
    run, other = (
        train(command, store, f"a[{name}]", "--set", f"optimizer.lr={lr}") for name, lr in (("b", 1e-3), ("c", 2e-3))
    )
    printed = command("compare", run, other).out
    assert all(re.search(rf"^a\[{name}\]: .*optimizer.lr", printed, re.M) for name in "bc")
    assert all(f"a[{name}]" in printed.split("fvu")[0] for name in "bc")
    assert "a[b], step 30 of 30" in command("report", run).err


def test_what_cannot_be_compared_is_refused(command: Command, store: SyntheticStore, tmp_path: Path) -> None:
    run = train(command, store, "a")
    relu = train(command, store, "relu", "--set", "activation.kind=relu", small=SMALL_WITHOUT_K)
    other = make_store(tmp_path / "elsewhere" / "store", seed=3, held_out_blocks=4)
    foreign = train(command, other, "b")
    again = train(command, store, "again")
    for arguments, said in (
        ((run, run), "different runs"),
        ((run, again), "are one arm and have one seed twice"),
        ((run, "--store", other.path), "pass the --store that the runs were trained on"),
        ((run, "--l0", 0), "--l0"),
        ((run, "--l0", "nan"), "--l0"),
        ((run, "--l0", 50), "active latents, not 50; pass a smaller --l0"),
        ((run, "--matched-latents", 0), "--matched-latents"),
        ((run, foreign), "compare runs of one store"),
        ((run, tmp_path / "none"), "is not a run"),
    ):
        found = command("compare", *arguments)
        assert found.code == 2 and said in found.err and "Traceback" not in found.err
    assert command("compare", run, relu, "--l0", 4).code == 0


def test_runs_of_other_k_are_each_at_their_own_l0_on_one_frontier(
    command: Command, store: SyntheticStore, tmp_path: Path
) -> None:
    runs = [train(command, store, "k6"), train(command, store, "k6-s1", "--seed", 1)]
    runs.append(train(command, store, "k3", "--set", "activation.k=3", "--set", "activation.k_start=3"))
    page = tmp_path / "compare.html"
    done = command("compare", *runs, "--html", page, "--json")
    assert done.code == 0 and "no k in common: each is measured at its own l0" in done.err
    found = Comparison.model_validate_json(done.out)
    assert found.l0 is None and [arm.name for arm in found.arms] == ["k6", "k3"]
    opened = Store.open(store.path)
    opened = opened.excluding(resolve_exclusion(opened, Settings()))
    for arm, ks in zip(found.arms, ((6, 6), (3,)), strict=True):
        for (path, figures), k in zip(arm.runs.items(), ks, strict=True):
            assert figures == measure_run(Path(path), opened, None).figures
            assert figures.l0 == pytest.approx(k, rel=0.2)
    drawn = json.loads(page.read_text().split('id="figures">')[1].split("</script>")[0])
    frontier = drawn["tradeoff"]["data"][-1]
    assert frontier["name"] == "each at its own l0" and frontier["text"] == ["k3", "k6"]
    assert frontier["x"] == [arm.spread["l0"].mean for arm in found.arms[::-1]]
    assert frontier["y"] == [arm.spread["fvu"].mean for arm in found.arms[::-1]]
    assert [trace["meta"]["series"] for trace in drawn["training"]["data"]] == [0, 0, 1]  # a colour per arm


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("k16", "k16-s1"), "k16"), (("a-0", "a-1"), "a"), (("k-s0", "k-s1"), "k"), (("tiny-001", "tiny-012"), "tiny"),
     (("x", "y"), "x"), (("k16-seed1", "k16-seed2"), "k16"), (("k32",), "k32")],
)  # fmt: skip
def test_an_arm_is_called_what_its_runs_names_have_in_common(names: tuple[str, ...], expected: str) -> None:
    assert _common_name(names) == expected


def test_a_page_that_cannot_be_written_is_said_before_the_measuring(
    command: Command, store: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(command, store, "a")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))  # root may write
    refused = command("compare", run, "--html", tmp_path / "page.html")
    assert refused.code == 2 and "cannot be written to" in refused.err and "compare 0" not in refused.err


def test_an_autoencoder_of_the_targets_is_compared(command: Command, store: SyntheticStore) -> None:
    run = train(command, store, "t", "--set", "source=target", "--set", "transcoder.skip=false")
    found = command("compare", run, "--json")
    assert found.code == 0 and json.loads(found.out)["arms"][0]["spread"]["fvu"]["mean"] < 2


def test_what_runs_started_from_sets_them_apart(command: Command, store: SyntheticStore) -> None:
    fresh = train(command, store, "arm-0")
    tuned = train(command, store, "arm-1", "--seed", 1, "--init-from", fresh)
    arms = json.loads(command("compare", fresh, tuned, "--json").out)["arms"]
    assert [arm["name"] for arm in arms] == ["arm-0", "arm-1"]
    assert arms[0]["differs"] == {"init_from": None} and arms[1]["differs"]["init_from"].endswith("arm-0")


def test_where_very_many_latents_are_active_every_nth_row_is_counted(
    command: Command, store: SyntheticStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Store.open(store.path)
    model = loaded(train(command, store, "a"), opened)
    blocks, threshold = opened.record.report_blocks, torch.zeros(64)
    whole = held_out_active(model, StoreRows(opened, 10**9), blocks, threshold)
    meetings = int(whole.active.starts.diff().square().sum())
    monkeypatch.setattr("train.evaluation.held_out.MOST_MEETINGS", meetings // 4)
    found = held_out_active(model, StoreRows(opened, 10**9), blocks, threshold)
    assert 0.15 * len(whole.stratum) < len(found.stratum) < 0.35 * len(whole.stratum)
    assert len(found.active.starts) - 1 == len(found.stratum)
    first = whole.active.of_rows(torch.arange(len(whole.stratum)) == 0)
    assert torch.equal(found.active.latents[: len(first.latents)], first.latents)


def test_an_unfinished_run_is_refused(command: Command, store: SyntheticStore) -> None:
    run = train(command, store, "a", "--set", "checkpoint.every=10")
    (checkpoint.folder(run, 30) / checkpoint.WEIGHTS).write_bytes(b"")
    found = command("compare", run)
    assert found.code == 2 and "is at step 20 of 30; finish it with" in found.err


def test_a_steps_cost_leaves_evaluations_checkpoints_and_the_first_out(command: Command, store: SyntheticStore) -> None:
    run = train(command, store, "a", "--set", "checkpoint.every=20")
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(2, 31, 2))
    seconds = {2: 100.0, 20: 50.0, 22: 50.0, 30: 50.0}  # compiles; evaluates; the checkpoint before it; evaluates
    clock = 0.0
    for row in rows:
        clock += seconds.get(row["step"], 0.02)
        row |= {"seconds": clock, "cpu_seconds": 2 * clock}
    (run / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cost_per_step(run, read_config(run).settings) == pytest.approx((20.0, 10.0))
    for row in rows[5:]:
        row |= {"from_step": 10, "seconds": row["seconds"] + 7, "cpu_seconds": row["cpu_seconds"] + 9}  # resumed
    lines = [json.dumps(row) for row in rows]
    (run / "timing.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    assert cost_per_step(run, read_config(run).settings) == pytest.approx((20.0, 10.0))
    (run / "timing.jsonl").unlink()
    assert cost_per_step(run, read_config(run).settings) == (None, None)


def test_a_checkpoint_between_rows_of_the_log_is_left_out(command: Command, store: SyntheticStore) -> None:
    run = train(command, store, "a", "--set", "checkpoint.every=15")
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    clock = 0.0
    for row in rows:
        clock += {16: 5.0, 20: 5.0, 30: 5.0}.get(row["step"], 0.02)  # 15 was saved within those of 16
        row |= {"seconds": clock, "cpu_seconds": clock}
    (run / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cost_per_step(run, read_config(run).settings) == pytest.approx((10.0, 10.0))


def test_a_spread_is_the_mean_and_the_sample_deviation() -> None:
    assert spread([2.0]).deviation is None
    found = spread([1.0, 2.0, 6.0])
    assert found.mean == 3.0 and found.deviation == pytest.approx(7**0.5)


def test_counts_are_whole_for_one_seed_and_have_a_digit_more_over_several() -> None:
    one, several = Spread(mean=13, deviation=None), Spread(mean=12.5, deviation=0.5)
    assert _cell(one, None, _COUNT, True) == "13" and _cell(several, one, _COUNT, False) == "12.5 ± 0.5 (-3.8%)"
    assert _cell(one.model_copy(update={"mean": -2e-5}), one, "+.5f", False) == "-0.00002"
