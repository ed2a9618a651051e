"""Read transcoders that other libraries wrote: what a path holds is seen by its files and the names of its tensors.

| what | files |
|---|---|
| SAELens | `cfg.json`, `sae_weights.safetensors` |
| sparsify | `cfg.json`, `sae.safetensors` |
| circuit-tracer, one layer | safetensors with `W_enc` [F, D] |
| Gemma Scope | `params.npz` with `W_enc` [D, F] |
| Gemma Scope 2 | safetensors with `w_enc` [D, F], `w_dec` [F, O] |
| dictionary_learning | safetensors with `encoder.weight` [F, D], `decoder.weight` [O, F] |

dictionary_learning saves `ae.pt`, a pickle, which is not read here: a pickle can run any code.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from shared.errors import UserError
from train.interchange import circuit_tracer, saelens, sparsify
from train.interchange.foreign_tensors import ForeignTensors
from train.interchange.plain_transcoder import PlainTranscoder


class Found(NamedTuple):
    """A transcoder of another library."""

    library: str
    transcoder: PlainTranscoder


def read_transcoder(path: Path | str) -> Found:
    """Read what is at `path`, a file or a folder.

    Raises `UserError` when it is nothing that is known, or another function than a transcoder here can be, and
    `CorruptData` when a file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise UserError(
            f"{path} is a pickle, which can run any code, and is not read; save its tensors with "
            "safetensors.torch.save_file(state_dict, PATH) if you trust it, and pass that file"
        )
    tensors = ForeignTensors(path)
    for library, name, read in _BY_TENSOR:
        if name in tensors and (path.suffix == ".npz") == (library == "Gemma Scope"):
            return Found(library, read(tensors))
    raise UserError(f"{path} is not a transcoder of a known format: it has no tensor W_enc, w_enc or encoder.weight")


def _read_folder(path: Path) -> Found:
    if (path / saelens.WEIGHTS).is_file():
        return Found("SAELens", saelens.read(path))
    if (path / sparsify.WEIGHTS).is_file():
        return Found("sparsify", sparsify.read(path))
    files = sorted(file.name for file in path.iterdir())
    raise UserError(
        f"{path} is not a folder of SAELens ({saelens.WEIGHTS}) or sparsify ({sparsify.WEIGHTS}); "
        f"it holds {', '.join(files[:8]) or 'nothing'}; of a circuit-tracer set, pass one layer's file"
    )


def _gemma_scope(tensors: ForeignTensors, W_enc: str = "W_enc", W_dec: str = "W_dec") -> PlainTranscoder:
    """Read a transcoder of either Gemma Scope; they name two tensors differently, and the second may have a skip."""
    (d_in, d_sae), d_out = tensors.matrix(W_enc), tensors.matrix(W_dec)[1]
    skip = "affine_skip_connection"
    return PlainTranscoder(
        W_enc=tensors.take(W_enc, d_in, d_sae),
        b_enc=tensors.take("b_enc", d_sae),
        W_dec=tensors.take(W_dec, d_sae, d_out),
        b_dec=tensors.take("b_dec", d_out),
        threshold=tensors.per_latent("threshold", d_sae).clamp_min(0),
        W_skip=tensors.take(skip, d_in, d_out) if skip in tensors else None,
    )


def _dictionary_learning(tensors: ForeignTensors) -> PlainTranscoder:
    """Read an autoencoder. One whose threshold was never set has -1 there, and is a ReLU."""
    d_sae, d_in = tensors.matrix("encoder.weight")
    threshold = tensors.per_latent("threshold", d_sae) if "threshold" in tensors else torch.zeros(d_sae)
    plain = PlainTranscoder(
        W_enc=tensors.take("encoder.weight", d_sae, d_in).T,
        b_enc=tensors.take("encoder.bias", d_sae),
        W_dec=tensors.take("decoder.weight", d_in, d_sae).T,
        b_dec=tensors.take("b_dec", d_in),
        threshold=threshold.clamp_min(0),
    )
    return plain.reading_less_b_dec()


_BY_TENSOR = (
    ("Gemma Scope", "W_enc", _gemma_scope),
    ("circuit-tracer", "W_enc", circuit_tracer.read_layer),
    ("Gemma Scope 2", "w_enc", partial(_gemma_scope, W_enc="w_enc", W_dec="w_dec")),
    ("dictionary_learning", "encoder.weight", _dictionary_learning),
)
"""Libraries by a tensor that only their files have; an .npz is Gemma Scope's."""
