"""Every architecture: the cut model against plain transformers, and documents that share a window."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harvest.llm.model import check_isolation, load_model, probe
from harvest.llm.model_files import read_shape
from shared.errors import UserError
from shared.store.row_arrays import FloatType
from shared.store.store import Store
from tests.llms import SHAPES, VOCABULARY, command, make_gemma3_multimodal, texts, write_jsonl

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
def test_hooks_equal_plain_transformers(folders: dict[str, Path], shape: str, dtype: FloatType) -> None:
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
def test_probe_gives_the_widths_that_the_model_gives(folders: dict[str, Path], shape: str) -> None:
    hooks = [*HOOKS, f"blocks.{LAYER}.ln2.hook_normalized", f"blocks.{LAYER}.mlp.hook_pre"]
    rows = load_model(folders[shape], "float32", "cpu", hooks)(torch.randint(4, 300, (2, 16)))
    assert probe(folders[shape], hooks, 16) == {name: values.shape[2] for name, values in rows.items()}


@pytest.mark.parametrize("shape", ["gemma3", "llama", "gpt2"])
def test_attention_that_transformers_computes_is_eager_attention(folders: dict[str, Path], shape: str) -> None:
    """To the rounding of float32, and not to the bit: it is another computation. Replicas have it, too."""
    ids = torch.randint(4, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    eager = load_model(folders[shape], "float32", "cpu", HOOKS)(ids)
    model = load_model(folders[shape], "float32", "cpu", HOOKS, attention="sdpa")
    found = model(ids)
    for name in HOOKS:
        torch.testing.assert_close(found[name], eager[name], rtol=1e-4, atol=1e-4)
        assert not torch.equal(found[name], eager[name])
        assert torch.equal(found[name], model.replica()(ids)[name])


def test_attention_that_a_model_does_not_have_is_one_line(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"not with model\.attention=sdpa \(Gemma2ForCausalLM does not support"):
        probe(folders["gemma2"], HOOKS, 40, "sdpa")
    inside = ["blocks.1.attn.hook_z"]
    with pytest.raises(UserError, match=r"hook blocks\.1\.attn\.hook_z gives nothing with model\.attention=sdpa"):
        load_model(folders["gpt2"], "float32", "cpu", inside, attention="sdpa")


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


def test_the_text_part_of_a_model_that_also_sees(tmp_path: Path) -> None:
    from transformers import Gemma3ForConditionalGeneration

    folder = make_gemma3_multimodal(tmp_path / "model")
    ids = torch.randint(4, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = Gemma3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    block, kept = whole.model.language_model.layers[LAYER], []
    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, given: kept.append(given[0].clone()))
    block.post_feedforward_layernorm.register_forward_hook(lambda _, given, result: kept.append(result.clone()))
    with torch.inference_mode():
        whole(input_ids=ids, use_cache=False)
    found = load_model(folder, "float32", "cpu", HOOKS)(ids)
    assert all(torch.equal(found[name], expected) for name, expected in zip(HOOKS, kept, strict=True))


def test_a_configuration_may_leave_out_the_vocabulary(tmp_path: Path) -> None:
    """As Gemma 3's do, where it is their class's own: the embedding says it."""
    folder = make_gemma3_multimodal(tmp_path / "model")
    shape, config = read_shape(folder), json.loads((folder / "config.json").read_text())
    del config["text_config"]["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_shape(folder) == shape and shape.vocabulary == VOCABULARY
    (folder / "config.json").write_text('{"text_config": 5}')
    with pytest.raises(UserError, match="text_config is 5, expected an object"):
        read_shape(folder)
    (folder / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{nope")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_shape(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_command_harvests_every_architecture(folders: dict[str, Path], shape: str, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": one} for one in texts(60)])
    small = ["windows.context_size=32", "store.edges=[0, 1, 8]", "store.block_sequences=8", "store.held_out_blocks=1"]
    settings = [part for one in (*small, "capture.batch_sequences=4") for part in ("--set", one)]
    given = ["--model", folders[shape], "--text", text, "--cache", tmp_path / "cache", "--layer", LAYER]
    path = command("run", *given, "--tokens", 512, *settings).store
    checked = command("verify", path)
    assert checked.code == 0, checked.err
    store = Store.open(path)
    tokens = np.empty((store.tokens.rows, 32), np.int32)
    store.tokens.read(0, len(tokens), tokens)
    first = {"qwen2": None, "gpt2": 1}.get(shape, 2)
    assert store.request.bos == (first is not None)
    assert store.request.corpus.separator == "<eos>"
    assert first is None or (tokens[:, 0] == first).all()
    assert first is not None or len(set(tokens[:, 0].tolist())) > 1
