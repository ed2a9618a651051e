"""A trained transcoder from Python: loaded from its checkpoint alone, in the LLM's own units."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import CorruptData, UserError
from shared.store.store import Store
from tests.runs import SMALL
from tests.stores import SyntheticStore, make_store
from train.data.batches import StoreRows
from train.evaluation.evaluate import natural_weights
from train.model import checkpoint
from train.model.transcoder import Transcoder

CPU = torch.device("cpu")
KINDS = ("batchtopk", "topk", "jumprelu", "relu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    return make_store(tmp_path_factory.mktemp("store") / "store", keep={0: 0.5}, held_out_blocks=4)


def train(command, store: SyntheticStore, *options: str) -> Path:
    sets = [part for option in options for part in ("--set", option)]
    line = ("run", "--store", store.path, "--runs", store.path.parent, "--steps", 40, "--set", "samples.rows=0")
    done = command(*line, *SMALL, *sets)
    assert done.code == 0, done.err
    return done.path


def reference(run: Path, x: torch.Tensor, prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and prediction by the formulas, in float64, from the tensors of the file."""
    path = checkpoint.find(run).path / checkpoint.WEIGHTS
    w = {name: tensor.double() for name, tensor in load_file(path).items()}
    x = (x.double() - w["source_mean"]) / w["source_scale"]
    pre_acts = x @ w["W_enc"] + w["b_enc"]
    latents = pre_acts * (pre_acts > w["threshold"])
    y = latents[..., :prefix] @ w["W_dec"][:prefix] + w["b_dec"]
    if "W_skip" in w:
        y = y + x @ w["W_skip"]
    return latents, y * w["target_scale"] + w["target_mean"]


@pytest.mark.parametrize("options", [(), ("transcoder.skip=false",)])
def test_it_predicts_by_the_formula_in_the_units_of_the_llm(command, store: SyntheticStore, options) -> None:
    run = train(command, store, *options)
    model = Transcoder.load(run)
    rows = next(StoreRows(Store.open(store.path), 200).chunks(range(1), CPU)).source
    x = rows[: len(rows) // 4 * 4].reshape(4, -1, rows.shape[1])  # with leading dimensions
    for prefix in (None, *model.prefixes):
        latents, expected = reference(run, x, prefix or model.d_sae)
        found = model(x, prefix)
        torch.testing.assert_close(found.reconstruction.double(), expected, rtol=1e-4, atol=1e-4)
        dense = model.encode(x, dense=True)
        torch.testing.assert_close(dense.double(), latents, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.decode(dense, x, prefix), found.reconstruction)
        triples = found.latents
        assert torch.equal(dense.reshape(-1, 64)[triples.rows, triples.latents], triples.values)
        assert len(triples.values) == int((dense != 0).sum()) > 0
    assert model(x.to(torch.bfloat16)).reconstruction.dtype == torch.bfloat16


def test_its_error_on_the_report_rows_is_the_headline_figure(command, store: SyntheticStore) -> None:
    run = train(command, store)
    said = json.loads(command("evaluate", run, "--json").out)["fvu"]
    opened, model = Store.open(store.path), Transcoder.load(run)
    squares, targets = [], []
    for chunk in StoreRows(opened, 10**9).chunks(opened.record.report_blocks, CPU):
        if weight := natural_weights(opened)[chunk.stratum]:
            error = (model(chunk.source).reconstruction - chunk.target).double()
            squares.append((weight, error.square().sum().item()))
            targets.append((weight, chunk.target.double()))
    mean = sum(w * y.sum(0) for w, y in targets) / sum(w * len(y) for w, y in targets)
    total = sum(w * (y - mean).square().sum().item() for w, y in targets)
    assert sum(w * s for w, s in squares) / total == pytest.approx(said, rel=1e-3)


def test_gradients_reach_the_rows(command, store: SyntheticStore) -> None:
    model = Transcoder.load(train(command, store))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = model(x).reconstruction[1, 2]
    (grad,) = torch.autograd.grad(y, x)
    assert grad[1].abs().sum() > 0 and not grad[0].any() and not grad[2].any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_activation_loads(command, store: SyntheticStore, kind: str) -> None:
    k = ("activation.k=6",) if kind in ("batchtopk", "topk") else ()
    line = ["run", "--store", store.path, "--runs", store.path.parent, "--steps", 20, "--set", "samples.rows=0"]
    sets = ("activation.kind=" + kind, *k, "transcoder.d_sae=64", "rows.batch_rows=48", "threads=1")
    done = command(*line, *[part for one in sets for part in ("--set", one)])
    assert done.code == 0, done.err
    model = Transcoder.load(done.path)
    x = next(StoreRows(Store.open(store.path), 50).chunks(range(1), CPU)).source
    latents, expected = reference(done.path, x, 64)
    torch.testing.assert_close(model(x).reconstruction.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.encode(x, dense=True).double(), latents, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_enough_and_the_store_may_be_gone(command, tmp_path: Path) -> None:
    made = make_store(tmp_path / "store", held_out_blocks=4)
    run = train(command, made, "evaluation.every=20", "checkpoint.every=20")
    newest, first = (Transcoder.load(run, step) for step in (None, 20))
    made.path.rename(tmp_path / "elsewhere")
    assert torch.equal(Transcoder.load(checkpoint.folder(run, 20)).W_dec, first.W_dec)
    assert torch.equal(Transcoder.load(str(run)).W_dec, newest.W_dec) and not torch.equal(newest.W_dec, first.W_dec)
    code = f"import sys; from train.model.transcoder import Transcoder; Transcoder.load({str(run)!r}); " + (
        "print([m for m in ('transformer_lens', 'transformers', 'datasets', 'zarr') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_what_does_not_fit_is_refused_in_words(command, store: SyntheticStore, tmp_path: Path) -> None:
    run = train(command, store)
    model = Transcoder.load(run)
    with pytest.raises(ValueError, match="rows are 7 wide, and this transcoder reads rows of 16"):
        model(torch.zeros(2, 7))
    with pytest.raises(ValueError, match=r"prefix must be one of \[4, 8, 16, 32, 64\], got 5"):
        model(torch.zeros(2, 16), prefix=5)
    with pytest.raises(ValueError, match=r"pass the source rows, decode\(latents, x\)"):
        model.decode(torch.zeros(2, 64))
    with pytest.raises(UserError, match="is neither a run"):
        Transcoder.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Transcoder.load(tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        Transcoder.load(run, 7)
    with pytest.raises(UserError, match="is a checkpoint of another step than 7"):
        Transcoder.load(checkpoint.folder(run, 40), 7)
    weights = checkpoint.folder(run, 40) / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptData, match=r"weights\.safetensors"):
        Transcoder.load(checkpoint.folder(run, 40))
