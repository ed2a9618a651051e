"""One trainer's optimiser step, in that trainer's own environment: a step for every line read, its time printed.

python peer_worker.py NAME D D_SAE K B [DEVICE]

Run by tests.bench.peers and tests.bench.gpu; imports nothing of this project but for `ours`. On CPU a step's time is
that of the processor, on CUDA that of the clock.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


def prefixes(d_sae: int) -> list[int]:
    """Rising sizes: n/16, n/8, n/4, n/2, n."""
    return [d_sae // n for n in (16, 8, 4, 2, 1)]


def batches(d: int, rows: int) -> Iterator[torch.Tensor]:
    """Sixteen batches, over and over."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    return itertools.cycle([torch.randn(rows, d, generator=generator) for _ in range(16)])


def sae_lens_matryoshka(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """SAELens' Matryoshka BatchTopK, a quarter of whose latents are dead."""
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=d, d_sae=d_sae, k=k, matryoshka_widths=prefixes(d_sae))
    return _sae_lens(MatryoshkaBatchTopKTrainingSAE(config), d, d_sae, rows)


def sae_lens_topk(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """SAELens' TopK: no prefixes."""
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    return _sae_lens(TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=d_sae, k=k)), d, d_sae, rows)


def _sae_lens(sae: Any, d: int, d_sae: int, rows: int) -> Callable[[], None]:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    data = batches(d, rows)
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=10**9,
        device=str(torch.get_default_device()),
        autocast=False,
        lr=3e-4,
        lr_end=3e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=rows,
        dead_feature_window=10**6,
        feature_sampling_window=10**6,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=data)

    def step() -> None:
        trainer.n_forward_passes_since_fired[::4] = 10**7
        trainer._train_step(sae=sae, sae_in=next(data))
        trainer.n_training_steps += 1

    return step


def dictionary_learning(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """dictionary_learning's Matryoshka BatchTopK."""
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer

    sizes = prefixes(d_sae)
    parts = [sizes[0], *(b - a for a, b in itertools.pairwise(sizes))]
    trainer = MatryoshkaBatchTopKTrainer(
        steps=10**6,
        activation_dim=d,
        dict_size=d_sae,
        k=k,
        layer=0,
        lm_name="none",
        group_fractions=[part / d_sae for part in parts],
        lr=3e-4,
        warmup_steps=0,
        device=str(torch.get_default_device()),
        seed=0,
    )
    data, numbers = batches(d, rows), itertools.count(1)

    def step() -> None:
        trainer.num_tokens_since_fired[::4] = 10**9
        trainer.update(next(numbers), next(data))

    return step


def sparsify(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """sparsify's TopK transcoder with Adam: per-row TopK, no prefixes, decoder rows not normalised."""
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(
        d, SparseCoderConfig(num_latents=d_sae, k=k, transcode=True), device=str(torch.get_default_device())
    )
    optimizer, data = torch.optim.Adam(coder.parameters(), lr=3e-4), batches(d, rows)
    dead = torch.zeros(d_sae, dtype=torch.bool)
    dead[::4] = True

    def step() -> None:
        x = next(data)
        out = coder(x, x.roll(1, 1), dead_mask=dead)
        (out.fvu + out.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """This project's step, rows' counters and figures included."""
    import numba

    from tests.bench.step import AUXK, figures_of
    from train.model.activations import BatchTopK
    from train.model.blas import faster_here
    from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
    from train.run.optimizer import Optimizer, OptimizerConfig

    numba.set_num_threads(torch.get_num_threads())
    activation = BatchTopK(k=k)
    config = TranscoderConfig(d_sae=d_sae).resolve(d, activation)
    model = Transcoder(d, d, config, activation, Normalisation(torch.zeros(d), 1.0, torch.zeros(d), 1.0))
    model.initialise(0)
    model.blas, model.kernels = faster_here(), "compiled"
    optimizer, data = Optimizer(model, OptimizerConfig(lr=3e-4), lambda _: 10**6), batches(d, rows)
    counters, window = figures_of(model)
    dead, numbers = torch.arange(d_sae) % 4 == 0, itertools.count()

    def step() -> None:
        x, number = next(data), next(numbers)
        output = model.step(x, x.roll(1, 1), dead, AUXK, number)
        _, norm = optimizer.step(output.losses, number)
        counters.update(output)
        window.add(output, norm)

    return step


def stand_in(d: int, d_sae: int, k: int, rows: int) -> Callable[[], None]:
    """A plain TopK autoencoder, which needs no other package: for showing that a bench runs."""
    encoder, decoder = torch.nn.Linear(d, d_sae), torch.nn.Linear(d_sae, d)
    optimizer, data = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=3e-4), batches(d, rows)

    def step() -> None:
        x = next(data)
        values, latents = encoder(x).topk(k)
        (decoder(torch.zeros(rows, d_sae).scatter(1, latents, values)) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_mib() -> float:
    """This program's peak memory: not that of the process that started it, as `getrusage` may say."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


STAND_IN = "stand-in"
STEPS = {
    "ours": ours,
    STAND_IN: stand_in,
    "SAELens Matryoshka BatchTopK": sae_lens_matryoshka,
    "SAELens TopK": sae_lens_topk,
    "dictionary_learning Matryoshka BatchTopK": dictionary_learning,
    "sparsify TopK transcoder": sparsify,
}


def main() -> None:
    """Answer every line on stdin with the seconds of a step and the peak memory of process or device in MiB."""
    name, *sizes = sys.argv[1:6]
    on_cpu = sys.argv[6:] in ([], ["cpu"])
    if on_cpu:
        torch.set_num_threads(1)
    else:
        torch.set_default_device(sys.argv[6])
    clock = time.process_time if on_cpu else time.perf_counter
    if name == "ours":
        from shared.console.process import keep_freed_memory

        keep_freed_memory()
    step = STEPS[name](*map(int, sizes))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = clock()
        step()
        if not on_cpu:
            torch.cuda.synchronize()
        seconds = clock() - began
        print(seconds, peak_mib() if on_cpu else torch.cuda.max_memory_allocated() / 2**20, flush=True)


if __name__ == "__main__":
    main()
