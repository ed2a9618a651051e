"""The settings of a run: one model per component, each beside its component, put together and resolved here."""

import platform
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors
import torch
from pydantic import Field, model_validator

from shared.bounds import Blocks, Digest, Every, Name, Text, Width
from shared.check_settings import Unfit
from shared.config import Changes, Config, build, dotted, json_digest, read_record
from shared.files import durable
from shared.resources import usable_cores
from shared.store.outliers import Exclusion
from shared.store.reader import RowsConfig
from shared.store.store import Store
from train.data.batches import Side
from train.duplicates.diversity import DiversityConfig
from train.duplicates.monitor import MonitorConfig
from train.evaluation.evaluate import EvaluationConfig
from train.evaluation.evaluated_blocks import evaluated_rows
from train.live.run_files import config_file
from train.model.activations import Activation, BatchTopK
from train.model.blas import Blas, bfloat16_units, faster_here
from train.model.kernels.base import Kernels
from train.model.losses import AuxKConfig
from train.model.quiet import QuietConfig
from train.model.shards import ParallelConfig
from train.model.sizes import source_width
from train.model.transcoder import TranscoderConfig
from train.parallel.required import required
from train.read_settings import ALIASES, BASE, read_settings
from train.run.cadences import resolved
from train.run.checkpoint_bytes import bytes_at_most
from train.run.choose_kernels import Shape, fastest
from train.run.device_rules import default_kernels
from train.run.optimizer import OptimizerConfig
from train.run.rules import check_device_name, check_run
from train.run.saver import CheckpointConfig
from train.run.step_graph import Choice
from train.samples.select import SamplesConfig

ProductDtype = Literal["float32", "tf32", "bfloat16", "guarded-bfloat16"]


class Settings(Config):
    """What a preset file and `--set` say."""

    steps: int = Field(4000, ge=1, le=10**9)
    """Optimizer steps."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, and of the order of rows unless `rows.seed` is set."""
    source: Side = "source"
    """Which side of the pairs the transcoder reads; `target` trains an autoencoder of the targets."""
    device: str = "auto"
    """`cpu`, `cuda`, one of several GPUs by number, such as `cuda:1`, or `auto`: CUDA if there is a GPU."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch and of compiled loops; 0: one for each core that the process may use. Recorded in the run,
    because another number may change the last bits."""
    blas: Literal["auto", "torch", "numpy"] = "auto"
    """The library for the encoder's matrix multiplication on CPU; `auto`: the one that is faster on processors of this
    maker. Recorded in the run, like `threads`."""
    kernels: Literal["auto", Kernels] = "auto"
    """What a step runs on: `compiled` loops on CPU, `triton` kernels on CUDA, `matmul`, products of whole matrices in
    TF32 on CUDA, `plain` torch on any device, or `dense`, the slow reference. `auto`: `compiled` on CPU; on CUDA the
    fastest of `triton`, `matmul` and `plain` in a few steps of the run's shape. Recorded in the run, with the times."""
    product_dtype: Literal["auto", ProductDtype] = "auto"
    """Precision of the encoder's matrix multiplication in training, by whose results latents are selected. The values
    of selected latents, and all gradients and weights, are float32 in any case. `tf32` (CUDA) and the coarser
    `bfloat16` may select other latents than `float32` does; `guarded-bfloat16` (BatchTopK on compiled loops) selects
    the same as float32, and proves it at every step. `auto`: guarded if possible and if the processor has units for
    bfloat16, `tf32` on CUDA, else `float32`. Recorded in the run."""
    resident_rows: Literal["auto", "on", "off"] = "auto"
    """Whether training rows are kept in the memory of a CUDA device, where batches are then gathered.
    `auto`: if they fit beside the training with a tenth of the memory to spare, and the run reads each row at least
    once. The choice is printed when training starts."""
    step_graph: Choice = "auto"
    """Whether a step on CUDA is recorded as one CUDA graph, which the host launches as a whole, with the same bits. For
    `kernels=triton` and a fixed k. `auto`: if possible; if recording fails, a warning says so. The choice is printed
    when training starts, and timing.jsonl counts the replayed steps."""
    log_every: Every = "auto"
    """Steps between rows of metrics.jsonl. `auto`: 50; on CUDA about as many as take a quarter of a second. With
    `auto`, how often a run logs, reports, evaluates and saves depends on the kind of device and on a count of
    operations (train/run/cadences.py), and is recorded in the run."""
    transcoder: TranscoderConfig = TranscoderConfig()
    activation: Activation = BatchTopK()
    rows: RowsConfig = RowsConfig()
    auxk: AuxKConfig = AuxKConfig()
    quiet: QuietConfig = QuietConfig()
    diversity: DiversityConfig = DiversityConfig()
    monitor: MonitorConfig = MonitorConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig = SamplesConfig()
    parallel: ParallelConfig = ParallelConfig()


class Extension(Config):
    """One time that a run was made longer."""

    step: int = Field(ge=0, le=10**9)
    """Steps done then: from there on the learning rate is that of the longer run."""
    steps_before: int = Field(ge=1, le=10**9)
    """Steps of the run until then."""


class InitialWeights(Config):
    """Which weights of `init_from` a run started from."""

    step: int = Field(ge=0, le=10**9)
    """0 for those of another library."""
    crc32c: str = Field(pattern="^[0-9a-f]{8}$")
    """Of the file."""
    library: Name | None = None
    """Whose file it is; none: a run's checkpoint."""


class Imported(Config):
    """Where the weights of an imported run come from: what its files say, as far as they do."""

    library: Name
    path: Text
    """Of the file or folder that was imported."""
    files: dict[Text, Digest]
    """SHA-256 of each file that was read, by name."""
    model: Text | None
    """The model that it was trained on; none: the files do not say."""
    source_hook: Text | None
    """The hook that it reads; none: the files do not say, and it is taken to be the store's."""
    target_hook: Text | None
    """The hook that it predicts; none as above."""
    accepted: tuple[Text, ...] = ()
    """How model and hooks differ from the store's, which was accepted."""
    metadata: dict[str, Any] = {}
    """All that its configuration file says."""

    @property
    def name(self) -> str:
        """The library, and the start of a digest of all files: two transcoders of one library have different names."""
        return f"{self.library} {json_digest(self.files)[:12]}"


class RunConfig(Config):
    """A run as it was resolved: `config.json`."""

    settings: Settings
    store: Path
    """Where the store was."""
    request: str
    """Digest of the store's request: resuming against another store is refused."""
    first_block: Blocks
    last_block: Blocks
    """Training blocks first_block <= block < last_block: a store that grows later does not change the run."""
    d_in: Width
    d_out: Width
    init_from: Path | None
    """The run that the weights started from."""
    initial: InitialWeights | None = None
    """Its checkpoint; none: there is no such run, or this one is from before that was recorded."""
    software: dict[str, str]
    """Versions that the run started with."""
    step_times: dict[Kernels, float] | None = None
    """Milliseconds of a step by each kind of kernels that `kernels=auto` compared; none: it compared none."""
    exclusion: Exclusion | None = None
    """Rows that are left out; none, as in runs from before there were exclusions: no row is."""
    blocks: Digest | None = None
    """Digest of `blocks.json`, the checksums of the blocks that the run reads; none: in runs from before there was."""
    extensions: tuple[Extension, ...] = ()
    """When the run was made longer (`train resume RUN --steps N`), in order."""
    imported: Imported | None = None
    """Where its weights come from; none: the run trained them."""
    asked: Settings | None = None
    """The settings before automatic choices were made: what `--like` starts another run with; none: in older runs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(before >= after for before, after in pairwise(self.lengths)):
            raise ValueError(f"a run is only ever made longer, and extensions say that it had {self.lengths} steps")
        return self

    @property
    def training_blocks(self) -> range:
        """Of the run's store."""
        return range(self.first_block, self.last_block)

    @property
    def lengths(self) -> list[int]:
        """The steps of the run when it was started, and after each extension."""
        return [*(one.steps_before for one in self.extensions), self.settings.steps]

    def length_at(self, step: int) -> int:
        """Return how many steps the run had when `step`, counted from 0, was to be trained."""
        begun = sum(1 for _ in dropwhile(lambda one: one.step > step, reversed(self.extensions)))
        return self.lengths[begun]


def load_settings(preset: str = BASE, changes: Changes = (), *, file: Path | str | None = None) -> Settings:
    """Read the settings of a preset, or in its place of a TOML `file` or a run's `config.json`, with `changes` put in.

    `changes`: values by dotted name, such as {"steps": 300, "transcoder.d_sae": 512}, or as `--set` takes them. Raises
    `UserError` that names the setting.
    """
    read = read_settings(preset, changes, Path(file) if file else None)
    return build(Settings, read.tables, read.origin, read.changes, ALIASES)


def read_config(run: Path) -> RunConfig:
    """Read `config.json` of a run. Raises `UserError` when `run` is none."""
    path = config_file(run)
    return parse_config(durable.read_json(path), path)


def parse_config(data: Any, path: Path) -> RunConfig:
    """Validate what `config.json` holds, of this version or one before. Raises `CorruptData` that names `path`."""
    config = read_record(RunConfig, data, path)
    if config.exclusion is None:  # from before there were any, and so without the term that goes with them
        quiet = config.settings.quiet.model_copy(update={"weight": 0.0})
        return config.model_copy(update={"settings": config.settings.model_copy(update={"quiet": quiet})})
    return config


def flat(config: Config) -> dict[str, Any]:
    """Return all settings of `config` as JSON, by dotted names."""
    return dict(dotted(config.model_dump(mode="json")))


def resolve(store: Store, settings: Settings, init_from: Path | None) -> RunConfig:
    """Return the run that `settings` ask for on `store`, every automatic choice made. Raises `UserError`."""
    asked = settings
    record, exclusion = store.record, resolve_exclusion(store, settings)
    device = _device(settings.device)
    check_run(settings.model_dump(mode="json"), store, device)
    d_in = source_width(record, settings.source)
    activation = settings.activation.resolve(settings.steps)
    shape = settings.transcoder.resolve(d_in, activation)
    blocks, view = settings.rows.training_blocks(store), store.excluding(exclusion)
    assert isinstance(shape.d_sae, int)
    fixed = required(settings.parallel.shards, dict(settings), activation.kind, shape.d_sae, device)
    settings = settings.model_copy(update=fixed)
    every, delay = resolved(settings.model_dump(mode="json"), device, d_in, shape.d_sae, evaluated_rows(record))
    monitor = settings.monitor.model_copy(update={"every": every.monitor, "delay": delay})
    auxk = settings.auxk.resolve(shape.d_sae, settings.steps * settings.rows.batch_rows)
    kernels: Kernels = default_kernels(device) if settings.kernels == "auto" else settings.kernels
    times = None
    if settings.kernels == "auto" and device != "cpu":
        of_step = Shape(d_in, record.d_out, settings.rows.batch_rows, shape, activation, auxk, settings.step_graph)
        kernels, times = fastest(of_step, device)
    return RunConfig(
        settings=settings.model_copy(
            update={
                "transcoder": shape,
                "activation": activation,
                "auxk": auxk,
                "diversity": settings.diversity.resolve(shape.d_sae),
                "quiet": settings.quiet.resolve(view, blocks),
                "optimizer": settings.optimizer.resolve(settings.steps, d_in, shape.decoder_norm == "unit"),
                "device": device,
                "threads": settings.threads or default_threads(),
                "blas": _blas(settings.blas, device),
                "kernels": kernels,
                "product_dtype": _product_dtype(settings.product_dtype, kernels, activation, device),
                "rows": _rows(settings, store),
                "monitor": monitor,
                "evaluation": settings.evaluation.model_copy(update={"every": every.evaluation}),
                "checkpoint": settings.checkpoint.model_copy(update={"every": every.checkpoint}),
                "log_every": every.log,
            }
        ),
        store=store.place,
        request=store.request.digest,
        first_block=blocks.start,
        last_block=blocks.stop,
        d_in=d_in,
        d_out=record.d_out,
        init_from=init_from.resolve() if init_from else None,
        software={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "safetensors": safetensors.__version__,
        },
        step_times=times,
        exclusion=exclusion,
        asked=asked,
    )


def _rows(settings: Settings, store: Store) -> RowsConfig:
    found = settings.rows.resolve(store.request.block_sequences)
    return found.model_copy(update={"seed": settings.seed if found.seed is None else found.seed})


def _device(wanted: str) -> str:
    """Return the device that `wanted` means here. Raises `Unfit` where there is none such."""
    check_device_name(wanted)
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted != "cpu":
        if not torch.cuda.is_available():
            raise Unfit(f"device is {wanted}, and torch finds no CUDA device; use --set device=cpu", "device")
        count, number = torch.cuda.device_count(), torch.device(wanted).index or 0
        if number >= count:
            said = f"device is {wanted}, and the last of torch's {count} CUDA devices is cuda:{count - 1}"
            raise Unfit(said, "device")
    return wanted


def resolve_exclusion(store: Store, settings: Settings) -> Exclusion:
    """Return which rows of `store` a run with these settings leaves out."""
    return settings.rows.exclusion(store, figures=settings.evaluation.leaves_outliers_out)


def default_threads() -> int:
    """Return the CPU threads of a run that names no number: torch's own, but no more than there are usable cores."""
    return min(torch.get_num_threads(), usable_cores())


def _blas(wanted: Literal["auto", "torch", "numpy"], device: str) -> Blas:
    if wanted == "auto":
        return faster_here() if device == "cpu" else "torch"
    return wanted


def _product_dtype(
    wanted: Literal["auto", ProductDtype], kernels: Kernels, activation: Activation, device: str
) -> ProductDtype:
    if wanted == "auto" and device != "cpu":
        return "tf32"
    if wanted == "auto":
        can = kernels == "compiled" and activation.pairs_of_step(0, 1) is not None
        return "guarded-bfloat16" if can and bfloat16_units() else "float32"
    return wanted


def checkpoint_bytes(settings: Settings, d_in: int, d_out: int) -> int:
    """Return how many bytes one checkpoint of a run with these settings, which are resolved, takes at most."""
    shape, activation, batch = settings.transcoder, settings.activation, settings.rows.batch_rows
    assert isinstance(shape.d_sae, int)
    state = settings.monitor.state_bytes(batch, activation.most_active(shape.d_sae), shape.d_sae)
    return bytes_at_most(d_in, d_out, shape.d_sae, shape.skip, state)
