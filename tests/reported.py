"""A small finished run with its samples and its table of latents, for tests of what reports are made of."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from shared import command_line
from shared.store.store import Store
from tests.runs import SMALL
from tests.stores import SyntheticStore, make_store
from train.cli import main
from train.model import checkpoint
from train.model.transcoder import Transcoder
from train.report.latents import latents_table
from train.run.load_run import build_transcoder, rows_of
from train.run.settings import RunConfig, read_config
from train.samples.make_samples import make_samples
from train.samples.select import SamplesConfig

STEPS = 30
DEAD = [3, 40, 41]
"""Latents that are never active."""


@dataclass
class Reported:
    path: Path
    made: SyntheticStore
    store: Store
    config: RunConfig
    model: Transcoder
    threshold: Tensor
    contexts: pa.Table
    latents: pa.Table
    """As sampled"""

    def table(self) -> pa.Table:
        return latents_table(self.model, rows_of(self.config, self.store), self.threshold, self.latents, self.contexts)


def reported(folder: Path, **options: Any) -> Reported:
    """Train on a new store, made with `options`, and then silence the latents `DEAD`."""
    made = make_store(folder / "store", **options)
    args = ["run", "--store", made.path, "--runs", folder / "runs", "--name", "small", "--steps", STEPS, *SMALL]
    slow = ("rows.position_0=train", "optimizer.lr=1e-3")  # so that all but `DEAD` stay active
    args += [part for one in ("samples.rows=0", *slow) for part in ("--set", one)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *map(str, args)])
        try:
            command_line.run(main)
        except SystemExit as stop:
            assert not stop.code
    path = folder / "runs" / "small"
    store, config = Store.open(made.path), read_config(path)
    model = build_transcoder(config, store)
    threshold = model.load_checkpoint(checkpoint.find(path))
    with torch.no_grad():
        model.b_enc[DEAD] = -1e3
    rows, seed = rows_of(config, store), config.settings.seed
    samples = make_samples(model, rows, config.training_blocks, threshold, SamplesConfig(), seed=seed, step=STEPS)
    return Reported(path, made, store, config, model, threshold, samples.contexts, samples.latents)
