"""Transcoders of other libraries: read as the function that the library would compute, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import CorruptData, UserError
from train.interchange.read_transcoder import read_transcoder

D, F, O = 6, 20, 8
BASE = {"d_in": D, "d_sae": F, "dtype": "float32", "metadata": {}}


@pytest.fixture
def w() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": draw(D, F), "b_enc": draw(F), "W_dec": draw(F, O), "b_dec": draw(O), "W_skip": draw(D, O),
        "threshold": draw(F).abs(), "W_dec_auto": draw(F, D), "b_dec_auto": draw(D), "x": draw(32, D),
    }  # fmt: skip


def check(path: Path, library: str, x: Tensor, latents: Tensor, y: Tensor) -> None:
    """What is read gives these latents and predictions."""
    found, plain = read_transcoder(path)
    assert found == library
    theirs = plain.encode(x)
    torch.testing.assert_close(theirs, latents.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.decode(theirs, x), y.float(), rtol=1e-4, atol=1e-4)


def save(path: Path, **tensors: Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def saelens(folder: Path, config: dict[str, object], **tensors: Tensor) -> Path:
    save(folder / "sae_weights.safetensors", **tensors)
    (folder / "cfg.json").write_text(json.dumps(BASE | config))
    return folder


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("jump", [False, True])
def test_saelens_transcoders(jump: bool, skip: bool, w: dict[str, Tensor], tmp_path: Path) -> None:
    kind = ("jumprelu_" if jump else "") + ("skip_" if skip else "") + "transcoder"
    extra = ({"threshold": w["threshold"]} if jump else {}) | ({"W_skip": w["W_skip"].T} if skip else {})
    config = {"architecture": kind, "d_out": O, "apply_b_dec_to_input": False}
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    folder = saelens(tmp_path / "sae", config, **{name: w[name] for name in names}, **extra)
    x = w["x"].double()
    h = x @ w["W_enc"].double() + w["b_enc"].double()
    latents = h.relu() * (h > w["threshold"].double()) if jump else h.relu()
    y = latents @ w["W_dec"].double() + w["b_dec"].double() + (x @ w["W_skip"].double() if skip else 0)
    check(folder, "SAELens", w["x"], latents, y)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("subtract", [False, True])
def test_saelens_autoencoders(subtract: bool, rescale: bool, w: dict[str, Tensor], tmp_path: Path) -> None:
    config = {"architecture": "topk", "k": 3, "apply_b_dec_to_input": subtract, "rescale_acts_by_decoder_norm": rescale}
    tensors = {"W_enc": w["W_enc"], "b_enc": w["b_enc"], "W_dec": w["W_dec_auto"], "b_dec": w["b_dec_auto"]}
    folder = saelens(tmp_path / "sae", config, **tensors)
    W_dec, b_dec = w["W_dec_auto"].double(), w["b_dec_auto"].double()
    h = (w["x"].double() - (b_dec if subtract else 0)) @ w["W_enc"].double() + w["b_enc"].double()
    norms = W_dec.norm(dim=1)
    h = (h * norms if rescale else h).relu()
    top = h.topk(3, dim=1)
    latents = torch.zeros_like(h).scatter_(1, top.indices, top.values)
    y = (latents / norms if rescale else latents) @ W_dec + b_dec
    check(folder, "SAELens", w["x"], latents, y)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(transcode: bool, w: dict[str, Tensor], tmp_path: Path) -> None:
    config = {"d_in": D, "num_latents": F, "k": 4, "transcode": transcode, "skip_connection": transcode, "extra": 1}
    skip = torch.randn(D, D)
    tensors = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec_auto"]}
    tensors |= {"b_dec": w["b_dec_auto"]} | ({"W_skip": skip} if transcode else {})
    save(tmp_path / "one" / "sae.safetensors", **tensors)
    (tmp_path / "one" / "cfg.json").write_text(json.dumps(config))
    x, b_dec = w["x"].double(), w["b_dec_auto"].double()
    h = ((x if transcode else x - b_dec) @ w["W_enc"].double() + w["b_enc"].double()).relu()
    top = h.topk(4, dim=1)
    latents = torch.zeros_like(h).scatter_(1, top.indices, top.values)
    y = latents @ w["W_dec_auto"].double() + b_dec + (x @ skip.double().T if transcode else 0)
    check(tmp_path / "one", "sparsify", w["x"], latents, y)


@pytest.mark.parametrize("jump", [False, True])
def test_a_layer_of_circuit_tracer(jump: bool, w: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    tensors |= {"W_skip": w["W_skip"].T} | ({"activation_function.threshold": w["threshold"]} if jump else {})
    h = w["x"].double() @ w["W_enc"].double() + w["b_enc"].double()
    latents = h * (h > w["threshold"].double()) if jump else h.relu()
    y = latents @ w["W_dec"].double() + w["b_dec"].double() + w["x"].double() @ w["W_skip"].double()
    check(save(tmp_path / "layer_3.safetensors", **tensors), "circuit-tracer", w["x"], latents, y)


def test_both_gemma_scopes(w: dict[str, Tensor], tmp_path: Path) -> None:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    arrays: dict[str, Any] = {name: w[name].numpy() for name in names}
    np.savez(tmp_path / "params.npz", **arrays)
    h = w["x"].double() @ w["W_enc"].double() + w["b_enc"].double()
    latents = h.relu() * (h > w["threshold"].double())
    y = latents @ w["W_dec"].double() + w["b_dec"].double()
    check(tmp_path / "params.npz", "Gemma Scope", w["x"], latents, y)
    second = {"w_enc": w["W_enc"], "w_dec": w["W_dec"], "affine_skip_connection": w["W_skip"]}
    second |= {name: w[name] for name in ("b_enc", "b_dec", "threshold")}
    path = save(tmp_path / "two.safetensors", **second)
    check(path, "Gemma Scope 2", w["x"], latents, y + w["x"].double() @ w["W_skip"].double())


@pytest.mark.parametrize("threshold", [-1.0, 0.4])
def test_dictionary_learning(threshold: float, w: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {
        "encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec_auto"].T,
        "b_dec": w["b_dec_auto"], "threshold": torch.tensor(threshold), "k": torch.tensor(3),
    }  # fmt: skip
    b_dec = w["b_dec_auto"].double()
    h = ((w["x"].double() - b_dec) @ w["W_enc"].double() + w["b_enc"].double()).relu()
    latents = h * (h > threshold)
    y = latents @ w["W_dec_auto"].double() + b_dec
    check(save(tmp_path / "ae.safetensors", **tensors), "dictionary_learning", w["x"], latents, y)


def test_what_is_nothing_known_is_refused_in_one_line(w: dict[str, Tensor], tmp_path: Path) -> None:
    good = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    (tmp_path / "ae.pt").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    known = {"architecture": "transcoder", "d_out": O}
    cases = [
        (tmp_path / "ae.pt", UserError, "is a pickle"),
        (tmp_path / "empty", UserError, "not a folder of SAELens"),
        (tmp_path / "none.safetensors", UserError, "no such file"),
        (tmp_path / "torn.npz", CorruptData, "not a readable .npz"),
        (tmp_path / "torn.safetensors", CorruptData, "not a readable safetensors"),
        (save(tmp_path / "other.safetensors", weight=w["b_enc"]), UserError, "not a transcoder of a known format"),
        (save(tmp_path / "few.safetensors", W_enc=w["W_enc"].T), UserError, "no tensor 'W_dec'; it has W_enc"),
        (save(tmp_path / "bias.safetensors", **good | {"b_enc": w["b_dec"]}), UserError, r"\[8\], expected \[20\]"),
        (save(tmp_path / "nan.safetensors", **good | {"b_enc": w["b_enc"] / 0}), CorruptData, "NaN or infinity"),
        (save(tmp_path / "ids.safetensors", **good | {"b_enc": torch.ones(F).int()}), UserError, "expected floating"),
        (save(tmp_path / "flat.safetensors", **good | {"W_enc": w["b_enc"]}), UserError, "expected a matrix"),
        (saelens(tmp_path / "gated", known | {"architecture": "gated"}, **good), UserError, "architecture 'gated'"),
        (saelens(tmp_path / "norm", known | {"normalize_activations": "layer_norm"}, **good), UserError, "normalised"),
        (saelens(tmp_path / "config", {"architecture": 3}, **good), CorruptData, "architecture: not text"),
    ]  # fmt: skip
    for path, kind, told in cases:
        with pytest.raises(kind, match=told) as raised:
            read_transcoder(path)
        assert "\n" not in str(raised.value), path
