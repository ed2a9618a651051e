"""SAELens's folder, for `SAE.load_from_disk` and `SAE.from_pretrained` (checked with 6.54.12).

`cfg.json` and `sae_weights.safetensors`. Its `W_skip` is [O, D], and its gate is ReLU(h) where h > threshold.
"""

from pathlib import Path

import torch
from pydantic import ConfigDict, Field

from shared.bounds import Width
from shared.config import Config, read_record
from shared.errors import UserError
from shared.files import durable
from train.interchange.foreign_tensors import ForeignTensors
from train.interchange.origin import Origin
from train.interchange.plain_transcoder import PlainTranscoder
from train.model.checkpoint import save_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_ARCHITECTURES = (
    "transcoder", "jumprelu_transcoder", "skip_transcoder", "jumprelu_skip_transcoder", "standard", "jumprelu", "topk",
)  # fmt: skip
VERSION = "6.54.12"
"""Without a version from 6 on, its loader drops the metadata."""


def write(plain: PlainTranscoder, folder: Path, origin: Origin) -> None:
    """Write both files into `folder`."""
    tensors = {
        "W_enc": plain.W_enc, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec,
        "threshold": plain.threshold,
    }  # fmt: skip
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip.T
    save_tensors(folder / WEIGHTS, tensors)
    durable.publish_json(folder / CONFIG, _config(plain, origin))


def read(folder: Path) -> PlainTranscoder:
    """Read a folder of SAELens 6. Raises `UserError` on an architecture that is another function, and `CorruptData`."""
    config = read_record(_Config, durable.read_json(folder / CONFIG), folder / CONFIG)
    kind = config.architecture
    if kind not in _ARCHITECTURES:
        raise UserError(f"{folder}: architecture {kind!r} is not read; these are: {', '.join(_ARCHITECTURES)}")
    if (config.normalize_activations, config.reshape_activations) != ("none", "none"):
        raise UserError(
            f"{folder}: rows are normalised or reshaped at run time; fold that into the weights in SAELens first"
        )
    tensors, skip = ForeignTensors(folder / WEIGHTS), "skip" in kind
    d_in, d_sae, d_out = config.d_in, config.d_sae, config.d_out or config.d_in
    plain = PlainTranscoder(
        W_enc=tensors.take("W_enc", d_in, d_sae),
        b_enc=tensors.take("b_enc", d_sae),
        W_dec=tensors.take("W_dec", d_sae, d_out),
        b_dec=tensors.take("b_dec", d_out),
        threshold=(tensors.take("threshold", d_sae) if "jumprelu" in kind else torch.zeros(d_sae)).clamp_min(0),
        W_skip=tensors.take("W_skip", d_out, d_in).T if skip else None,
        k=config.k if kind == "topk" else None,
    )
    if config.rescale_acts_by_decoder_norm:
        plain = plain.with_unit_decoder()
    return plain.reading_less_b_dec() if config.apply_b_dec_to_input and "transcoder" not in kind else plain


class _Config(Config):
    """What is read of `cfg.json`."""

    model_config = ConfigDict(extra="ignore")
    architecture: str
    d_in: Width
    d_sae: Width
    d_out: Width | None = None
    k: int | None = Field(None, ge=1)
    apply_b_dec_to_input: bool = True
    """SAELens's own default."""
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    rescale_acts_by_decoder_norm: bool = False


def _config(plain: PlainTranscoder, origin: Origin) -> dict[str, object]:
    metadata = {
        "sae_lens_version": VERSION,
        "model_name": origin.model.rsplit("/", 1)[-1],
        "hook_name": origin.source_hook,
        "prepend_bos": origin.bos,
        "context_size": origin.context_size,
        "dataset_path": origin.text,
        "trained_by": f"transcoder-cache, {origin.run}",
        "k": origin.k,
        "prefixes": [prefix for prefix in origin.prefixes if prefix <= plain.d_sae],
    }
    config: dict[str, object] = {
        "architecture": _architecture(plain, origin),
        "d_in": len(plain.W_enc),
        "d_sae": plain.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    if origin.is_transcoder:
        config["d_out"] = len(plain.b_dec)
        metadata["hook_name_out"] = origin.target_hook
    return config


def _architecture(plain: PlainTranscoder, origin: Origin) -> str:
    if not origin.is_transcoder:
        return "jumprelu"
    return "jumprelu_transcoder" if plain.W_skip is None else "jumprelu_skip_transcoder"
