"""Load a run: its settings, its store, and the transcoder of one of its checkpoints."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shared.console.terminal import say
from shared.errors import DiskFull, ProjectError, UserError
from shared.files.object_store import place
from shared.store.checks import read_store_record
from shared.store.store import Local, Store
from train.data.batches import StoreRows
from train.live.store_place import keep_store_place, moved_store, require_store
from train.model import checkpoint
from train.model.checkpoint import Checkpoint
from train.model.kernels import guarded
from train.model.normalisation import normalisation
from train.model.sizes import source_width
from train.model.transcoder import Transcoder
from train.run.bindings import foreign_block, require_own_config, require_own_store
from train.run.device_rules import default_kernels
from train.run.settings import RunConfig, read_config, resolve_exclusion
from train.samples.make_samples import make_samples
from train.samples.parquet import Samples
from train.samples.select import SamplesConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedRun:
    """A run with the transcoder of one of its checkpoints."""

    path: Path
    config: RunConfig
    checkpoint: Checkpoint
    rows: StoreRows
    transcoder: Transcoder
    threshold: Tensor
    """[F] of inference, as the checkpoint has them"""

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.checkpoint.step

    @property
    def training_blocks(self) -> range:
        """Those that the run trained on; of another store than the run's, all that there are to train on."""
        same = foreign_block(self.path, self.config, self.rows.store) is None
        return self.config.training_blocks if same else self.rows.store.record.training_blocks


def load_run(
    run: Path | str, step: int | None = None, *, store: Store | None = None, found: Checkpoint | None = None
) -> LoadedRun:
    """Load the checkpoint of `run` at `step`, or its newest valid one, and open its store.

    `store`: another one of the same widths; `found`: a checkpoint that was found already. Raises `UserError` when there
    is no such run, checkpoint or store, and `CorruptData` when one of them is damaged.
    """
    run = Path(run)
    config = read_config(run)
    found = found or checkpoint.find(run, step)
    require_own_config(run, config, found)
    store = store or open_store(run, config)
    transcoder = build_transcoder(config, store)
    threshold = transcoder.load_checkpoint(found)
    return LoadedRun(
        path=run,
        config=config,
        checkpoint=found,
        rows=rows_of(config, store),
        transcoder=transcoder,
        threshold=threshold,
    )


def samples_of(loaded: LoadedRun, settings: SamplesConfig) -> Samples:
    """Make samples of a loaded checkpoint."""
    blocks, seed = loaded.training_blocks, loaded.config.settings.seed
    return make_samples(loaded.transcoder, loaded.rows, blocks, loaded.threshold, settings, seed=seed, step=loaded.step)


def open_store(
    run: Path, config: RunConfig, store_path: Path | None = None, local: Local | None = None, *, verify: bool = False
) -> Store:
    """Open the store of `run`, or another one of the same widths, and read some of its shard files, or all to `verify`.

    Raises `UserError`, also when other rows are where the store of the run was, and `CorruptData` when one is damaged.
    """
    store = Store.open(place_of_store(run, config, store_path), local)
    if store_path is None:
        require_own_store(run, config, store)
    d_in, d_out = source_width(store.record, config.settings.source), store.record.d_out
    if (d_in, d_out) != (config.d_in, config.d_out):
        raise UserError(
            f"{store.path} has d_in {d_in} and d_out {d_out}, "
            f"{run} was trained with {config.d_in} and {config.d_out}; pass the --store of the same model and hooks"
        )
    same = foreign_block(run, config, store) is None
    if same:
        remember_store(run, config, store)
    check_shards(store, config.training_blocks if same else store.record.training_blocks, verify=verify)
    fresh = config.exclusion and resolve_exclusion(store, config.settings)
    return store.excluding(config.exclusion if same else fresh)


def place_of_store(run: Path, config: RunConfig, given: Path | None = None) -> Path:
    """Return where the store of `run` is: as `given`, else as it was given last, else where it was when it started.

    Raises `UserError` when it is not there and none is given, and `CorruptData` when the record of that is damaged.
    """
    return given or require_store(_known_place(run, config))


def _known_place(run: Path, config: RunConfig) -> Path:
    return moved_store(run) or config.store


def remember_store(run: Path, config: RunConfig, store: Store) -> None:
    """Keep where the store of `run` is, if it is no longer where the run has it; with a note where that cannot be."""
    known = _known_place(run, config)
    if place(known) == store.place or _is_at(known, config.request):
        return
    try:
        keep_store_place(run, store.place)
    except (DiskFull, OSError) as error:
        say(f"note: where the store of {run} is now cannot be kept ({error}); give --store the next time, too")


def _is_at(place: Path, digest: str) -> bool:
    """Tell whether a store of this request is at `place`."""
    try:
        return read_store_record(place).request.digest == digest
    except ProjectError:
        return False


def check_shards(store: Store, training_blocks: range, *, verify: bool) -> None:
    """Read some of the store's shard files, or all to `verify`. Raises `CorruptData` that names a damaged one."""
    record = store.record
    held_out = [block for block in range(record.blocks) if block not in record.training_blocks]
    store.check_shards(held_out, training_blocks, everything=verify)


def rows_of(config: RunConfig, store: Store) -> StoreRows:
    """Return the rows of `store` as a run evaluates them."""
    return StoreRows(store, config.settings.evaluation.chunk_rows, config.settings.source)


def build_transcoder(config: RunConfig, store: Store) -> Transcoder:
    """Build the transcoder of a run with its store's normalisation, not initialised."""
    settings = config.settings
    over_rms = settings.transcoder.source_rms_eps is not None
    shift_and_scale = normalisation(store, settings.source, over_rms=over_rms)
    model = Transcoder(config.d_in, config.d_out, settings.transcoder, settings.activation, shift_and_scale)
    model.blas = "numpy" if settings.blas == "numpy" else "torch"  # `auto` only in runs from before there was a choice
    model.kernels = default_kernels(settings.device) if settings.kernels == "auto" else settings.kernels
    model.product_dtype = torch.bfloat16 if settings.product_dtype == "bfloat16" else torch.float32
    model.tf32 = settings.product_dtype == "tf32"
    model.guarded = guarded.Guarded() if settings.product_dtype == "guarded-bfloat16" else None
    return model.to(settings.device)
