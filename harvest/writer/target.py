"""A store to be made: its request, its plan, and the token windows that the plan names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from harvest.text.packing import Windows
from harvest.writer.recover_records import check_request, read_records, refuse_packed
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.store.arrays import group_metadata
from shared.store.checks import check_shard, fault
from shared.store.layout import (
    ARRAYS,
    PLAN,
    REQUEST,
    StorePlan,
    StoreRequest,
    StratumPlan,
    documents_spec,
    tokens_spec,
)
from shared.store.strata import Stratum

Push = Callable[[Path], None]
"""Hears of a store's folder when a part of the store is committed there."""


def push_nowhere(path: Path) -> None:
    """Take no notice: the store is made where it stays."""


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
    def strata(self) -> tuple[Stratum, ...]:
        """The strata that are stored, once that is planned."""
        return self.plan.stored_strata if self.plan else ()

    @property
    def special(self) -> tuple[int, ...]:
        """Tokens whose rows are left out."""
        return self.plan.special_tokens if self.plan else ()

    @property
    def blocks(self) -> int:
        """All planned blocks, the held-out ones included."""
        return self.request.held_out_blocks + sum(self.segments)


def load_target(path: Path, request: StoreRequest) -> Target:
    """Load what is at `path` already. Raises `UserError` when it was made for another request, or when it is packed."""
    refuse_packed(path)
    found = read_records(path)
    check_request(path, found.request, request)
    return Target(path=path, request=request, plan=found.plan)


def needs_packing(target: Target, training_blocks: int) -> bool:
    """Tell whether tokens must be added before `training_blocks` are planned. Raises `UserError` on a larger plan."""
    if target.plan is None:
        return True
    planned = target.plan.training_blocks
    if planned > training_blocks:
        tokens = planned * target.request.block_tokens
        raise UserError(
            f"{target.path} is unfinished and was planned with {planned} training blocks, more than the "
            f"{training_blocks} now asked for: finish it with --tokens {tokens}, or remove the folder"
        )
    return planned < training_blocks and not target.plan.exhausted


def publish_records(target: Target) -> None:
    """Publish request, plan, groups and the windows' metadata of a planned target, unless they are there as they are.

    A plan that is there and goes further stays.
    """
    assert target.plan is not None
    begun = read_records(target.path).plan
    target = replace(target, plan=begun if begun and begun.continues(target.plan) else target.plan)
    assert target.plan is not None
    specs = (tokens_spec(target.request), documents_spec(target.request))
    files = {target.path / ARRAYS / spec.path / "zarr.json": spec.metadata(target.blocks) for spec in specs}
    records = {REQUEST: target.request, PLAN: target.plan}
    files |= {target.path / name: record.model_dump(mode="json") for name, record in records.items()}
    durable.publish_changed({**_groups(target, target.strata), **{p: durable.json_bytes(v) for p, v in files.items()}})


def begin(target: Target, strata: Sequence[StratumPlan]) -> None:
    """Write the first files of a store: its request and the groups of its Zarr hierarchy."""
    durable.publish_json(target.path / REQUEST, target.request.model_dump(mode="json"))
    durable.publish_files(_groups(target, [stratum for stratum in strata if stratum.rows]))


def _groups(target: Target, strata: Sequence[StratumPlan | Stratum]) -> dict[Path, bytes]:
    groups = ["", "strata", *(f"strata/{stratum.name}" for stratum in strata)]
    return {target.path / ARRAYS / group / "zarr.json": durable.json_bytes(group_metadata()) for group in groups}


def damaged_files(target: Target) -> list[str]:
    """List planned shard files of `tokens` and `documents` that are not as written, by path below the Zarr root."""
    files = target.plan.token_files if target.plan else {}
    return [name for name, record in files.items() if fault(target.path / ARRAYS / name, record)]


def read_block(target: Target, block: int) -> Windows:
    """Read the windows of a block. Raises `CorruptData` when they are not what was planned."""
    assert target.plan is not None
    root, found = target.path / ARRAYS, []
    for spec in (tokens_spec(target.request), documents_spec(target.request)):
        parts = []
        for shard in spec.block_shards(block):
            name = spec.shard_path(shard)
            check_shard(root, spec, shard)
            if wrong := fault(root / name, target.plan.token_files[name]):
                raise CorruptData(f"{root / name}: {wrong}; repair it with: harvest repair {target.path}")
            count = spec.payload_bytes // np.dtype(spec.dtype).itemsize
            parts.append(np.fromfile(root / name, spec.dtype, count=count).reshape(-1, target.request.context_size))
        found.append(np.concatenate(parts))
    return Windows(*found)
