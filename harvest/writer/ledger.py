"""Commits blocks: shard files, then the record that says they exist, then the arrays' metadata."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import numpy as np
from safetensors.numpy import save

from harvest.writer.attention_sinks import listed
from harvest.writer.blocks import (
    Array,
    BlockLayout,
    Buffers,
    Measures,
    pack_moments,
    stratum_arrays,
)
from harvest.writer.int8_blocks import encoded, pack_lost
from harvest.writer.target import Target
from shared.errors import CorruptData, ProjectError
from shared.files import durable
from shared.store.checks import belongs, buffers_record, check_size, read_ledger, read_store_record
from shared.store.layout import (
    ARRAYS,
    STORE,
    FileRecord,
    LedgerRecord,
    StoreRequest,
    block_token_files,
    moments_path,
    record_path,
    row_specs,
    stratum_specs,
)
from shared.store.outliers import norms_of, pack_long_rows
from shared.store.row_arrays import SIDES
from shared.store.statistics import Moments, RowParts, moments_of


def missing_blocks(target: Target) -> list[int]:
    """List the planned blocks without a ledger record, or with files that are not there in full."""
    return [block for block in range(target.blocks) if not _is_committed(target, block)]


def commit(
    target: Target,
    block: int,
    layout: BlockLayout,
    buffers: Buffers,
    batch: int,
    measured: Measures | None = None,
    computed_on: Mapping[str, str] | None = None,
) -> dict[str, Moments]:
    """Publish a block. A kill at any point leaves it either committed, or to be done again with the same bytes.

    `batch`: windows per forward pass that it was computed with; `measured`: what is known of its rows already;
    `computed_on`: what its record says of device and software. Returns the moments by stratum and side.
    """
    request, known = target.request, measured or {}
    hooks = dict(zip(SIDES, (request.source_hook, request.target_hook), strict=True))
    d_in, d_out = (buffers[name].shape[1] for name in (request.source_hook, request.target_hook))
    files: dict[str, FileRecord] = {}
    moments: dict[str, Moments] = {}
    norms: dict[str, Callable[[], Array]] = {}
    rows: dict[str, RowParts] = {}
    with ThreadPoolExecutor(len(SIDES) + 1) as pool:
        for stratum in target.strata:
            captured = stratum_arrays(request, stratum, block, layout, buffers)
            arrays, sides = _as_stored(request, captured, pool)
            found = {side: known.get((hooks[side], stratum.name)) for side in SIDES}
            gathered = {side: pool.submit(moments_of, sides[side]) for side in SIDES if not found[side]}
            shards: dict[str, durable.Buffers] = {}
            for name, spec in stratum_specs(request, stratum, d_in, d_out).items():
                paths = [spec.shard_path(shard) for shard in spec.block_shards(block)]
                shards |= dict(zip(paths, spec.shard_buffers(arrays[name]), strict=True))
            records = pool.map(buffers_record, shards.values())
            durable.publish_files({target.path / ARRAYS / name: data for name, data in shards.items()})
            files |= dict(zip(shards, records, strict=True))
            for side in SIDES:
                name, one = f"{stratum.name}/{side}", found[side]
                rows[name] = sides[side]
                moments[name] = one.moments if one else gathered[side].result()
                norms[name] = partial(np.asarray, one.norms) if one else partial(norms_of, rows[name])
    _require_finite(target, block, moments)
    tensors = pack_moments(moments) | pack_long_rows(listed(target.strata, moments, norms))
    if request.storage == "int8":
        tensors |= pack_lost(target.strata, moments, rows, norms)
    saved = save(tensors)
    durable.publish_bytes(target.path / moments_path(block), saved)
    assert target.plan is not None
    record = LedgerRecord(
        block=block,
        batch_sequences=batch,
        d_in=d_in,
        d_out=d_out,
        files=files,
        tokens=block_token_files(target.plan, request, block),
        moments=buffers_record([saved]),
        computed_on=None if computed_on is None else dict(computed_on),
    )
    durable.publish_json(target.path / record_path(block), record.model_dump(mode="json"))
    return moments


def _as_stored(
    request: StoreRequest, arrays: dict[str, Array], pool: Executor
) -> tuple[dict[str, Array], Mapping[str, RowParts]]:
    """Return a stratum's arrays as they are written, and by side the numbers that will be read."""
    if request.storage == "int8":
        return encoded(arrays, pool)
    return arrays, {side: arrays[side] for side in SIDES}


def _require_finite(target: Target, block: int, moments: Mapping[str, Moments]) -> None:
    for name, found in moments.items():
        if not (np.isfinite(found.mean).all() and np.isfinite(found.m2).all()):
            raise ProjectError(
                f"{target.path}: block {block}, {name}: its rows are so long that their squares overflow; the model's "
                "weights are damaged, or its dtype is too narrow"
            )


def fixed_batch(target: Target) -> int | None:
    """Return the windows per forward pass that the committed blocks were made with, or None when there are none."""
    records = (_readable(target, block) for block in range(target.blocks))
    return next((record.batch_sequences for record in records if record), None)


def computed_on(target: Target) -> dict[int, dict[str, str]]:
    """Return by block what committed blocks were computed on, as far as their records say that."""
    records = ((block, _readable(target, block)) for block in range(target.blocks))
    return {block: record.computed_on for block, record in records if record and record.computed_on}


def grow_arrays(target: Target, committed: Iterable[int]) -> None:
    """Set the arrays' shapes to the blocks that are committed without a gap; `committed` are block numbers.

    While a finished store is repaired, its shapes stay: it can be opened meanwhile.
    """
    known = set(committed)
    prefix = next(block for block in range(target.blocks + 1) if block not in known)
    if prefix == 0:
        return
    prefix = max(prefix, _finished_blocks(target))
    record = read_ledger(target.path, 0)
    files = {
        target.path / ARRAYS / spec.path / "zarr.json": durable.json_bytes(spec.metadata(prefix))
        for spec in row_specs(target.request, target.strata, record.d_in, record.d_out)
    }
    durable.publish_changed(files)


def _finished_blocks(target: Target) -> int:
    """Return the blocks of the finished store that is at the target already; 0 where there is none."""
    with suppress(CorruptData):
        return read_store_record(target.path).blocks if (target.path / STORE).is_file() else 0
    return 0


def _is_committed(target: Target, block: int) -> bool:
    record = _readable(target, block)
    if record is None or target.plan is None or not belongs(record, target.request, target.plan):
        return False
    try:
        for name, file in record.files.items():
            check_size(target.path / ARRAYS / name, file)
        check_size(target.path / moments_path(block), record.moments)
    except CorruptData:
        return False
    return True


def _readable(target: Target, block: int) -> LedgerRecord | None:
    """Return a block's record, if it is there and whole; else the block is made again."""
    try:
        return read_ledger(target.path, block)
    except CorruptData:
        return None
