"""Saves a dictionary as its own library does, in that library's environment; its weights come from a file.

python peer_saving.py TRAINER WEIGHTS FOLDER K      WEIGHTS is an .npz; run by tests.bench.parity; imports nothing of it
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def sae_lens(w: dict[str, Tensor], folder: Path, k: int) -> None:
    """As a JumpReLU, which is how SAELens saves a BatchTopK."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    d_in, d_sae = w["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=False))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(sae, name).data = w[name].contiguous()
    sae.threshold.data = w["threshold"].expand(d_sae).clone()
    sae.save_model(folder)


def dictionary_learning(w: dict[str, Tensor], folder: Path, k: int) -> None:
    """The module's tensors, as safetensors in place of its pickle."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE

    d_in, d_sae = w["W_enc"].shape
    _save_linear(BatchTopKSAE(d_in, d_sae, k), w, folder)


def sparsify(w: dict[str, Tensor], folder: Path, k: int) -> None:
    """A transcoder, with a linear map beside the latents where there is one."""
    from sparsify import SparseCoder, SparseCoderConfig

    d_in, d_sae = w["W_enc"].shape
    skip = "W_skip" in w
    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=k, transcode=True, skip_connection=skip), "cpu")
    coder.encoder.weight.data, coder.encoder.bias.data = w["W_enc"].T.contiguous(), w["b_enc"]
    coder.W_dec.data, coder.b_dec.data = w["W_dec"].contiguous(), w["b_dec"]
    if skip:
        coder.W_skip.data = w["W_skip"].T.contiguous()
    coder.save_to_disk(folder)


def stand_in(w: dict[str, Tensor], folder: Path, k: int) -> None:
    """As dictionary_learning has it, which is not installed: for showing that a bench runs."""
    d_in, d_sae = w["W_enc"].shape

    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in, bias=False)
            self.b_dec, self.threshold = nn.Parameter(torch.zeros(d_in)), nn.Buffer(torch.zeros(()))

    _save_linear(Dictionary(), w, folder)


def _save_linear(module: nn.Module, w: dict[str, Tensor], folder: Path) -> None:
    """Its encoder reads rows less `b_dec`."""
    b_enc = w["b_enc"] + w["b_dec"] @ w["W_enc"]
    given = {"encoder.weight": w["W_enc"].T, "encoder.bias": b_enc, "decoder.weight": w["W_dec"].T}
    state = module.state_dict() | given | {"b_dec": w["b_dec"], "threshold": w["threshold"]}
    module.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
    save_file(kept, folder / "ae.safetensors")


SAVERS = {
    "SAELens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "stand-in": stand_in,
}


def main() -> None:
    """Save one."""
    trainer, weights, folder, k = sys.argv[1:]
    w = {name: torch.from_numpy(array).float() for name, array in np.load(weights).items()}
    SAVERS[trainer.split()[0]](w, Path(folder), int(k))


if __name__ == "__main__":
    main()
