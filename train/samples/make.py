"""Samples of a checkpoint: encode, select, and put into tables."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from shared.store import Store
from shared.terminal import say
from train.evaluate import natural_weights
from train.samples.encode import encode
from train.samples.select import SamplesConfig, select
from train.samples.table import RECORD, Samples, SamplesRecord, contexts_table, latents_table
from train.settings import RunConfig
from train.transcoder import Transcoder


def make_samples(
    transcoder: Transcoder,
    store: Store,
    threshold: Tensor,
    config: RunConfig,
    settings: SamplesConfig,
    step: int,
    stop: Sequence[object] = (),
) -> Samples:
    """Samples of `transcoder` as it is, from the training blocks: those of the run, if `store` is the run's.

    Raises `Stopped` when `stop` is filled meanwhile.
    """
    run, same = config.settings, store.request.digest == config.request
    blocks = range(config.first_block, config.last_block) if same else store.record.training_blocks
    found = encode(transcoder, store, blocks, threshold, settings.rows, run.evaluation.chunk_rows, run.source, stop)
    chosen = select(found, settings, run.seed)
    tokenizer = store.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        say(f"note: {store.path} holds no tokenizer.json: samples have tokens, and no text")
    contexts = contexts_table(found, chosen, settings.context, tokenizer)
    prefixes = np.array(transcoder.prefixes)[transcoder.segment.cpu().numpy()]
    weights = natural_weights(store)
    latents = latents_table(found, chosen, prefixes, np.array([weights[name] for name in found.strata]))
    record = SamplesRecord(
        request=store.request.digest,
        step=step,
        source=run.source,
        d_sae=found.d_sae,
        first_sequence=found.first,
        sequences=len(found.tokens),
        rows=dict(zip(found.strata, found.rows.tolist(), strict=True)),
        latents=len(np.unique(chosen.latents)),
        contexts=len(chosen.pairs),
        seed=run.seed,
        settings=settings,
    )
    metadata = {RECORD: record.model_dump_json()}
    return Samples(record, contexts.replace_schema_metadata(metadata), latents.replace_schema_metadata(metadata))
