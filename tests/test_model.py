"""The cut model against plain transformers, and what cannot be loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from harvest.llm.model import check_device, load_model, probe
from harvest.llm.model_files import ModelFiles, find_model, read_shape, read_special_tokens, resolve_device
from harvest.settings import ModelSettings
from shared.errors import UserError
from tests.llms import edit_json, make_gemma, make_neox

HOOKS = ["blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gemma(tmp_path_factory.mktemp("models") / "gemma")


def plain(folder: Path, layer: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Input of the MLP's norm, output of the MLP's post-norm, and the layer's output, by hooks on the whole model."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    block, found = whole.model.layers[layer], {}

    def keep(name: str, value: Any) -> None:
        found[name] = (value[0] if isinstance(value, tuple) else value).clone()

    block.pre_feedforward_layernorm.register_forward_pre_hook(lambda _, given: keep("resid_mid", given))
    block.post_feedforward_layernorm.register_forward_hook(lambda _, given, result: keep("mlp_out", result))
    block.register_forward_hook(lambda _, given, result: keep("resid_post", result))
    with torch.inference_mode():
        whole(ids, use_cache=False)
    return found


def test_the_cut_model_equals_the_whole_one(folder: Path) -> None:
    ids = torch.randint(4, 300, (3, 40), generator=torch.Generator().manual_seed(0))
    found = load_model(folder, "float32", "cpu", [*HOOKS, "blocks.2.hook_resid_post"])(ids)
    expected = plain(folder, 2, ids)
    assert torch.equal(found["blocks.2.hook_resid_mid"], expected["resid_mid"])
    assert torch.equal(found["blocks.2.hook_mlp_out"], expected["mlp_out"])
    assert torch.equal(found["blocks.2.hook_resid_post"], expected["resid_post"])
    assert list(found) == [*HOOKS, "blocks.2.hook_resid_post"]


def test_resid_mid_and_mlp_out_add_up_to_resid_post(folder: Path) -> None:
    ids = torch.randint(4, 300, (2, 20))
    mid, out, post = load_model(folder, "float32", "cpu", [*HOOKS, "blocks.2.hook_resid_post"])(ids).values()
    assert torch.equal(mid + out, post)


def test_a_replica_shares_weights_and_nothing_else(folder: Path) -> None:
    model = load_model(folder, "float32", "cpu", HOOKS)
    twin = model.replica()
    ids = torch.randint(4, 300, (2, 20))
    assert all(torch.equal(twin(ids)[name], model(ids)[name]) for name in HOOKS)
    ours = {id(parameter) for parameter in model._bridge.parameters()}
    assert {id(parameter) for parameter in twin._bridge.parameters()} == ours
    assert not {id(m) for m in model._bridge.modules()} & {id(m) for m in twin._bridge.modules()}


def test_probe_gives_widths_without_weights(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.rename(weights.with_suffix(".away"))
    try:
        assert probe(folder, [*HOOKS, "blocks.1.mlp.hook_pre"], 16) == {
            **dict.fromkeys(HOOKS, 32),
            "blocks.1.mlp.hook_pre": 48,
        }
    finally:
        for weights in folder.glob("*.away"):
            weights.rename(weights.with_suffix(".safetensors"))


def test_unknown_hooks_name_near_ones(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no hook 'blocks.2.hook_mlp_oot'; near it: .*blocks\.2\.hook_mlp_out"):
        probe(folder, ["blocks.2.hook_resid_mid", "blocks.2.hook_mlp_oot"], 16)


def test_hooks_without_rows_per_position_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="no rows per position"):
        probe(folder, ["blocks.2.attn.hook_pattern", "blocks.2.hook_mlp_out"], 16)


def test_a_parallel_architecture_has_no_resid_mid(tmp_path: Path) -> None:
    said = r"no hook .blocks.1.hook_resid_mid.: .*in parallel.*capture\.source=mlp\.hook_in"
    with pytest.raises(UserError, match=said):
        probe(make_neox(tmp_path / "neox"), ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"], 16)


def test_an_unknown_architecture_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    edit_json(tmp_path / "config.json", model_type="no_such_model")
    with pytest.raises(UserError, match="no_such_model"):
        probe(tmp_path, HOOKS, 16)


def test_damaged_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 500 if path.suffix == ".safetensors" else None])
    with pytest.raises(UserError, match="does not load"):
        load_model(tmp_path, "float32", "cpu", HOOKS)


@pytest.mark.fault(37)
def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(tmp_path, "float32", "cpu", HOOKS)


def test_files_tell_sizes_and_special_tokens(folder: Path) -> None:
    files = find_model(ModelSettings(name=str(folder)))
    assert (files.name, files.revision) == ("gemma", None)
    shape = read_shape(folder)
    assert (shape.layers, shape.d_model, shape.vocabulary, shape.max_context) == (4, 32, 320, 1024)
    special = read_special_tokens(files)
    assert (special.bos, special.eos) == ("<bos>", "<eos>")


def test_digests_follow_contents_not_places(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    ours, theirs = ModelFiles(folder=folder, name="a", revision=None), ModelFiles(folder=copy, name="b", revision=None)
    assert ours.weights_digest() == theirs.weights_digest()
    assert ours.tokenizer_digest() == theirs.tokenizer_digest()
    edit_json(copy / "tokenizer_config.json", model_max_length=77)
    assert ours.tokenizer_digest() != theirs.tokenizer_digest()
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert ours.weights_digest() != theirs.weights_digest()


def test_a_blob_of_the_hub_cache_is_not_read(folder: Path, tmp_path: Path) -> None:
    """A snapshot's symbolic links name their blobs by SHA-256; the digest equals that of a plain copy."""
    import hashlib

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        blob = tmp_path / hashlib.sha256(path.read_bytes()).hexdigest()
        blob.write_bytes(b"" if path.suffix == ".safetensors" else path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    linked, direct = (ModelFiles(folder=f, name="m", revision=None).weights_digest() for f in (snapshot, folder))
    assert linked == direct


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_explicit_device_is_taken_as_it_is(device: Any) -> None:
    assert resolve_device(device) == device


def test_cuda_that_is_not_there_is_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match=r"model\.device=cpu"):
        check_device("cuda")
