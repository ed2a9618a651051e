"""circuit-tracer's set of transcoders, one for every layer of a model (checked with 0.5.0).

`layer_N.safetensors` and `config.yaml`, which is written last. It is opened by its absolute path:
`ReplacementModel.from_pretrained(model, "/absolute/path")`. `W_enc` is [F, D] and `W_skip` [O, D]; the gate is h where
h > threshold. circuit-tracer walks all layers. A layer without a transcoder gets one that is never active: all of its
MLP is then an error node of the graph.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from shared.errors import UserError
from shared.files import durable
from train.interchange.foreign_tensors import ForeignTensors
from train.interchange.origin import Origin
from train.interchange.plain_transcoder import PlainTranscoder
from train.model.checkpoint import save_tensors

CONFIG, THRESHOLD = "config.yaml", "activation_function.threshold"


def write(plain: Sequence[PlainTranscoder], origins: Sequence[Origin], layers: int | None, folder: Path) -> None:
    """Write a set for a model of so many `layers` into `folder`. Raises `UserError` when it cannot be one set."""
    layers = _checked(plain, origins, layers)
    of_layers = {origin.layer: one for one, origin in zip(plain, origins, strict=True)}
    first_silent: Path | None = None
    for layer in range(layers):
        path = folder / file_of(layer)
        if layer in of_layers:
            _save(of_layers[layer], path)
        elif first_silent:
            path.hardlink_to(first_silent)
        else:
            _save(plain[0].silent(), path)
            first_silent = path
    durable.publish_bytes(folder / CONFIG, _config(origins[0]).encode())


def read_layer(tensors: ForeignTensors) -> PlainTranscoder:
    """Take one layer's transcoder out of its file. Raises `UserError` and `CorruptData`."""
    (d_sae, d_in), d_out = tensors.matrix("W_enc"), tensors.matrix("W_dec")[1]
    plain = PlainTranscoder(
        W_enc=tensors.take("W_enc", d_sae, d_in).T,
        b_enc=tensors.take("b_enc", d_sae),
        W_dec=tensors.take("W_dec", d_sae, d_out),
        b_dec=tensors.take("b_dec", d_out),
        threshold=tensors.per_latent(THRESHOLD, d_sae) if THRESHOLD in tensors else torch.zeros(d_sae),
        W_skip=tensors.take("W_skip", d_out, d_in).T if "W_skip" in tensors else None,
    )
    if plain.threshold.min() < 0:
        raise UserError(f"{tensors.path}: a threshold is below 0, where circuit-tracer lets negative latents through")
    return plain


def file_of(layer: int) -> str:
    """Return the name of a layer's file."""
    return f"layer_{layer}.safetensors"


def _save(plain: PlainTranscoder, path: Path) -> None:
    tensors = {
        "W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec,
        THRESHOLD: plain.threshold,
    }  # fmt: skip
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip.T
    save_tensors(path, tensors)


def _checked(plain: Sequence[PlainTranscoder], origins: Sequence[Origin], layers: int | None) -> int:
    """Return the number of layers. Raises `UserError` when these transcoders cannot be one set."""
    first, given = origins[0], [origin.layer for origin in origins]
    if not first.is_transcoder:
        raise UserError("circuit-tracer replaces MLPs, and this run is an autoencoder of the targets; use saelens")
    if layers is None or layers <= max(given):
        raise UserError(
            f"a set has a transcoder for every layer of the model: pass how many it has, --layers N, above {max(given)}"
        )
    if len(set(given)) < len(given):
        raise UserError(f"a set has one transcoder for each layer, and these runs are of the layers {given}")
    agreed = _agreed(plain[0], first)
    for one, origin in zip(plain, origins, strict=True):
        for what, mine in _agreed(one, origin).items():
            if mine != agreed[what]:
                theirs = agreed[what]
                raise UserError(
                    f"the runs of one set agree in {what}: {first.run} has {theirs}, {origin.run} has {mine}"
                )
    if len(plain[0].W_enc) != len(plain[0].b_dec):
        widths = f"reads {len(plain[0].W_enc)} and gives {len(plain[0].b_dec)}"
        raise UserError(f"circuit-tracer's transcoders have one width; {first.run} {widths}")
    return layers


def _agreed(plain: PlainTranscoder, origin: Origin) -> dict[str, object]:
    """Return what all transcoders of a set have in common."""
    return {
        "their model": origin.weights,
        "their hooks": origin.hooks,
        "their widths": (len(plain.W_enc), len(plain.b_dec)),
        "d_sae": plain.d_sae,
        "having a skip connection": plain.W_skip is not None,
    }


def _config(origin: Origin) -> str:
    """Return config.yaml; hooks are relative to their block, `blocks.N`."""
    values = {
        "model_kind": "transcoder_set",
        "model_name": origin.model,
        "feature_input_hook": origin.hooks[0],
        "feature_output_hook": origin.hooks[1],
        "scan": origin.run,
    }
    return "".join(f"{key}: {durable.json_bytes(value).decode().strip()}\n" for key, value in values.items())
