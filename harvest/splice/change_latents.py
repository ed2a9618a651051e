"""What a latent does to a prompt: its activation is changed at the target hook, and the next tokens are compared.

Legend: T tokens of the prompt, D d_in, O d_out, F latents, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from harvest.llm.model import Model

_SHOWN = 10
"""Next tokens that are listed of a change."""


class NextToken(NamedTuple):
    """A token that may come after the prompt."""

    token: int
    before: float
    """Probability by the unchanged model."""
    after: float


class LatentChange(NamedTuple):
    """One latent set to one value."""

    latent: int
    value: float
    """Its activation from then on; 0: it is ablated."""
    kl: list[float]
    """Of each token's next-token distribution, KL(unchanged || changed), nats."""
    next: list[NextToken]
    """After the last token, those whose probability changes most."""


class PromptPass(NamedTuple):
    """A prompt run through the unchanged model."""

    ids: Tensor
    """[1, T]"""
    source: Tensor
    """[T, D]"""
    target: Tensor
    """[T, O]"""
    logits: Tensor
    """[T, V]"""


@torch.inference_mode()
def run_prompt(model: Model, ids: Tensor, source_hook: str, target_hook: str) -> PromptPass:
    """Run `ids` [1, T] through a whole model, and keep the rows at both hooks."""
    found: dict[str, Tensor] = {}

    def keep(name: str, values: Tensor) -> Tensor:
        found[name] = values.clone()
        return values

    logits = model.logits(ids, None, {name: partial(keep, name) for name in (source_hook, target_hook)})
    return PromptPass(ids, found[source_hook][0], found[target_hook][0], logits[0])


@torch.inference_mode()
def change_latents(
    model: Model,
    target_hook: str,
    clean: PromptPass,
    latents: Tensor,
    directions: Mapping[int, Tensor],
    values: Sequence[tuple[int, float]],
    kept: Tensor,
) -> list[LatentChange]:
    """Set one latent to one value at a time, and compare the predictions with those of the unchanged model.

    At every token but those `kept` [T] bool, (value - activation) times the latent's row of the decoder, `directions`
    [O] in the targets' units, is added to what the MLP gives: what the transcoder leaves unexplained stays. `latents`
    [T, F] are the activations as they are.
    """
    before = clean.logits.double().log_softmax(1)
    changed = []
    for latent, value in values:
        amount = torch.where(kept, 0.0, value - latents[:, latent].double())
        put = (
            clean.target.double()
            + amount[:, None].to(clean.target.device) * directions[latent].to(clean.target).double()
        )
        rows = put.to(clean.target)[None]
        logits = model.logits(clean.ids, None, {target_hook: partial(_put, rows)})[0]
        after = logits.double().log_softmax(1)
        kl = (before.exp() * (before - after)).sum(1)
        changed.append(LatentChange(latent, value, kl.tolist(), _next_tokens(before[-1].exp(), after[-1].exp())))
    return changed


def _put(rows: Tensor, _own: Tensor) -> Tensor:
    return rows


def _next_tokens(before: Tensor, after: Tensor) -> list[NextToken]:
    """List the tokens whose probability changes most, the largest change first."""
    most = (after - before).abs().topk(min(_SHOWN, len(before))).indices.tolist()
    return [NextToken(token, float(before[token]), float(after[token])) for token in most]
