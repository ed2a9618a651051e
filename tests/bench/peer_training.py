"""Another trainer's autoencoder on rows from stdin, in that trainer's own environment; its weights go to a file.

python peer_training.py SETTINGS      SETTINGS is a JSON object; run by tests.bench.same_answer; imports nothing of it

Rows come as float32, a batch after the other, shifted and scaled by the store's statistics. Every trainer keeps its own
defaults except for what a run of a few thousand steps makes senseless: their warm-up is at most a twentieth of the
steps, the rate falls to 0 over the last fifth (their tutorials' share), and a latent counts as dead after as many rows
as in this project's run. dictionary_learning gets rows of mean squared norm 1, as its `normalize_activations` makes
them, and SAELens rows of mean square 1 per dimension, which is what its `expected_average_only_in` makes.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Trained(NamedTuple):
    """A trained autoencoder, and the same as one affine map either side of a threshold."""

    pre_acts: Callable[[Tensor], Tensor]
    """Its own [B, F] from rows, negative ones maybe set to 0."""
    decode: Callable[[Tensor], Tensor]
    """Its own rows from latents [B, F]."""
    folded: dict[str, Tensor]
    """W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], threshold []"""
    lr: float


def schedule(steps: int, warmup: int) -> tuple[int, int]:
    """Steps of warm-up, and of decay at the end."""
    return min(warmup, steps // 20), steps // 5


def sae_lens(settings: dict[str, Any], batches: Iterator[Tensor]) -> Trained:
    """SAELens' Matryoshka BatchTopK by its own trainer."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    steps, rows, d, d_sae = (settings[name] for name in ("steps", "rows", "d", "d_sae"))
    lr = settings["lr"] or 3e-4  # the default of its runner
    warmup, decay = schedule(steps, 1000)
    sae = MatryoshkaBatchTopKTrainingSAE(
        MatryoshkaBatchTopKTrainingSAEConfig(
            d_in=d, d_sae=d_sae, k=settings["k"], matryoshka_widths=settings["prefixes"]
        )
    )
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=steps * rows,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=warmup,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=decay,
        n_restart_cycles=1,
        train_batch_size_samples=rows,
        dead_feature_window=max(1, settings["dead_after"] // rows),
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=config, sae=sae, data_provider=batches).fit()
    norms = sae.W_dec.norm(dim=1)  # its latents are scaled by the decoder's norms before they are compared
    folded = {
        "W_enc": sae.W_enc * norms,
        "b_enc": (sae.b_enc - sae.b_dec @ sae.W_enc * sae.cfg.apply_b_dec_to_input) * norms,
        "W_dec": sae.W_dec / norms.unsqueeze(1),
        "b_dec": sae.b_dec,
        "threshold": sae.topk_threshold,
    }
    return Trained(lambda x: sae.encode_with_hidden_pre(x)[1], sae.decode, folded, lr)


def dictionary_learning(settings: dict[str, Any], batches: Iterator[Tensor]) -> Trained:
    """dictionary_learning's Matryoshka BatchTopK by its own trainer."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    steps, d, d_sae = (settings[name] for name in ("steps", "d", "d_sae"))
    warmup, decay = schedule(steps, 1000)
    parts = [b - a for a, b in itertools.pairwise([0, *settings["prefixes"]])]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=steps,
        activation_dim=d,
        dict_size=d_sae,
        k=settings["k"],
        layer=0,
        lm_name="none",
        group_fractions=[part / d_sae for part in parts],
        lr=settings["lr"],
        warmup_steps=warmup,
        decay_start=steps - decay,
        threshold_start_step=min(1000, steps // 2),
        device="cpu",
        seed=0,
    )
    trainer.dead_feature_threshold = settings["dead_after"]
    scale = d**-0.5
    for step, batch in zip(range(steps), batches, strict=False):
        trainer.update(step, batch * scale)
    ae = trainer.ae
    folded = {
        "W_enc": ae.W_enc * scale,
        "b_enc": ae.b_enc - ae.b_dec @ ae.W_enc,
        "W_dec": ae.W_dec / scale,
        "b_dec": ae.b_dec / scale,
        "threshold": ae.threshold.clamp_min(0),
    }
    return Trained(
        lambda x: ae.encode(x * scale, return_active=True)[2], lambda z: ae.decode(z) / scale, folded, trainer.lr
    )


def stand_in(settings: dict[str, Any], batches: Iterator[Tensor]) -> Trained:
    """A plain BatchTopK autoencoder, which needs no other package: for showing that a bench runs."""
    d, d_sae, lr = settings["d"], settings["d_sae"], settings["lr"] or 1e-3
    encoder, decoder = torch.nn.Linear(d, d_sae), torch.nn.Linear(d_sae, d)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
    least = torch.zeros(())
    for x in batches:
        pre_acts = encoder(x)
        least = pre_acts.detach().flatten().topk(settings["k"] * len(x)).values[-1].clamp_min(0)
        (decoder(pre_acts * (pre_acts > least)) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    folded = {
        "W_enc": encoder.weight.T,
        "b_enc": encoder.bias,
        "W_dec": decoder.weight.T,
        "b_dec": decoder.bias,
        "threshold": least,
    }
    return Trained(encoder, decoder, folded, lr)


TRAINERS = {
    "stand-in": stand_in,
    "SAELens Matryoshka BatchTopK": sae_lens,
    "dictionary_learning Matryoshka BatchTopK": dictionary_learning,
}


def read_batches(rows: int, d: int) -> Iterator[Tensor]:
    """The batches on stdin, until they end."""
    while len(data := sys.stdin.buffer.read(4 * rows * d)) == 4 * rows * d:
        yield torch.from_numpy(np.frombuffer(data, np.float32).reshape(rows, d).copy())


def check(trained: Trained, x: Tensor) -> None:
    """Raise unless the folded weights give what the trainer's own module gives."""
    part, threshold = trained.folded, float(trained.folded["threshold"])
    own, folded = trained.pre_acts(x).relu(), (x @ part["W_enc"] + part["b_enc"]).relu()
    assert torch.allclose(own, folded, atol=1e-4, rtol=1e-4), float((own - folded).abs().max())
    own = own * (own > threshold)
    out, expected = own @ part["W_dec"] + part["b_dec"], trained.decode(own)
    assert torch.allclose(out, expected, atol=1e-4, rtol=1e-4), float((out - expected).abs().max())


def main() -> None:
    """Train, check and export."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    batches = read_batches(settings["rows"], settings["d"])
    kept = next(batches)
    began = time.process_time()
    trained = TRAINERS[settings["trainer"]](settings, itertools.chain([kept], batches))
    seconds = time.process_time() - began
    with torch.no_grad():
        check(trained, kept)
        arrays = {name: value.detach().double().numpy() for name, value in trained.folded.items()}
    arrays |= {"lr": np.array(trained.lr), "seconds": np.array(seconds)}
    np.savez(settings["out"], allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
