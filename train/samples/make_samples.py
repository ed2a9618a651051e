"""Samples of a checkpoint: encode, select, and put into tables."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from shared.console.terminal import say
from train.data.batches import StoreRows
from train.evaluation.evaluate import natural_weights
from train.model.transcoder import Transcoder
from train.samples.encode import encode
from train.samples.parquet import RECORD, Samples, SamplesRecord, contexts_table, latents_table
from train.samples.select import SamplesConfig, select


def make_samples(
    transcoder: Transcoder,
    rows: StoreRows,
    blocks: range,
    threshold: Tensor,
    settings: SamplesConfig,
    *,
    seed: int,
    step: int,
    stop: Sequence[object] = (),
) -> Samples:
    """Make samples of `transcoder` as it is at `step`, from `blocks`.

    Raises `Stopped` when `stop` is filled meanwhile.
    """
    store = rows.store
    found = encode(transcoder, rows, blocks, threshold, settings.rows, stop)
    chosen = select(found, settings, seed)
    tokenizer = store.tokenizer / "tokenizer.json"
    if not tokenizer.is_file():
        say(f"note: {store.path} holds no tokenizer.json: samples have tokens, and no text")
    contexts = contexts_table(found, chosen, settings.context, tokenizer)
    prefixes = np.array(transcoder.prefixes)[transcoder.group.cpu().numpy()]
    weights = natural_weights(store)
    latents = latents_table(found, chosen, prefixes, np.array([weights[name] for name in found.strata]))
    record = SamplesRecord(
        request=store.request.digest,
        step=step,
        source=rows.source,
        d_sae=found.d_sae,
        first_sequence=found.first,
        sequences=len(found.tokens),
        rows=dict(zip(found.strata, found.rows.tolist(), strict=True)),
        latents=len(np.unique(chosen.latents)),
        contexts=len(chosen.pairs),
        seed=seed,
        settings=settings,
    )
    metadata = {RECORD: record.model_dump_json()}
    return Samples(record, contexts.replace_schema_metadata(metadata), latents.replace_schema_metadata(metadata))
