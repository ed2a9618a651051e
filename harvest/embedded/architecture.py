"""The embedded model's configuration, its initial weights, and its Hugging Face folder."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import Gemma2Config, Gemma2ForCausalLM

from harvest.embedded.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, save_tokenizer
from shared.files import durable


def model_config() -> Gemma2Config:
    """Return Gemma-2's architecture with every feature of the large models, at three million parameters."""
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        max_position_embeddings=1024,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
        attn_implementation="eager",
    )


def initial_model() -> Gemma2ForCausalLM:
    """Make a model whose residual updates, summed over layers, start at unit size.

    With unit size each, it learns slower.
    """
    config = model_config()
    model = Gemma2ForCausalLM(config)
    gain = (2 * config.num_hidden_layers) ** -0.5
    for layer in model.model.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            torch.nn.init.constant_(norm.weight, gain - 1.0)
    return model


def rounded(model: Gemma2ForCausalLM) -> Gemma2ForCausalLM:
    """Return a copy with the weights rounded to bfloat16."""
    return copy.deepcopy(model).to(torch.bfloat16)


def write_model(model: Gemma2ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Put the model, rounded to bfloat16, in place of ``folder``."""
    if folder.exists():
        shutil.rmtree(folder)
    with durable.publish_folder(folder) as partial:
        rounded(model).save_pretrained(partial)
        save_tokenizer(tokenizer, partial, model.config.max_position_embeddings)
        config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        # transformers 4 knows these two under other names.
        config |= {"torch_dtype": config["dtype"], "rope_theta": config["rope_parameters"]["rope_theta"]}
        (partial / "config.json").write_bytes(durable.json_bytes(config))
        for file in partial.iterdir():
            file.chmod(0o644)
