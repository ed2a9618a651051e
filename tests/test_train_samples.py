"""Samples through the real commands: at a run's end, by `train samples`, and what goes wrong on the way."""

import errno
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest

from shared.files import durable
from shared.store.store import Local, Store
from tests.runs import SMALL
from tests.stores import SyntheticStore, make_store
from train.data.read_ahead import read_ahead
from train.model import checkpoint
from train.samples import encode as encoding
from train.samples.encode import Activations, encode
from train.samples.parquet import RECORD, paths
from train.samples.select import SamplesConfig, Selection, select


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("cache") / "store", keep={0: 0.25}, tokenizer=True)


@pytest.fixture
def trained(command, made: SyntheticStore, tmp_path: Path) -> Path:
    done = command("run", "--store", made.path, "--runs", tmp_path / "runs", "--steps", 30, *SMALL)
    assert done.code == 0, done.err
    return done.path


def test_a_run_ends_with_samples_and_the_command_writes_the_same_bytes(
    command, made: SyntheticStore, trained: Path
) -> None:
    contexts, latents = paths(trained, 30)
    before = [path.read_bytes() for path in (contexts, latents)]
    usage = json.loads((trained / "usage.json").read_text())
    table = pq.read_table(contexts)
    record = json.loads(table.schema.metadata[RECORD])
    assert usage["components"]["samples"] == {
        "calls": 1, "effect": record["latents"], "effect_counts": "latents with samples"
    }  # fmt: skip
    assert record["latents"] == len(table["latent"].unique()) > 30 and record["contexts"] == len(table)
    assert record["rows"] == {"000-001": 12, "001-004": 144, "004-016": 576, "016-032": 768}
    assert (record["step"], record["sequences"], record["first_sequence"]) == (30, 48, 32)
    assert record["request"] == made.record.request.digest and record["schema_version"] == 1
    shutil.rmtree(trained / "samples")
    done = command("samples", trained)
    assert done.code == 0 and done.path == contexts and "latents, from 1,500 rows of 48 sequences" in done.out
    assert [path.read_bytes() for path in (contexts, latents)] == before
    told = json.loads(command("samples", trained, "--json").out)
    assert told == record | {"path": str(contexts)}


def test_the_file_opens_in_pandas(trained: Path) -> None:
    contexts, latents = (pandas.read_parquet(path) for path in paths(trained, 30))
    assert len(latents) == 64 and contexts.latent.isin(latents.latent).all()
    one = contexts[contexts.peak > 2].iloc[0]
    assert one.activations[one.peak] == one.activation and "".join(one.text).startswith(" ")
    counts = contexts.groupby(["latent", "sequence"]).size()
    assert counts.max() == 1 and contexts.groupby("latent").size().max() <= 25
    at_0 = contexts[contexts.position == 0]
    assert at_0.groupby("latent").size().max() == 1
    descriptions = {f.name: f.metadata[b"description"] for f in pq.read_schema(paths(trained, 30)[0])}
    assert all(descriptions.values()) and len(descriptions) == len(contexts.columns)


def test_the_command_takes_a_step_a_store_rows_and_settings(
    command, made: SyntheticStore, trained: Path, tmp_path: Path
) -> None:
    done = command("samples", trained, "--rows", 320, "--set", "samples.top=2", "--set", "samples.bins=0", "--json")
    told = json.loads(done.out)
    assert told["sequences"] == 10 and told["settings"] | {"top": 2, "bins": 0, "rows": 320} == told["settings"]
    table = pq.read_table(told["path"])
    assert set(table["kind"].to_pylist()) == {"top"} and max(Counter(table["latent"].to_pylist()).values()) == 2
    other = make_store(tmp_path / "other", seed=3)
    told = json.loads(command("samples", trained, "--store", other.path, "--json").out)
    assert told["request"] == other.record.request.digest
    assert set(pq.read_table(told["path"])["text"].to_pylist()[0]) == {None}
    for args, message in (
        (["--set", "samples.topp=3"], "unknown option 'topp'; did you mean 'top'?"),
        (["--set", "optimizer.lr=3"], "only settings of samples can be set here"),
        (["--set", "samples.rows=0"], "samples.rows is 0, and nothing would be sampled"),
        (["--rows", "0"], "0 is not in the range x>=1"),
        (["--step", "29"], "has no checkpoint of step 29"),
        (["--store", make_store(tmp_path / "wide", d_in=20).path], "has d_in 20"),
    ):
        refused = command("samples", trained, *args)
        assert refused.code == 2 and message in refused.err and len(refused.err.splitlines()) == 1
    with durable.lock(trained / ".lock", "test"):
        assert "is locked" in command("samples", trained).err


def test_a_packed_store_gives_the_same_samples(command, made: SyntheticStore, trained: Path, tmp_path: Path) -> None:
    from tests.llms import command as harvest

    before = [path.read_bytes() for path in paths(trained, 30)]
    assert harvest("pack", made.path, tmp_path / "packed").code == 0
    assert Store.open(tmp_path / "packed", Local(folder=tmp_path / "local")).packed
    shutil.rmtree(trained / "samples")
    done = command("samples", trained, "--store", tmp_path / "packed", "--local-folder", tmp_path / "local")
    assert done.code == 0, done.err
    assert [path.read_bytes() for path in paths(trained, 30)] == before


def test_without_samples_none_are_made_and_the_command_still_makes_them(
    command, made: SyntheticStore, tmp_path: Path
) -> None:
    done = command("run", "--store", made.path, "--runs", tmp_path, "--steps", 5, *SMALL, "--set", "samples.rows=0")
    assert done.code == 0 and not (done.path / "samples").exists()
    assert "samples" not in json.loads((done.path / "usage.json").read_text())["components"]
    assert "is finished: 5 steps" in command("resume", done.path).err and not (done.path / "samples").exists()
    assert json.loads(command("samples", done.path, "--json").out)["settings"]["rows"] == 1_000_000


def test_resume_makes_the_samples_that_a_finished_run_lacks(command, trained: Path) -> None:
    before = {path: path.read_bytes() for path in (*paths(trained, 30), trained / "usage.json")}
    shutil.rmtree(trained / "samples")
    config = json.loads((trained / "config.json").read_text())
    del config["settings"]["samples"]  # of a run from before there were any
    (trained / "config.json").write_text(json.dumps(config))
    assert command("resume", trained).code == 0
    assert {path: path.read_bytes() for path in before} == before
    again = command("resume", trained)
    assert again.code == 0 and "is finished: 30 steps" in again.err and "samples " not in again.err


def test_a_signal_during_the_pass_stops_it_and_resume_makes_the_samples(
    command, made: SyntheticStore, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_ahead

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args)

    monkeypatch.setattr(encoding, "read_ahead", signalled)
    stopped = command("run", "--store", made.path, "--runs", tmp_path / "runs", "--steps", 30, *SMALL)
    run = tmp_path / "runs" / "tiny-002"
    assert stopped.code == 3
    assert f"stopped while sampling; continue with: python -m train resume {run}" in stopped.err
    assert checkpoint.find(run).step == 30 and not (run / "samples").exists()
    monkeypatch.undo()
    assert command("resume", run).code == 0
    for one, other in zip(paths(run, 30), paths(trained, 30), strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert (run / "usage.json").read_bytes() == (trained / "usage.json").read_bytes()


def test_a_full_disk_costs_the_samples_and_one_warning(
    command, made: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = durable._write_synced

    def full(path: Path, data) -> None:
        if path.name == "step-000030.parquet.tmp":  # the second of the two
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(durable, "_write_synced", full)
    done = command("run", "--store", made.path, "--runs", tmp_path, "--steps", 30, *SMALL)
    assert done.code == 0 and done.err.count("disk full while writing") == 1
    assert "the run is finished, and has no samples" in done.err
    assert checkpoint.find(done.path).step == 30 and not list((done.path / "samples").iterdir())
    assert json.loads((done.path / "usage.json").read_text())["components"]["samples"]["calls"] == 1
    alone = command("samples", done.path)
    assert alone.code == 3 and alone.err.count("error: disk full while writing") == 1 and alone.out == ""
    monkeypatch.undo()
    assert command("resume", done.path).code == 0
    assert all(path.is_file() for path in paths(done.path, 30))


def test_a_run_whose_latents_are_never_active_says_so(
    command, made: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "train.samples.make_samples.encode",
        lambda model, rows, blocks, threshold, *rest: encode(model, rows, blocks, threshold + 1e9, *rest),
    )
    done = command("run", "--store", made.path, "--runs", tmp_path, "--steps", 5, *SMALL)
    assert done.code == 0 and "note: samples ran and found nothing to do" in done.err
    assert pq.read_table(paths(done.path, 5)[0]).num_rows == 0
    assert pq.read_table(paths(done.path, 5)[1])["max"].null_count == 64


@pytest.mark.parametrize("fault", ["neighbours", "position 0", "not the largest", "nothing"])
def test_sampling_that_goes_wrong_stops_a_run_before_its_first_step(
    command, made: SyntheticStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def wrong(found: Activations, config: SamplesConfig, seed: int) -> Selection:
        chosen = select(found, config, seed)
        if fault == "neighbours":
            return chosen._replace(pairs=chosen.pairs // 2 * 2)
        if fault == "position 0":
            every = {"repeats": np.zeros(len(found.stratum), bool)}
            found.__dict__.update(every)
            return select(found, config, seed)
        if fault == "not the largest":
            return select(replace(found, values=-found.values + 100), config, seed)
        return Selection(*(part[:0] for part in chosen))

    monkeypatch.setattr("train.run.self_test.select", wrong)
    done = command("run", "--store", made.path, "--runs", tmp_path, "--steps", 5, *SMALL)
    assert done.code == 1 and "planted latents are sampled wrongly: the run was not started" in done.err
    assert not (tmp_path / "tiny-001" / "metrics.jsonl").exists()
