"""A small Gemma-2 language model that ships with the package, and the code that trained it."""

from __future__ import annotations

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
"""The Hugging Face folder of the shipped model: weights, configuration, tokenizer."""
