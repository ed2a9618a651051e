"""What latents mean by labels of tokens: against slow, obvious references in float64, and through the command."""

import io
import itertools
import json
import keyword
import shutil
import tokenize
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import minimize

from tests.reports import STEPS, read
from tests.runs import Outcome
from tests.stores import SyntheticStore
from train.probe import score_loops
from train.probe.absorption import main_latents
from train.probe.dense_probes import dense_probes
from train.probe.english_labels import english_labels
from train.probe.label_latents import drawn, label_latents
from train.probe.labels import Labels
from train.probe.measure import random_pairs
from train.probe.probe_record import FILE, ProbeRecord
from train.probe.probed_rows import ByLatent, ProbedRows, halves, probed_rows
from train.probe.python_labels import python_labels
from train.probe.sparse_probes import DenseColumns, SparseColumns, differences, sparse_probes
from train.samples.context_loops import NOT_STORED
from train.samples.encode import Activations

Command = Callable[..., Outcome]
R, F, L, GROUPS = 300, 7, 4, 10


def f1(told: np.ndarray, true: np.ndarray, weight: np.ndarray) -> float:
    return 2 * weight[told & true].sum() / max(weight[told].sum() + weight[true].sum(), 1e-300)


def auroc(values: np.ndarray, true: np.ndarray, weight: np.ndarray) -> float:
    above = np.sign(values[true][:, None].astype(float) - values[~true]) / 2 + 0.5
    both = weight[true][:, None] * weight[~true]
    return (above * both).sum() / both.sum()


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """Activations [R, F] with many ties; latent 6 is never active."""
    rng = np.random.default_rng(0)
    values = np.round(rng.exponential(size=(R, F)), 1) * (rng.random((R, F)) < 0.3)
    values[:, 6] = 0
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> ProbedRows:
    rng = np.random.default_rng(1)
    masks = rng.random((L, R)) < np.array([0.1, 0.2, 0.3, 0.45])[:, None]
    groups = np.arange(R) * GROUPS // R
    return ProbedRows(
        number=np.arange(R), unit="documents", groups=groups, scored=groups % 2 == 1,
        names=tuple(f"label {i}" for i in range(L)), masks=masks, left_out=(),
    )  # fmt: skip


def by_latent(dense: np.ndarray) -> ByLatent:
    latents, rows = np.nonzero(dense.T)
    return ByLatent(np.searchsorted(latents, np.arange(dense.shape[1] + 1)), rows, dense[rows, latents])


def test_the_best_cut_and_label_are_those_of_every_cut_tried(dense: np.ndarray, rows: ProbedRows) -> None:
    found, cuts = np.zeros((F, L)), np.zeros((F, L))
    first = ~rows.scored
    score_loops.best_cuts(*by_latent(dense), first, *rows.by_row, rows.masks[:, first].sum(1), found, cuts)
    for f, label in itertools.product(range(F), range(L)):
        tried = [0.0, *np.unique(dense[first, f])]
        expected = [f1(dense[first, f] > cut, rows.masks[label, first], np.ones(first.sum())) for cut in tried]
        assert found[f, label] == pytest.approx(max(expected), abs=1e-12)
        at_cut = f1(dense[first, f] > cuts[f, label], rows.masks[label, first], np.ones(first.sum()))
        assert at_cut == pytest.approx(max(expected), abs=1e-12)


def test_figures_and_their_intervals_are_those_of_rows_repeated_by_document(
    dense: np.ndarray, rows: ProbedRows
) -> None:
    scores = label_latents(by_latent(dense), rows, labels=2, draws=50)
    second = rows.scored
    weights = drawn(np.unique(rows.groups[second]), GROUPS, 50)
    assert weights.sum(1) == pytest.approx(GROUPS / 2) and not weights[:, ::2].any()
    assert sorted(set(scores.latents)) == list(range(F - 1)) and len(scores.latents) == 2 * (F - 1)
    for e, (f, label) in enumerate(zip(scores.latents, scores.labels, strict=True)):
        values, true = dense[second, f], rows.masks[label, second]
        told = values > scores.cuts[e]
        for figure, reference, given in ((scores.f1, f1, told), (scores.auroc, auroc, values)):
            once = reference(given, true, np.ones(second.sum()))
            repeated = [reference(given, true, draw[rows.groups[second]]) for draw in weights]
            assert figure[e] == pytest.approx([once, *np.quantile(repeated, [0.025, 0.975])], abs=1e-12)
        assert scores.precision[e] == pytest.approx((told & true).sum() / told.sum())
        assert scores.recall[e] == pytest.approx((told & true).sum() / true.sum())


def test_a_latent_that_fires_exactly_on_a_label_has_f1_and_auroc_1(rows: ProbedRows) -> None:
    rng = np.random.default_rng(2)
    planted = (rows.masks * rng.uniform(0.5, 2, R)).T.astype(np.float32)
    pairs = by_latent(planted)
    scores = label_latents(pairs, rows, labels=1)
    assert scores.labels.tolist() == list(range(L)) and not scores.cuts.any()
    assert (scores.f1 == 1).all() and (scores.auroc == 1).all()
    probes = sparse_probes(SparseColumns(pairs, R), rows)
    assert probes.chosen[:, 0].tolist() == list(range(L)) and (probes.f1[:, 0] == 1).all()


def test_columns_are_chosen_by_the_difference_of_means_over_the_deviation(dense: np.ndarray, rows: ProbedRows) -> None:
    first = ~rows.scored
    values = dense[first].astype(np.float64)
    expected = np.zeros((F, L))
    for f, label in itertools.product(range(F - 1), range(L)):
        true = rows.masks[label, first]
        expected[f, label] = (values[true, f].mean() - values[~true, f].mean()) / values[:, f].std()
    for columns in (SparseColumns(by_latent(dense), R), DenseColumns(torch.from_numpy(dense))):
        assert differences(*columns.moments(rows), rows) == pytest.approx(expected, abs=1e-5)
        probes = sparse_probes(columns, rows)
        assert (probes.chosen == np.argsort(-np.abs(expected), axis=0, kind="stable")[:5].T).all()


def test_the_probe_is_the_logistic_regression_whose_penalised_loss_is_least() -> None:
    rng = np.random.default_rng(3)
    x, weights = rng.normal(size=(80, 3)), rng.integers(1, 5, 80).astype(float)
    y = (x @ [1.0, -2.0, 0.0] + rng.logistic(size=80) > 1).astype(float)

    def loss(w: np.ndarray) -> float:
        z = x @ w[:3] + w[3]
        return float((weights * (np.logaddexp(0, z) - y * z)).sum() + 0.5 * (w[:3] ** 2).sum())

    assert score_loops.logistic(x, y, weights, 1.0, 50) == pytest.approx(minimize(loss, np.zeros(4)).x, abs=1e-3)
    apart = score_loops.logistic(x, (x[:, 0] > 0).astype(float), weights, 1.0, 50)
    assert np.isfinite(apart).all() and ((x @ apart[:3] + apart[3] > 0) == (x[:, 0] > 0)).mean() > 0.9


def test_probes_of_one_column_have_the_f1_of_the_best_cut_on_the_other_half(
    dense: np.ndarray, rows: ProbedRows
) -> None:
    """A probe of one latent is a cut of it, from one side or the other."""
    probes, ones = sparse_probes(SparseColumns(by_latent(dense), R), rows), np.ones(R // 2)
    for label in range(L):
        values, true = dense[:, probes.chosen[label, 0]].astype(float), rows.masks[label]
        sign = np.sign(values[true & ~rows.scored].mean() - values[~true & ~rows.scored].mean())
        values = sign * values
        tried = [-np.inf, *np.unique(values)]
        best = max(tried, key=lambda cut: f1(values[~rows.scored] > cut, true[~rows.scored], ones))
        assert probes.f1[label, 0] == pytest.approx(f1(values[rows.scored] > best, true[rows.scored], ones))


def test_a_dense_probe_finds_a_direction_that_no_dimension_shows(rows: ProbedRows) -> None:
    x = torch.randn(R, 6, generator=torch.Generator().manual_seed(4))
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    masks = np.stack([(x @ direction > 1.5).numpy(), (x @ direction < -1).numpy()])
    planted = replace(rows, masks=masks, names=("a", "b"))
    found = dense_probes(x, planted)
    assert (found.f1 > 0.9).all() and found.f1 == pytest.approx(
        [f1(found.found[i, rows.scored], masks[i, rows.scored], np.ones(R // 2)) for i in range(2)]
    )
    cosines = torch.nn.functional.cosine_similarity(found.weights.T, direction)
    assert cosines[0] > 0.95 and cosines[1] < -0.95


def saebench(acts: np.ndarray, cosines: np.ndarray, along: float, main: list[int]) -> tuple[bool, float]:
    """`calculate_absorption` of SAEBench for one token and unit decoder rows, on a dense row of latents."""
    projections = acts * cosines
    mine = projections[main].sum()
    others = [p for f, p in enumerate(projections) if f not in main and cosines[f] >= 0.1 and p > 0]
    largest = sum(sorted(others)[-3:])
    if mine >= along or largest / along < 0.4:
        fraction = 0.0
    elif mine <= 0:
        fraction = 1.0
    else:
        part = min(largest, along - mine)
        fraction = part / (part + mine)
    top = int(np.argmax(projections))
    whole = (acts[main] < 1e-8).all() and cosines[top] >= 0.025 and along >= 0 and projections[top] / along >= 0.4
    return bool(whole), fraction


def test_absorption_is_saebenchs(dense: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    cosines, along, main = rng.uniform(-0.3, 1, F), rng.uniform(0.05, 2.5, R), [1, 4]
    is_main = np.isin(np.arange(F), main)
    tokens = np.arange(0, R, 2)
    at, latents = np.nonzero(dense)
    found = score_loops.absorbed(
        tokens, np.searchsorted(at, np.arange(R + 1)), latents, dense[at, latents].astype(float), is_main,
        cosines, cosines, along, (0.025, 0.1, 0.4),
    )  # fmt: skip
    expected = [saebench(dense[row].astype(float), cosines, along[row], main) for row in tokens]
    assert found == pytest.approx(np.sum(expected, axis=0)) and min(found) > 3
    assert [main_latents(np.array(one)) for one in ([0.5, 0.52, 0.9], [0.5, 0.6, 0.62], [0.1, 0.2, 0.3])] == [1, 2, 3]


def test_random_directions_have_the_l0_that_was_asked_for() -> None:
    source = torch.randn(500, 8, generator=torch.Generator().manual_seed(6))
    pairs = random_pairs(source, 40, 3.0, "torch")
    assert len(pairs.rows) / 500 == pytest.approx(3.0, abs=0.05)
    assert pairs.starts[-1] == len(pairs.rows) and all(
        (np.diff(pairs.rows[a:b]) > 0).all() for a, b in itertools.pairwise(pairs.starts)
    )
    assert pairs.values.min() > 0


def found_of(tokens: np.ndarray, documents: np.ndarray, stratum: np.ndarray) -> Activations:
    none = np.zeros(0, np.int32)
    return Activations(
        first=0, tokens=tokens, documents=documents, apart=False, strata=("000-001", "001-032"), stratum=stratum,
        starts=np.zeros(F + 1, np.int64), places=none, values=none.astype(np.float32),
    )  # fmt: skip


def test_halves_are_of_whole_documents_and_labels_of_few_or_many_rows_are_left_out() -> None:
    documents = (np.arange(640) // 40).reshape(20, 32)
    stratum = np.where(np.arange(640) % 32 == 0, 0, 1).astype(np.uint8)
    stratum[5] = NOT_STORED
    masks = np.stack([np.arange(640) % 7 == 0, np.arange(640) % 200 == 0, np.arange(640) % 7 != 0])
    labels = Labels(kind="file", names=("some", "few", "many"), masks=masks)
    rows = probed_rows(found_of(documents, documents, stratum), labels, 0)
    kept = np.flatnonzero(stratum == 1)
    assert (np.flatnonzero(rows.number >= 0) == kept).all() and rows.unit == "documents"
    assert rows.names == ("some",) and rows.left_out == ("few", "many") and (rows.masks[0] == masks[0, kept]).all()
    assert all(len(set(rows.scored[rows.groups == group])) == 1 for group in range(16))
    assert abs(rows.scored.mean() - 0.5) < 0.05
    assert halves(np.array([5, 3, 3])).tolist() == [False, True, True]
    one = np.zeros_like(documents)
    assert probed_rows(found_of(one, one, stratum), labels, 0).unit == "sequences"


def test_labels_of_windows_of_python_are_those_that_tokenize_gives_the_whole_file() -> None:
    rng, wrong, counted = np.random.default_rng(7), dict.fromkeys(WANTED, 0), dict.fromkeys(WANTED, 0)
    for module in (tokenize, json.decoder, shutil, keyword):
        text = Path(str(module.__file__)).read_text()
        truth = by_tokenize(text)
        for low in rng.integers(0, max(len(text) - 900, 1), 6):
            window = text[low : low + 900]
            found = python_labels(window)
            inked = np.array([not one.isspace() for one in window])
            for label in WANTED:
                mine, true = found.get(label, np.zeros(len(window), bool)), truth[label][low : low + 900]
                wrong[label] += int(((mine != true) & inked).sum())
                counted[label] += int((true & inked).sum())
    assert all(counted.values())
    assert all(wrong[label] <= 0.05 * counted[label] for label in WANTED), (wrong, counted)


WANTED = ("comment", "string", "number", "keyword")


def by_tokenize(text: str) -> dict[str, np.ndarray]:
    starts = np.cumsum([0, *(len(line) for line in text.splitlines(keepends=True))])
    found = {label: np.zeros(len(text), bool) for label in WANTED}
    names = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.NUMBER: "number"}
    inside = [getattr(tokenize, name) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if
              hasattr(tokenize, name)]  # fmt: skip
    for one in tokenize.generate_tokens(io.StringIO(text).readline):
        label = "string" if one.type in inside else names.get(one.type, "")
        if one.type == tokenize.NAME and keyword.iskeyword(one.string):
            label = "keyword"
        if label:
            low, high = (starts[line - 1] + column for line, column in (one.start, one.end))
            found[label][low:high] = True
    return found


def marked(text: str, characters: np.ndarray) -> list[str]:
    return "".join(one if is_in else "\0" for one, is_in in zip(text, characters, strict=True)).strip("\0").split("\0")


def test_brackets_indentation_and_calls_of_a_window_that_begins_within_a_call() -> None:
    text = "a, b])\n    if x.y(c[1], k=2):\n        return f'{z}'  # done\n"
    found = {
        label: [part for part in marked(text, mask) if part.strip()] for label, mask in python_labels(text).items()
    }
    assert "".join(found["in 2 brackets"]) == "a,b[1" and "".join(found["in 1 brackets"]) == "](c],k=2"
    assert "".join(found["indented 1 levels"]).replace(" ", "") == "ifx.y(c[1],k=2):"
    assert "".join(found["indented 2 levels"]).replace(" ", "").startswith("returnf'{z}'")
    assert found["attribute"] == ["y"] and found["called or defined"] == ["y"]
    assert found["assigned, or a keyword argument"] == ["k"] and found["comment"] == ["# done"]
    assert found["keyword if"] == ["if"] and found["number"] == ["1", "2"]


def test_labels_of_english() -> None:
    text = 'It cost 3,500 dollars. "She left (early)", said Anna Smith, but not for two days.'
    found = {label: [part for part in marked(text, mask) if part] for label, mask in english_labels(text).items()}
    assert found["number"] == ["3,500", "two"] and found["start of a sentence"] == ["It", "She"]
    assert found["end of a sentence"] == [".", "."] and found["in brackets"] == ["(early)"]
    assert found["in quotes"] == ['"She left (early)"'] and found["conjunction"] == ["but"]
    assert found["capitalised inside a sentence"] == ["Anna", "Smith"] and found["negation"] == ["not"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def own_labels(path: Path, store: SyntheticStore, **columns: Any) -> Path:
    """Every third token of the held-out sequences is `odd`, and every fifth `fifth`."""
    context, held_out = store.record.request.context_size, 2 * store.record.request.block_sequences
    places = np.arange(held_out * context)
    kept = [places[places % 3 == 0], places[places % 5 == 0]]
    table = {
        "sequence": np.concatenate(kept) // context,
        "offset": np.concatenate(kept) % context,
        "label": ["odd"] * len(kept[0]) + ["fifth"] * len(kept[1]),
    }
    pq.write_table(pa.table(table | columns), path)
    return path


def test_a_run_is_probed_by_labels_of_its_user_and_report_and_comparison_show_it(
    command: Command, run: Path, report_store: SyntheticStore, tmp_path: Path
) -> None:
    labels = own_labels(tmp_path / "own.parquet", report_store)
    done = command("probe", run, "--labels", labels)
    assert done.code == 0 and done.path == run / FILE, done.err
    data = json.loads((run / FILE).read_text())
    del data["digest"]
    record = ProbeRecord.model_validate(data)
    assert [one.name for one in record.summary.labels] == ["fifth", "odd"] and record.summary.step == STEPS
    context = report_store.record.request.context_size
    shares = [np.mean([(i * context + j) % n == 0 for i in range(32) for j in range(1, context)]) for n in (5, 3)]
    assert [one.share for one in record.summary.labels] == pytest.approx(shares, abs=0.02)
    assert sum(record.summary.rows) == 32 * (context - 1)
    again = json.loads(command("probe", run, "--labels", labels, "--json").out)
    assert again == record.model_dump(mode="json")

    assert command("report", run).code == 0
    assert read(run).probe == record.summary
    assert "What latents mean" in (run / "report.html").read_text() and "labels |" in (run / "report.md").read_text()
    table = pq.read_table(run / "report" / "latents.parquet")
    first = record.latents.latent[0]
    assert table["labels"][first].as_py()[0] == record.summary.labels[record.latents.label[0]].name
    assert table["label_f1"][first].as_py()[0] == record.latents.f1[0]

    found = json.loads(command("compare", run, "--json").out)
    (figures,) = found["arms"][0]["runs"].values()
    assert figures["probe_f1"] == record.summary.mean_f1["latents"]["1"]
    assert "F1 of the best latent of a label" in command("compare", run).out
    (run / FILE).write_text((run / FILE).read_text().replace('"d_sae": 64', '"d_sae": 65'))
    refused = command("report", run)
    assert refused.code != 0 and str(run / FILE) in refused.err and "train probe" in refused.err


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"offset": pa.array([1.5])}, "column 'offset' is double"),
        ({"sequence": pa.array([10**6])}, "sequence goes from 1000000 to 1000000"),
        ({"sequence": pa.array([100])}, "none of the sequences"),
        ({"label": pa.array(["a\x1bb"])}, "can be printed"),
        ({"label": pa.array([None], pa.string())}, "with 1 nulls"),
        ({"label": None}, "no column 'label'"),
        ({}, "at least 20"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels_that_do_not_fit_are_one_clear_error(
    columns: dict[str, Any], said: str, command: Command, trained: Path, tmp_path: Path
) -> None:
    given = {"sequence": pa.array([0]), "offset": pa.array([1]), "label": pa.array(["a"])} | columns
    pq.write_table(pa.table({name: one for name, one in given.items() if one is not None}), tmp_path / "own.parquet")
    done = command("probe", trained, "--labels", tmp_path / "own.parquet")
    assert done.code == 2 and said in done.err and "Traceback" not in done.err and not (trained / FILE).exists()


def test_a_file_that_is_none_is_one_clear_error(command: Command, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_text("no Parquet")
    for name, said in (("own.parquet", "cannot be read as Parquet"), ("pyton", "no such file; expected one of auto")):
        done = command("probe", trained, "--labels", tmp_path / name)
        assert done.code == 2 and said in done.err and "Traceback" not in done.err


def test_text_of_a_store_is_labelled(command: Command, trained_on_text: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained_on_text, tmp_path / "run"))
    done = command("probe", run, "--json")
    assert done.code == 0, done.err
    record = ProbeRecord.model_validate_json(done.out)
    assert record.summary.kind == "english"
    assert {"begins a word", "blank"} & {one.name for one in record.summary.labels} | set(record.summary.left_out)
