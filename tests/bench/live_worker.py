"""Live runs of SAELens by its own runners, in its own environment: the LLM runs inside the training.

python live_worker.py SETTINGS      SETTINGS is a JSON object; run by tests.bench.end_to_end; imports nothing of it

One autoencoder by `LanguageModelSAETrainingRunner`, several at once on one LLM by `MultiSAETrainingRunner`. Both load
the model's folder by their class for Hugging Face models, which stops the forward pass at the hook, and tokenize,
buffer and mix by their `ActivationsStore`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Load, train, save."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    if settings["stand_in"]:  # only to show that the bench runs, where SAELens is not installed
        assert all("text" in json.loads(line) for line in Path(settings["text"]).read_text().splitlines())
        return

    from datasets import load_dataset
    from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
    from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig

    # From the folder of this run: the cache of an earlier one would save it the reading.
    cache = str(Path(settings["out"]) / "text-cache")
    text = load_dataset("json", data_files=settings["text"], split="train", cache_dir=cache)
    steps, count = settings["steps"], settings["count"]

    def sae() -> Any:
        return MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=settings["d"], d_sae=settings["d_sae"], k=settings["k"], matryoshka_widths=settings["prefixes"]
        )

    common: dict[str, Any] = {
        "model_name": settings["model"],
        "model_class_name": "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": {"dtype": "float32"},
        "dataset_path": settings["text"],
        "streaming": False,
        "context_size": settings["context_size"],
        "store_batch_size_prompts": 16,
        "training_tokens": steps * settings["rows"],
        "train_batch_size_tokens": settings["rows"],
        "lr_decay_steps": steps // 5,
        "device": "cpu",
        "dead_feature_window": max(1, steps // 20),
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": settings["out"],
    }
    if count == 1:
        one = LanguageModelSAERunnerConfig(
            sae=sae(), hook_name=settings["hook"], is_dataset_tokenized=False, seed=0, **common
        )
        LanguageModelSAETrainingRunner(one, override_dataset=text).run()
    else:
        several = MultiSAETrainingRunnerConfig(
            saes={f"sae-{i}": sae() for i in range(count)}, hook_names=settings["hook"], **common
        )
        MultiSAETrainingRunner(several, override_dataset=text).run()


if __name__ == "__main__":
    main()
