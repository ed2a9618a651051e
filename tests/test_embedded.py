"""The shipped model, its tokenizer and its training record."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

from harvest.embedded import MODEL_FOLDER
from harvest.embedded.architecture import initial_model, write_model
from harvest.embedded.corpus import Document, corpus_digest, documents, is_held_out, is_included, read_corpus
from harvest.embedded.data import NOT_SCORED, SCORED, evaluation_windows, token_stream, training_batches
from harvest.embedded.evaluation import check_forward, evaluate
from harvest.embedded.forward import logits, training_loss
from harvest.embedded.muon import orthogonalise
from harvest.embedded.tokenizer import BOS_ID, EOS_ID, PAD_ID, UNK_ID

AWKWARD = [
    "",
    " ",
    "\n\n\t\tx = 1\r\n",
    "def f(x):\n    return x ** 2  # comment\n",
    "naïve café — ‘quoted’ … ½",
    "日本語のテキスト и кириллица עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff\x00\x7f",
    "trailing spaces   ",
    "  two leading, and a.b , c ! ? 'll don't",
]


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def held_out_windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight windows spread over the running Python's held-out files."""
    held_out = [document for document in documents() if is_held_out(document.name)]
    stream = token_stream(held_out, Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json")))
    inputs, labels = evaluation_windows(stream)
    return inputs[:: len(inputs) // 8][:8], labels[:: len(labels) // 8][:8]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((MODEL_FOLDER.parent / "training.json").read_text(encoding="utf-8"))


def test_model_is_gemma2_of_the_stated_size(model: Gemma2ForCausalLM) -> None:
    config = model.config
    assert type(model) is Gemma2ForCausalLM
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (10, 128, 512)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert config.query_pre_attn_scalar == 32
    assert config.sliding_window == 64
    assert config.layer_types == ["sliding_attention", "full_attention"] * 5
    assert config.vocab_size == 4096
    assert config.max_position_embeddings >= 1024
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_987_136


def test_weights_file_is_tied_bfloat16() -> None:
    with safe_open(MODEL_FOLDER / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert weights.metadata() == {"format": "pt"}
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_folder_loads_in_transformers_4_too() -> None:
    tokenizer_config = json.loads((MODEL_FOLDER / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = json.loads((MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["architectures"] == ["Gemma2ForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("text", AWKWARD)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {PAD_ID, EOS_ID, BOS_ID, UNK_ID}


def test_special_tokens(tokenizer: PreTrainedTokenizerFast, model: Gemma2ForCausalLM) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == model.config.bos_token_id == BOS_ID
    assert tokenizer.eos_token_id == model.config.eos_token_id == EOS_ID
    assert tokenizer.pad_token_id == model.config.pad_token_id == PAD_ID
    assert tokenizer("import os")["input_ids"] == tokenizer("import os", add_special_tokens=False)["input_ids"]


def test_model_predicts_held_out_code(
    model: Gemma2ForCausalLM, held_out_windows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    # Bigrams reach 4.5 nats; the margin above the model's own figure is for other Python versions' libraries.
    assert evaluate(model, *held_out_windows) < 3.9


def test_lean_forward_matches_transformers(
    model: Gemma2ForCausalLM, held_out_windows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    check_forward(model, held_out_windows[0][:2])
    check_forward(model, held_out_windows[0][:1, :70])


def test_lean_gradient_matches_autograd(held_out_windows: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(0)
    fresh = initial_model()
    inputs, labels = (part[:2] for part in held_out_windows)
    plain_loss = torch.nn.functional.cross_entropy(logits(fresh, inputs).flatten(0, 1), labels.flatten())
    plain = torch.autograd.grad(plain_loss, list(fresh.parameters()))
    lean_loss = training_loss(fresh, inputs, labels)
    lean = torch.autograd.grad(lean_loss, list(fresh.parameters()))
    assert lean_loss.item() == pytest.approx(plain_loss.item(), abs=1e-5)
    for ours, theirs in zip(lean, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("shape", [(128, 128), (512, 128), (128, 512)])
def test_muon_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    # The iteration trades accuracy for speed; only directions of almost no gradient stay far below one.
    assert float(values.max()) < 1.3
    assert float(values.median()) > 0.65


def test_corpus_is_stable_and_clean() -> None:
    corpus = read_corpus()
    names = [document.name for document in corpus.documents]
    assert names == sorted(set(names))
    assert "functools.py" in names
    assert "\r" not in "".join(document.text for document in corpus.documents)
    assert corpus_digest(corpus.documents) == corpus_digest(documents())


@pytest.mark.parametrize(
    "name",
    [
        "test/test_os.py",
        "unittest/test/x.py",
        "idlelib/idle_test/x.py",
        "x/tests/y.py",
        "site-packages/a.py",
        "_sysconfigdata__linux.py",
        "config-3.11/x.py",
    ],
)
def test_corpus_excludes(name: str) -> None:
    assert not is_included(name)


def test_digest_is_unambiguous() -> None:
    assert corpus_digest([Document("a", "bc")]) != corpus_digest([Document("ab", "c")])
    assert corpus_digest([Document("a", ""), Document("b", "")]) != corpus_digest([Document("a", "b")])


def test_every_held_out_token_is_scored_once() -> None:
    stream = torch.arange(10, 10 + 2 * SCORED + 5)
    inputs, labels = evaluation_windows(stream)
    assert torch.equal(labels[labels != NOT_SCORED], stream)
    assert bool((inputs[:, 0] == BOS_ID).all())
    assert torch.equal(inputs[:2, 1:], labels[:2, :-1])


def test_training_windows_differ_between_epochs_and_repeat_with_the_seed() -> None:
    stream = torch.arange(SCORED * 10)
    first, again = training_batches(stream, 4, seed=1), training_batches(stream, 4, seed=1)
    batches = [next(first) for _ in range(4)]
    assert all(torch.equal(labels, next(again)[1]) for _, labels in batches)
    assert {int(labels[0, 0]) % SCORED for _, labels in batches[:2]} != {
        int(labels[0, 0]) % SCORED for _, labels in batches[2:]
    }


def test_held_out_files_are_not_trained_on(record: dict[str, Any]) -> None:
    names = record["corpus"]["held_out_names"]
    assert names and all(is_held_out(name) for name in names)
    share = record["corpus"]["held_out_tokens"] / record["corpus"]["train_tokens"]
    assert 0.01 < share < 0.1


def test_training_record_is_consistent(record: dict[str, Any]) -> None:
    settings, final, references = record["settings"], record["held_out"], record["references_nats_per_token"]
    curve = record["curve"]
    assert record["steps_done"] == curve[-1]["step"]
    assert settings["tokens"] <= curve[-1]["tokens"] < settings["tokens"] + settings["batch"] * SCORED
    assert [point["step"] for point in curve] == sorted({point["step"] for point in curve})
    assert final["bfloat16"]["nats_per_token"] <= 3.2 < references["bigram"] < references["unigram"]
    assert final["bfloat16"]["nats_per_token"] == pytest.approx(final["float32"]["nats_per_token"], abs=0.005)
    per_byte = record["corpus"]["held_out_tokens"] / record["corpus"]["held_out_bytes"] / math.log(2)
    assert final["float32"]["bits_per_byte"] == pytest.approx(final["float32"]["nats_per_token"] * per_byte)
    losses = [point["held_out_sample_loss"] for point in curve]
    assert losses[-1] == min(losses)
    assert all(later < earlier + 0.1 for earlier, later in itertools.pairwise(losses))


def test_writing_the_model_replaces_the_folder_whole(model: Gemma2ForCausalLM, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "stale").touch()
    write_model(model, tokenizer, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    written = {path.name for path in folder.iterdir()}
    assert written == {path.name for path in MODEL_FOLDER.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (MODEL_FOLDER / "model.safetensors").read_bytes()
