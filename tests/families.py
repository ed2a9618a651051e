"""Small models of many families with random weights: mixtures of experts, parallel attention and MLP, odd norms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tf

from tests.llms import VOCABULARY, save_model

_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 1}
_S: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
_K = {**_S, "num_key_value_heads": 1}
_GPT = {**_TOKENS, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128}
_EXPERTS = {**_S, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}

EXPERTS: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=24)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**_EXPERTS, num_local_experts=4, sliding_window=8)),
}
PARALLEL: dict[str, Callable[[], Any]] = {
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_S)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=8)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_S)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(**_TOKENS, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, alibi=False)
    ),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**_K, logit_scale=0.25)),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "olmo": lambda: tf.OlmoForCausalLM(tf.OlmoConfig(**_K)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**_K)),
    "starcoder2": lambda: tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**_K)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_K, head_dim=16)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_K, pad_token_id=0)),
}
FAMILIES = {**EXPERTS, **PARALLEL, **OTHERS}


def make_family(name: str, folder: Path) -> Path:
    """A model of a family, in a folder of its own."""
    return save_model(folder / name, FAMILIES[name])
