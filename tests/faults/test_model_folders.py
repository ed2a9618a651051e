"""Model folders with odd configurations, headers, tokenizers and weights: one line each."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.llms import command, edit_json, make_llama, refused, texts, write_jsonl


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "model")


def header(value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        edit_json(folder / "config.json", vocab_size=None)
        data = json.dumps(value).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)

    return write


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def token(value: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                edit_json(folder / name, bos_token=value)

    return write


def regex(folder: Path) -> None:
    def change(value: Any) -> None:
        value["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False
        }  # fmt: skip

    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))


def weights(change: Callable[[str, Tensor], Tensor]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        held = load_file(folder / "model.safetensors")
        changed = {name: change(name, tensor).contiguous() for name, tensor in held.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return write


def nan_norm(name: str, tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, float("nan")) if name == "model.norm.weight" else tensor


def written(name: str, data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return write


def dangling(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").symlink_to("gone")


def index(names: Any) -> Callable[[Path], None]:
    return written("model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}).encode())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


NAME = "model.embed_tokens.weight"
CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "header is a list": (header([1]), "not a safetensors file (its header is"),
    "header is a text": (header("x"), "not a safetensors file (its header is"),
    "tensor is a number": (header({NAME: 5}), "has the shape None"),
    "tensor without a shape": (header({NAME: {}}), "has the shape None"),
    "shape is empty": (header({NAME: {"shape": []}}), "has the shape []"),
    "shape is a text": (header({NAME: {"shape": ["a", 1]}}), "has the shape"),
    "many layers": (config(num_hidden_layers=10**9), "1,000,000,000 layers, expected at most 10,000"),
    "layers are true": (config(num_hidden_layers=True), "num_hidden_layers is"),
    "no vocabulary": (config(vocab_size=0), "vocab_size is 0, expected a number from 1"),
    "half a layer": (config(num_hidden_layers=2.5), "num_hidden_layers is 2.5"),
    "a kind that is a list": (config(model_type=["llama"]), "does not load"),
    "heads that are text": (config(num_attention_heads="two"), "does not load"),
    "no heads": (config(num_attention_heads=0, num_key_value_heads=0), "does not load"),
    "quantised": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        "needs a package that is not installed",
    ),
    "bos is a list": (token([1]), "bos_token is [1], expected text"),
    "bos is a number": (token(5), "bos_token is 5, expected text"),
    "bos is an odd object": (token({"content": 5}), "expected text"),
    "bad regex": (regex, "does not load"),
    "pointer": (written("model.safetensors", POINTER), "is a pointer of Git LFS"),
    "pointer to a tokenizer": (written("tokenizer.json", POINTER), "is a pointer of Git LFS"),
    "shard elsewhere": (index({"a": "../model.safetensors"}), "names '../model.safetensors', expected a .safetensors"),
    "pickled shard": (index({"a": "pytorch_model.bin"}), "names 'pytorch_model.bin', expected a .safetensors file"),
    "odd index": (index([5]), "its weight_map is [5], expected an object"),
    "adapter": (written("adapter_config.json", b"{}"), "holds an adapter (adapter_config.json), which is not applied"),
    "whole numbers": (weights(lambda _, tensor: tensor.to(torch.int8)), "is of type I8, so it is quantised"),
    "floats of 8 bits": (weights(lambda _, tensor: tensor.to(torch.float8_e4m3fn)), "is of type F8_E4M3, so it is"),
    "link to nowhere": (dangling, "tokenizer_config.json is not a readable file"),
}


def harvest(folder: Path, model: Path, *more: object) -> Any:
    text = write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(80)])
    given = ["--model", model, "--text", text, "--cache", folder / "cache", "--tokens", 512, "--layer", 1]
    small = ["--set", "windows.context_size=32", "--set", "store.block_sequences=16", "-q"]
    return command("run", *given, *small, *more)


@pytest.mark.fault(56)
@pytest.mark.parametrize("case", CASES)
def test_an_odd_folder_is_one_line(whole: Path, tmp_path: Path, case: str) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    spoil, said = CASES[case]
    spoil(model)
    refused(harvest(tmp_path, model), said, folder=tmp_path / "cache")


@pytest.mark.fault(56)
def test_a_librarys_advice_is_cut_to_its_beginning(whole: Path, tmp_path: Path) -> None:
    """transformers explains an unknown kind in some 800 characters, and repeats the kind as it stands in the file."""
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    edit_json(model / "config.json", model_type="\x1b[31mno_such_model")
    done = harvest(tmp_path, model)
    refused(done, "model type `\\x1b[31mno_such_model`", folder=tmp_path / "cache")
    said = done.err.split("the model does not load (ValueError: ")[1]
    assert len(said) <= 210 and said.endswith("...)\n")


@pytest.mark.fault(56)
def test_a_final_norm_that_is_not_finite_is_one_line(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    weights(nan_norm)(model)
    done = harvest(tmp_path, model)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "unembedding or final norm has values that are not finite" in done.err


@pytest.mark.fault(56)
def test_weights_of_other_shapes_are_one_line(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    weights(lambda name, tensor: tensor.T if "up_proj" in name else tensor)(model)
    done = harvest(tmp_path, model)
    assert done.code == 2
    assert done.err == f"error: {model}: its weights have other shapes than its config.json says\n"


@pytest.mark.fault(56)
def test_rows_whose_squares_overflow_are_one_line(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    weights(lambda name, tensor: tensor * (1e25 if "down_proj" in name else 1))(model)
    done = harvest(tmp_path, model)
    assert done.code == 1 and done.err.splitlines()[-1].startswith("error: "), done.err
    assert "its rows are so long that their squares overflow" in done.err


@pytest.mark.fault(22)
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_weights_is_not_waited_for(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    done = harvest(tmp_path, model)
    assert done.code == 1 and "model.safetensors is not a regular file" in done.err
