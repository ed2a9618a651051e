"""What another library makes of an export: `python reader.py LIBRARY FOLDER LAYER ROWS OUT`, in its environment.

Imports nothing of this project. ROWS is an .npz with `source` [B, D]; OUT gets `latents` [B, F] and `target` [B, O].
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def saelens(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """`SAE.load_from_disk`, with the skip connection where there is one."""
    from sae_lens import SAE

    sae = SAE.load_from_disk(str(folder), device="cpu")
    assert sae.cfg.metadata.hook_name, "the metadata are lost"
    return sae.encode(x), sae(x)


def sparsify(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """`SparseCoder.load_from_disk`."""
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    found = coder(x)
    latents = torch.zeros(len(x), coder.num_latents).scatter_(1, found.latent_indices, found.latent_acts)
    return latents, found.sparse_out if hasattr(found, "sparse_out") else found.sae_out


def circuit_tracer(folder: Path, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """`load_transcoder_from_hub` by the set's absolute path."""
    from circuit_tracer.utils.hf_utils import load_transcoder_from_hub

    found, config = load_transcoder_from_hub(str(folder.resolve()), dtype=torch.float32)
    assert config["feature_input_hook"], config
    transcoder = found.transcoders[layer]
    latents = transcoder.encode(x)
    return latents, transcoder.decode(latents, x)


def main() -> None:
    """Run a library on some rows."""
    library, folder, layer, rows, out = sys.argv[1:]
    with torch.no_grad():
        latents, target = globals()[library](Path(folder), int(layer), torch.from_numpy(np.load(rows)["source"]))
    np.savez(out, latents=latents.numpy(), target=target.numpy())


if __name__ == "__main__":
    main()
