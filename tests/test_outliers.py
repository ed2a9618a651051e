"""Outlier rows against brute force: which they are, the stream without them, and the statistics without them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harvest.writer.blocks import pack_moments
from shared.errors import CorruptData, UserError
from shared.store.layout import moments_path, record_path
from shared.store.outliers import Exclusion, long_rows, norms_of, pack_long_rows
from shared.store.reader import RowReader, RowsConfig, RowStream, rows_per_stratum, training_strata
from shared.store.statistics import decode, moments_of, row_norms
from shared.store.store import Store
from tests.runs import SMALL, as_format_4_had_it, rows
from tests.stores import SyntheticStore, edit, make_store
from train.data.batches import BatchReader, StoreRows
from train.evaluation.evaluate import calibrate, evaluate, natural_weights
from train.model import checkpoint
from train.model.activations import BatchTopK
from train.model.normalisation import moments, without
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.settings import Settings, resolve

CPU = torch.device("cpu")
SINKS = {5: 40.0, 17: 300.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("sinks") / "store", sinks=SINKS, block_sequences=16)


def excluding(store: Store, **changes: object) -> Store:
    settings = {"training": True, "figures": True, "position_0": True} | changes
    return store.excluding(store.exclusion_at(10.0, **settings))  # type: ignore[arg-type]


def brute(made: SyntheticStore, exclusion: Exclusion, stratum: str) -> list[int]:
    found: set[int] = set()
    for side, limit in exclusion.limits.items():
        norms = np.linalg.norm(made.values(f"strata/{stratum}/{side}").astype(np.float64), axis=1)
        found |= set(np.flatnonzero(norms > limit).tolist())
    return sorted(found)


def write_statistics(made: SyntheticStore, *, listed: bool, above: float = 1.0) -> None:
    """Give each block the statistics that a harvest writes; without lists, as harvests did before there were any."""
    record = made.record
    for block in range(record.blocks):
        tensors: dict[str, np.ndarray] = {}
        for s in record.plan.stored_strata:
            for side in ("source", "target"):
                stored = made.arrays[f"strata/{s.name}/{side}"][block * s.rows : (block + 1) * s.rows]
                tensors |= pack_moments({f"{s.name}/{side}": moments_of(stored)})
                tensors |= pack_long_rows({f"{s.name}/{side}": long_rows(norms_of(stored), above)}) if listed else {}
        write_block(made.path, block, tensors)


def write_block(path: Path, block: int, tensors: dict) -> None:
    from safetensors.numpy import save

    from shared.store.checks import buffers_record

    data = save(tensors)
    (path / moments_path(block)).write_bytes(data)
    ledger = json.loads((path / record_path(block)).read_text())
    ledger["moments"] = buffers_record([data]).model_dump(mode="json")
    (path / record_path(block)).write_text(json.dumps(ledger))


@pytest.mark.parametrize("statistics", ["none", "histograms", "lists", "short lists"])
def test_outliers_are_the_rows_over_the_limit(tmp_path: Path, statistics: str) -> None:
    """Whether blocks list their long rows, have histograms alone, or neither, or lists that begin above the limit."""
    made = make_store(tmp_path / "store", sinks=SINKS, bos_norm=100.0)
    if statistics != "none":
        write_statistics(made, listed="lists" in statistics, above=1e9 if statistics == "short lists" else 1.0)
    store = excluding(Store.open(made.path))
    assert store.exclusion
    for name in store.strata:
        expected = [] if name == "000-001" else brute(made, store.exclusion, name)
        assert store.outliers[name].tolist() == expected
        assert expected or name == "000-001"
    whole = excluding(Store.open(made.path), position_0=False)
    assert whole.outliers["000-001"].tolist() == list(range(made.record.blocks * 16))
    assert not any(len(rows) for rows in Store.open(made.path).outliers.values())


def test_histograms_spare_reading_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "store")  # no sinks but position 0
    write_statistics(made, listed=False)
    monkeypatch.setattr(Store, "_block_rows", lambda *_: pytest.fail("rows were read"))
    assert not any(len(rows) for rows in excluding(Store.open(made.path)).outliers.values())


def test_damaged_statistics_are_told_with_what_to_do(tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", sinks=SINKS)
    store = excluding(Store.open(made.path))
    path = made.path / moments_path(3)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptData, match="000003.*crc32c.*harvest repair"):
        _ = store.outliers
    write_statistics(made, listed=True)
    store = excluding(Store.open(made.path))
    stratum = "004-016"
    listed = {f"{stratum}/source/long_rows": np.array([10**6]), f"{stratum}/source/long_norms": np.array([1e9]),
              f"{stratum}/source/long_above": np.array([1.0])}  # fmt: skip
    write_block(made.path, 2, listed)
    with pytest.raises(CorruptData, match=stratum):
        _ = store.outliers


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32"])
def test_norms_are_those_of_the_stored_numbers(storage: str, tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", storage=storage, sinks=SINKS)
    stored = made.arrays["strata/004-016/source"]
    expected = np.linalg.norm(made.values("strata/004-016/source").astype(np.float64), axis=1)
    np.testing.assert_allclose(row_norms(stored), expected, rtol=1e-12)
    assert (decode(stored) == made.values("strata/004-016/source")).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_stream_without_some_rows_is_the_stream_of_the_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, run = int(rng.integers(2, 200)), int(rng.integers(1, 20))
    left_out = np.sort(rng.permutation(rows)[: rng.integers(0, rows)])
    kept = np.delete(np.arange(rows), left_out)
    stream, plain = RowStream(rows, run, "k", without=left_out), RowStream(len(kept), run, "k")
    for start in range(0, 2 * len(kept), 7):
        count = int(rng.integers(0, 3 * len(kept)))
        found = [row - 1000 for low, high in stream.runs(start, count, 1000) for row in range(low, high)]
        assert found == [kept[row] for low, high in plain.runs(start, count) for row in range(low, high)]


def test_no_batch_holds_a_row_that_is_left_out(made: SyntheticStore) -> None:
    store = excluding(Store.open(made.path))
    assert store.exclusion
    blocks = store.record.training_blocks
    reader = BatchReader(store, blocks, RowsConfig(batch_rows=50), 0, CPU)
    assert not reader.has_outliers and "000-001" not in reader.slices()
    source, target = store.exclusion.source_norm, store.exclusion.target_norm
    for step in range(60):
        batch = reader.batch(step)
        assert len(batch.source) == 50 and not reader.outliers(step).any()
        assert (batch.source.norm(dim=1) <= source).all() and (batch.target.norm(dim=1) <= target).all()
    seen = [n for s, low, high, _ in reader.runs(0) for n in range(low, high) if s.stratum.name == "016-032"]
    assert min(seen) >= blocks.start * store.strata["016-032"].stratum.rows


def test_batches_that_take_outliers_in_say_which_they_are(made: SyntheticStore) -> None:
    store = excluding(Store.open(made.path), training=False, position_0=False)
    assert store.exclusion and store.exclusion.source_norm
    reader = BatchReader(store, store.record.training_blocks, RowsConfig(batch_rows=500), 0, CPU)
    assert reader.has_outliers
    for step in range(3):
        batch, found = reader.batch(step), torch.from_numpy(reader.outliers(step))
        long = (batch.source.norm(dim=1) > store.exclusion.source_norm) | (
            batch.target.norm(dim=1) > (store.exclusion.target_norm or 0)
        )
        assert found.equal(long) and found.any()


def test_a_strata_share_is_of_the_rows_that_are_left(made: SyntheticStore) -> None:
    store = excluding(Store.open(made.path))
    for stratum in training_strata(store, store.record.training_blocks):
        whole = store.strata[stratum.name].stratum
        first = store.record.held_out_blocks if hasattr(store.record, "held_out_blocks") else 2
        gone = (store.outliers[stratum.name] >= first * whole.rows).sum()
        left = 0 if stratum.is_position_0 else 1 - gone / (3 * whole.rows)
        assert stratum.natural_rows == pytest.approx(whole.natural_rows * left)
    with pytest.raises(UserError, match="every row"):
        rows_per_stratum([s for s in training_strata(store, range(2, 5)) if s.is_position_0], RowsConfig())


def test_old_runs_read_every_row(made: SyntheticStore) -> None:
    """Without an exclusion, as in runs from before there were any."""
    store = Store.open(made.path)
    reader = RowReader(store, store.record.training_blocks, RowsConfig(batch_rows=50, max_position_0_batch_share=1), 0)
    assert not reader.has_outliers
    assert set(reader.slices()) == set(store.strata)


def test_moments_are_those_of_the_ordinary_rows(made: SyntheticStore) -> None:
    store = excluding(Store.open(made.path))
    for side in ("source", "target"):
        rows, weights = [], []
        for name, part in store.strata.items():
            if name != "000-001":
                n, first = part.stratum.rows, 2 * part.stratum.rows
                kept = np.setdiff1d(np.arange(first, 5 * n), store.outliers[name])
                rows.append(made.values(f"strata/{name}/{side}")[kept].astype(np.float64))
                weights.append(np.full(len(kept), part.stratum.natural_rows / n))
        x, w = np.concatenate(rows), np.concatenate(weights)
        mean = w @ x / w.sum()
        variance = w @ np.square(x - mean) / w.sum()
        found = moments(store, side)
        np.testing.assert_allclose(found[0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], variance, rtol=1e-4)
        assert store.statistics["overall"][side].variance.sum() > 3 * variance.sum()


def test_taking_rows_away_is_exact_in_float64() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1000, 7)) + 3, rng.uniform(0.5, 4, 1000)
    x[:20] *= 1e4
    w[20:] = 1.0

    def of(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = weights @ rows / weights.sum()
        return mean, weights @ np.square(rows - mean) / weights.sum()

    found = without(*of(x, w), float(w.sum()), x[:20], w[:20])
    for got, expected in zip(found, of(x[20:], w[20:]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    mean, variance = of(x, w)
    same = without(mean, variance, float(w.sum()), x[:0], w[:0])
    assert (same[0] == mean).all() and (same[1] == variance).all()


def test_figures_of_ordinary_rows_and_of_outliers_are_apart(made: SyntheticStore) -> None:
    store = excluding(Store.open(made.path))
    activation = BatchTopK(k=6)
    config = TranscoderConfig(d_sae=64).resolve(16, activation)
    means = [torch.from_numpy(moments(store, side)[0]).float() for side in ("source", "target")]
    model = Transcoder(16, 24, config, activation, Normalisation(means[0], 1.5, means[1], 0.7))
    model.initialise(1)
    threshold = calibrate(model, StoreRows(store, 37))
    found = evaluate(model, StoreRows(store, 37), threshold, seed=0)
    weights, error, out_error, out_squares, active, out_active = natural_weights(store), 0.0, 0.0, 0.0, 0.0, 0.0
    zero_error = zero_active = total = n = out_n = 0.0
    mean = torch.zeros(24).double()
    for chunk in StoreRows(store, 10**9).chunks(store.record.report_blocks, CPU):
        x, y = model.normalised(chunk.source, chunk.target)
        pre_acts = (x @ model.W_enc + model.b_enc).detach()
        latents = pre_acts * (pre_acts > threshold)
        errors = (y - latents @ model.W_dec - model.b_dec).detach().double().square().sum(1)
        fires, squares = (latents > 0).sum(1).double(), y.double().square().sum(1)
        out, w = chunk.outliers, weights[chunk.stratum]
        if chunk.stratum == "000-001":
            times = store.strata["000-001"].stratum.natural_rows / store.strata["000-001"].stratum.rows
            zero_error, zero_active = times * float(errors.sum()), times * float(fires.sum())
            continue
        assert out.any() and (chunk.source[out].norm(dim=1) > 5 * chunk.source[~out].norm(dim=1).max()).all()
        error, active = error + w * float(errors[~out].sum()), active + w * float(fires[~out].sum())
        out_error, out_active = out_error + w * float(errors[out].sum()), out_active + w * float(fires[out].sum())
        out_squares, out_n, n = (
            out_squares + w * float(squares[out].sum()),
            out_n + w * int(out.sum()),
            n + w * int((~out).sum()),
        )
        mean, total = mean + w * y[~out].double().sum(0), total + w * float(squares[~out].sum())
    assert found.fvu == pytest.approx(error / (total - float(mean.square().sum()) / n), rel=1e-4)
    assert found.l0 == pytest.approx(active / n, rel=1e-6) and found.l0 == pytest.approx(6, rel=0.25)
    assert found.outliers and found.outliers.rows == pytest.approx(out_n)
    assert found.outliers.relative_error == pytest.approx(out_error / out_squares, rel=1e-4)
    whole = error + out_error + zero_error
    assert found.outliers.error_share == pytest.approx(out_error / whole, rel=1e-4)
    assert found.outliers.active_share == pytest.approx(out_active / (active + out_active + zero_active), rel=1e-6)
    assert found.outliers.l0 == pytest.approx(out_active / out_n, rel=1e-6)
    assert found.strata["000-001"].error_share == pytest.approx(zero_error / whole, rel=1e-4)
    with_them = evaluate(model, StoreRows(excluding(store, figures=False), 37), threshold, seed=0)
    assert with_them.outliers is None and abs(with_them.fvu / found.fvu - 1) > 0.1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (True, True, True)),
        ({"rows": {"outliers": "train"}}, (False, True, True)),
        ({"rows": {"position_0": "train"}}, (True, True, False)),
        ({"evaluation": {"outliers": "with_others"}}, (True, False, True)),
    ],
)
def test_each_choice_is_a_setting_and_is_kept_in_the_run(
    made: SyntheticStore, settings: dict, expected: tuple[bool, bool, bool]
) -> None:
    base = {"transcoder": {"d_sae": 64}, "activation": {"kind": "batchtopk", "k": 6}, "steps": 9}
    base["rows"] = {"batch_rows": 48} | settings.get("rows", {})
    config = resolve(Store.open(made.path), Settings.model_validate(base | {**settings, "rows": base["rows"]}), None)
    found = config.exclusion
    assert found and (found.training, found.figures, found.position_0) == expected
    median = made.record.overall.source.norm_quantiles["0.5"]
    assert found.source_norm == pytest.approx(10 * median)
    none = resolve(
        Store.open(made.path), Settings.model_validate(base | {"rows": {"batch_rows": 48, "outlier_ratio": 0}}), None
    )
    assert none.exclusion and none.exclusion.limits == {"source": None, "target": None}


def test_position_0_that_varies_is_trained_on(tmp_path: Path) -> None:
    """As where windows do not begin with BOS: rows that are neither one constant nor long."""

    class Varied:
        mean = np.zeros(16)

        def __call__(self, tokens: np.ndarray, position: np.ndarray, shared: object) -> dict:
            rng = np.random.default_rng(int(tokens.sum()))
            return {"source": rng.normal(size=(len(tokens), 16)).astype(np.float32),
                    "target": rng.normal(size=(len(tokens), 24)).astype(np.float32)}  # fmt: skip

    varied = make_store(tmp_path / "varied", draw=Varied())
    assert not Store.open(varied.path).position_0_is_odd
    assert Store.open(make_store(tmp_path / "constant", bos_norm=1.0).path).position_0_is_odd


def held_out(run: Path) -> dict:
    return [row["held_out"] for row in rows(run) if "held_out" in row][-1]


def test_a_default_run_loses_nothing_to_planted_sinks(command, tmp_path: Path) -> None:
    """Sinks at position 0 and at single tokens: against a store without them, and against a run that takes them in."""
    sinks = make_store(tmp_path / "sinks", sinks=SINKS, bos_norm=100.0, training_blocks=8, d_in=48, d_out=48)
    plain = make_store(tmp_path / "plain", bos_norm=1.0, training_blocks=8, d_in=48, d_out=48)
    takes = ["--set", "rows.outliers=train", "--set", "rows.position_0=train"]
    lines = {"default": (sinks, []), "without": (plain, []), "taken in": (sinks, takes)}
    found = {}
    for name, (store, options) in lines.items():
        done = command("run", "--store", store.path, "--runs", tmp_path, "--name", name, "--steps", 400, *SMALL,
                       "--set", "optimizer.lr=0.01", "--set", "samples.rows=500", *options)  # fmt: skip
        assert done.code == 0, done.err
        found[name] = held_out(tmp_path / name)
        told = ("outliers (source norm above", "left out (rows.outliers=train would keep them)")
        assert all(words in done.err for words in told) == (name == "default"), done.err
    assert found["default"]["fvu"] < 1.1 * found["without"]["fvu"]
    for sunk in (found["default"]["strata"]["000-001"], found["default"]["outliers"]):
        assert sunk["l0"] < found["default"]["l0"] < 8  # without the term that keeps latents silent there: 30 and more
    assert found["taken in"]["fvu"] > 1.3 * found["default"]["fvu"]
    assert found["default"]["outliers"]["rows"] > 0 and found["without"]["outliers"] is None
    shares = rows(tmp_path / "taken in")[-1]["strata"]
    assert shares["outliers"]["error_share"] > 0.2 and "outliers" not in rows(tmp_path / "default")[-1]["strata"]


def test_a_run_from_before_there_were_exclusions_goes_on_as_it_was(
    command, made: SyntheticStore, tmp_path: Path
) -> None:
    """Its config.json names none: every row is read, as a run reads them that leaves nothing out."""
    whole = ["rows.outlier_ratio=0", "rows.position_0=train", "checkpoint.every=10", "samples.rows=500"]
    sets = [part for one in whole for part in ("--set", one)]
    line = ("run", "--store", made.path, "--runs", tmp_path, "--steps", 20, *SMALL, *sets)
    assert command(*line, "--name", "new").code == 0
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    for later in ("checkpoints/step-000020", "samples", "anti_duplication_logs"):
        shutil.rmtree(tmp_path / "old" / later)
    edit(tmp_path / "old" / "config.json", lambda config: (config.pop("exclusion"), config["settings"].pop("quiet")))
    as_format_4_had_it(tmp_path / "old")
    assert command("resume", tmp_path / "old").code == 0
    left, right = checkpoint.find(tmp_path / "new"), checkpoint.find(tmp_path / "old")
    assert left.step == right.step == 20
    for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        assert (left.path / name).read_bytes() == (right.path / name).read_bytes()
