"""Token windows on disk, and the plan of a store: exact before any model is loaded.

A segment's windows are spooled in order of the text, then permuted on their own into whole blocks. The order of
publishing is request, groups, token shards, array metadata, plan: a plan that exists names tokens that exist.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from harvest.corpus import Corpus
from harvest.encoding import Encoder
from harvest.packing import Packed, Quota, TokenStream, pack
from shared import durable
from shared.errors import CorruptData, UserError
from shared.keyed import permutation
from shared.layout import (
    ARRAYS,
    PLAN,
    REQUEST,
    FileRecord,
    StorePlan,
    StoreRequest,
    group_metadata,
    tokens_spec,
)
from shared.progress import Progress
from shared.store import buffers_record, check_shard, fault, read_plan, read_request

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A store to be made: its folder, its request, and its plan once there is one."""

    path: Path
    request: StoreRequest
    plan: StorePlan | None = None

    @property
    def segments(self) -> tuple[int, ...]:
        """Training blocks of each segment that is planned."""
        return self.plan.segments if self.plan else ()

    @property
    def blocks(self) -> int:
        """All planned blocks, the held-out ones included."""
        return self.request.held_out_blocks + sum(self.segments)


def load_target(path: Path, request: StoreRequest) -> Target:
    """What is at `path` already. Raises `UserError` when it was made for another request."""
    if not (path / REQUEST).is_file():
        return Target(path=path, request=request)
    found = read_request(path)
    if found != request:
        raise UserError(
            f"{path / REQUEST} is of another request: {_difference(found, request)}; choose another --cache, or "
            "remove the folder"
        )
    return Target(path=path, request=request, plan=read_plan(path) if (path / PLAN).is_file() else None)


def needs_packing(target: Target, training_blocks: int) -> bool:
    """Whether tokens must be added before `training_blocks` are planned. Raises `UserError` on a larger plan."""
    if target.plan is None:
        return True
    planned = target.plan.training_blocks
    if planned > training_blocks:
        tokens = planned * target.request.block_sequences * target.request.context_size
        raise UserError(
            f"{target.path} is unfinished and was planned with {planned} training blocks, more than the "
            f"{training_blocks} now asked for: finish it with --tokens {tokens}, or remove the folder"
        )
    return planned < training_blocks and not target.plan.exhausted


def extend(targets: Sequence[Target], training_blocks: int, corpus: Corpus, encoder: Encoder) -> list[Target]:
    """Add a segment to each target, so that it plans `training_blocks`, or all that the corpus holds.

    The targets' requests differ in nothing that tokens depend on, and their segments are the same. Raises `UserError`,
    with nothing written, when the corpus has no whole training block.
    """
    first = targets[0]
    request, size, before = first.request, first.request.block_sequences, sum(first.segments)
    payload = request.context_size - 1
    quota = Quota(
        held_out=request.held_out_blocks * size, skipped=before * size, wanted=(training_blocks - before) * size
    )
    with _spool(first.path) as file:
        stream = TokenStream(encoder.encode(corpus.read()), encoder.separator, payload)
        with Progress("pack", quota.wanted * payload, "tokens") as bar:
            packed = pack(stream, payload, quota, lambda part: bar.update(_append(file, part) // 4))
        added = packed.windows // size
        _check(packed, quota, before + added, training_blocks, request)
        file.flush()
        windows = np.memmap(file.name, np.int32, "r", shape=(packed.windows, payload)) if added else packed.held_out
        segment = _Segment(request, first, windows[: added * size], packed.held_out, encoder.bos)
        return [_publish(target, segment, packed, exhausted=packed.windows < quota.wanted) for target in targets]


def read_block(target: Target, block: int) -> Ids:
    """The token windows [sequences, context] of a block. Raises `CorruptData` when they are not what was planned."""
    assert target.plan is not None
    spec, parts = tokens_spec(target.request), []
    for shard in spec.block_shards(block):
        name = spec.shard_path(shard)
        path = target.path / ARRAYS / name
        check_shard(target.path / ARRAYS, spec, shard)
        if wrong := fault(path, target.plan.token_files[name]):
            raise CorruptData(f"{path}: {wrong}; remove {target.path} and run the same harvest again")
        count = spec.payload_bytes // np.dtype(spec.dtype).itemsize
        parts.append(np.fromfile(path, spec.dtype, count=count).reshape(-1, target.request.context_size))
    return np.concatenate(parts)


class _Segment:
    """The blocks that a segment adds: numbers and token windows."""

    def __init__(self, request: StoreRequest, before: Target, windows: Ids, held_out: Ids, bos: int) -> None:
        self.blocks = len(windows) // request.block_sequences
        self._request, self._windows, self._held_out, self._bos = request, windows, held_out, bos
        self._first = before.blocks if before.segments else 0
        self._order = permutation(len(windows), "windows", request.seed, len(before.segments))

    def __iter__(self) -> Iterator[tuple[int, Ids]]:
        """Yield (block, windows [block_sequences, context])."""
        size = self._request.block_sequences
        reserved = [self._held_out[i : i + size] for i in range(0, len(self._held_out), size)]
        for block, payload in enumerate(reserved):
            yield block, self._with_bos(payload)
        for i in range(self.blocks):
            payload = self._windows[self._order[i * size : (i + 1) * size]]
            yield self._first + len(reserved) + i, self._with_bos(payload)

    def _with_bos(self, payload: Ids) -> Ids:
        return np.pad(payload, ((0, 0), (1, 0)), constant_values=self._bos)


def _publish(target: Target, segment: _Segment, packed: Packed, *, exhausted: bool) -> Target:
    request, root = target.request, target.path / ARRAYS
    if target.plan is None:
        _begin(target)
    files = dict(target.plan.token_files) if target.plan else {}
    _remove_unplanned(root, files)
    spec = tokens_spec(request)
    for block, windows in segment:
        files |= _publish_block(root, spec.block_shards(block), windows, request)
    counts = packed.counts(segment.blocks * request.block_sequences, request.context_size - 1)
    plan = StorePlan(
        request=request.digest,
        segments=(*target.segments, segment.blocks) if segment.blocks else target.segments,
        packing=(*(target.plan.packing if target.plan else ()), *([counts] if segment.blocks else [])),
        token_files=files,
        exhausted=exhausted,
    )
    done = replace(target, plan=plan)
    durable.publish_json(root / spec.path / "zarr.json", spec.metadata(done.blocks))
    durable.publish_json(target.path / PLAN, plan.model_dump(mode="json"))
    return done


def _begin(target: Target) -> None:
    """The first files of a store: its request and the groups of its Zarr hierarchy."""
    durable.publish_json(target.path / REQUEST, target.request.model_dump(mode="json"))
    groups = ["", "strata", *(f"strata/{stratum.name}" for stratum in target.request.strata)]
    data = durable.json_bytes(group_metadata())
    durable.publish_files({target.path / ARRAYS / group / "zarr.json": data for group in groups})


def _publish_block(root: Path, shards: range, windows: Ids, request: StoreRequest) -> dict[str, FileRecord]:
    spec = tokens_spec(request)
    named = {spec.shard_path(shard): data for shard, data in zip(shards, spec.shard_buffers(windows), strict=True)}
    durable.publish_files({root / name: data for name, data in named.items()})
    return {name: buffers_record(data) for name, data in named.items()}


def _remove_unplanned(root: Path, planned: dict[str, FileRecord]) -> None:
    """Token shards that a killed harvest wrote before it could publish its plan."""
    for path in (root / "tokens" / "c").glob("*/*"):
        if path.relative_to(root).as_posix() not in planned:
            path.unlink()
            path.parent.rmdir()


@contextmanager
def _spool(store: Path) -> Iterator[BinaryIO]:
    """A file beside the store for the windows in order of the text: tokens of a large harvest do not fit in memory."""
    durable.make_folder(store.parent)
    path = store.parent / f"{store.name}.spool{durable.TEMPORARY}"
    try:
        with open(path, "w+b") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _append(file: BinaryIO, part: Ids) -> int:
    """Write `part` and return the file's size in bytes."""
    try:
        file.write(part.tobytes())
        return file.tell()
    except OSError as error:
        raise durable.explain(error, [Path(file.name)]) from error


def _check(packed: Packed, quota: Quota, blocks: int, wanted: int, request: StoreRequest) -> None:
    """Refuse a corpus without a whole training block, and warn about one that is shorter than asked."""
    per_block = request.block_sequences * request.context_size
    if blocks == 0 or (not quota.skipped and len(packed.held_out) < quota.held_out):
        needed = (request.held_out_blocks + 1) * request.block_sequences * (request.context_size - 1)
        raise UserError(
            f"{request.corpus.name}: its {packed.documents:,} documents hold {packed.tokens:,} tokens, and "
            f"{request.held_out_blocks} held-out blocks and one training block need {needed:,}; give more text, or "
            "lower store.block_sequences or store.held_out_blocks"
        )
    if blocks < wanted:
        print(
            f"warning: {request.corpus.name} holds {blocks * per_block:,} training tokens in whole blocks, "
            f"{wanted * per_block:,} were asked for; taking what there is",
            file=sys.stderr,
        )


def _difference(found: StoreRequest, asked: StoreRequest) -> str:
    """The first field that differs, by dotted name, with both values."""
    theirs, ours = _flat(found.model_dump(mode="json")), _flat(asked.model_dump(mode="json"))
    name = next(key for key in [*ours, *theirs] if theirs.get(key) != ours.get(key))
    return f"{name} is {theirs.get(name)} there and {ours.get(name)} here"


def _flat(value: dict[str, object], prefix: str = "") -> dict[str, object]:
    result: dict[str, object] = {}
    for key, item in value.items():
        result |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {prefix + key: item}
    return result
