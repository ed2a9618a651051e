"""Proof of effect before a run, and what `usage.json` counts."""

import json
from pathlib import Path

import pytest
import torch

from shared.errors import ProjectError
from train.duplicates import diversity, monitor
from train.duplicates.co_activation import Correlated, co_activation_loss
from train.duplicates.directions import direction_loss
from train.duplicates.diversity import MergeConfig
from train.live.run_files import USAGE
from train.live.status import Status
from train.model.quiet import Quiet
from train.model.sparse_latents import SparseLatents
from train.run import self_test
from train.run.self_test import prove
from train.run.settings import Settings
from train.run.usage import Usage, components

ALL_ON = Settings.model_validate(
    {
        "diversity": {
            "orthogonality": {"weight": 1.0},
            "mined": {"weight": 1.0},
            "co_activation": {"weight": 1.0},
            "position": {"weight": 1.0},
            "merge": {"at": [0.5]},
        }
    }
)
OFF = Settings.model_validate(
    {
        "auxk": {"coefficient": 0},
        "quiet": {"weight": 0},
        "samples": {"rows": 0},
        "diversity": {"mined": {"weight": 0}, "co_activation": {"weight": 0}},
    }
)
STRATA = {"000-001": slice(0, 2), "001-004": slice(2, 10)}


def test_every_component_that_is_on_is_expected_and_no_other() -> None:
    assert set(components(OFF)) == {"reconstruction", "monitor", "evaluation", "checkpoint"}
    assert set(components(Settings())) == set(components(OFF)) | {"auxk", "quiet", "samples", "mined", "co_activation"}
    assert set(components(ALL_ON)) == set(components(OFF)) | {
        "auxk", "quiet", "orthogonality", "mined", "co_activation", "position", "merge", "samples"
    }  # fmt: skip
    jumprelu = Settings.model_validate({"activation": {"kind": "jumprelu"}})
    assert "l0" in components(jumprelu) and "l1" not in components(jumprelu)


@pytest.mark.parametrize(("per_row", "rows"), [("max", 2), ("mean", 1024)])
@pytest.mark.parametrize("least", [2, 10, 50])
def test_planted_latents_move_what_is_on(per_row: str, rows: int, least: int) -> None:
    settings = ALL_ON.model_dump()
    settings["diversity"]["orthogonality"] |= {"per_row": per_row, "rows": rows}
    settings["monitor"]["least_together"] = least
    prove(Settings.model_validate(settings))
    prove(Settings.model_validate(settings | {"transcoder": {"decoder_norm": "free"}}))
    prove(OFF)


@pytest.mark.parametrize("margin", [0.0, 0.97, 0.98, 0.99, 0.999, 0.999999])
def test_the_planted_pair_lies_above_any_margin(margin: float) -> None:
    settings = ALL_ON.model_dump()
    settings["diversity"] |= {"margin": margin, "cross_margin": margin}
    settings["diversity"]["co_activation"]["margin"] = margin
    prove(Settings.model_validate(settings))


def test_a_margin_that_is_1_in_float32_is_named() -> None:
    settings = ALL_ON.model_dump()
    settings["diversity"] |= {"margin": 0.99999999}
    with pytest.raises(ProjectError, match=r"diversity.orthogonality is on, .*; diversity.margin is 0.99999999$"):
        prove(Settings.model_validate(settings))


def no_loss(W_dec: torch.Tensor, *_: object) -> torch.Tensor:
    return W_dec.sum() * 0


@pytest.mark.parametrize(
    ("module", "function", "inert", "named"),
    [
        (diversity, "direction_loss", no_loss, "diversity.orthogonality"),
        (diversity.Diversity, "_orthogonality", lambda self, *_: self._transcoder.W_dec.sum() * 0, "orthogonality"),
        (diversity, "co_activation_loss", lambda values, *_: values.sum() * 0, "diversity.co_activation"),
        (diversity, "direction_loss", lambda *args: -direction_loss(*args), "diversity.orthogonality"),
        (diversity, "co_activation_loss", lambda *args: -co_activation_loss(*args), "diversity.co_activation"),
        (diversity, "position_loss", lambda values, *_: values.sum() * 0, "diversity.position"),
        (Quiet, "terms", lambda self, _: {"quiet": 0 * self._positive_sum(self._rows, self._times)}, "quiet"),
        (Quiet, "terms", lambda self, _: {}, "quiet"),
        (self_test, "find_groups", lambda *_: ([], None), "diversity.merge"),
        (
            monitor,
            "correlated_pairs",
            lambda *_, **__: (Correlated.none(), dict.fromkeys(monitor.LEVELS, 0)),
            "monitor",
        ),
    ],
)
def test_a_component_patched_inert_is_named(
    module: object, function: str, inert: object, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, function, inert)
    with pytest.raises(ProjectError, match=f"{named}.* is on, and planted duplicates do not move it"):
        prove(ALL_ON)


def test_a_monitor_that_lists_latents_of_position_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseLatents, "of_rows", lambda active, _: active)
    with pytest.raises(ProjectError, match="monitor is on"):
        prove(OFF)


def test_counts_are_written_and_continue_from_a_saved_state(tmp_path: Path) -> None:
    whole, resumed = (Usage(tmp_path / name, ALL_ON, STRATA) for name in ("a", "b"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole.call("reconstruction", "mined")
    whole.effects({"reconstruction": 0.5, "mined": 0.25}, 4)
    resumed.load({name: tensor.clone() for name, tensor in whole.state().items()})
    assert len(whole.state()["usage.calls"]) == len(components(ALL_ON)) - 1  # samples come after the last checkpoint
    for one in (whole, resumed):
        one.call("monitor", effect=7)
        one.publish(4)
    record = json.loads((tmp_path / "a" / USAGE).read_text())
    assert (tmp_path / "b" / USAGE).read_text() == (tmp_path / "a" / USAGE).read_text()
    assert record["components"]["mined"] | {"effect_counts": ""} == {"calls": 1, "effect": 1.0, "effect_counts": ""}
    assert record["components"]["monitor"]["effect"] == 7 and record["components"]["auxk"]["calls"] == 0
    assert record["rows"] == {"000-001": 8, "001-004": 32} and record["step"] == 4


def test_a_component_that_never_ran_is_a_failure_and_one_without_effect_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = Usage(tmp_path, ALL_ON, STRATA)
    counts.call(*(name for name in components(ALL_ON) if name != "mined"), effect=1)
    with pytest.raises(ProjectError, match="configured, and never ran in 9 steps: mined"):
        counts.finish(9)
    counts.call("mined")
    counts.finish(9)
    assert "note: mined ran and found nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [9, 3])
def test_a_status_names_what_did_not_run_yet_and_what_ran_without_effect(tmp_path: Path, steps: int) -> None:
    """The last row of a run, too, is written before its last checkpoint and its samples."""

    def used() -> str:
        status = Status(tmp_path, steps=steps, batch_rows=4)
        status.add({"step": 3})
        status.update({}, counts.publish(3).model_dump(mode="json"))
        return status.used()

    merges = OFF.model_copy(update={"diversity": OFF.diversity.model_copy(update={"merge": MergeConfig(at=(0.5,))})})
    counts = Usage(tmp_path, merges, STRATA)
    counts.call("reconstruction", "monitor", effect=4)
    assert used() == "2 of 5 components have acted (not yet: evaluation, checkpoint, merge)"
    counts.call("merge", effect=0)  # which looked and found nothing to merge
    counts.call("evaluation", effect=0)
    assert used() == "3 of 5 components have acted (not yet: checkpoint; no effect: evaluation)"
    counts.call("evaluation", "checkpoint", effect=1)
    assert used() == "5 of 5 components have acted"


def test_a_monitor_that_is_off_is_no_component(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OFF.model_copy(update={"monitor": monitor.MonitorConfig(every=0)})
    assert "monitor" not in components(settings)
    prove(settings)
