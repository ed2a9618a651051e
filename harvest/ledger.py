"""Commits blocks: shard files, then the record that says they exist, then the arrays' metadata."""

from collections.abc import Iterable
from pathlib import Path

from safetensors.numpy import save

from harvest.blocks import SIDES, Activations, pack_moments, stored_moments, stratum_arrays
from harvest.plan import Target
from shared import durable
from shared.errors import CorruptData
from shared.layout import (
    ARRAYS,
    LedgerRecord,
    moments_path,
    record_path,
    store_specs,
    stratum_specs,
)
from shared.statistics import Moments
from shared.store import buffers_record, check_size, read_ledger


def missing_blocks(target: Target) -> list[int]:
    """Planned blocks without a ledger record, or with files that are not there in full."""
    return [block for block in range(target.blocks) if not _is_committed(target, block)]


def commit(target: Target, block: int, activations: Activations) -> None:
    """Publish a block. A kill at any point leaves it either committed, or to be done again with the same bytes."""
    request = target.request
    source, captured = activations[request.source_hook], activations[request.target_hook]
    files: dict[str, durable.Buffers] = {}
    moments: dict[str, Moments] = {}
    for stratum in request.strata:
        arrays = stratum_arrays(request, stratum, block, source, captured)
        moments |= {f"{stratum.name}/{side}": stored_moments(arrays[side]) for side in SIDES}
        for name, spec in stratum_specs(request, stratum, source.shape[2], captured.shape[2]).items():
            shards = [spec.shard_path(shard) for shard in spec.block_shards(block)]
            files |= dict(zip(shards, spec.shard_buffers(arrays[name]), strict=True))
    saved = save(pack_moments(moments))
    published = {target.path / ARRAYS / name: data for name, data in files.items()}
    durable.publish_files({**published, target.path / moments_path(block): saved})
    record = LedgerRecord(
        block=block,
        d_in=source.shape[2],
        d_out=captured.shape[2],
        files={name: buffers_record(list(data)) for name, data in files.items()},
        moments=buffers_record([saved]),
    )
    durable.publish_json(target.path / record_path(block), record.model_dump(mode="json"))


def grow_arrays(target: Target, committed: Iterable[int]) -> None:
    """Set the arrays' shapes to the blocks that are committed without a gap; `committed` are block numbers."""
    known = set(committed)
    prefix = next(block for block in range(target.blocks + 1) if block not in known)
    if prefix == 0:
        return
    record = read_ledger(target.path, 0)
    files = {
        target.path / ARRAYS / spec.path / "zarr.json": durable.json_bytes(spec.metadata(prefix))
        for spec in store_specs(target.request, record.d_in, record.d_out)
    }
    durable.publish_files({path: data for path, data in files.items() if not _holds(path, data)})


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def _is_committed(target: Target, block: int) -> bool:
    if not (target.path / record_path(block)).is_file():
        return False
    record = read_ledger(target.path, block)
    try:
        for name, file in record.files.items():
            check_size(target.path / ARRAYS / name, file)
        check_size(target.path / moments_path(block), record.moments)
    except CorruptData:
        return False
    return True
