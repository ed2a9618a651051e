"""The unembedding and the final norm, kept beside a store so that stage 2 can list the tokens each latent promotes."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harvest.llm.model import Model
from shared.errors import UserError
from shared.files import durable


def publish_unembedding(model: Model, path: Path) -> None:
    """Write `unembedding.safetensors`; the model's logits are `softcap(W_U @ (norm(x) * gain + bias) + b_U)`.

    Tensors: `W_U` [vocabulary, d_model] in the model's type; `final_norm.gain` and `final_norm.bias` [d_model] and
    `b_U` [vocabulary] in float32. The metadata's `logits` is JSON (one entry: the library writes several
    in any order): `norm`, `rms` (x over its root mean square) or `layer` (after taking its mean away); `eps`, added to
    the mean square; `softcap`, c of `c * tanh(logits / c)`, or null. Raises `UserError` when they are not finite.
    """
    (weight, offset), config = model.unembedding, model.text_config
    gain, bias, kind = norm_effect(model.final_norm, weight.shape[1], weight.device)
    # Granite divides its logits and Cohere multiplies them: a factor of the norm's output does the same.
    scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    gain, bias, offset = gain * scale, bias * scale, offset.float() * scale
    tensors = {"W_U": weight, "final_norm.gain": gain, "final_norm.bias": bias, "b_U": offset}
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise UserError(
            "the model's unembedding or final norm has values that are not finite; its weights are damaged: take "
            "another copy of them, or use --set store.unembedding=false"
        )
    eps = norm_eps(model.final_norm, weight.shape[1], weight.device)
    softcap = getattr(config, "final_logit_softcapping", None)
    told = json.dumps({"norm": kind, "eps": eps, "softcap": softcap}, sort_keys=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    needed = sum(tensor.nbytes for tensor in kept.values())
    durable.publish_file(path, lambda temporary: save_file(kept, temporary, {"logits": told}), needed)


def norm_effect(norm: nn.Module, d_model: int, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Return the gain and bias [d_model], float32, of a norm and its kind, from what it does: models keep w or 1 + w.

    A vector of alternating signs has mean 0, so either kind passes it scaled to a root mean square of 1; it is large,
    so that eps is lost in it. A copy in float32 is asked: in bfloat16 the bias drowns in the rounding of the gain.
    """
    norm = copy.deepcopy(norm).float()
    signs = _signs(d_model, device)
    with torch.inference_mode():
        probes = 1024.0 * torch.stack([signs, -signs, torch.ones_like(signs)])
        up, down, ones = norm(probes[:, None]).squeeze(1).cpu()
    signs = signs.cpu()
    gain, bias = signs * (up - down) / 2, (up + down) / 2
    limit = 1e-3 * float(gain.abs().nan_to_num().max())
    kind = "layer" if torch.allclose(ones, bias, atol=limit) else "rms"
    return gain, bias, kind


def norm_eps(norm: nn.Module, d_model: int, device: torch.device) -> float:
    """Return what a norm adds to the mean square: as it says itself, or else from what it does to small vectors."""
    named = (getattr(norm, name, None) for name in ("eps", "variance_epsilon", "epsilon"))
    said = next((value for value in named if isinstance(value, float)), None)
    if said is not None:
        return said
    norm, signs, small = copy.deepcopy(norm).double(), _signs(d_model, device).double(), 1e-3
    with torch.inference_mode():
        probes = torch.stack([1e6 * signs, -1e6 * signs, small * signs, -small * signs])
        up, down, small_up, small_down = norm(probes[:, None]).squeeze(1).double()
    ratio = float((up - down).norm() / (small_up - small_down).norm())  # sqrt(small^2 + eps) / small
    return float(f"{small**2 * (ratio**2 - 1):.3g}")


def _signs(d_model: int, device: torch.device) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(d_model, device=device) % 2)
