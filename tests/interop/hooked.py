"""A Gemma-2 model of transformers, such as the embedded one, for transformer-lens; imports nothing of this project."""

from typing import Any

from transformer_lens import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config


def hooked_config(config: Any) -> HookedTransformerConfig:
    """transformer-lens' own settings for Gemma-2, with this model's sizes."""
    known = convert_hf_model_config("google/gemma-2-2b")
    known |= {
        "d_model": config.hidden_size, "d_head": config.head_dim, "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size, "n_layers": config.num_hidden_layers, "d_vocab": config.vocab_size,
        "n_ctx": config.max_position_embeddings, "n_key_value_heads": config.num_key_value_heads,
        "window_size": config.sliding_window, "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_types": ["local" if kind == "sliding_attention" else "global" for kind in config.layer_types],
        "model_name": "embedded", "device": "cpu", "init_weights": False, "default_prepend_bos": False,
    }  # fmt: skip
    del known["tokenizer_name"]
    return HookedTransformerConfig.from_dict(known)
