"""Exports: what is written is the run's function in the other library's form, or nothing is written."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train as api
from shared.errors import ProjectError
from shared.store.store import Store
from tests.runs import VALUES, VALUES_WITHOUT_K, Outcome
from tests.stores import SyntheticStore, make_store
from train.data.batches import StoreRows
from train.evaluation.evaluate import calibrate
from train.interchange.plain_transcoder import PlainTranscoder
from train.run.load_run import load_run

FORMATS = ("saelens", "circuit-tracer", "sparsify")
LAYERS = {"circuit-tracer": ("--layers", "5")}
"""The synthetic store is of layer 3."""
Command = Callable[..., Outcome]
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """Source and target of one width, as most formats want them."""
    return make_store(tmp_path_factory.mktemp("square") / "store", d_in=12, d_out=12, held_out_blocks=4)


@pytest.fixture(scope="module")
def other_layer(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("other") / "store", d_in=12, d_out=12, held_out_blocks=4, layer=1)


@pytest.fixture(scope="module")
def train_on(tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Trains on a store with some settings, once for each."""
    made, folder = dict[tuple[object, ...], Path](), tmp_path_factory.mktemp("runs")

    def run(store: SyntheticStore, sets: Mapping[str, object] | None = None) -> Path:
        key = (store.path, *(sets or {}).items())
        if key not in made:
            small = VALUES_WITHOUT_K if "activation.kind" in (sets or {}) else VALUES
            changes: dict[str, object] = {**small, "steps": 40, "samples.rows": 0, **(sets or {})}
            settings = api.load_settings("tiny", changes)
            made[key] = api.train(store.path, settings, folder / f"run-{len(made)}")
        return made[key]

    return run


def held_out(store: SyntheticStore, side: str = "source") -> Tensor:
    """All rows of the report blocks."""
    opened = Store.open(store.path)
    chunks = StoreRows(opened, 200, side).chunks(opened.record.report_blocks, torch.device("cpu"))  # type: ignore[arg-type]
    return torch.cat([chunk.source for chunk in chunks])


def as_library(kind: str, folder: Path, x: Tensor, layer: int = 3) -> tuple[Tensor, Tensor]:
    """Latents and prediction by each library's formula, in float64, from the file's tensors."""
    names = {"saelens": "sae_weights", "circuit-tracer": f"layer_{layer}", "sparsify": "sae"}
    w = {name: tensor.double() for name, tensor in load_file(folder / f"{names[kind]}.safetensors").items()}
    x = x.double()
    if kind == "saelens":
        h = x @ w["W_enc"] + w["b_enc"]
        latents = h.relu() * (h > w["threshold"])
    elif kind == "circuit-tracer":
        h = x @ w["W_enc"].T + w["b_enc"]
        latents = h * (h > w["activation_function.threshold"])
    else:
        h = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        k = json.loads((folder / "cfg.json").read_text())["k"]
        top = h.topk(k, dim=1)
        latents = torch.zeros_like(h).scatter_(1, top.indices, top.values)
    y = latents @ w["W_dec"] + w["b_dec"]
    return latents, y + x @ w["W_skip"].T if "W_skip" in w else y


def reference(run: Path, x: Tensor, prefix: int | None = None) -> tuple[Tensor, Tensor]:
    """The run's own latents and prediction, at thresholds that are calibrated on its store."""
    loaded = load_run(run)
    model = loaded.transcoder
    model.inference_threshold.copy_(calibrate(model, loaded.rows))
    with torch.no_grad():
        return model.encode(x, dense=True)[:, : prefix or model.d_sae], model(x, prefix).reconstruction


@pytest.mark.parametrize("sets", [{}, {"transcoder.skip": False}, {"transcoder.decoder_norm": "free"}])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_is_the_runs_function_by_the_librarys_formula(
    kind: str, sets: dict[str, object], command: Command, square: SyntheticStore, train_on: Train, tmp_path: Path
) -> None:
    run, out = train_on(square, sets), tmp_path / "out"
    done = command("export", run, "--format", kind, "--out", out, *LAYERS.get(kind, ()))
    assert done.code == 0, done.err
    assert done.path == out
    x = held_out(square)
    latents, y = reference(run, x)
    theirs, y_theirs = as_library(kind, out, x)
    if kind == "sparsify":
        k = VALUES["activation.k"]
        assert (theirs != 0).sum(1).max() <= k
        kept = latents.topk(k, dim=1)
        same = (latents != 0).sum(1) == (theirs != 0).sum(1)
        assert same.any()
        expected = torch.zeros_like(latents).scatter_(1, kept.indices, kept.values)
        torch.testing.assert_close(theirs[same].float(), expected[same], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y_theirs[same].float(), y[same], rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(theirs.float(), latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y_theirs.float(), y, rtol=1e-4, atol=1e-4)


def test_folding_is_exact_in_float64(square: SyntheticStore, train_on: Train) -> None:
    loaded = load_run(train_on(square))
    model, x = loaded.transcoder, held_out(square).double()
    plain = PlainTranscoder.of(model, loaded.threshold)
    normalised = (x - model.source_mean.double()) / model.source_scale.double()
    h = normalised @ model.W_enc.double() + model.b_enc.double()
    torch.testing.assert_close(x @ plain.W_enc.double() + plain.b_enc.double(), h, rtol=1e-5, atol=1e-5)
    assert model.W_skip is not None and plain.W_skip is not None
    linear = (normalised @ model.W_skip.double() + model.b_dec.double()) * model.target_scale.double()
    expected = linear + model.target_mean.double()
    torch.testing.assert_close(x @ plain.W_skip.double() + plain.b_dec.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_is_exported_alone(command: Command, square: SyntheticStore, train_on: Train, tmp_path: Path) -> None:
    run, x = train_on(square), held_out(square)
    done = command("export", run, "--format", "saelens", "--prefix", 16, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    latents, y = reference(run, x, 16)
    theirs, y_theirs = as_library("saelens", tmp_path / "out", x)
    assert theirs.shape[1] == 16
    torch.testing.assert_close(theirs.float(), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y_theirs.float(), y, rtol=1e-4, atol=1e-4)
    (found,) = json.loads(done.out)["runs"]
    assert found["ours"]["fvu"] == pytest.approx(found["exported"]["fvu"], rel=1e-5)


def test_figures_of_an_export_are_those_of_evaluate(
    command: Command, square: SyntheticStore, train_on: Train, tmp_path: Path
) -> None:
    run = train_on(square)
    evaluated = api.evaluate(run).evaluation
    _, (found,) = api.export(run, "saelens", tmp_path / "out")
    for part in (found.ours, found.exported):
        assert part.fvu == pytest.approx(evaluated.fvu, rel=1e-5)
        assert part.l0 == pytest.approx(evaluated.l0, rel=1e-3)
    assert found.is_same and found.largest_error < 1e-5
    lossy = api.export(run, "sparsify", tmp_path / "lossy").agreements[0]
    assert lossy.exported.l0 < lossy.ours.l0
    assert f"fvu is {lossy.ours.fvu:.4f}" in (tmp_path / "lossy" / "README.md").read_text()


def test_saelens_is_told_what_its_loader_reads(square: SyntheticStore, train_on: Train, tmp_path: Path) -> None:
    api.export(train_on(square), "saelens", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert found["architecture"] == "jumprelu_skip_transcoder"
    assert (found["d_in"], found["d_out"], found["d_sae"], found["dtype"]) == (12, 12, 64, "float32")
    assert found["apply_b_dec_to_input"] is False
    meta = found["metadata"]
    assert (meta["hook_name"], meta["hook_name_out"]) == ("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out")
    assert meta["sae_lens_version"] >= "6.0.0"


def test_an_autoencoder_of_the_targets_is_one_for_saelens(
    command: Command, square: SyntheticStore, train_on: Train, tmp_path: Path
) -> None:
    run = train_on(square, {"source": "target", "transcoder.skip": False})
    done = command("export", run, "--format", "saelens", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert found["architecture"] == "jumprelu" and "d_out" not in found
    assert found["metadata"]["hook_name"] == "blocks.3.hook_mlp_out"
    x = held_out(square, "target")
    torch.testing.assert_close(
        as_library("saelens", tmp_path / "out", x)[1].float(), reference(run, x)[1], rtol=1e-4, atol=1e-4
    )


def test_a_set_has_a_file_for_every_layer(
    command: Command, square: SyntheticStore, other_layer: SyntheticStore, train_on: Train, tmp_path: Path
) -> None:
    runs, out = [train_on(square), train_on(other_layer)], tmp_path / "out"
    done = command("export", *runs, "--format", "circuit-tracer", "--layers", 5, "--out", out)
    assert done.code == 0, done.err
    assert {path.name for path in out.iterdir()} == {f"layer_{i}.safetensors" for i in range(5)} | {
        "config.yaml", "README.md",
    }  # fmt: skip
    x = held_out(other_layer)
    torch.testing.assert_close(
        as_library("circuit-tracer", out, x, layer=1)[1].float(), reference(runs[1], x)[1], rtol=1e-4, atol=1e-4
    )
    latents, y = as_library("circuit-tracer", out, x, layer=4)
    assert not latents.any() and not y.any()
    config = (out / "config.yaml").read_text()
    assert 'feature_input_hook: "hook_resid_mid"\nfeature_output_hook: "hook_mlp_out"\n' in config


BAD = [
    ("saelens", (), ("--prefix", "5"), "--prefix 5"),
    ("saelens", (), ("--layers", "5"), "--layers is for"),
    ("circuit-tracer", (), (), "--layers N"),
    ("circuit-tracer", (), ("--layers", "3"), "above 3"),
    ("sparsify", (("activation.kind", "jumprelu"),), (), "fixed k"),
    ("sparsify", (("source", "target"), ("transcoder.skip", False)), (), "use saelens"),
    ("circuit-tracer", (("source", "target"), ("transcoder.skip", False)), ("--layers", "5"), "use saelens"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sets", "options", "told"), BAD)
def test_what_a_format_has_no_place_for_is_refused(
    kind: str, sets: tuple, options: tuple, told: str, command: Command, square: SyntheticStore, train_on: Train,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = train_on(square, dict(sets))
    done = command("export", run, "--format", kind, "--out", tmp_path / "out", *options)
    assert done.code == 2 and told in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_widths_that_differ_and_a_second_run_are_refused(
    command: Command, square: SyntheticStore, synthetic: SyntheticStore, train_on: Train, tmp_path: Path
) -> None:
    run, out = train_on(synthetic), tmp_path / "out"
    for kind in ("sparsify", "circuit-tracer"):
        done = command("export", run, "--format", kind, "--out", out, *LAYERS.get(kind, ()))
        assert done.code == 2 and "one width" in done.err, done.err
    done = command("export", train_on(square), train_on(square), "--format", "saelens", "--out", out)
    assert done.code == 2 and "takes one run, got 2" in done.err
    done = command(
        "export", train_on(square), train_on(square), "--format", "circuit-tracer", "--layers", 5, "--out", out
    )
    assert done.code == 2 and "one transcoder for each layer" in done.err
    assert not out.exists()
    command("export", run, "--format", "saelens", "--out", out)
    done = command("export", run, "--format", "saelens", "--out", out)
    assert done.code == 2 and "exists" in done.err


def test_what_is_another_function_is_not_written(
    square: SyntheticStore, train_on: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = PlainTranscoder.of
    monkeypatch.setattr(PlainTranscoder, "of", lambda *given: replace(fold(*given), b_dec=fold(*given).b_dec * 1.001))
    with pytest.raises(ProjectError, match="not the same function"):
        api.export(train_on(square), "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()
