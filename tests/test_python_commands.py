"""The commands as functions: what they give is what the command line prints and writes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import harvest
import train
from shared.errors import UserError
from shared.store.store import Store
from tests.runs import SMALL, VALUES, Outcome
from tests.stores import SyntheticStore
from train.live.run_files import METRICS

pytestmark = pytest.mark.slow
Command = Callable[..., Outcome]


def test_a_harvest_from_python_makes_and_finds_a_store(model: Path, text: Path, tmp_path: Path) -> None:
    changes = {"windows.context_size": 16, "store.block_sequences": 8, "store.edges": [0, 1, 4]}
    settings = harvest.load_settings("tiny", changes, model=str(model), text=str(text), layers=(1, 2), tokens=256)
    (estimate, _), paths = harvest.estimates(settings, tmp_path), harvest.harvest(settings, tmp_path)
    stores = [Store.open(path) for path in paths]
    assert [store.request.layer for store in stores] == [1, 2]
    assert estimate.blocks == stores[0].record.blocks == 2 + 2
    assert harvest.harvest(settings, str(tmp_path)) == paths
    with pytest.raises(UserError, match=r"unknown option 'context_size'; did you mean 'windows.context_size'"):
        harvest.load_settings("tiny", {"context_size": 16})


def test_the_functions_of_a_run_give_what_the_commands_print(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    by_command = command("run", "--store", pristine.path, "--runs", tmp_path, "--name", "a", "--steps", 12, *SMALL).path
    changes: dict[str, object] = {**VALUES, "steps": 12}
    run = train.train(pristine.path, train.load_settings("tiny", changes), tmp_path / "b")
    assert (run / METRICS).read_bytes() == (by_command / METRICS).read_bytes()
    assert train.resume(run) == run

    printed = json.loads(command("evaluate", run, "--linear", "--json").out)
    found = train.evaluate(str(run), linear=True)
    assert (found.step, found.linear_fvu) == (printed["step"], printed["linear_fvu"]) and found.step == 12
    assert found.evaluation.model_dump(mode="json").items() <= printed.items()
    assert train.sample(run, rows=50)[1].latents > 0
    page, report = train.write_report(run)
    assert page == run / "report.html" and report.held_out.fvu == found.evaluation.fvu
    compared = json.loads(command("compare", by_command, "--json").out)
    assert train.compare_runs([by_command]).model_dump(mode="json") == compared
    with pytest.raises(UserError, match=f"{run} exists"):
        train.train(Store.open(pristine.path), train.load_settings("tiny", VALUES), run)
