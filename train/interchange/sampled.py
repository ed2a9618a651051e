"""The samples of a run, and the activations that they were chosen from, for formats that show what latents do."""

from typing import NamedTuple

import pyarrow as pa

from shared.errors import UserError
from train.run.load_run import LoadedRun
from train.samples.encode import Activations, encode
from train.samples.parquet import RECORD, SamplesRecord, paths, read_contexts, read_latents
from train.samples.select import SamplesConfig


class Sampled(NamedTuple):
    """What is known of every latent of a checkpoint."""

    record: SamplesRecord
    contexts: pa.Table
    latents: pa.Table
    activations: Activations
    """Of the sequences that the samples were chosen from."""


def activations_of(loaded: LoadedRun, rows: int | None = None) -> Activations:
    """Encode the sequences that samples look at: those with `rows` stored rows, or as many as the run's settings say.

    Latents are active above the checkpoint's thresholds.
    """
    wanted = rows or loaded.config.settings.samples.rows or SamplesConfig().rows
    return encode(loaded.transcoder, loaded.rows, loaded.training_blocks, loaded.threshold, wanted)


def sampled(loaded: LoadedRun) -> Sampled:
    """Read the samples of a loaded checkpoint, and encode the sequences that they were chosen from.

    Raises `UserError` when it has none, or those of another store, and `CorruptData` when they are damaged.
    """
    contexts_file, latents_file = paths(loaded.path, loaded.step)
    make = f"python -m train samples {loaded.path} --step {loaded.step}"
    if not (contexts_file.is_file() and latents_file.is_file()):
        raise UserError(f"{loaded.path} has no samples of step {loaded.step}; make them with: {make}")
    contexts, latents = read_contexts(contexts_file), read_latents(latents_file)
    record = SamplesRecord.model_validate_json(latents.schema.metadata[RECORD])
    if record.request != (digest := loaded.rows.store.request.digest):
        raise UserError(
            f"{contexts_file}: samples of the store {record.request[:12]}, expected {digest[:12]}; make them "
            f"again: {make}"
        )
    found = activations_of(loaded, record.settings.rows)
    if (found.first, len(found.tokens)) != (record.first_sequence, record.sequences):
        raise UserError(
            f"{contexts_file}: samples of {record.sequences:,} sequences from {record.first_sequence:,} on, expected "
            f"{len(found.tokens):,} from {found.first:,} on; the store has grown or shrunk: make them again: {make}"
        )
    return Sampled(record, contexts, latents, found)
