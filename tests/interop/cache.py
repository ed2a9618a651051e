"""Activations that SAELens caches itself: `python cache.py MODEL FOLDER HOOK HOOK`, in its environment.

Imports nothing of this project. MODEL is a folder of a Gemma-2 model, such as the embedded one, whose text is the
standard library's. Each hook gets a folder of its own, named after it, as SAELens' runner caches one hook at a time.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from hooked import hooked_config
from sae_lens import cache_activations_runner
from sae_lens.config import CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer
from transformer_lens.pretrained.weight_conversions import convert_gemma_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT, SEQUENCES, BATCH = 256, 256, 16


def main() -> None:
    """Cache."""
    model, folder, *hooks = sys.argv[1:]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    hooked = HookedTransformer(hooked_config(loaded.config), tokenizer=AutoTokenizer.from_pretrained(model))
    state = convert_gemma_weights(loaded, hooked.cfg)
    assert not hooked.load_state_dict(state, strict=False).unexpected_keys
    cache_activations_runner.load_model = lambda **_: hooked
    texts = [file.read_text() for file in sorted(Path(json.__file__).parents[1].glob("*.py"))[:80]]
    for hook in hooks:
        config = CacheActivationsRunnerConfig(
            dataset_path="the standard library", model_name="embedded", model_batch_size=BATCH, hook_name=hook,
            d_in=hooked.cfg.d_model, training_tokens=SEQUENCES * CONTEXT, context_size=CONTEXT, device="cpu",
            new_cached_activations_path=f"{folder}/{hook}", shuffle=False, streaming=False, buffer_size_gb=0.01,
        )  # fmt: skip
        dataset = Dataset.from_dict({"text": texts})
        cache_activations_runner.CacheActivationsRunner(config, override_dataset=dataset).run()


if __name__ == "__main__":
    main()
