"""Every architecture: the cut model against plain transformers, and documents that share a window."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest.model import check_isolation, load_model
from shared.errors import UserError
from tests.llms import SHAPES

LAYER = 2
HOOKS = [f"blocks.{LAYER}.hook_resid_mid", f"blocks.{LAYER}.hook_mlp_out"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(root / name) for name, make in SHAPES.items()}


def plain(folder: Path, dtype: torch.dtype, ids: torch.Tensor) -> list[torch.Tensor]:
    """What the MLP's norm reads, and what is added to the residual, by hooks on the whole model."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    layers = whole.transformer.h if hasattr(whole, "transformer") else whole.model.layers
    block, found = layers[LAYER], {}
    names = dict(block.named_children())
    before = names.get("pre_feedforward_layernorm") or names.get("ln_2") or names["post_attention_layernorm"]
    after = names.get("post_feedforward_layernorm") or names["mlp"]

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).clone()

    before.register_forward_pre_hook(lambda _, given: keep("mid", given))
    after.register_forward_hook(lambda _, given, result: keep("out", result))
    with torch.inference_mode():
        whole(ids, use_cache=False)
    return [found["mid"], found["out"]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_equal_plain_transformers(folders: dict[str, Path], shape: str, dtype: str) -> None:
    ids = torch.randint(4, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    found = load_model(folders[shape], dtype, "cpu", HOOKS)(ids)
    for name, expected in zip(HOOKS, plain(folders[shape], getattr(torch, dtype), ids), strict=True):
        assert found[name].dtype == getattr(torch, dtype)
        if shape == "gpt2":  # its queries, keys and values are computed apart here, and in one product there
            tolerance = {"float32": 1e-5, "bfloat16": 0.02, "float16": 2e-3}[dtype]
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=tolerance)
        else:
            assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("shape", SHAPES)
def test_documents_apart_equal_documents_alone(folders: dict[str, Path], shape: str) -> None:
    model = load_model(folders[shape], "float32", "cpu", HOOKS)
    lengths = [[5, 20, 1, 14], [40], [17, 23]]
    ids = torch.randint(4, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    together = model(ids, positions)
    check_isolation(model, 40, "cpu")
    for window, row in enumerate(lengths):
        for start, length in zip(np.cumsum([0, *row[:-1]]), row, strict=True):
            alone = model(ids[window : window + 1, start : start + length])
            for name in HOOKS:
                torch.testing.assert_close(
                    together[name][window, start : start + length], alone[name][0], rtol=1e-4, atol=1e-4
                )


def test_a_model_that_mixes_documents_is_refused(folders: dict[str, Path]) -> None:
    model = load_model(folders["gemma2"], "float32", "cpu", HOOKS)
    model._forward = {**model._forward, "use_cache": True}  # the trap: with a cache, documents see each other
    with pytest.raises(UserError, match=r"does not keep the documents of a window apart.*documents=joined"):
        check_isolation(model, 40, "cpu")
