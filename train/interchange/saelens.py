"""SAELens's folder, for `SAE.load_from_disk` and `SAE.from_pretrained` (checked with 6.54.12).

`cfg.json` and `sae_weights.safetensors`. Its `W_skip` is [O, D], and its gate is ReLU(h) where h > threshold.
"""

from pathlib import Path

from shared.files import durable
from train.interchange.origin import Origin
from train.interchange.plain_transcoder import PlainTranscoder
from train.model.checkpoint import load_state, save_tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
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
    """Read a folder of `write`. Raises `CorruptData`."""
    found = load_state(folder / WEIGHTS)
    return PlainTranscoder(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        threshold=found["threshold"],
        W_skip=found["W_skip"].T if "W_skip" in found else None,
    )


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
