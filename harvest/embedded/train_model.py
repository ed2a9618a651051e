"""Train the embedded model: ``python -m harvest.embedded.train_model``, about an hour on one core.

At the end it writes ``model/`` (a Hugging Face folder in bfloat16) and ``training.json`` (curve and final figures).
The result is the same for the same Python, library versions, seed and number of threads.

With glibc, ``MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000`` in the environment saves a tenth of
the time: large buffers are then used again instead of being returned to the system and cleared at every step.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import Gemma2ForCausalLM

from harvest.embedded.architecture import initial_model, rounded, write_model
from harvest.embedded.corpus import Corpus, corpus_digest, is_held_out, read_corpus
from harvest.embedded.data import SCORED, Data, evaluation_windows, prepare_data, training_batches
from harvest.embedded.evaluation import bigram_loss, check_forward, evaluate, unigram_loss
from harvest.embedded.forward import training_loss
from harvest.embedded.muon import Muon
from harvest.embedded.tokenizer import VOCABULARY
from shared.files import durable

QUICK_WINDOWS = 48


@dataclass(frozen=True)
class Settings:
    """What decides the result besides the corpus; ``batch`` is in windows, ``tokens`` counts scored ones."""

    tokens: int
    batch: int
    muon_lr: float
    adamw_lr: float
    muon_weight_decay: float
    warmup_steps: int
    seed: int
    threads: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return math.ceil(self.tokens / (self.batch * SCORED))


@dataclass
class TrainingState:
    """A training run's state."""

    model: Gemma2ForCausalLM
    optimizers: list[Optimizer]
    curve: list[dict[str, float]]
    step: int = 0
    cpu_seconds: float = 0.0


def make_optimizers(model: Gemma2ForCausalLM, settings: Settings) -> list[Optimizer]:
    """Make Muon for the blocks' matrices, AdamW for the embedding and the gains; both remember their peak rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    optimizers: list[Optimizer] = [
        Muon(matrices, lr=settings.muon_lr, weight_decay=settings.muon_weight_decay),
        AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        optimizer.param_groups[0]["peak_lr"] = optimizer.param_groups[0]["lr"]
    return optimizers


def rate_factor(step: int, settings: Settings) -> float:
    """Return the share of the peak rate at a step.

    It has a short warm-up, is then constant, then linear to zero over the second half.
    """
    return min(1.0, (step + 1) / settings.warmup_steps, 2.0 * (1.0 - step / settings.steps))


def training_step(run: TrainingState, inputs: Tensor, labels: Tensor, settings: Settings) -> float:
    """Make one update; returns the batch's loss in nats per token."""
    loss = training_loss(run.model, inputs, labels)
    loss.backward()
    for optimizer in run.optimizers:
        group = optimizer.param_groups[0]
        group["lr"] = group["peak_lr"] * rate_factor(run.step, settings)
        optimizer.step()
        optimizer.zero_grad()
    run.step += 1
    return float(loss.detach())


def describe(corpus: Corpus, data: Data, settings: Settings) -> dict[str, Any]:
    """Return what ``training.json`` says besides the curve and the model's own figures."""
    references = {
        "unigram": unigram_loss(data.train, data.held_out, VOCABULARY),
        "bigram": bigram_loss(data.train, data.held_out, VOCABULARY),
    }
    return {
        "python": platform.python_version(),
        "corpus": {
            "digest": corpus_digest(corpus.documents),
            "documents": len(corpus.documents),
            "undecodable": corpus.undecodable,
            "held_out_names": [d.name for d in corpus.documents if is_held_out(d.name)],
            "train_tokens": len(data.train),
            "held_out_tokens": len(data.held_out),
            "held_out_bytes": data.held_out_bytes,
        },
        "settings": asdict(settings),
        "references_nats_per_token": references,
    }


def final_figures(run: TrainingState, data: Data) -> dict[str, dict[str, float]]:
    """Return the loss on all held-out tokens, as trained and as shipped (rounded to bfloat16, computed in float32)."""
    windows = evaluation_windows(data.held_out)
    losses = {"float32": evaluate(run.model, *windows), "bfloat16": evaluate(rounded(run.model).float(), *windows)}
    return {name: {"nats_per_token": loss, "bits_per_byte": data.bits_per_byte(loss)} for name, loss in losses.items()}


def write_record(run: TrainingState, data: Data, description: dict[str, Any], out: Path) -> None:
    """Write ``training.json`` below ``out``."""
    figures = final_figures(run, data)
    click.echo(json.dumps(figures))
    record = description | {
        "steps_done": run.step,
        "cpu_seconds": round(run.cpu_seconds, 1),
        "held_out": figures,
        "curve": [
            point | {"held_out_sample_bits_per_byte": round(data.bits_per_byte(point["held_out_sample_loss"]), 4)}
            for point in run.curve
        ],
    }
    durable.publish_json(out / "training.json", record)


def train(
    run: TrainingState,
    data: Data,
    settings: Settings,
    every: int,
) -> None:
    """Train to the end, with a report after every ``every`` steps."""
    quick = [part[:: max(1, len(part) // QUICK_WINDOWS)][:QUICK_WINDOWS] for part in evaluation_windows(data.held_out)]
    batches = itertools.islice(training_batches(data.train, settings.batch, settings.seed), run.step, settings.steps)
    started, cpu_before, first_step, losses = time.monotonic(), time.process_time() - run.cpu_seconds, run.step, []
    for inputs, labels in batches:
        losses.append(training_step(run, inputs, labels, settings))
        if run.step % every and run.step != settings.steps:
            continue
        run.cpu_seconds = time.process_time() - cpu_before
        point = {
            "step": run.step,
            "tokens": run.step * settings.batch * SCORED,
            "train_loss": sum(losses) / len(losses),
            "held_out_sample_loss": evaluate(run.model, *quick),
        }
        run.curve.append({name: round(value, 4) for name, value in point.items()})
        losses.clear()
        elapsed = time.monotonic() - started
        pace = elapsed / (run.step - first_step)
        click.echo(
            f"step {run.step}/{settings.steps}  train {point['train_loss']:.3f}  "
            f"held out {point['held_out_sample_loss']:.3f} nats/token  {settings.batch * SCORED / pace:.0f} "
            f"tokens/s  {elapsed / 60:.1f} min, {(settings.steps - run.step) * pace / 60:.1f} to go"
        )


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).parent,
    help="Folder that receives model/ and training.json.",
)
@click.option("--tokens", default=5_600_000, show_default=True, help="Tokens to train on.")
@click.option("--batch", default=8, show_default=True, help="Windows in a batch.")
@click.option("--muon-lr", default=0.02, show_default=True)
@click.option("--adamw-lr", default=0.004, show_default=True)
@click.option("--muon-weight-decay", default=0.1, show_default=True)
@click.option("--warmup-steps", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--every", default=100, show_default=True, help="Steps between reports.")
def main(out: Path, every: int, **options: Any) -> None:
    """Train the embedded model on the running Python's standard library."""
    settings = Settings(**options)
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    corpus = read_corpus()
    data = prepare_data(corpus)
    description = describe(corpus, data, settings)
    click.echo(json.dumps({name: description[name] for name in ("settings", "references_nats_per_token")}))
    click.echo(f"{len(data.train)} training and {len(data.held_out)} held-out tokens")
    model = initial_model()
    run = TrainingState(model, make_optimizers(model, settings), [])
    sample = evaluation_windows(data.held_out)[0][:2]
    check_forward(model, sample)
    train(run, data, settings, every)
    check_forward(model, sample)
    write_model(run.model, data.tokenizer, out / "model")
    write_record(run, data, description, out)


if __name__ == "__main__":
    main()
