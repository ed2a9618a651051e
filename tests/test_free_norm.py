"""Runs whose decoder rows have free norms, through the real commands: cosines are of directions everywhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from shared.store.store import Store
from tests.runs import SMALL, assert_same_run
from tests.stores import SyntheticStore, make_store
from train.compare.measure import measure_run
from train.live.run_files import REPORTS
from train.model import checkpoint

pytestmark = pytest.mark.slow
FREE = [
    *SMALL,
    *("--set", "transcoder.decoder_norm=auto", "--set", "optimizer.decoder_rate=auto", "--set", "monitor.every=10"),
    *("--set", "monitor.least_together=3", "--set", "monitor.rows=150", "--set", "diversity.mined.weight=4"),
    *("--set", "diversity.co_activation.margin=0.1", "--set", "optimizer.lr=0.01", "--set", "checkpoint.every=20"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.5}, training_blocks=6)


def directions(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines of all decoder rows with each other, and the rows' norms."""
    W_dec = load_file(checkpoint.find(run).path / checkpoint.WEIGHTS)["W_dec"].double()
    norms = W_dec.norm(dim=1)
    unit = W_dec / norms.clamp_min(1e-30)[:, None]
    return unit @ unit.T, norms


def test_what_is_told_of_directions_is_told_of_unit_rows(command, store: SyntheticStore, tmp_path: Path) -> None:
    run = command("run", "--store", store.path, "--runs", tmp_path, "--steps", 60, *FREE).path
    config = json.loads((run / "config.json").read_text())["settings"]
    assert (config["transcoder"]["decoder_norm"], config["optimizer"]["decoder_rate"]) == ("free", 1.0)
    cosines, norms = directions(run)
    assert norms.min() >= 0 and norms.max() > 1.3 * norms.median()  # so that a product of rows is no cosine

    report = json.loads((run / REPORTS / "correlation-000060.json").read_text())
    assert report["pairs"]
    for pair in report["pairs"]:
        first, second = (one["latent"] for one in pair["latents"])
        assert pair["cosine"] == pytest.approx(float(cosines[first, second]), abs=1e-5)
    near = cosines.clone().fill_diagonal_(-1)
    assert report["directions"]["largest"] <= 1.0 + 1e-6

    assert command("report", run).code == 0
    table = pyarrow.parquet.read_table(run / "report" / "latents.parquet")
    live = np.flatnonzero(table["max"].is_valid().to_numpy())
    for latent in live.tolist():
        found = table["nearest_cosines"][latent].as_py()
        assert found[0] == pytest.approx(float(near[latent][torch.from_numpy(live)].max()), abs=1e-5)
    measured = measure_run(run, Store.open(store.path), 3.0)
    torch.testing.assert_close(measured.W_dec.norm(dim=1)[measured.live], torch.ones(len(measured.live)))
    assert json.loads(command("evaluate", run, "--json").out)["fvu"] < 1


def test_a_run_of_free_norms_resumes_to_the_same_bits(command, store: SyntheticStore, tmp_path: Path) -> None:
    line = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 60, *FREE)
    whole = command(*line, "--name", "whole").path
    run = Path(shutil.copytree(whole, tmp_path / "cut"))
    shutil.rmtree(checkpoint.folder(run, 60))
    assert command("resume", run).code == 0
    assert_same_run(whole, run)


def test_free_rows_start_no_run_of_unit_rows(command, store: SyntheticStore, tmp_path: Path) -> None:
    line = ("run", "--store", store.path, "--runs", tmp_path, "--steps", 20)
    free, unit = command(*line, *FREE).path, command(*line, *SMALL).path
    refused = command(*line, *SMALL, "--init-from", free)
    assert refused.code == 2 and "its decoder rows have free norms, and this run would set them to 1" in refused.err
    assert command(*line, *FREE, "--init-from", unit).code == 0
