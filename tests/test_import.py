"""`train import`: the run is the function that the other library's file is, on the rows of a store, or is refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import train as api
from shared.store.store import Store
from tests.runs import SMALL, VALUES, Outcome
from tests.stores import SyntheticStore, make_store
from train.data.batches import RowChunk, StoreRows
from train.evaluation.evaluate import natural_weights
from train.interchange.declared import declared
from train.interchange.read_transcoder import read_transcoder
from train.run.load_run import load_run
from train.run.settings import read_config

D, F, K = 12, 40, 5
Command = Callable[..., Outcome]
Made = Callable[[str, Path], Path]
KINDS = (
    "saelens",
    "saelens skip",
    "saelens relu",
    "sparsify",
    "circuit-tracer",
    "gemma scope 2",
    "dictionary_learning",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> SyntheticStore:
    """Source and target of one width, as most formats want them."""
    return make_store(tmp_path_factory.mktemp("square") / "store", d_in=D, d_out=D, held_out_blocks=4)


@pytest.fixture(scope="module")
def w() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "W_skip": (D, D), "threshold": (F,)}
    drawn = {name: 0.3 * torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return drawn | {"threshold": drawn["threshold"].abs()}


def save(path: Path, config: tuple[str, object] | None, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    if config:
        (path.parent / config[0]).write_text(json.dumps(config[1]))
    return path


def saelens(folder: Path, w: dict[str, Tensor], kind: str, **metadata: str) -> Path:
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if "jumprelu" in kind else [])]
    told = {"architecture": kind, "d_in": D, "d_out": D, "d_sae": F, "apply_b_dec_to_input": False,
            "metadata": metadata}  # fmt: skip
    skip = {"W_skip": w["W_skip"].T} if "skip" in kind else {}
    save(folder / "sae_weights.safetensors", ("cfg.json", told), {name: w[name] for name in names} | skip)
    return folder


def write(kind: str, folder: Path, w: dict[str, Tensor]) -> Path:
    """Write a transcoder of random weights, as a library would."""
    if kind.startswith("saelens"):
        name = {"saelens": "jumprelu_transcoder", "saelens skip": "jumprelu_skip_transcoder"}.get(kind, "transcoder")
        return saelens(folder, w, name)
    if kind == "sparsify":
        told = {"d_in": D, "num_latents": F, "k": K, "transcode": True}
        tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        return save(folder / "sae.safetensors", ("cfg.json", told), tensors).parent
    if kind == "circuit-tracer":
        tensors = {"W_enc": w["W_enc"].T, "activation_function.threshold": w["threshold"]}
        return save(folder / "layer_3.safetensors", None, tensors | {n: w[n] for n in ("b_enc", "W_dec", "b_dec")})
    if kind == "gemma scope 2":
        tensors = {"w_enc": w["W_enc"], "w_dec": w["W_dec"], **{n: w[n] for n in ("b_enc", "b_dec", "threshold")}}
        return save(folder / "two.safetensors", None, tensors)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    return save(folder / "ae.safetensors", None, tensors | {"b_dec": w["b_dec"]})


def slow(kind: str, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and prediction by the library's formula, in float64."""
    v, x = {name: tensor.double() for name, tensor in w.items()}, x.double()
    h = (x - v["b_dec"] if kind == "dictionary_learning" else x) @ v["W_enc"] + v["b_enc"]
    if kind == "sparsify":
        top = h.relu().topk(K, dim=1)
        latents = torch.zeros_like(h).scatter_(1, top.indices, top.values)
    else:
        latents = h.relu() * (h > (0 if kind in ("saelens relu", "dictionary_learning") else v["threshold"]))
    y = latents @ v["W_dec"] + v["b_dec"]
    return latents, y + x @ v["W_skip"] if kind == "saelens skip" else y


def chunks(run: Path) -> Iterator[tuple[RowChunk, float]]:
    """Report rows that the headline is of, and how often each counts."""
    config = read_config(run)
    store = Store.open(config.store).excluding(config.exclusion)
    weights = natural_weights(store)
    for chunk in StoreRows(store, 200, config.settings.source).chunks(store.record.report_blocks, CPU):
        if weights[chunk.stratum] and len(chunk.ordinary.source):
            yield chunk.ordinary, weights[chunk.stratum]


def slow_figures(run: Path, function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Fvu and l0, in float64."""
    parts = [(chunk.target.double(), *function(chunk.source), weight) for chunk, weight in chunks(run)]
    total = sum(weight * len(y) for y, _, _, weight in parts)
    mean = torch.stack([weight * y.sum(0) for y, _, _, weight in parts]).sum(0) / total
    error = sum(weight * float((y - out).square().sum()) for y, _, out, weight in parts)
    variance = sum(weight * float((y - mean).square().sum()) for y, _, _, weight in parts)
    return error / variance, sum(weight * float((z != 0).sum()) for _, z, _, weight in parts) / total


def import_(command: Command, path: Path, store: SyntheticStore | Path, runs: Path, *more: object) -> Outcome:
    where = store if isinstance(store, Path) else store.path
    return command("import", path, "--store", where, "--runs", runs, *more)


def hook(kind: str) -> tuple[str, ...]:
    return ("--source-hook", "hook_resid_mid") if kind.startswith("gemma") else ()


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_run_is_the_librarys_function(
    kind: str, command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write(kind, tmp_path / "theirs", w)
    done = import_(command, path, square, tmp_path / "runs", "--name", "one", *hook(kind))
    assert done.code == 0, done.err
    assert done.path == tmp_path / "runs" / "one"
    model = load_run(done.path).transcoder
    with torch.no_grad():
        for chunk, _ in chunks(done.path):
            latents, y = slow(kind, w, chunk.source)
            x, _ = model.normalised(chunk.source, chunk.target)
            active = model.select_final(model.pre_acts(x))
            ours = torch.zeros_like(latents).index_put_((active.rows, active.latents), active.values.double())
            torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                model.reconstruct_whole(active.values, active, x).double(), y, rtol=1e-4, atol=1e-4
            )
    found = json.loads(command("evaluate", done.path, "--json").out)
    if kind != "sparsify":  # k of every row: its headline is by a threshold, as that of every fixed k
        fvu, l0 = slow_figures(done.path, lambda x: slow(kind, w, x))
        assert found["fvu"] == pytest.approx(fvu, rel=1e-4)
        assert found["l0"] == pytest.approx(l0, rel=1e-4)


@pytest.mark.parametrize("kind", ["saelens skip", "sparsify", "circuit-tracer"])
def test_an_export_of_an_imported_run_is_the_same_function_again(
    kind: str, command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    path, name = write(kind, tmp_path / "theirs", w), kind.split()[0]
    first = import_(command, path, square, tmp_path / "runs", "--name", "one")
    layers = ("--layers", 5) if name == "circuit-tracer" else ()
    exported = command("export", first.path, "--format", name, "--out", tmp_path / "out", *layers)
    assert exported.code == 0, exported.err
    assert "| imported from |" in (tmp_path / "out" / "README.md").read_text()
    again = tmp_path / "out" / ("layer_3.safetensors" if layers else "")
    second = import_(command, again, square, tmp_path / "runs", "--name", "two")
    assert second.code == 0, second.err
    before, after = read_transcoder(path).transcoder, read_transcoder(again).transcoder
    x = torch.cat([chunk.source for chunk, _ in chunks(first.path)])
    torch.testing.assert_close(after.encode(x), before.encode(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        after.decode(after.encode(x), x), before.decode(before.encode(x), x), rtol=1e-6, atol=1e-6
    )
    figures = [json.loads(command("evaluate", run, "--json").out)["fvu"] for run in (first.path, second.path)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_what_gemma_scope_reads_is_computed_from_the_residual_stream(
    command: Command, finished: Path, tmp_path: Path
) -> None:
    record = Store.open(finished).record
    generator = np.random.default_rng(0)
    arrays = {
        "W_enc": generator.normal(size=(record.d_in, F)), "b_enc": generator.normal(size=F),
        "W_dec": generator.normal(size=(F, record.d_out)) / 20, "b_dec": generator.normal(size=record.d_out) / 20,
        "threshold": np.abs(generator.normal(size=F)),
    }  # fmt: skip
    kept = {name: array.astype(np.float32) for name, array in arrays.items()}
    np.savez(tmp_path / "params.npz", allow_pickle=False, **kept)
    unsaid = import_(command, tmp_path / "params.npz", finished, tmp_path / "runs")
    assert unsaid.code == 2 and "--source-hook ln2.hook_normalized" in unsaid.err
    done = import_(
        command, tmp_path / "params.npz", finished, tmp_path / "runs", "--source-hook", "ln2.hook_normalized"
    )
    assert done.code == 0, done.err
    eps = read_config(done.path).settings.transcoder.source_rms_eps
    assert eps == pytest.approx(1e-6)  # of a Gemma
    v = {name: torch.from_numpy(array).double() for name, array in kept.items()}

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
        h = x @ v["W_enc"] + v["b_enc"]
        latents = h * (h > v["threshold"])
        return latents, latents @ v["W_dec"] + v["b_dec"]

    found = json.loads(command("evaluate", done.path, "--json").out)
    fvu, l0 = slow_figures(done.path, function)
    assert (found["fvu"], found["l0"]) == (pytest.approx(fvu, rel=1e-4), pytest.approx(l0, rel=1e-4))
    exported = command("export", done.path, "--format", "saelens", "--out", tmp_path / "out")
    assert exported.code == 0, exported.err
    metadata = json.loads((tmp_path / "out" / "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"].endswith("ln2.hook_normalized")
    again = import_(command, tmp_path / "out", finished, tmp_path / "runs")  # its files say what it reads
    assert json.loads(command("evaluate", again.path, "--json").out)["fvu"] == pytest.approx(fvu, rel=1e-4)


@pytest.mark.parametrize("kind", ["saelens", "sparsify"])
@pytest.mark.parametrize("of", ["file", "run"])
def test_a_run_starts_from_it_with_its_fvu(
    of: str, kind: str, command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    small = w | {name: 0.3 * w[name] for name in ("W_dec", "b_dec")}  # else its fvu is that of a diverged training
    path = write(kind, tmp_path / "theirs", small)
    imported = import_(command, path, square, tmp_path / "runs", "--name", "one").path
    kinds = ["activation.kind=topk", f"activation.k={K}"] if kind == "sparsify" else ["activation.kind=jumprelu"]
    sets = [*kinds, f"transcoder.d_sae={F}", f"transcoder.prefixes=[{F}]", "transcoder.skip=false",
            "transcoder.decoder_norm=free", "optimizer.lr=1e-12", "rows.batch_rows=48", "threads=1"]  # fmt: skip
    words = [part for one in sets for part in ("--set", one)]
    start = path if of == "file" else imported
    done = command(
        "run", "--store", square.path, "--runs", tmp_path / "runs", "--steps", 1, *words, "--init-from", start
    )
    assert done.code == 0, done.err
    config = read_config(done.path)
    assert config.initial is not None and config.imported is None
    assert config.initial.library == ({"saelens": "SAELens", "sparsify": "sparsify"}[kind] if of == "file" else None)
    found, expected = (json.loads(command("evaluate", run, "--json").out) for run in (done.path, imported))
    for name in ("fvu", "l0"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    model, theirs = load_run(done.path).transcoder, load_run(imported).transcoder
    assert float(model.source_scale) != 1 and float(theirs.source_scale) == 1  # rows are shifted and scaled again
    odd = command("run", "--store", square.path, "--runs", tmp_path / "runs", *SMALL, "--init-from", start)
    assert odd.code == 2 and f"d_sae is {F}, this run's is {VALUES['transcoder.d_sae']}" in odd.err


def test_every_command_takes_an_imported_run(
    command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    theirs = [import_(command, write(kind, tmp_path / kind, w), square, runs, "--name", kind[:8].strip()).path
              for kind in ("saelens", "sparsify")]  # fmt: skip
    settings = api.load_settings("tiny", VALUES | {"steps": 20, "samples.rows": 0})
    own = api.train(square.path, settings, runs / "own")
    report = command("report", theirs[0], "--json")
    assert report.code == 0, report.err
    found = json.loads(report.out)
    finished = next(check for check in found["verdict"] if check["name"] == "finished")
    assert finished["state"] == "good" and "Imported, not trained here: SAELens" in finished["said"]
    assert "missing" not in json.dumps(found["verdict"])
    assert command("samples", theirs[1]).code == 0
    shown = command("watch", theirs[0])
    assert shown.code == 0 and "was imported" in shown.out
    assert command("checkpoints", theirs[0]).code == 0
    resumed = command("resume", theirs[0])
    assert resumed.code == 2 and f"train run --init-from {theirs[0]}" in resumed.err
    unlike = command("compare", own, *theirs, "--json")
    assert unlike.code == 0 and "each is measured at its own l0" in unlike.err
    done = command("compare", own, *theirs, "--own-l0", "--json", "--html", tmp_path / "page.html")
    assert done.code == 0, done.err
    compared = json.loads(done.out)
    assert compared["l0"] is None and len(compared["arms"]) == 3 and json.loads(unlike.out) == compared
    for run, arm in zip((own, *theirs), compared["arms"], strict=True):
        (figures,), alone = arm["runs"].values(), json.loads(command("evaluate", run, "--json").out)
        for name in ("fvu", "l0"):
            assert figures[name] == pytest.approx(alone[name], rel=1e-4), (run, name)
        for name, part in figures["strata"].items():
            assert part["fvu"] == pytest.approx(alone["strata"][name]["fvu"], rel=1e-4)
        assert figures["pairs_correlated_above_0_5"] >= figures["pairs_correlated_above_0_8"]
    assert command("compare", own, "--own-l0", "--l0", 3).code == 2


def test_what_does_not_fit_the_store_is_refused_in_one_line_and_leaves_nothing(
    command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    runs, fits = tmp_path / "runs", {"hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.hook_mlp_out"}
    kind = "jumprelu_transcoder"
    hooks = [("hook_name", "blocks.3.mlp.hook_in", "it reads blocks.3.mlp.hook_in, the store has blocks.3.hook_resid"),
             ("hook_name_out", "blocks.2.hook_mlp_out", "it predicts blocks.2.hook_mlp_out, the store's target is"),
             ("model_name", "gpt2\x1b[31m", "it was trained on gpt2\\x1b[31m, the store is of synthetic")]  # fmt: skip
    for i, (name, value, said) in enumerate(hooks):
        path = saelens(tmp_path / f"odd-{i}", w, kind, **{**fits, name: value})
        refused = import_(command, path, square, tmp_path / "none")
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert said in refused.err and "--accept-mismatch" in refused.err
        taken = import_(command, path, square, runs / str(i), "--accept-mismatch")
        assert taken.code == 0, taken.err
        assert len(read_config(taken.path).imported.accepted) == 1  # type: ignore[union-attr]
    wide = {name: torch.cat([tensor, tensor], -1 if name == "b_dec" else 1 if name == "W_dec" else 0)
            if name in ("W_enc", "W_dec", "b_dec") else tensor for name, tensor in w.items()}  # fmt: skip
    path = write("circuit-tracer", tmp_path / "wide", wide)
    refused = import_(command, path, square, tmp_path / "none")
    assert refused.code == 2 and f"reads rows of {2 * D} values and predicts {2 * D}" in refused.err
    whole = import_(command, write("saelens", tmp_path / "good", w), square, runs, "--name", "good")
    twice = import_(command, tmp_path / "good", square, runs, "--name", "good")
    assert whole.code == 0 and twice.code == 2 and "exists" in twice.err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("mlp_out_layer_8", "blocks.8.hook_mlp_out"),
        ("resid_post_layer_12", "blocks.12.hook_resid_post"),
        ("my layer 8", None),
    ],
)
def test_a_submodule_of_dictionary_learning_is_a_hook_where_its_name_is_of_their_form(
    w: dict[str, Tensor], tmp_path: Path, name: str, hook: str | None
) -> None:
    ae = write("dictionary_learning", tmp_path / "ae", w)
    (ae.parent / "config.json").write_text(json.dumps({"trainer": {"lm_name": "m", "submodule_name": name}}))
    found = declared(ae, "dictionary_learning")
    assert (found.model, found.source_hook, found.target_hook) == ("m", hook, hook)


@pytest.mark.fault(26)
def test_hostile_files_are_one_line(
    command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "ae.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    damaged = w | {"W_dec": w["W_dec"].clone().fill_(torch.nan)}
    write("saelens", tmp_path / "nan", damaged)
    write("saelens", tmp_path / "list", w)
    (tmp_path / "list" / "cfg.json").write_text("[1, 2]")
    write("saelens", tmp_path / "deep", w)
    (tmp_path / "deep" / "cfg.json").write_text("[" * 10**5)
    ae = write("dictionary_learning", tmp_path / "ae", w)
    (ae.parent / "config.json").write_text('{"trainer": {"lm_name": 3}, "x": 1e999}')
    layer = write("circuit-tracer", tmp_path / "set", w)
    (layer.parent / "config.yaml").write_bytes(b"\xff\xfe")
    sparse = write("sparsify", tmp_path / "sparse", w)
    told: dict[str, Any] = json.loads((sparse / "cfg.json").read_text())
    (sparse / "cfg.json").write_text(json.dumps(told | {"k": F + 1}))
    cases = {tmp_path / "ae.pt": "pickle", tmp_path / "nan": "NaN", tmp_path / "list": "cfg.json"}
    cases |= {tmp_path / "deep": "cfg.json", ae: "config.json", layer: "config.yaml", sparse: f"k = {F + 1}"}
    for path, said in cases.items():
        refused = import_(command, path, square, tmp_path / "runs")
        assert refused.code in (1, 2) and refused.err.count("\n") == 1, refused.err
        assert said in refused.err and "Traceback" not in refused.err
        assert not (tmp_path / "runs").exists()


def test_transcoders_of_one_library_and_one_configuration_are_two_arms(
    command: Command, square: SyntheticStore, w: dict[str, Tensor], tmp_path: Path
) -> None:
    """Their `cfg.json` are one file, byte for byte."""
    other = w | {"W_dec": w["W_dec"].flip(0)}
    runs = []
    for name, one in (("a", w), ("b", other)):
        path = write("sparsify", tmp_path / name, one)
        runs.append(import_(command, path, square, tmp_path / "runs", "--name", name).path)
    done = command("compare", *runs, "--json")
    assert done.code == 0, done.err
    assert [len(arm["runs"]) for arm in json.loads(done.out)["arms"]] == [1, 1]
