"""Another library's own trainer on the rows of a store, in that library's environment.

python trainers.py LIBRARY STORE STEPS OUT PACKAGES

`StoreDataset` feeds it. OUT gets JSON: the mean loss of the first and of the last twenty steps, and the fvu on held-out
rows. What this project needs and the library's environment lacks is found in PACKAGES, after all else.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

D_SAE, K, ROWS, LR = 1024, 32, 512, 1e-3
Pairs = Iterator[tuple[Tensor, Tensor]]
Trained = tuple[Callable[[Tensor, Tensor], Tensor], list[float]]
"""What predicts targets from sources and targets, and the losses of all steps."""


def saelens(data: Pairs, d: int, steps: int) -> Trained:
    """`SAETrainer` takes an iterator of rows."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, total_training_samples=steps * ROWS,
        device="cpu", autocast=False, lr=LR, lr_end=LR, lr_scheduler_name="constant", lr_warm_up_steps=0,
        adam_beta1=0.9, adam_beta2=0.999, lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=ROWS,
        dead_feature_window=1000, feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=d, d_sae=D_SAE, k=K))
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=(target for _, target in data))
    losses = _record(trainer, "_train_step", lambda found: found.losses["mse_loss"])
    trainer.fit()
    return lambda _, target: sae(target), losses


def dictionary_learning(data: Pairs, d: int, steps: int) -> Trained:
    """`trainSAE` takes an iterable of rows."""
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.training import trainSAE

    made: list[Any] = []

    class Kept(BatchTopKTrainer):  # trainSAE saves what it trains, or forgets it
        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            made.append(self)
            self.losses = _record(self, "update", float)

    config = {
        "trainer": Kept, "steps": steps, "activation_dim": d, "dict_size": D_SAE, "k": K, "layer": 0, "lm_name": "none",
        "lr": LR, "warmup_steps": 0, "decay_start": None, "threshold_start_step": steps // 2, "device": "cpu",
        "seed": 0,
    }  # fmt: skip
    trainSAE(data=(target for _, target in data), trainer_configs=[config], steps=steps, device="cpu")
    return lambda _, target: made[0].ae(target), made[0].losses


def sparsify(data: Pairs, d: int, steps: int) -> Trained:
    """`Trainer` runs a model and looks at a module's input and output: here a module that hands out the pairs."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    from tests.bench.peer_training import NoTokens, pairs_model

    config = TrainConfig(
        SparseCoderConfig(num_latents=D_SAE, k=K, transcode=True), batch_size=1, lr=4 * LR, lr_warmup_steps=steps // 20,
        optimizer="adam", hookpoints=["pairs"], init_seeds=[0], log_to_wandb=False,
    )  # fmt: skip
    scale = d**0.5  # mean square 1 per dimension
    sides = ([source * scale, target * scale] for source, target in data)
    first = next(sides)  # once more, as the trainer looks at the width of one
    trainer = Trainer(config, NoTokens(steps, ROWS), pairs_model(chain([first, first], sides)))
    coder = trainer.saes["pairs"]
    losses = _record(coder, "forward", lambda found: found.fvu)
    trainer.save = lambda: None
    trainer.fit()
    kept = list(losses)
    return lambda source, _: coder(source * scale).sae_out / scale, kept


def _record(trainer: Any, method: str, loss: Callable[[Any], Any]) -> list[float]:
    """Note the loss that a method of a trainer gives."""
    losses: list[float] = []
    given = getattr(trainer, method)

    def noting(*args: Any, **named: Any) -> Any:
        found = given(*args, **named)
        losses.append(float(loss(found)))
        return found

    setattr(trainer, method, noting)
    return losses


def main() -> None:
    """Train for some steps, and judge by held-out rows."""
    library, path, steps, out, packages = sys.argv[1:]
    sys.path.append(packages)
    from shared import Store
    from shared.store.reader import RowsConfig
    from train import StoreDataset

    torch.set_num_threads(1)
    torch.manual_seed(0)
    record, rows = Store.open(path).record, RowsConfig(batch_rows=ROWS)
    scales = [side.mean_squared_norm**-0.5 for side in (record.overall.source, record.overall.target)]
    loader = DataLoader(StoreDataset(path, rows=rows), batch_size=None, num_workers=1)
    data = ((batch.source * scales[0], batch.target * scales[1]) for batch in loader)
    predict, losses = globals()[library](data, record.d_out, int(steps))
    held_out = list(islice(StoreDataset(path, rows=rows, blocks=record.report_blocks), 8))
    x = torch.cat([batch.source for batch in held_out]) * scales[0]
    y = torch.cat([batch.target for batch in held_out]) * scales[1]
    with torch.no_grad():
        residual = (predict(x, y) - y).square().sum()
    fvu = float(residual / (y - y.mean(0)).square().sum())
    first, last = (sum(part) / len(part) for part in (losses[:20], losses[-20:]))
    Path(out).write_text(json.dumps({"steps": len(losses), "first loss": first, "last loss": last, "fvu": fvu}))


if __name__ == "__main__":
    main()
