"""sparsify's folder, for `SparseCoder.load_from_disk` (checked with 1.3.3).

`cfg.json` and `sae.safetensors`. Its latents have no thresholds: the k largest of every row are active, so an export is
another function than the run's. Its `W_skip` is [O, D].

sparsify and delphi feed the input of the module that the folder is named after. A transcoder of the residual stream
before the MLP reads the input of the norm before the MLP.
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

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def write(plain: PlainTranscoder, folder: Path, origin: Origin) -> None:
    """Write both files into `folder`. Raises `UserError` when the format has no place for such a transcoder."""
    if not origin.is_transcoder:
        raise UserError("sparsify's autoencoders subtract b_dec from their input, and this one does not; use saelens")
    d_in, d_out = len(plain.W_enc), len(plain.b_dec)
    if d_in != d_out:
        raise UserError(f"sparsify's transcoders have one width, and this one reads {d_in} and gives {d_out}")
    if origin.k is None:
        raise UserError("sparsify's transcoders have a fixed k, and this run's activation has none; use saelens")
    tensors = {
        "encoder.weight": plain.W_enc.T, "encoder.bias": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec,
    }  # fmt: skip
    if plain.W_skip is not None:
        tensors["W_skip"] = plain.W_skip.T
    save_tensors(folder / WEIGHTS, tensors)
    config = {
        "d_in": d_in,
        "num_latents": plain.d_sae,
        "expansion_factor": max(1, plain.d_sae // d_in),
        "k": min(origin.k, plain.d_sae),
        "transcode": True,
        "skip_connection": plain.W_skip is not None,
        "activation": "topk",
        "normalize_decoder": False,
        "multi_topk": False,
    }
    durable.publish_json(folder / CONFIG, config)


def read(folder: Path) -> PlainTranscoder:
    """Read a folder of sparsify. Raises `UserError` on an activation that is another function, and `CorruptData`."""
    config = read_record(_Config, durable.read_json(folder / CONFIG), folder / CONFIG)
    if config.activation != "topk":
        raise UserError(f"{folder}: activation {config.activation!r} is not read; topk is")
    tensors, d_in = ForeignTensors(folder / WEIGHTS), config.d_in
    d_sae = config.num_latents or d_in * config.expansion_factor
    plain = PlainTranscoder(
        W_enc=tensors.take("encoder.weight", d_sae, d_in).T,
        b_enc=tensors.take("encoder.bias", d_sae),
        W_dec=tensors.take("W_dec", d_sae, d_in),
        b_dec=tensors.take("b_dec", d_in),
        threshold=torch.zeros(d_sae),
        W_skip=tensors.take("W_skip", d_in, d_in).T if config.skip_connection else None,
        k=config.k,
    )
    return plain if config.transcode else plain.reading_less_b_dec()


class _Config(Config):
    """What is read of `cfg.json`, with sparsify's own defaults."""

    model_config = ConfigDict(extra="ignore")
    d_in: Width
    num_latents: int = Field(0, ge=0)
    expansion_factor: int = Field(32, ge=1)
    k: int = Field(32, ge=1)
    transcode: bool = False
    skip_connection: bool = False
    activation: str = "topk"
