"""The correlation monitor: what its report says of planted duplicates, and what it writes."""

import json
from pathlib import Path

import pytest
import torch

from shared.files import durable
from train.duplicates.monitor import CorrelationMonitor, MonitorConfig
from train.evaluation.held_out import HeldOutActive
from train.live.run_files import HELD_OUT, REPORTS
from train.model.activations import BatchTopK
from train.model.schedule import monitor_cadence
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig

D, F, B = 8, 32, 40
STRATA = {"000-001": slice(0, 4), "001-004": slice(4, B)}


def make_model() -> Transcoder:
    """Of which 3 and 20, and 5 and 6, have nearly one direction each."""
    config = TranscoderConfig(d_sae=F, prefixes=(8, 32)).resolve(D, BatchTopK(k=4))
    model = Transcoder(D, D, config, BatchTopK(k=4), Normalisation(torch.zeros(D), 1.0, torch.zeros(D), 1.0))
    model.initialise(1)
    with torch.no_grad():
        for one, other in ((3, 20), (5, 6)):
            model.W_dec[other] = model.W_dec[one] + 0.02 * torch.randn(
                D, generator=torch.Generator().manual_seed(other)
            )
        model.normalise_decoder()
    return model


def make_step(seed: int) -> StepOutput:
    """3 and 20 fire together; 9 and 10 at position 0 only, always."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(B, F, generator=generator) * (torch.rand(B, F, generator=generator) > 0.7)
    dense[:, 20] = 0.5 * dense[:, 3]
    dense[:, 9:11] = 0
    dense[:4, 9:11] = 1
    rows, latents = dense.nonzero(as_tuple=True)
    active = SparseLatents.of(rows, latents, dense[rows, latents], dense.shape)
    nothing = torch.zeros(())
    return StepOutput(
        terms={},
        errors=torch.zeros(B, 2),
        target=torch.zeros(B, D),
        active=active,
        values=active.values,
        threshold=nothing,
        pre_acts=dense,
    )


def make_monitor(path: Path, **config: object) -> CorrelationMonitor:
    settings = MonitorConfig.model_validate({"every": 4, "rows": 2 * B, "least_together": 10} | config)
    return CorrelationMonitor(path, settings, make_model(), STRATA, steps=10)


ALIVE = torch.zeros(F, dtype=torch.bool)


def dense_of(step: StepOutput) -> torch.Tensor:
    """[B, F] its pre-activations."""
    assert step.pre_acts is not None
    return step.pre_acts


def test_a_report_finds_planted_duplicates_by_every_measure(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    for done in range(1, 5):
        monitor.add(make_step(done), done)
    report = monitor.report(4, ALIVE)
    first = report.pairs[0]
    assert first.key == (3, 20) and first.reports == 1 and not first.within_segment
    assert first.correlation == pytest.approx(1) and first.jaccard == 1 and first.cosine > 0.9
    assert (first.latents[0].prefix, first.latents[1].prefix) == (8, 32)
    assert report.sample.first_step == 3 and report.sample.last_step == 4
    assert report.sample.strata == {"000-001": 8, "001-004": 72}
    assert report.clusters == [[3, 20]]  # 5 and 6 have one direction and fire apart
    assert report.directions.share_with_neighbour_above["0.9"] >= 4 / F
    assert report.directions.effective_number < F and 1 < report.directions.effective_rank <= D
    assert report.without_position_0.pairs_above["0.9"] == 1
    assert (report.without_position_0.rows, report.with_position_0.rows) == (72, 80)


def test_latents_of_position_0_correlate_only_with_it(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, least_together=2)
    for done in range(3, 5):
        monitor.add(make_step(done), done)
    report = monitor.report(4, ALIVE)
    assert report.with_position_0.pairs_above["0.9"] == 2 and report.without_position_0.pairs_above["0.9"] == 1
    assert (9, 10) not in {pair.key for pair in report.pairs}


def test_measures_equal_dense_ones(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    steps = [make_step(done) for done in (3, 4)]
    for done, step in enumerate(steps, 3):
        monitor.add(step, done)
    report, model = monitor.report(4, ALIVE), make_model()
    dense = torch.cat([dense_of(step) for step in steps]).double()
    stratum = torch.arange(B).ge(4).repeat(2)
    inner, outer = torch.corrcoef(dense[stratum].T), torch.corrcoef(dense.T)
    cosines = model.W_dec.detach() @ model.W_dec.detach().T
    assert len(report.pairs) > 10
    for pair in report.pairs:
        i, j = pair.key
        assert pair.correlation == pytest.approx(float(inner[i, j]), abs=1e-9)
        assert pair.correlation_with_position_0 == pytest.approx(float(outer[i, j]), abs=1e-9)
        assert pair.cosine == pytest.approx(float(cosines[i, j]), abs=1e-6)
        assert pair.rows_together == int(((dense[stratum][:, i] > 0) & (dense[stratum][:, j] > 0)).sum()) >= 10
        assert pair.latents[0].strata["000-001"] == pytest.approx(float((dense[~stratum][:, i] > 0).double().mean()))
    near = cosines.fill_diagonal_(-1).amax(1)
    for level, share in report.directions.share_with_neighbour_above.items():
        assert share == pytest.approx(float((near > float(level)).double().mean()))
    neighbours = (cosines > 0.7).sum(1)
    assert report.directions.effective_number == pytest.approx(float((1 / (1 + neighbours.double())).sum()))


def test_reports_follow_each_other_and_are_written(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    assert [done for done in range(1, 11) if monitor.due(done)] == [4, 8, 10]
    for done in range(1, 11):
        monitor.add(make_step(done), done)
        if monitor.due(done):
            monitor.report(done, ALIVE)
    files = sorted((tmp_path / REPORTS).iterdir())
    assert [file.name for file in files] == [f"correlation-{step:06d}.json" for step in (4, 8, 10)]
    first, second, last = (json.loads(file.read_text()) for file in files)
    assert first["change"] is None and second["change"]["since_step"] == 4 and last["change"]["since_step"] == 8
    assert [report["pairs"][0]["reports"] for report in (first, second, last)] == [1, 2, 3]
    assert second["persisting_pairs"] >= 1 and last["sample"] == {
        "rows_of": "training steps", "first_step": 9, "last_step": 10, "strata": {"000-001": 8, "001-004": 72}
    }  # fmt: skip
    assert second["schema_version"] == 1


def test_reports_between_scans_repeat_the_last_ones_directions(tmp_path: Path) -> None:
    """A scan costs 32 * 8 operations by row of the dictionary, a step's product 2 * 40 * 8: so every 5 steps."""
    monitor = make_monitor(tmp_path, every=2, cost_share=0.08)
    steps = []
    for done in range(1, 11):
        monitor.add(make_step(done), done)
        if monitor.due(done):
            steps.append(monitor.report(done, ALIVE).directions.step)
    assert steps == [2, 2, 2, 8, 8]


def test_where_many_latents_are_active_every_nth_row_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(4)
    meetings = int(step.active.starts.diff().square().sum()) * 2
    monkeypatch.setattr("train.duplicates.monitor.MOST_SAMPLED_MEETINGS", meetings // 2 - 1)
    monitor = make_monitor(tmp_path, least_together=2)
    monitor.add(step, 4)
    report = monitor.report(4, ALIVE)
    assert report.sample.strata == {"000-001": 2, "001-004": 12} and report.pairs[0].key == (3, 20)
    kept = dense_of(step)[::3][2:].double()
    assert report.pairs[0].correlation == pytest.approx(float(torch.corrcoef(kept.T)[3, 20]))


def test_dead_latents_are_left_out_of_the_directions(tmp_path: Path) -> None:
    monitor, dead = make_monitor(tmp_path), ALIVE.clone()
    dead[[3, 6]] = True
    for done in (3, 4):
        monitor.add(make_step(done), done)
    report = monitor.report(4, dead)
    assert report.directions.live == F - 2 and report.clusters == []


def test_an_open_sample_continues_from_its_state(tmp_path: Path) -> None:
    whole, stopped, resumed = (make_monitor(tmp_path / name) for name in ("whole", "stopped", "resumed"))
    for done in range(1, 5):
        whole.add(make_step(done), done)
        (stopped if done < 4 else resumed).add(make_step(done), done) if done != 4 else None
    resumed.load({name: tensor.clone() for name, tensor in stopped.state().items()})
    resumed.add(make_step(4), 4)
    assert whole.report(4, ALIVE) == resumed.report(4, ALIVE)


def test_a_report_begun_before_a_merge_hands_on_no_pair_of_the_merged_latents(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, delay=2)
    for i in range(4):
        monitor.add(make_step(i), i + 1)
    monitor.begin(4, torch.zeros(F, dtype=torch.bool))
    monitor.start_anew(torch.tensor([20]))
    resumed = make_monitor(tmp_path, delay=2)
    resumed.load(monitor.state())
    for one in (monitor, resumed):
        assert one.finish().pairs[0].key == (3, 20)  # as it was when it was counted
        first, second = one.correlated.pairs
        assert len(first) > 0
        assert not bool(((first == 20) | (second == 20)).any())


def test_rows_from_before_a_merge_say_nothing_of_the_merged_latents(tmp_path: Path) -> None:
    monitor, resumed, after = make_monitor(tmp_path), make_monitor(tmp_path), make_step(4)
    monitor.add(make_step(3), 3)
    monitor.start_anew(torch.tensor([20]))
    resumed.load({name: tensor.clone() for name, tensor in monitor.state().items()})
    reports = []
    for one in (monitor, resumed):
        one.add(after, 4)
        reports.append(one.report(4, ALIVE))
    assert reports[0] == reports[1]
    pair = next(pair for pair in reports[0].pairs if pair.key == (3, 20))
    assert pair.rows_together == int((dense_of(after)[4:, 20] > 0).sum())  # without position 0, of step 4 alone
    before = dense_of(make_step(3))
    before[:, 20] = 0
    rows = torch.cat([before[4:], dense_of(after)[4:]]).double()
    assert pair.correlation == pytest.approx(float(torch.corrcoef(rows.T)[3, 20]))


def test_a_full_disk_costs_reports_and_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shared.errors import DiskFull

    def full(*_: object) -> None:
        raise DiskFull("no space left")

    monitor = make_monitor(tmp_path)
    monkeypatch.setattr(durable, "publish_json", full)
    for done in (4, 8):
        monitor.add(make_step(done), done)
        assert monitor.report(done, ALIVE).pairs
    assert monitor.lost_reports == 2 and capsys.readouterr().err.count("no space left") == 1


def test_a_saved_state_holds_the_last_report_though_its_file_is_lost(tmp_path: Path) -> None:
    whole, resumed = (make_monitor(tmp_path / name, every=2, cost_share=0.08) for name in ("whole", "resumed"))
    for done in (1, 2):
        whole.add(make_step(done), done)
    whole.report(2, ALIVE)
    resumed.load(whole.state())
    found = []
    for monitor in (whole, resumed):
        for done in (3, 4):
            monitor.add(make_step(done), done)
        found.append(monitor.report(4, ALIVE))
    assert found[0] == found[1] and found[1].directions.step == 2 and found[1].change is not None


def test_the_report_on_held_out_rows_counts_all_of_them_and_by_stratum(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    steps = [make_step(seed) for seed in (11, 12, 13)]
    at_0 = torch.arange(B).lt(4).repeat(3)
    rows = HeldOutActive(
        active=SparseLatents.joined([step.active for step in steps]).positive(),
        stratum=(~at_0).long(),
        strata=tuple(STRATA),
        weight_of_position_0=1.0,
    )
    report = monitor.report_held_out(10, rows, ALIVE)
    dense = torch.cat([dense_of(step) for step in steps]).double()
    assert report.sample.rows_of == "held-out blocks" and report.sample.strata == {"000-001": 12, "001-004": 108}
    assert report.strata is not None and report.change is None
    for name, which in (("000-001", at_0), ("001-004", ~at_0)):
        part = dense[which]
        both = (part > 0).double().T @ (part > 0).double()
        correlation = torch.corrcoef(part.T).nan_to_num().masked_fill(both < 10, 0).triu(1)
        assert report.strata[name].rows == len(part)
        assert report.strata[name].largest == pytest.approx(float(correlation.max()))
        assert report.strata[name].pairs_above["0.5"] == int((correlation > 0.5).sum())
    assert report.pairs[0].key == (3, 20)
    written = json.loads((tmp_path / REPORTS / HELD_OUT).read_text())
    assert written == report.model_dump(mode="json")
    assert len(monitor.correlated.correlation) == 0  # no run is steered by it


def test_a_monitor_that_is_off_reports_nothing(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, every=0)
    for done in range(1, 11):
        monitor.add(make_step(done), done)
    assert not any(monitor.due(done) for done in range(1, 11)) and set(monitor.state()) == {"monitor.report"}


def test_the_cadence_of_short_runs_is_a_fourth_of_their_steps() -> None:
    lengths = (1, 3, 4, 41, 399, 400, 10**6)
    found = {steps: monitor_cadence("auto", "auto", steps, "cpu", 100) for steps in lengths}
    assert found == {1: (1, 0), 3: (1, 0), 4: (1, 0), 41: (10, 0), 399: (99, 0), 400: (100, 0), 10**6: (100, 0)}
    assert monitor_cadence("auto", "auto", 400, "cuda", 100) == (100, 50)
    assert [monitor_cadence(every, 3, 10**6, "cuda", 100) for every in (7, 0)] == [(7, 3), (0, 3)]
