"""Another trainer's dictionary of rows from stdin, in that trainer's own environment; its weights go to a file.

python peer_training.py SETTINGS      SETTINGS is a JSON object; run by tests.bench.same_answer; imports nothing of it

Rows come as float32, a batch after the other, shifted and scaled by the store's statistics; of pairs, a batch's sources
before its targets. Every trainer keeps its own defaults except for what a run of a few thousand steps makes senseless:
their warm-up is at most a twentieth of the steps, the rate of SAELens and dictionary_learning falls to 0 over the last
fifth (their tutorials' share), and a latent counts as dead after as many rows as in this project's run.
dictionary_learning gets rows of mean squared norm 1, as its `normalize_activations` makes them, and SAELens rows of
mean square 1 per dimension, which is what its `expected_average_only_in` makes.

sparsify trains a transcoder by its own `Trainer.fit`, on a model whose one module hands out the rows: with Signum as it
comes, and with Adam and an auxiliary loss of the weight that Gao et al. give it.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Batches = Iterator[list[Tensor]]
"""Of every step, rows [B, D]; or sources [B, D] and targets [B, O]."""


class Trained(NamedTuple):
    """A trained dictionary, and the same as one affine map either side of a rule for what is active."""

    pre_acts: Callable[[Tensor], Tensor]
    """Its own [B, F] from rows, negative ones maybe set to 0."""
    decode: Callable[[Tensor], Tensor]
    """Its own rows from latents [B, F]."""
    folded: dict[str, Tensor]
    """W_enc [D, F], b_enc [F], W_dec [F, O], b_dec [O]; where it has them, threshold [] and W_skip [D, O]"""


def schedule(steps: int, warmup: int) -> tuple[int, int]:
    """Steps of warm-up, and of decay at the end."""
    return min(warmup, steps // 20), steps // 5


def sae_lens(settings: dict[str, Any], batches: Batches) -> Trained:
    """SAELens' Matryoshka BatchTopK by its own trainer."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.training.sae_trainer import SAETrainer

    steps, rows, (d,), d_sae = (settings[name] for name in ("steps", "rows", "widths", "d_sae"))
    lr = settings["lr"]
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
    SAETrainer(cfg=config, sae=sae, data_provider=(rows for (rows,) in batches)).fit()
    norms = sae.W_dec.norm(dim=1)  # its latents are scaled by the decoder's norms before they are compared
    folded = {
        "W_enc": sae.W_enc * norms,
        "b_enc": (sae.b_enc - sae.b_dec @ sae.W_enc * sae.cfg.apply_b_dec_to_input) * norms,
        "W_dec": sae.W_dec / norms.unsqueeze(1),
        "b_dec": sae.b_dec,
        "threshold": sae.topk_threshold,
    }
    return Trained(lambda x: sae.encode_with_hidden_pre(x)[1], sae.decode, folded)


def dictionary_learning(settings: dict[str, Any], batches: Batches) -> Trained:
    """dictionary_learning's Matryoshka BatchTopK by its own trainer."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    steps, (d,), d_sae = (settings[name] for name in ("steps", "widths", "d_sae"))
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
        seed=settings["seed"],
    )
    trainer.dead_feature_threshold = settings["dead_after"]
    scale = d**-0.5
    for step, (batch,) in zip(range(steps), batches, strict=False):
        trainer.update(step, batch * scale)
    ae = trainer.ae
    folded = {
        "W_enc": ae.W_enc * scale,
        "b_enc": ae.b_enc - ae.b_dec @ ae.W_enc,
        "W_dec": ae.W_dec / scale,
        "b_dec": ae.b_dec / scale,
        "threshold": ae.threshold.clamp_min(0),
    }
    return Trained(lambda x: ae.encode(x * scale, return_active=True)[2], lambda z: ae.decode(z) / scale, folded)


def sparsify(settings: dict[str, Any], batches: Batches, **chosen: Any) -> Trained:
    """A TopK transcoder by sparsify's own trainer."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    steps, rows, widths, d_sae = (settings[name] for name in ("steps", "rows", "widths", "d_sae"))
    assert widths[0] == widths[1], "sparsify's targets are as wide as its sources"
    config = TrainConfig(
        SparseCoderConfig(num_latents=d_sae, k=settings["k"], transcode=True, skip_connection=settings["skip"]),
        batch_size=1,
        lr=settings["lr"],
        lr_warmup_steps=schedule(steps, 1000)[0],
        dead_feature_threshold=settings["dead_after"],
        hookpoints=["pairs"],
        init_seeds=[settings["seed"]],
        log_to_wandb=False,
        **chosen,
    )
    first = next(batches)  # once more, as the trainer looks at the width of one
    model = pairs_model(itertools.chain([first, first], batches))
    trainer = Trainer(config, NoTokens(steps, rows), model)
    trainer.save = lambda: None
    trainer.fit()
    if config.optimizer == "signum":  # its weights are averages, which `save` would have put in place
        trainer.optimizers[0].eval()
    coder = trainer.saes["pairs"]
    folded = {
        "W_enc": coder.encoder.weight.T,
        "b_enc": coder.encoder.bias,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    } | ({"W_skip": coder.W_skip.T} if settings["skip"] else {})
    return Trained(
        lambda x: coder.encode(x).pre_acts,
        lambda z: coder.decode(*z.topk(settings["k"], dim=1)),
        folded,
    )


class NoTokens:
    """A data set that says how many rows a step has: all of its tokens are 0."""

    def __init__(self, steps: int, rows: int) -> None:
        self._steps, self._ids = steps, torch.zeros(rows, dtype=torch.int64)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids}


def pairs_model(batches: Batches) -> Any:
    """A model for sparsify whose module `pairs` is called with the sources of a step and returns its targets."""

    class Pairs(torch.nn.Module):
        target: Tensor

        def forward(self, source: Tensor) -> Tensor:
            return self.target

    class Model(torch.nn.Module):
        device, dummy_inputs = torch.device("cpu"), {"ids": torch.zeros(1)}

        def __init__(self) -> None:
            super().__init__()
            self.pairs = Pairs()

        @property
        def base_model(self) -> torch.nn.Module:
            return self

        def forward(self, ids: Tensor) -> Tensor:
            source, self.pairs.target = (side.unsqueeze(0) for side in next(batches))
            return self.pairs(source)

    return Model()


def stand_in(settings: dict[str, Any], batches: Batches) -> Trained:
    """A plain BatchTopK autoencoder, which needs no other package: for showing that a bench runs."""
    (d,), d_sae, lr = settings["widths"], settings["d_sae"], settings["lr"]
    encoder, decoder = torch.nn.Linear(d, d_sae), torch.nn.Linear(d_sae, d)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=lr)
    least = torch.zeros(())
    for (x,) in batches:
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
    return Trained(encoder, decoder, folded)


TRAINERS: dict[str, Callable[[dict[str, Any], Batches], Trained]] = {
    "stand-in": stand_in,
    "SAELens Matryoshka BatchTopK": sae_lens,
    "dictionary_learning Matryoshka BatchTopK": dictionary_learning,
    "sparsify TopK, Signum": sparsify,
    "sparsify TopK, Adam": functools.partial(sparsify, optimizer="adam", auxk_alpha=1 / 32),
}


def read_batches(rows: int, widths: list[int]) -> Batches:
    """The batches on stdin, until they end."""
    sizes = [4 * rows * width for width in widths]
    while len(data := sys.stdin.buffer.read(sum(sizes))) == sum(sizes):
        ends = list(itertools.accumulate(sizes))
        parts = (data[end - size : end] for size, end in zip(sizes, ends, strict=True))
        yield [torch.from_numpy(np.frombuffer(part, np.float32).reshape(rows, -1).copy()) for part in parts]


def check(trained: Trained, x: Tensor, k: int) -> None:
    """Raise unless the folded weights give what the trainer's own module gives."""
    part = trained.folded
    own, folded = trained.pre_acts(x).relu(), (x @ part["W_enc"] + part["b_enc"]).relu()
    assert torch.allclose(own, folded, atol=1e-4, rtol=1e-4), float((own - folded).abs().max())
    least = part["threshold"] if "threshold" in part else own.topk(k + 1, dim=1).values[:, -1:]
    own = own * (own > least)
    out, expected = own @ part["W_dec"] + part["b_dec"], trained.decode(own)
    assert torch.allclose(out, expected, atol=1e-4, rtol=1e-4), float((out - expected).abs().max())


def main() -> None:
    """Train, check and export."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    batches = read_batches(settings["rows"], settings["widths"])
    kept = next(batches)
    began: list[float] = []

    def asked_for() -> Batches:
        began.append(time.process_time())  # imports are over
        yield from itertools.chain([kept], batches)

    trained = TRAINERS[settings["trainer"]](settings, asked_for())
    seconds = time.process_time() - began[0]
    out = Path(settings["out"])
    with torch.no_grad():
        if all(value.isfinite().all() for value in trained.folded.values()):
            check(trained, kept[0], settings["k"])
        arrays = {name: value.detach().double().numpy() for name, value in trained.folded.items()}
    partial = out.with_name(f"partial-{out.name}")
    np.savez(partial, allow_pickle=False, **arrays, seconds=np.array(seconds))
    partial.replace(out)


if __name__ == "__main__":
    main()
