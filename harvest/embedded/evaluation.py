"""The model's loss, the n-gram losses that it is compared with, and the check of the lean forward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma2ForCausalLM

from harvest.embedded.data import NOT_SCORED
from harvest.embedded.forward import logits
from harvest.embedded.tokenizer import EOS_ID

EVALUATION_BATCH = 8


@torch.inference_mode()
def evaluate(model: Gemma2ForCausalLM, inputs: Tensor, labels: Tensor) -> float:
    """Return the mean nats per scored token of windows [W, 256]."""
    total = 0.0
    for some_inputs, some_labels in zip(inputs.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        scores = logits(model, some_inputs).flatten(0, 1)
        total += float(F.cross_entropy(scores, some_labels.flatten(), ignore_index=NOT_SCORED, reduction="sum"))
    return total / int((labels != NOT_SCORED).sum())


@torch.inference_mode()
def check_forward(model: Gemma2ForCausalLM, inputs: Tensor) -> None:
    """Check that the lean forward pass is the published architecture's."""
    error = float((logits(model, inputs) - model(inputs).logits).abs().max())
    if error > 1e-4:
        raise RuntimeError(f"the training forward pass differs from Gemma2ForCausalLM by {error:.2e}")


def unigram_loss(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Return the held-out nats per token of the training frequencies, one count added to every token."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum())[held_out].log().mean())


def bigram_loss(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Return the held-out nats per token of bigrams backed off to unigrams, with the best of several back-off weights.

    Choosing the weight on the held-out tokens favours the bigrams slightly: a reference should not be a straw man.
    """
    unigram = torch.bincount(train, minlength=vocabulary).double() + 1
    unigram /= unigram.sum()
    pairs = torch.bincount(train[:-1] * vocabulary + train[1:], minlength=vocabulary**2)
    firsts = torch.bincount(train[:-1], minlength=vocabulary)
    previous = torch.cat((torch.tensor([EOS_ID]), held_out[:-1]))
    seen, first, backed_off = pairs[previous * vocabulary + held_out], firsts[previous], unigram[held_out]
    return min(
        float(-((seen + weight * backed_off) / (first + weight)).log().mean())
        for weight in (1, 3, 10, 30, 100, 300, 1000)
    )
