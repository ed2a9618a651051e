"""The settings of a run: one model per component, each beside its component, put together here."""

from pathlib import Path

from pydantic import Field

from shared.config import Config, load_preset, override
from train.checkpoint import CheckpointConfig
from train.evaluate import EvaluationConfig
from train.losses import AuxKConfig
from train.optimizer import OptimizerConfig
from train.rows import RowsConfig
from train.transcoder import Activation, BatchTopK, TranscoderConfig

PRESETS = Path(__file__).parent / "presets"


class Settings(Config):
    """What a preset file and `--set` say."""

    steps: int = Field(4000, ge=1)
    """Optimiser steps."""
    seed: int = Field(0, ge=0)
    """Of the initial weights and the order of rows."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is one."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0: one per core. Recorded in the run: another number may change the last bits."""
    log_every: int = Field(50, ge=1)
    """Steps between rows of metrics.jsonl."""
    transcoder: TranscoderConfig = TranscoderConfig()
    activation: Activation = BatchTopK()
    rows: RowsConfig = RowsConfig()
    auxk: AuxKConfig = AuxKConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class RunConfig(Config):
    """A run as it was resolved: `config.json`."""

    settings: Settings
    store: Path
    """Where the store was."""
    request: str
    """Digest of the store's request: resuming against another store is refused."""
    first_block: int
    last_block: int
    """Training blocks first_block <= block < last_block: a store that grows later does not change the run."""
    d_in: int
    d_out: int
    init_from: Path | None
    """The checkpoint that the weights started from."""
    software: dict[str, str]
    """Versions that the run started with."""


def load_settings(preset: str, file: Path | None, assignments: list[str]) -> dict[str, object]:
    """The raw settings of a preset or file, with `--set` put in."""
    return override(load_preset(PRESETS, preset, file), assignments)
