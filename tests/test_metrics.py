"""The window's figures against the rows themselves, the dead counters, and the log."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.files import durable
from tests import reference
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.run.latent_counters import Counters
from train.run.metrics import Log, Window

STRATA = {"000-001": slice(0, 2), "001-004": slice(2, 10)}
PREFIXES = (2, 8)
WEIGHTS = torch.ones(10)


def make_step(seed: int, latents: list[int] | None = None) -> tuple[StepOutput, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target, guess = torch.randn(10, 3, generator=generator) + 2, torch.randn(10, 2, 3, generator=generator) + 2
    rows = torch.tensor([0, 0, 0, 3, 5, 5])
    values = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 0.0])  # the last is not active
    active = SparseLatents.of(rows, torch.tensor([*(latents or [1, 2, 3, 2, 6]), 5]), values, torch.Size((10, 8)))
    step = StepOutput(
        terms={"reconstruction": torch.tensor(2.0 + seed), "auxk": torch.tensor(1.0)},
        errors=(guess - target.unsqueeze(1)).square().sum(2),
        target=target,
        active=active,
        values=active.values,
        threshold=torch.tensor(0.5 + seed),
        pre_acts=torch.zeros(10, 8),
    )
    return step, target, guess


def test_a_windows_figures_are_those_of_its_rows_without_position_0() -> None:
    window = Window(STRATA, PREFIXES, 3, WEIGHTS)
    steps = [make_step(seed) for seed in range(4)]
    for step, _, _ in steps:
        window.add(step, torch.tensor(2.0))
    row = window.row()
    target = torch.cat([target for _, target, _ in steps]).view(4, 10, 3)
    guess = torch.cat([guess for _, _, guess in steps]).view(4, 10, 2, 3)
    for i, size in enumerate(PREFIXES):
        expected = reference.fvu(target[:, 2:].reshape(-1, 3), guess[:, 2:, i].reshape(-1, 3))
        assert row["prefixes"][str(size)]["fvu"] == pytest.approx(expected, rel=1e-6)
    assert row["fvu"] == row["prefixes"]["8"]["fvu"]
    for name, rows in STRATA.items():
        expected = reference.fvu(target[:, rows].reshape(-1, 3), guess[:, rows, 1].reshape(-1, 3))
        assert row["strata"][name]["fvu"] == pytest.approx(expected, rel=1e-6)
    first = row["strata"]["000-001"]
    assert (first["rows"], first["l0_training_rule"]) == (8, 1.5)
    errors = {name: (target[:, rows] - guess[:, rows, 1]).square().sum() for name, rows in STRATA.items()}
    assert first["error_share"] == pytest.approx(float(errors["000-001"] / sum(errors.values())), rel=1e-6)
    energy = target[:, STRATA["000-001"]].square().sum()
    assert first["relative_error"] == pytest.approx(float(errors["000-001"] / energy), rel=1e-6)
    assert sum(part["active_share"] for part in row["strata"].values()) == pytest.approx(1)
    assert row["l0_training_rule"] == 2 / 8
    assert row["terms"] == {"auxk": 1.0, "reconstruction": 3.5}
    assert row["loss"] == 4.5 and row["grad_norm"] == 2.0


def test_fvu_at_natural_frequencies_weighs_rows_by_how_rarely_they_are_drawn() -> None:
    strata = {"000-001": slice(0, 2), "001-004": slice(2, 4), "004-016": slice(4, 10)}
    weights = torch.tensor([0.1] * 2 + [3.0] * 2 + [0.5] * 6)
    window, steps = Window(strata, PREFIXES, 3, weights), [make_step(seed) for seed in range(3)]
    for step, _, _ in steps:
        window.add(step, torch.tensor(0.0))
    row = window.row()
    target = torch.cat([target[2:] for _, target, _ in steps]).double()
    guess = torch.cat([guess[2:, 1] for _, _, guess in steps]).double()
    w = weights[2:].repeat(3).double().unsqueeze(1)
    mean = (w * target).sum(0) / w.sum()
    expected = float((w * (target - guess) ** 2).sum() / (w * (target - mean) ** 2).sum())
    assert row["fvu_natural"] == pytest.approx(expected, rel=1e-6)
    assert row["fvu"] == pytest.approx(reference.fvu(target, guess), rel=1e-6)
    assert abs(row["fvu"] - row["fvu_natural"]) > 0.01


def test_a_window_starts_anew_after_its_row_and_continues_from_a_saved_state() -> None:
    first, second, fresh = (Window(STRATA, PREFIXES, 3, WEIGHTS) for _ in range(3))
    steps = [make_step(seed)[0] for seed in range(3)]
    first.add(steps[2], torch.tensor(1.0))
    first.row()
    first.add(steps[0], torch.tensor(1.0))
    second.load({name: value.clone() for name, value in first.state().items()})
    for window in (first, second):
        window.add(steps[1], torch.tensor(1.0))
    for step in steps[:2]:
        fresh.add(step, torch.tensor(1.0))
    assert first.row() == second.row() == fresh.row()


def test_latents_are_dead_by_rows_since_they_fired() -> None:
    counters, later = (Counters(8, after, torch.device("cpu")) for after in (10, 11))
    counters.update(make_step(0, [0, 1, 2, 3, 4])[0])
    counters.update(make_step(1, [0, 1, 2, 3, 3])[0])
    assert counters.rows_since_fired.tolist() == [0, 0, 0, 0, 10, 20, 20, 20]
    assert counters.dead().nonzero().flatten().tolist() == [4, 5, 6, 7]
    later.load(counters.state())
    assert later.dead().nonzero().flatten().tolist() == [5, 6, 7]


def test_the_running_threshold_is_a_float32_moving_average_from_the_first_value() -> None:
    counters = Counters(8, 10, torch.device("cpu"))
    for seed in (0, 1):
        counters.update(make_step(seed)[0])
    assert counters.threshold.dtype == torch.float32
    assert float(counters.threshold) == pytest.approx(0.99 * 0.5 + 0.01 * 1.5)


def test_a_log_is_cut_after_a_step_and_drops_a_torn_line(tmp_path: Path) -> None:
    log = Log(tmp_path / "metrics.jsonl")
    for step in (10, 20, 30):
        log.append({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3')
    log.cut(20)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 10}\n{"step": 20}\n'


def test_rows_that_cannot_be_written_are_counted_and_warned_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: object, data: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "_write", full)
    log = Log(tmp_path / "metrics.jsonl")
    for step in range(3):
        log.append({"step": step})
    assert log.lost_rows == 3
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_row_is_one_line_of_strict_json(tmp_path: Path) -> None:
    Log(tmp_path / "m.jsonl").append({"step": 1, "a": {"b": 0.1}})
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "a": {"b": 0.1}}
    with pytest.raises(ValueError, match="JSON compliant"):
        Log(tmp_path / "m.jsonl").append({"step": 1, "loss": float("nan")})


def test_one_row_repeated_has_no_variance_to_explain() -> None:
    """Sums in float32 leave rounding noise, which is none: there is no fvu, and not one of millions."""
    window = Window(STRATA, PREFIXES, 3, WEIGHTS)
    step, target, _ = make_step(0)
    target = target.clone()
    target[STRATA["000-001"]] = torch.tensor([0.1, 31.7, -12.3])
    for _ in range(50):
        window.add(replace(step, target=target, errors=torch.full_like(step.errors, 1e3)), torch.tensor(1.0))
    row = window.row()
    assert row["strata"]["000-001"]["fvu"] is None and row["fvu"] > 1


@pytest.mark.parametrize("rows", [1, 4, 64, 1024, 8192])
def test_a_constant_target_has_no_fvu_however_many_rows_a_batch_has_of_it(rows: int) -> None:
    """Position 0 where it is trained on, and BOS is its only token; others vary by a thousandth."""
    strata = {"000-001": slice(0, rows), "001-004": slice(rows, 2 * rows)}
    generator = torch.Generator().manual_seed(0)
    row = 20 * torch.randn(96, generator=generator)
    target = row.expand(2 * rows, 96).clone()
    target[rows:] += 0.03 * 20 * torch.randn(rows, 96, generator=generator)
    step, _, _ = make_step(0)
    window = Window(strata, PREFIXES, 96, torch.ones(2 * rows))
    none = torch.zeros(0, dtype=torch.int64)
    nothing = SparseLatents.of(none, none, torch.zeros(0), torch.Size((2 * rows, 8)))
    errors = torch.ones(2 * rows, len(PREFIXES))
    for _ in range(3):
        window.add(replace(step, target=target, errors=errors, active=nothing), torch.tensor(1.0))
    found = window.row()["strata"]
    assert found["000-001"]["fvu"] is None
    if rows > 1:
        variance = float((target[rows:].double() - target[rows:].double().mean(0)).square().sum())
        assert found["001-004"]["fvu"] == pytest.approx(rows / variance, rel=0.05)
