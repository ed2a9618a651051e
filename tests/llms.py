"""Small LLMs with random weights in Hugging Face folders, texts for them, and the harvest's command line."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from harvest.embedded.tokenizer import BOS_ID, EOS_ID, save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = 320
WORDS = ["def", "return", "import", "class", "self", "value", "list", "index", "token", "layer", "0", "1", "(", ")"]


def make_gemma(folder: Path, **changes: Any) -> Path:
    """A Gemma-2 model of 4 layers of width 32, with a byte-level tokenizer of 320 tokens."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    return _save(folder, Gemma2ForCausalLM, Gemma2Config(**{**sizes, **changes}))


def make_gemma3(folder: Path) -> Path:
    """A Gemma-3 text model: five layers, of which the third and the last attend to all of the window."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **_SMALL, head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=5, layer_types=kinds, sliding_window=8
    )
    return _save(folder, Gemma3ForCausalLM, config)


def make_llama(folder: Path) -> Path:
    """A Llama model, its unembedding apart from its embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save(folder, LlamaForCausalLM, LlamaConfig(**_SMALL, num_hidden_layers=4, tie_word_embeddings=False))


def make_qwen(folder: Path) -> Path:
    """A Qwen-2 model: biases in attention, and a tokenizer without BOS."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _save(folder, Qwen2ForCausalLM, Qwen2Config(**_SMALL, num_hidden_layers=4))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), "bos_token": None}))
    return folder


def make_gpt2(folder: Path) -> Path:
    """A GPT-2 model: learned positions, layer norms with biases, and a tokenizer whose BOS is its EOS."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 1024}
    _save(folder, GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=1, **sizes))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            edit_json(folder / name, bos_token="<eos>", eos_token="<eos>")
    return folder


def make_gemma3_multimodal(folder: Path) -> Path:
    """A Gemma-3 model that also sees: its text part is nested, in the configuration and in the weights' names."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(
        **_SMALL, head_dim=16, query_pre_attn_scalar=16, num_hidden_layers=4, layer_types=kinds, sliding_window=8
    )
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sight, "image_size": 28, "patch_size": 14}
    return _save(
        folder,
        Gemma3ForConditionalGeneration,
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4),
    )


def make_granite(folder: Path) -> Path:
    """A Granite model, which divides its logits."""
    from transformers import GraniteConfig, GraniteForCausalLM

    return _save(folder, GraniteForCausalLM, GraniteConfig(**_SMALL, num_hidden_layers=3, logits_scaling=8.0))


def make_cohere(folder: Path) -> Path:
    """A Cohere model: layer norms without bias, and logits that are multiplied."""
    from transformers import CohereConfig, CohereForCausalLM

    return _save(folder, CohereForCausalLM, CohereConfig(**_SMALL, num_hidden_layers=3, logit_scale=0.25))


_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
SHAPES = {
    "gemma2": make_gemma,
    "gemma3": make_gemma3,
    "llama": make_llama,
    "qwen2": make_qwen,
    "gpt2": make_gpt2,
}
"""Makers of small models, by architecture."""


def make_neox(folder: Path) -> Path:
    """A GPT-NeoX model: its attention and MLP run in parallel, so there is no residual between them."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return _save(folder, GPTNeoXForCausalLM, config)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 200 words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 200))) for _ in range(count)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def store(self) -> Path:
        """The path on the last line of stdout."""
        assert self.code == 0, self.err
        return Path(self.out.splitlines()[-1])


def command(*arguments: object) -> Outcome:
    """Run `python -m harvest` in this process, through the same entry point."""
    import shared.command_line
    from harvest.cli import group

    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["harvest", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            shared.command_line.run(group)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def start(*arguments: object, options: Iterable[str] = ()) -> "subprocess.Popen[str]":
    """Start `python -m harvest` as a process of its own."""
    line = [sys.executable, *options, "-m", "harvest", *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, env=dict(os.environ), stdout=-1, stderr=-1, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store and its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SMALL = [
    *("--set", "windows.context_size=32"),
    *("--set", "store.edges=[0, 1, 4, 16]"),
    *("--set", "store.keep={0 = 0.25}"),
    *("--set", "store.block_sequences=16"),
    *("--set", "store.held_out_blocks=2"),
    *("--set", "capture.batch_sequences=4"),
]
BLOCK_TOKENS = 16 * 32


def small_inputs(folder: Path) -> tuple[Path, Path]:
    """A small model and a text in `folder`, made if they are missing."""
    model = folder / "model" if (folder / "model").exists() else make_gemma(folder / "model")
    return model, write_jsonl(folder / "text.jsonl", [{"text": one} for one in texts(80)])


def small_harvest(folder: Path) -> list[object]:
    """Options of a harvest of a second, of the inputs in `folder`."""
    model, text = small_inputs(folder)
    return ["--model", model, "--text", text, "--layer", 2, "--tokens", 3 * BLOCK_TOKENS, *SMALL]


class Line:
    """The arguments of a harvest that takes a second: by default two held-out blocks and three training blocks."""

    def __init__(self, model: Path, text: Path) -> None:
        self.model, self.text = model, text

    def __call__(
        self,
        cache: Path,
        *more: object,
        model: Path | None = None,
        text: Path | None = None,
        layers: tuple[int, ...] = (2,),
        tokens: int = 3 * BLOCK_TOKENS,
    ) -> list[object]:
        given = ["--model", model or self.model, "--text", text or self.text, "--cache", cache, "--tokens", tokens]
        return ["run", *given, *SMALL, *(part for layer in layers for part in ("--layer", layer)), *more]


def refused(outcome: Any, *parts: str, folder: Path | None = None) -> None:
    """Exit code 2, one line on stderr with all of `parts`, and no store begun in `folder`."""
    assert outcome.code == 2, (outcome.out, outcome.err)
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith("error: ")
    for part in parts:
        assert part in outcome.err
    assert outcome.out == ""
    if folder is not None:
        assert not [path for path in folder.rglob("*") if path.is_dir() or path.suffix != ".lock"]


def wait_for(cache: Path, pattern: str, process: Any) -> None:
    began = time.monotonic()
    while not list(cache.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - began < 120
        time.sleep(0.005)


def _save(folder: Path, kind: Any, config: Any) -> Path:
    return save_model(folder, lambda: kind(config))


def save_model(folder: Path, make: Callable[[], Any]) -> Path:
    """Save what `make` returns, its weights changed so that one can tell what they do, with a tokenizer."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # the usual 0.02 gives activations that hardly differ
            else:
                parameter.add_(0.5 * torch.rand_like(parameter))  # gains of 1 and biases of 0 would hide what norms do
    model.save_pretrained(folder)
    save_tokenizer(train_tokenizer(texts(50, seed=99), VOCABULARY), folder, 1024)
    return folder
