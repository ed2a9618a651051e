"""The side-car reproduces the model's logits, for every architecture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from harvest.model import load_model
from harvest.unembedding import publish_unembedding
from tests.llms import SHAPES, make_gemma


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


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_model(shape: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = SHAPES[shape](tmp_path / "model")
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
