"""What binds a run's records to each other: `blocks.json`, and the settings that every checkpoint keeps.

Two stores can have one name and one digest and other rows: an extended store, and one that was harvested at once. So a
run pins the checksums of the blocks that it reads. And `config.json` says how a run was trained, so it is compared with
what its checkpoints say.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from shared.bounds import Blocks, Digest
from shared.config import Config, brief, json_digest, read_record
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.store.checks import MOST_RECORD_BYTES
from shared.store.store import Store
from train.live.run_files import BLOCKS, CONFIG
from train.model.checkpoint import STATE, Checkpoint
from train.run.settings import RunConfig, flat, parse_config


class PinnedBlocks(Config):
    """`blocks.json`: the blocks of the store that a run reads, held-out ones included."""

    schema_version: Literal[1] = 1
    checksums: dict[Blocks, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]
    """By block, `Store.block_checksum`."""

    @property
    def digest(self) -> Digest:
        """SHA-256 over the record, which `config.json` names."""
        return json_digest(self.model_dump(mode="json"))


def pinned(store: Store, training: range) -> PinnedBlocks:
    """Return the checksums of the held-out blocks of `store`, and of those of `training` that it has."""
    record = store.record
    wanted = {*range(record.request.held_out_blocks), *training} & set(range(record.blocks))
    return PinnedBlocks(checksums={block: store.block_checksum(block) for block in sorted(wanted)})


def require_own_store(run: Path, config: RunConfig, store: Store) -> None:
    """Raise `UserError` when a block that `run` reads is missing from `store`, or holds other rows there."""
    if wrong := foreign_block(run, config, store):
        raise UserError(
            f"{store.path} is not the store that {run} was trained on: {wrong}; pass the --store that it was trained "
            f"on, or start another run from its weights with --init-from {run}"
        )


def foreign_block(run: Path, config: RunConfig, store: Store, *, whole: bool = True) -> str | None:
    """Return what is wrong with the first block that `run` reads and `store` has otherwise; none: all are the same.

    Runs from before blocks were pinned are compared by the digest of their store's request alone. Unless the store must
    have the `whole` of them, blocks that it lacks do not count. Raises `CorruptData` when `blocks.json` is damaged.
    """
    if store.request.digest != config.request:
        return f"its request is {store.request.digest[:6]}, that of the run is {config.request[:6]}"
    if config.blocks is None or pinned(store, config.training_blocks).digest == config.blocks:
        return None
    for block, checksum in _read_pinned(run, config).checksums.items():
        found = store.block_checksum(block) if block < store.record.blocks else None
        if found is None and whole:
            return f"block {block} is missing, it has {store.record.blocks} blocks"
        if found not in (None, checksum):
            return f"block {block} holds other rows (checksum {found}, the run read {checksum})"
    return None


def _read_pinned(run: Path, config: RunConfig) -> PinnedBlocks:
    path = run / BLOCKS
    if not path.is_file():
        raise CorruptData(f"{path} is missing, and the store is not the one that {run} was trained on; restore it")
    found = read_record(PinnedBlocks, durable.read_json(path, MOST_RECORD_BYTES), path)
    if found.digest != config.blocks:
        raise CorruptData(f"{path} is not the record that {CONFIG} names; restore both from one copy of the run")
    return found


_NOT_TRAINED_BY = {
    "store",
    "settings.threads",
    "settings.device",
    "settings.kernels",
    "settings.blas",
    "settings.resident_rows",
    "settings.step_graph",
}
"""Where the store was and its rows are kept, how steps are launched, and what `train.run.determinism` records apart."""


def require_own_config(run: Path, config: RunConfig, found: Checkpoint) -> None:
    """Raise `UserError` that names the first setting of `config.json` with which a checkpoint was not trained.

    A run that was made longer since goes on from it. Checkpoints from before they kept settings are taken as they are.
    """
    if found.state.config is None:
        return
    then = parse_config(found.state.config, found.path / STATE)
    before, now = flat(then), flat(config)
    if (
        config.extensions[: len(then.extensions)] == then.extensions
        and config.lengths[len(then.extensions)] == then.settings.steps
    ):
        before |= {name: now[name] for name in ("settings.steps", "extensions")}
    odd = [name for name in {**before, **now} if before.get(name) != now.get(name) and name not in _NOT_TRAINED_BY]
    if odd:
        name = odd[0].removeprefix("settings.")
        longer = f"; to train longer: train resume {run} --steps N" if name == "steps" else ""
        raise UserError(
            f"{run / CONFIG}: {name} is {brief(now.get(odd[0]))}, and the checkpoint of step {found.step} was trained "
            f"with {brief(before.get(odd[0]))}; put that back{longer}; to train with other settings: train run ... "
            f"--init-from {run}"
        )
