"""The side-car reproduces the model's logits, for every architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

import shared.store.unembedding
from harvest.llm.extract_unembedding import norm_effect, publish_unembedding
from harvest.llm.model import load_model
from shared.errors import CorruptData, UserError
from shared.store.row_arrays import FloatType
from shared.store.unembedding import Unembedding
from tests.llms import SHAPES, make_cohere, make_gemma, make_granite

MAKERS = {**SHAPES, "granite": make_granite, "cohere": make_cohere}


def logits(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Logits of residuals `x` by what the file's documentation says."""
    with safe_open(path, "pt") as file:
        names = ("W_U", "b_U", "final_norm.gain", "final_norm.bias")
        tensors, told = {name: file.get_tensor(name).double() for name in names}, json.loads(file.metadata()["logits"])
    x = x.double()
    if told["norm"] == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + told["eps"])
    found = (x * tensors["final_norm.gain"] + tensors["final_norm.bias"]) @ tensors["W_U"].T + tensors["b_U"]
    return found if not told["softcap"] else told["softcap"] * torch.tanh(found / told["softcap"])


@pytest.mark.parametrize("shape", MAKERS)
def test_logits_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = MAKERS[shape](tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():  # a norm that does nothing proves nothing
        norm = whole.transformer.ln_f if shape == "gpt2" else whole.model.norm
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    whole.save_pretrained(folder)
    kept = []
    norm.register_forward_pre_hook(lambda _, given: kept.append(given[0].clone()))
    with torch.inference_mode():
        expected = whole(torch.randint(4, 300, (2, 30)), use_cache=False).logits
    publish_unembedding(load_model(folder, "float32", "cpu", ["blocks.1.hook_mlp_out"]), tmp_path / "u.safetensors")
    torch.testing.assert_close(logits(tmp_path / "u.safetensors", kept[0]).float(), expected, rtol=1e-5, atol=1e-4)


def test_the_file_has_the_models_type_and_equal_bytes_each_time(tmp_path: Path) -> None:
    folder = make_gemma(tmp_path / "model")
    for name in ("a", "b"):
        publish_unembedding(load_model(folder, "bfloat16", "cpu", ["blocks.1.hook_mlp_out"]), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("W_U").dtype == torch.bfloat16 and file.get_tensor("W_U").shape == (320, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_layer_norm_is_told_apart_in_every_type(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(32, generator=generator).to(getattr(torch, dtype)) for _ in range(2))
    layer, rms = torch.nn.LayerNorm(32), torch.nn.RMSNorm(32, eps=1e-5)
    with torch.no_grad():
        layer.weight.copy_(weight), layer.bias.copy_(bias), rms.weight.copy_(weight)
    for norm, kind, wanted in ((layer, "layer", bias), (rms, "rms", torch.zeros(32))):
        gain, found, told = norm_effect(norm.to(getattr(torch, dtype)), 32, torch.device("cpu"))
        assert told == kind
        torch.testing.assert_close(gain, weight.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-6, atol=1e-6)
        assert next(norm.parameters()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("block_values", [2**24, 32 * 7, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_promoted_tokens_equal_a_dense_reference(
    dtype: FloatType, block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.store.unembedding, "_BLOCK_VALUES", block_values)
    model = load_model(make_gemma(tmp_path / "model"), dtype, "cpu", ["blocks.1.hook_mlp_out"])
    publish_unembedding(model, tmp_path / "u")
    with safe_open(tmp_path / "u", "pt") as file:
        weight, gain = (file.get_tensor(name).double().numpy() for name in ("W_U", "final_norm.gain"))
    directions = np.random.default_rng(0).normal(size=(9, 32)).astype(np.float32)
    dense = (directions * gain) @ weight.T
    dense -= dense.mean(1, keepdims=True)
    found, order = Unembedding(tmp_path / "u").effects(directions, 5), np.argsort(dense, axis=1)
    assert (found.promoted == order[:, :-6:-1]).all() and (found.suppressed == order[:, :5]).all()
    for ids, effects in ((found.promoted, found.promoted_effects), (found.suppressed, found.suppressed_effects)):
        np.testing.assert_allclose(effects, np.take_along_axis(dense, ids, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block_values", [2**24, 32 * 7, 32])
def test_of_equal_tokens_the_first_are_taken(
    block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that no text had are often the same row of `W_U`."""
    monkeypatch.setattr(shared.store.unembedding, "_BLOCK_VALUES", block_values)
    weight = np.zeros((320, 32), np.float32)
    weight[40:, 0], weight[100:130, 0], weight[5, 0] = 1, 3, 2
    save_file({"W_U": weight, "final_norm.gain": np.ones(32, np.float32)}, tmp_path / "u")
    found = Unembedding(tmp_path / "u").effects(np.eye(1, 32, dtype=np.float32), 4)
    assert found.promoted.tolist() == [[100, 101, 102, 103]] and found.suppressed.tolist() == [[0, 1, 2, 3]]
    mean = float(weight[:, 0].mean())
    np.testing.assert_allclose(found.promoted_effects, [[3 - mean] * 4], rtol=1e-6)
    np.testing.assert_allclose(found.suppressed_effects, [[-mean] * 4], rtol=1e-6)


def test_more_tokens_than_there_are_and_no_directions(tmp_path: Path) -> None:
    model = load_model(make_gemma(tmp_path / "model"), "float32", "cpu", ["blocks.1.hook_mlp_out"])
    publish_unembedding(model, tmp_path / "u")
    whole = Unembedding(tmp_path / "u").effects(np.eye(2, 32, dtype=np.float32), 1000)
    assert (np.sort(whole.promoted, axis=1) == np.arange(320)).all()
    assert (whole.promoted_effects == whole.suppressed_effects[:, ::-1]).all()
    assert Unembedding(tmp_path / "u").effects(np.zeros((0, 32), np.float32), 5).promoted.shape == (0, 5)


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    model = load_model(make_gemma(tmp_path / "model"), "float32", "cpu", ["blocks.1.hook_mlp_out"])
    publish_unembedding(model, tmp_path / "u")
    with pytest.raises(UserError, match=r"no unembedding at .*store\.unembedding=true"):
        Unembedding(tmp_path / "missing")
    with pytest.raises(UserError, match=r"directions are \[3, 48\], .* unembeds 32 values"):
        Unembedding(tmp_path / "u").effects(np.zeros((3, 48), np.float32), 5)
    data = (tmp_path / "u").read_bytes()
    for name, part in (("empty", b""), ("cut", data[:-100_000]), ("head", data[:40]), ("noise", b"\x09" * 500)):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(CorruptData, match="not a readable unembedding"):
            Unembedding(tmp_path / name)


@pytest.mark.parametrize("block_values", [2**24, 32 * 7])
def test_rows_that_no_token_has_are_never_promoted(
    block_values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings are often padded; and the mean is that of tokens alone."""
    monkeypatch.setattr(shared.store.unembedding, "_BLOCK_VALUES", block_values)
    rng = np.random.default_rng(0)
    weight, directions = rng.normal(size=(50, 32)).astype(np.float32), rng.normal(size=(4, 32)).astype(np.float32)
    weight[40:] *= 100
    tokens = [*range(30), *range(33, 40), 99]  # 30 to 32 and all from 40 on are no tokens; 99 is no row
    save_file({"W_U": weight, "final_norm.gain": np.ones(32, np.float32)}, tmp_path / "u")
    known = np.array(tokens[:-1])
    dense = directions @ weight[known].T
    dense -= dense.mean(1, keepdims=True)
    order = known[np.argsort(dense, axis=1)]
    found = Unembedding(tmp_path / "u").effects(directions, 6, tokens)
    assert (found.promoted == order[:, :-7:-1]).all() and (found.suppressed == order[:, :6]).all()
    np.testing.assert_allclose(found.promoted_effects, np.sort(dense, axis=1)[:, :-7:-1], rtol=1e-4, atol=1e-5)
    assert set(Unembedding(tmp_path / "u").effects(directions, 50, tokens).promoted[0].tolist()) == set(known.tolist())
