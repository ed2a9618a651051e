"""Families of models: rows equal those of plain transformers, or one line says what to use."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from harvest.llm.extract_unembedding import norm_effect, norm_eps
from harvest.llm.model import load_model, probe
from harvest.llm.pair_meaning import Paths, explain_pair, trace
from shared.errors import UserError
from tests.families import EXPERTS, FAMILIES, PARALLEL, make_family
from tests.llms import command, texts, write_jsonl

AT = "blocks.1."
MLP = [f"{AT}mlp.hook_in", f"{AT}mlp.hook_out"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(name, root) for name in FAMILIES}


def plain(folder: Path, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the MLP of layer 1 reads and gives, by hooks on the whole model."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found: dict[str, torch.Tensor] = {}
    (mlp,) = [module for name, module in whole.named_modules() if name.endswith(".1.mlp")]

    def keep(_: Any, given: Any, result: Any) -> None:
        found.update(given=given[0].clone(), out=(result[0] if isinstance(result, tuple) else result).clone())

    mlp.register_forward_hook(keep)
    with torch.inference_mode():
        whole(ids, use_cache=False)
    return found["given"], found["out"].reshape(found["given"].shape)


@pytest.mark.fault(56)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_an_mlp_reads_and_gives_is_that_of_plain_transformers(folders: dict[str, Path], name: str) -> None:
    ids = torch.randint(4, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    found = load_model(folders[name], "float32", "cpu", MLP)(ids)
    for hook, expected in zip(MLP, plain(folders[name], ids), strict=True):
        torch.testing.assert_close(found[hook], expected, rtol=1e-5, atol=1e-5)
    assert probe(folders[name], MLP, 16) == dict.fromkeys(MLP, 32)


@pytest.mark.fault(56)
@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_is_harvested(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    small = ["windows.context_size=32", "store.edges=[0, 1, 8]", "store.block_sequences=8", "store.held_out_blocks=1"]
    settings = [part for one in small for part in ("--set", one)]
    given = ["--model", folders[name], "--text", text_of(tmp_path), "--cache", tmp_path / "cache", "--layer", 1]
    path = command("run", *given, "--tokens", 256, *settings).store
    checked = command("verify", path, "--against-model", 20, "--model", folders[name])
    assert checked.code == 0, checked.err + checked.out


def text_of(folder: Path) -> Path:
    return write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(60)])


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_attention_and_mlp_name_what_to_use(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    given = ["--model", folders[name], "--text", text_of(tmp_path), "--cache", tmp_path / "cache", "--layer", 1]
    small = ["--set", "windows.context_size=32", "--set", "store.block_sequences=8", "--tokens", 256]
    done = command("plan", *given, *small)
    assert done.code == 2 and "attention and MLP run in parallel" in done.err, done.err
    assert "use --set capture.source=mlp.hook_in" in done.err and len(done.err.splitlines()) == 1
    done = command("plan", *given, *small, "--set", "capture.source=mlp.hook_in", "--json")
    assert json.loads(done.out)["pair"][2] == (
        "the target follows from the source of its position alone, through the MLP"
    )


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_what_a_pair_means(folders: dict[str, Path], name: str) -> None:
    folder, every = folders[name], Paths(follows=True, alone=True, through_attention=False, through_mlp=True)
    for source, target, expected in (
        ("hook_resid_mid", "hook_mlp_out", every),
        ("mlp.hook_in", "mlp.hook_out", every),
        ("ln2.hook_normalized", "hook_mlp_out", every),
        ("hook_resid_pre", "hook_mlp_out", every._replace(through_attention=True)),
        ("mlp.hook_in", "hook_resid_post", every._replace(alone=False)),
        ("hook_mlp_out", "hook_resid_mid", Paths(False, False, False, False)),
    ):
        assert trace(folder, AT + source, AT + target) == expected, (source, target)
    lines = explain_pair(folder, f"{AT}ln2.hook_normalized", f"{AT}hook_mlp_out")
    assert "before its gain and bias: not what the MLP reads (that is mlp.hook_in)" in lines[0]
    assert "follows from the source of its position alone" in lines[2]
    assert explain_pair(folder, f"{AT}hook_mlp_out", f"{AT}hook_mlp_out")[2] == "source and target are the same rows"


def test_the_normalised_rows_are_before_the_gain(folders: dict[str, Path]) -> None:
    """As docs/storing.md says; models whose gains are all 1 would not show it."""
    normalized, read = load_model(folders["qwen3"], "float32", "cpu", [f"{AT}ln2.hook_normalized", f"{AT}mlp.hook_in"])(
        torch.randint(4, 300, (2, 20))
    ).values()
    gain = (read / normalized).flatten(0, 1)
    torch.testing.assert_close(gain, gain[:1].expand_as(gain), rtol=1e-3, atol=1e-3)
    assert float((normalized - read).norm() / read.norm()) > 0.1


@pytest.mark.parametrize(("name", "part"), [("attn.hook_z", "z"), ("attn.hook_q", "q"), ("attn.o.hook_in", "z")])
def test_what_heads_give_is_one_row(folders: dict[str, Path], name: str, part: str) -> None:
    hooks = [AT + name, f"{AT}hook_mlp_out"]
    rows = load_model(folders["qwen3"], "float32", "cpu", hooks)(torch.randint(4, 300, (2, 20)))[AT + name]
    assert rows.shape == (2, 20, 32) and probe(folders["qwen3"], hooks, 16)[AT + name] == 32


@pytest.mark.parametrize("context", [2, 16])
def test_attention_patterns_are_no_rows(folders: dict[str, Path], context: int) -> None:
    """With as many heads as tokens, their shape alone does not tell."""
    with pytest.raises(UserError, match="no rows per position"):
        probe(folders["qwen3"], [f"{AT}attn.hook_pattern"], context)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("hook_mlp_in", "use hook_resid_mid, which has the same values"),
        ("hook_attn_in", "use hook_resid_pre"),
        ("hook_q_input", "use hook_resid_pre"),
        ("attn.hook_result", "use attn.hook_z"),
    ],
)
def test_hooks_that_are_switched_off_name_another(folders: dict[str, Path], name: str, use: str) -> None:
    with pytest.raises(UserError, match=f"is switched off in this model; {use}"):
        probe(folders["qwen3"], [AT + name], 16)
    with pytest.raises(UserError, match="near it") as error:
        probe(folders["qwen3"], [f"{AT}hook_mlp_i"], 16)
    assert "hook_mlp_in" not in str(error.value)


@pytest.mark.fault(56)
def test_a_bridge_that_computes_something_else_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harvest.llm import model

    bridge = model._bridge

    def other(folder: Path, network: Any, *more: Any) -> Any:
        with torch.no_grad():
            network.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return bridge(folder, network, *more)

    monkeypatch.setattr(model, "_bridge", other)
    with pytest.raises(UserError, match="computes something else than transformers"):
        load_model(folders["qwen3"], "float32", "cpu", MLP)


@pytest.mark.fault(56)
def test_weights_that_have_no_place_are_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As biases that the configuration does not name: rows would differ without a word."""
    model = Path(shutil.copytree(folders["qwen3"], tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(32)
    weights["model.layers.2.self_attn.q_proj.bias"] = torch.ones(32)  # of a layer that does not run
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    load_model(model, "float32", "cpu", MLP)
    said = capsys.readouterr().err
    assert "hold 1 tensors that the model has no place for, the first is model.layers.1.self_attn.q_proj.bias" in said
    load_model(folders["qwen3"], "float32", "cpu", MLP)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["olmo", "starcoder2", "qwen3", "cohere"])
def test_eps_is_that_of_the_norm(folders: dict[str, Path], name: str) -> None:
    model = load_model(folders[name], "float32", "cpu", MLP)
    norm, config, cpu = model.final_norm, model.text_config, torch.device("cpu")
    said = [getattr(config, key, None) for key in ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")]
    eps = norm_eps(norm, 32, cpu)
    assert eps == next((value for value in said if value), 1e-5)
    gain, bias, kind = norm_effect(norm, 32, cpu)
    x = 1e-3 * torch.randn(1, 4, 32)
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias
    torch.testing.assert_close(norm(x), expected, rtol=1e-3, atol=1e-3)
