"""What latents do to the logits: their directions in the residual stream, and the unembedding of the store."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.store.layout import UNEMBEDDING
from shared.store.store import Store
from shared.store.unembedding import Unembedding
from train.model.transcoder import Transcoder
from train.samples.token_text import known_tokens

_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Hooks whose values are the residual stream or are added to it: what they change, the logits show directly."""


def unembedding_of(store: Store) -> Unembedding | None:
    """Open the unembedding; none where the store has none, or its targets are not part of the residual stream."""
    if not store.request.unembedding or not store.request.target_hook.endswith(_RESIDUAL):
        return None
    return Unembedding(store.path / UNEMBEDDING)


def tokens_of(store: Store) -> list[int] | None:
    """Return the ids that the store's tokenizer knows; none where the store has no tokenizer."""
    file = store.tokenizer / "tokenizer.json"
    return known_tokens(file) if file.is_file() else None


def decoder_directions(transcoder: Transcoder) -> NDArray[np.float32]:
    """Return what an activation of 1 adds to the targets [F, O], in the targets' own units."""
    directions: NDArray[Any] = (transcoder.W_dec.detach() * transcoder.target_scale).cpu().numpy()
    return directions
