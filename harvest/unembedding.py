"""The unembedding and the final norm, kept beside a store so that stage 2 can list the tokens each latent promotes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from harvest.model import Model
from shared import durable


def publish_unembedding(model: Model, path: Path) -> None:
    """Write `unembedding.safetensors`; the model's logits are `softcap(W_U @ (norm(x) * gain + bias) + b_U)`.

    Tensors: `W_U` [vocabulary, d_model] in the model's type; `final_norm.gain` and `final_norm.bias` [d_model] and
    `b_U` [vocabulary] in float32. The metadata's `logits` is JSON (one entry: the library writes several
    in any order): `norm`, `rms` (x over its root mean square) or `layer` (after taking its mean away); `eps`, added to
    the mean square; `softcap`, c of `c * tanh(logits / c)`, or null.
    """
    (weight, offset), config = model.unembedding, model.text_config
    gain, bias, kind = norm_effect(model.final_norm, weight.shape[1], weight)
    tensors = {"W_U": weight, "final_norm.gain": gain, "final_norm.bias": bias, "b_U": offset.float()}
    names = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps")
    eps = next((getattr(config, name) for name in names if hasattr(config, name)), 0.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    told = json.dumps({"norm": kind, "eps": eps, "softcap": softcap}, sort_keys=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    durable.publish_file(path, lambda temporary: save_file(kept, temporary, {"logits": told}))


def norm_effect(norm: Callable[[Tensor], Tensor], d_model: int, like: Tensor) -> tuple[Tensor, Tensor, str]:
    """Gain and bias [d_model] of a norm and its kind, from what it does: models keep w or 1 + w.

    A vector of alternating ±1 has mean 0 and root mean square 1, so either kind passes it as it is.
    """
    signs = (1.0 - 2.0 * (torch.arange(d_model) % 2)).to(like)
    with torch.inference_mode():
        up, down, ones = (norm(x.expand(1, 1, -1))[0, 0].float().cpu() for x in (signs, -signs, torch.ones_like(signs)))
    signs = signs.float().cpu()
    gain, bias = signs * (up - down) / 2, (up + down) / 2
    kind = "layer" if torch.allclose(ones, bias, atol=1e-3 * float(gain.abs().max())) else "rms"
    return gain, bias, kind
