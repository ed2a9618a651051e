"""Model folders with odd configurations, headers, tokenizers and weights: one line each."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def nan_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


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
    nan_weights(model)
    done = harvest(tmp_path, model)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "unembedding or final norm has values that are not finite" in done.err


@pytest.mark.fault(22)
@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_weights_is_not_waited_for(whole: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(whole, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors")
    done = harvest(tmp_path, model)
    assert done.code == 1 and "model.safetensors is not a regular file" in done.err
