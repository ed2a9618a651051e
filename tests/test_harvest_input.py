"""What a user can get wrong in a harvest: one line, and nothing lost."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click import BadParameter

from harvest.settings import load_settings
from harvest.text.corpus import open_corpus
from shared.command_line import COUNT
from shared.errors import UserError
from shared.store.layout import STORE
from shared.store.store import Store
from tests.llms import (
    BLOCK_TOKENS,
    Line,
    command,
    edit_json,
    make_neox,
    refused,
    write_jsonl,
)


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "tinny"], ["no preset 'tinny'", "tiny"]),
        (["run", "--config", "/no/such.toml"], ["/no/such.toml"]),
        (["run", "tiny", "--config", "/no/such.toml"], ["the preset 'tiny' and --config", "give one of them"]),
        (["run", "--bogus"], ["--bogus"]),
        (["run", "--set", "capture.layer=3"], ["capture.layer", "layers"]),
        (["run", "--set", "nonsense"], ["NAME=VALUE"]),
        (["run", "--set", "store.keep={3=0.5}"], ["keep names position 3"]),
        (["run", "--set", "store.edges=[1,2]"], ["edges must start with 0"]),
        (["run", "--set", "text.name=[]"], ["--set text.name=[]: must have at least 1 item"]),
        (["run", "--set", "windows.context_size=1"], ["context_size", "1"]),
        (["run", "--tokens", "0"], ["tokens"]),
        (["run", "--tokens", "many"], ["many"]),
        (["run", "--layer", "-1"], ["layers"]),
        (["run", "--model", "/no/such/model"], ["no model folder at /no/such/model"]),
        (
            ["run", "--model", "nobody/nothing"],
            ["model 'nobody/nothing'", "HF_HUB_OFFLINE is set; unset it", "local folder"],
        ),
        (["info", "/no/such/store"], ["/no/such/store"]),
        (["verify", "/no/such/store"], ["/no/such/store"]),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[Any], parts: list[str]) -> None:
    more = ["--cache", tmp_path / "cache"] if arguments[0] == "run" else []
    refused(command(*arguments, *more), *parts, folder=tmp_path / "cache")


@pytest.mark.fault(15, 40)
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--layer", 4], ["no layer for hook blocks.4.hook_resid_mid", "4 layers"]),
        (["--set", "capture.source=blocks.9.hook_out"], ["blocks.9.hook_out", "4 layers"]),
        (["--set", "capture.target=hook_mlp_oot"], ["no hook 'blocks.2.hook_mlp_oot'", "blocks.2.hook_mlp_out"]),
        (["--set", "capture.target=attn.hook_pattern"], ["no rows per position"]),
        (["--set", "windows.context_size=4096"], ["4096", "1024 positions"]),
        (["--set", "text.column=body"], ["no column 'body'", "text"]),
        (["--set", "text.column=body", "--set", "text.kind=text"], ["no column 'body'", "its columns: text"]),
        (["--set", "text.split=test"], ["text.split = test has no meaning for local text files"]),
        (
            ["--set", "text.name=embedded", "--set", "text.kind=text"],
            ["text.kind", "has no meaning for the embedded text"],
        ),
        (["--set", "model.revision=main"], ["model.revision = main has no meaning for a local model"]),
        (["--tokens", 10**15], ["no room", "bytes", "--force"]),
        (["--set", "store.held_out_blocks=99"], ["text.jsonl", "99 held-out blocks", "tokens"]),
        (["--set", "model.device=cuda"], ["model.device"]),
        (["--set", "model.attention=sdpa"], ["not with model.attention=sdpa", "Gemma2ForCausalLM does not support"]),
    ],
)
def test_what_model_or_text_cannot_give(small: Line, tmp_path: Path, arguments: list[Any], parts: list[str]) -> None:
    if "model.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(command(*small(tmp_path / "cache", *arguments)), *parts, folder=tmp_path / "cache")


def test_text_and_model_by_option_leave_the_presets_columns_and_revisions_behind(tmp_path: Path) -> None:
    kind = {"text.kind": "messages"}
    found = load_settings("gemma-2-2b", kind, text=("chats.jsonl",), model="folder")
    assert (found.text.name, found.text.column, found.text.kind) == (("chats.jsonl",), None, "messages")
    assert found.text.streaming and found.model.dtype == "bfloat16"
    whole = load_settings("gemma-2-2b", kind).text
    assert (whole.name, whole.column, whole.kind) == (("monology/pile-uncopyrighted",), "text", "messages")
    embedded = load_settings("gemma-2-2b", text="embedded").text
    assert open_corpus(embedded, None, 0).identity.name == "embedded"
    (tmp_path / "mine.toml").write_text('tokens = 1\n[text]\ncolumn = "body"\n[model]\nrevision = "v1"\n')
    mine = load_settings("tiny", file=tmp_path / "mine.toml", text=("chats.jsonl",), model="folder")
    assert (mine.text.column, mine.model.revision) == ("body", "v1")  # said of no other text, and of no other model


def test_a_store_of_another_device_is_not_recomputed_here(finished: Path, model: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    from harvest.llm.model import load_model
    from shared.errors import UserError

    with pytest.raises(UserError, match="this torch sees no CUDA device"):
        load_model(model, "float32", "cuda:0", ["blocks.2.hook_mlp_out"])


@pytest.mark.fault(37)
def test_a_tokenizer_that_does_not_parse_is_one_line(small: Line, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "tokenizer.json").write_text("{")
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    refused(command(*small(tmp_path / "cache", model=folder)), "its tokenizer does not load", folder=tmp_path / "cache")


@pytest.mark.fault(37)
def test_models_that_do_not_fit(small: Line, model: Path, tmp_path: Path) -> None:
    def run(folder: Path, *more: Any) -> Any:
        return command(*small(tmp_path / "cache", *more, model=folder, tokens=1))

    refused(run(make_neox(tmp_path / "neox")), "no hook 'blocks.2.hook_resid_mid'", folder=tmp_path / "cache")
    (tmp_path / "nothing").mkdir()
    refused(run(tmp_path / "nothing"), "config.json", folder=tmp_path / "cache")
    shutil.copytree(model, tmp_path / "nobos")
    edit_json(tmp_path / "nobos/tokenizer_config.json", bos_token=None, eos_token="<bos>")
    edit_json(tmp_path / "nobos/tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    refused(run(tmp_path / "nobos", "--set", "windows.bos=true"), "no BOS token", folder=tmp_path / "cache")
    edit_json(tmp_path / "nobos/tokenizer_config.json", bos_token="<bos>", eos_token=None)
    more = ("--set", "windows.separator=true")
    refused(run(tmp_path / "nobos", *more), "windows.separator=auto", folder=tmp_path / "cache")
    assert Store.open(run(tmp_path / "nobos").store).request.corpus.separator is None


@pytest.mark.fault(38)
def test_a_text_without_any_text_leaves_no_store(small: Line, tmp_path: Path) -> None:
    cases: dict[str, list[dict[str, Any]]] = {"none": [], "empty": [{"text": ""}] * 2, "null": [{"text": None}]}
    for name, rows in cases.items():
        text = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        found = command(*small(tmp_path / "cache", "--set", "text.column=text", text=text))
        refused(found, f"{name}.jsonl", folder=tmp_path / "cache")


@pytest.mark.fault(17)
def test_a_cache_that_cannot_be_written_is_refused_before_the_model(small: Line, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harvest.llm.model.probe", lambda *_: pytest.fail("the model was touched"))
        refused(command(*small(tmp_path / "file" / "cache")), "cannot write to")


@pytest.mark.fault(3)
def test_an_edited_request_is_refused_by_field(small: Line, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    edit_json(copy / "request.json", context_size=64)
    refused(command(*small(tmp_path)), "context_size is 64 there and 32 here")


@pytest.mark.fault(28)
def test_a_second_harvester_is_told_at_once(small: Line, finished: Path, tmp_path: Path) -> None:
    from shared.files.durable import lock

    with lock(tmp_path / f"{finished.name}.lock", "test"):
        refused(command(*small(tmp_path)), "locked")


@pytest.mark.fault(30)
def test_an_unfinished_plan_is_not_made_smaller(small: Line, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / finished.name
    shutil.copytree(finished, copy)
    (copy / STORE).unlink()
    found = command(*small(tmp_path, tokens=1))
    refused(found, "planned with 3 training blocks", f"--tokens {3 * BLOCK_TOKENS}")
    refused(command("info", copy), "is unfinished (5 of 5 blocks)")


def test_help_says_everything() -> None:
    assert all(option in command("run", "--help").out for option in ("--layer", "--tokens", "--set", "--force"))
    assert all(name in command("--help").out for name in ("run", "info", "verify"))


@pytest.mark.fault(32)
def test_nan_in_a_layer_stops_with_its_place(small: Line, model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    done = command(*small(tmp_path / "cache", model=folder))
    assert done.code == 1
    assert "blocks.2.hook_resid_mid, sequence 0 of the block, position 0: the value is nan" in done.err


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "tiny"),
        ({"model": "embedded"}, "tiny"),
        ({"model": "Qwen/Qwen3-0.6B"}, "Qwen3-0.6B"),
        ({"model": "/data/my model+"}, "my-model"),
        ({"model": "gpt2", "name": "first"}, "first"),
        ({"model": "gpt2", "changes": ["label=second"]}, "second"),
    ],
)
def test_a_store_is_called_as_asked_or_as_its_model(options: dict[str, object], label: str) -> None:
    assert load_settings("tiny", **options).label == label  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "tokens"), [("5M", 5_000_000), ("1e9", 10**9), ("2.5k", 2500), ("1_000", 1000)])
def test_tokens_can_be_written_short(text: str, tokens: int) -> None:
    assert COUNT.convert(text, None, None) == tokens


@pytest.mark.parametrize("text", ["5X", "0", "-3", "0.5", "many", "1.2345k", ""])
def test_what_is_no_whole_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(BadParameter, match="5M, 10k or 1e9"):
        COUNT.convert(text, None, None)


def test_a_setting_of_harvest_is_refused_with_the_option_that_was_typed() -> None:
    for given, said in (
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"changes": ["seed=-1"]}, "--set seed=-1: must be at least 0"),
        ({"name": "a/b"}, "--name a/b: must have the form "),
        ({"layers": (3, 3)}, "--layer 3 3: layers must be distinct"),
        ({"changes": ["dataset=x"]}, "--set dataset=x: unknown option 'dataset'; did you mean 'text.name'?"),
    ):
        with pytest.raises(UserError) as error:
            load_settings("tiny", **given)
        assert str(error.value).startswith(said), error.value
