"""Activation pairs from elsewhere become a store like a harvest's, by the same writer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from harvest.digests import file_sha256
from harvest.imports.formats import open_pairs
from harvest.imports.row_files import Names, Pairs, Side
from harvest.llm.model_files import ModelFiles, find_model, read_shape
from harvest.run.pipeline import is_finished, lock_store
from harvest.run.stored_values import as_array
from harvest.settings import ModelSettings, StoreSettings
from harvest.text.packing import Windows
from harvest.writer import attention_sinks, finish, ledger
from harvest.writer.blocks import BlockLayout, Buffers, block_layout
from harvest.writer.recover_records import check_request
from harvest.writer.target import (
    Push,
    Target,
    damaged_files,
    load_target,
    publish_records,
    push_nowhere,
    read_block,
)
from harvest.writer.tokens import lay_out, lay_out_again
from shared.bounds import (
    MAX_CONTEXT,
    MAX_IMPORTED,
    MAX_STRATA,
    Blocks,
    Count,
    Edges,
    Label,
    Layer,
    Position,
    Seed,
    Sequences,
)
from shared.config import Changes, Config, build, changes_of, json_digest, override
from shared.console.progress import Progress
from shared.errors import ProjectError, UserError, warn
from shared.files import durable
from shared.store.import_origin import UNKNOWN, ImportedFile, ImportFormat, ImportOrigin
from shared.store.layout import StoreRequest
from shared.store.row_arrays import STORAGE_DTYPES, FloatType, StorageType, captured_as

_DEFAULTS = StoreSettings()
_NO_SEQUENCES = 256
"""Neighbouring rows that make up a window where the files have no sequences."""


class ImportStore(Config):
    """What is written, as in a harvest."""

    edges: Edges | None = None
    """First positions of the strata; those of a harvest if not given, and one stratum without sequences."""
    keep: dict[Position, float] = Field(default={}, max_length=MAX_STRATA)
    """Share of a stratum's rows to store, by its first position; 1 where not named."""
    cap: dict[Position, Count] = Field(default={}, max_length=MAX_STRATA)
    """Maximum number of a stratum's rows to store from a block, by its first position."""
    max_norm_quantile: float = Field(default=1.0, gt=0, le=1)
    """Leave out the rows of a stratum whose source norm is above this quantile of its block; 1 leaves out none."""
    storage: StorageType = "bfloat16"
    """The type of stored activations, as in a harvest."""
    block_sequences: Sequences = _DEFAULTS.block_sequences
    """Sequences per block."""
    held_out_blocks: Blocks = _DEFAULTS.held_out_blocks
    """Blocks of the first sequences, kept from training."""


class ImportSettings(Config):
    """The settings of an import."""

    label: Label = "imported"
    """Start of the store's name."""
    format: ImportFormat
    source: str | None = None
    """Name of the sources: the start of a .npy file's name, a tensor, or a column; `source` if not given, or
    the only column of activations. With `vllm` HOOK:N, the N-th of the states that were saved."""
    target: str | None = None
    """Name of the targets, in the same way."""
    tokens: str | None = None
    """Name of the token ids; `tokens` if not given, or `token_ids` with `saelens`."""
    layer: Layer | None = None
    """The layer that rows are of; if not given, by a name such as `blocks.8.hook_mlp_out`, else 0. With `clt-forge` the
    layer to import."""
    model: str | None = None
    """The model that computed the rows, a Hugging Face folder or a name on the hub: its name, digest and tokenizer go
    into the store."""
    context_size: int | None = Field(None, ge=1, le=MAX_CONTEXT)
    """Tokens of a sequence, where arrays are [rows, d]; with `vllm` those taken of each request."""
    store: ImportStore = ImportStore()
    seed: Seed = 0
    """Seed of every permutation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Files to import, found and identified."""

    pairs: Pairs
    request: StoreRequest
    windows: Windows
    model: ModelFiles | None

    @property
    def sides(self) -> dict[str, Side]:
        """The files' rows by hook."""
        return {self.request.source_hook: self.pairs.source, self.request.target_hook: self.pairs.target}


def load_import_settings(changes: Changes = (), **given: object) -> ImportSettings:
    """Return the settings of an import from what is given, and `changes` by name. Raises `UserError`."""
    named = {name: value for name, value in given.items() if value is not None}
    made = changes_of(changes)
    return build(ImportSettings, override(named, made), "settings of the import", made)


def import_pairs(
    settings: ImportSettings, paths: Sequence[Path | str], cache: Path | str, *, force: bool = False
) -> Path:
    """Make (or find, or continue) the store of the files at `paths` in `cache`, and return its folder.

    `force` goes on where the disk looks too small. Raises `UserError` when the files cannot be pairs, with nothing
    written, and `ProjectError` on a row that is not finite or that the storage type cannot hold.
    """
    inputs = identify(settings, [Path(path) for path in paths])
    path = Path(cache) / inputs.request.folder
    if is_finished(path, inputs.request, 1):
        return path
    with lock_store(path):
        durable.sweep(path)
        target = load_target(path, inputs.request)
        if not force:
            _require_space(inputs, path)
        _explain_losses(settings, inputs)
        if target.plan:
            publish_records(target)
            lay_out_again(target, damaged_files(target), inputs.windows)
        else:
            target = lay_out(target, inputs.windows)
        write_blocks(target, inputs, ledger.missing_blocks(target))
    return path


def repair_from(path: Path, request: StoreRequest, files: Sequence[Path], model: str | None) -> Inputs:
    """Open the files that the store at `path` was imported from. Raises `UserError` when they are others."""
    origin = request.imported
    assert origin is not None
    known = request.model.weights != UNKNOWN
    settings = ImportSettings(
        label=request.label,
        format=origin.format,
        source=origin.source,
        target=origin.target,
        tokens=origin.tokens,
        layer=request.layer,
        context_size=request.context_size if origin.positions else None,
        model=model or (request.model.name if known else None),
        store=ImportStore(**{name: getattr(request, name) for name in ImportStore.model_fields}),
        seed=request.seed,
    )
    inputs = identify(settings, files)
    found = inputs.request.imported
    assert found is not None
    for theirs, ours in zip_longest(found.files, origin.files):
        if theirs != ours:
            raise UserError(f"{path} was imported from other files: {_digest(ours)}, and here is {_digest(theirs)}")
    check_request(path, request, inputs.request, "pass the files and the --model that it was imported with")
    return inputs


def _digest(file: ImportedFile | None) -> str:
    return f"{file.name} of {file.bytes:,} bytes with SHA-256 {file.sha256[:12]}" if file else "no further file"


def write_blocks(target: Target, inputs: Inputs, blocks: Sequence[int], push: Push = push_nowhere) -> None:
    """Commit `blocks` of a planned store, and finish it; `push` hears of the store when a block is committed."""
    size, there = target.request.block_tokens, target.blocks - len(blocks)
    warned = there > target.request.held_out_blocks
    missing = set(blocks)
    with Progress("import", target.blocks * size, "rows", there * size) as bar:
        for done, block in enumerate(blocks, there + 1):
            windows = read_block(target, block)
            layout = block_layout(target.request, target.strata, windows, block, target.special)
            moments = ledger.commit(target, block, layout, _buffers(target.request, inputs, windows, layout), 1)
            missing.discard(block)
            ledger.grow_arrays(target, set(range(target.blocks)) - missing)
            push(target.path)
            bar.update(done * size)
            if not warned and block >= target.request.held_out_blocks:
                warned = True
                for line in attention_sinks.warnings(target.strata, moments) + finish.floor_warnings(target, [block]):
                    warn(line)
    ledger.grow_arrays(target, range(target.blocks))
    finish.finish(target, inputs.model)


def _buffers(request: StoreRequest, inputs: Inputs, windows: Windows, layout: BlockLayout) -> Buffers:
    """Read a block's rows to their places; `documents` say which sequences of the files its windows are."""
    context, kind = request.context_size, captured_as(request.storage)
    buffers: Buffers = {
        hook: np.empty((len(layout.rows), s.width), STORAGE_DTYPES[kind]) for hook, s in inputs.sides.items()
    }
    sequences = windows.documents[:, 0]
    for number in np.argsort(sequences, kind="stable").tolist():  # in order of the files
        places, rows = layout.batch(number, number + 1)
        first = int(sequences[number]) * context
        for hook, side in inputs.sides.items():
            buffers[hook][places] = _stored(side, first, context, kind)[rows]
    return buffers


def _stored(side: Side, first: int, count: int, storage: FloatType) -> NDArray[Any]:
    """Read rows in a type of floats. Raises `ProjectError` that names one which is not finite."""
    rows = side.read(first, first + count)
    stored = rows.to(getattr(torch, storage))
    if not torch.isfinite(stored.sum(dtype=torch.float32)):  # one pass; a sum of finite values may overflow, too
        _check_finite(side, first, rows, "; take another copy of the file, or leave out its sequence")
        _check_finite(side, first, stored, f" as {storage}; choose --set store.storage=bfloat16")
    return as_array(stored)


def _check_finite(side: Side, first: int, rows: Tensor, remedy: str) -> None:
    if len(wrong := torch.nonzero(~torch.isfinite(rows).all(dim=1))):
        raise ProjectError(f"{side.place(first + int(wrong[0]))} is not finite{remedy}")


def identify(settings: ImportSettings, paths: Sequence[Path]) -> Inputs:
    """Open the files, and state what determines the store's bytes. Raises `UserError`."""
    asked = {name: getattr(settings, name) for name in ("source", "target", "tokens", "layer", "context_size")}
    pairs = open_pairs(paths, settings.format, Names(**asked))
    model = find_model(ModelSettings(name=settings.model)) if settings.model else None
    context, positions = _context_size(settings, pairs)
    sequences = pairs.source.rows // context
    tokens = np.zeros((sequences, context), np.int32)
    if pairs.tokens is not None:
        tokens = pairs.tokens.ravel()[: sequences * context].reshape(sequences, context)
        _check_vocabulary(tokens, model)
    numbers = np.broadcast_to(np.arange(sequences, dtype=np.int32)[:, None], tokens.shape)
    bos = pairs.tokens is not None and positions and context > 1 and bool((tokens[:, 0] == tokens[0, 0]).all())
    request = _request(settings, pairs, model, context_size=context, positions=positions, bos=bos)
    return Inputs(pairs=pairs, request=request, windows=Windows(tokens, numbers), model=model)


def _context_size(settings: ImportSettings, pairs: Pairs) -> tuple[int, bool]:
    """Return the tokens of a window, and whether windows are sequences."""
    tokens = pairs.tokens.shape[1] if pairs.tokens is not None and pairs.tokens.ndim == 2 else None
    known = {
        "the rows' arrays": pairs.source.context_size,
        "token ids": tokens,
        "the files": pairs.context_size,
        "--context-size": settings.context_size,
    }
    given = {name: size for name, size in known.items() if size}
    if len(set(given.values())) > 1:
        said = ", ".join(f"{size:,} by {name}" for name, size in given.items())
        raise UserError(f"sequences have different lengths: {said}")
    if not given:
        return min(_NO_SEQUENCES, pairs.source.rows), False
    size = next(iter(given.values()))
    if size > MAX_CONTEXT:
        raise UserError(f"sequences of {size:,} tokens, and a store takes at most {MAX_CONTEXT:,}")
    for part in (*pairs.source.parts, *pairs.target.parts):
        if part.rows % size:
            raise UserError(f"{part.name}: {part.rows:,} rows are not a whole number of sequences of {size:,} tokens")
    return size, True


def _check_vocabulary(tokens: NDArray[np.int32], model: ModelFiles | None) -> None:
    if model and (largest := int(tokens.max())) >= (size := read_shape(model.folder).vocabulary):
        raise UserError(
            f"token id {largest} is not among the {size:,} of {model.folder}; pass the --model of these rows"
        )


def _request(
    settings: ImportSettings, pairs: Pairs, model: ModelFiles | None, *, context_size: int, positions: bool, bos: bool
) -> StoreRequest:
    names, store = pairs.names, settings.store
    source_hook, target_hook = pairs.hooks
    layer = settings.layer if settings.layer is not None else _layer_of(source_hook)
    edges = store.edges or _edges(pairs, positions)
    origin = {
        "format": settings.format,
        "files": _identities(pairs.files),
        "source": names.source,
        "target": names.target,
        "tokens": names.tokens if pairs.tokens is not None else None,
        "positions": positions,
    }
    weights = {
        "name": model.name if model else "unknown",
        "revision": model.revision if model else None,
        "weights": model.weights_digest() if model else UNKNOWN,
        "dtype": "float32",  # not known: what `verify --against-model` runs in
        "device": "cpu",
    }
    imported = build(ImportOrigin, origin, "origin of the import")
    corpus = {
        "name": f"imported from {len(imported.files)} files",
        "digest": json_digest(imported.model_dump(mode="json")),
        "column": None,
        "kind": "input_ids",
        "order": "as_read",
        "separator": None,
    }
    given = {
        "label": settings.label,
        "model": weights,
        "tokenizer": model.tokenizer_digest() if model else UNKNOWN,
        "corpus": corpus,
        "context_size": context_size,
        "bos": bos,
        "documents": "joined",
        "layer": layer,
        "source_hook": source_hook,
        "target_hook": target_hook,
        "edges": edges,
        "keep": store.keep,
        "cap": store.cap,
        "exclude_special": False,
        "max_norm_quantile": store.max_norm_quantile,
        "storage": store.storage,
        "block_sequences": store.block_sequences,
        "held_out_blocks": store.held_out_blocks,
        "batch_sequences": 1,
        "unembedding": False,
        "seed": settings.seed,
        "imported": imported,
    }
    return build(StoreRequest, given, "request of the import")


def _edges(pairs: Pairs, positions: bool) -> tuple[int, ...]:
    """Return a harvest's edges, but for the one at 1 where the files lack position 0; one stratum without positions."""
    if not positions:
        return (0,)
    return tuple(edge for edge in _DEFAULTS.edges if edge != 1 or pairs.has_position_0)


def _layer_of(hook: str) -> int:
    found = re.match(r"blocks\.(\d{1,4})\.", hook)
    return int(found[1]) if found else 0


def _identities(files: Sequence[Path]) -> list[ImportedFile]:
    """Return names, sizes and digests, in order of name."""
    if len(files) > MAX_IMPORTED:
        raise UserError(f"{len(files):,} files, and at most {MAX_IMPORTED:,} are imported into a store; join some")
    sizes, found, done = [file.stat().st_size for file in files], [], 0
    with Progress("hash the files", sum(sizes), "bytes") as bar:
        for file, size in zip(files, sizes, strict=True):
            found.append(ImportedFile(name=file.name, bytes=size, sha256=file_sha256(file)))
            bar.update(done := done + size)
    return found


def _require_space(inputs: Inputs, path: Path) -> None:
    request = inputs.request
    rows = inputs.windows.tokens.size
    item = np.dtype(STORAGE_DTYPES[request.storage]).itemsize
    needed = rows * (item * sum(side.width for side in inputs.sides.values()) + 16)
    durable.require_space(path.parent, needed, "the store (--force goes on anyway)")


def _explain_losses(settings: ImportSettings, inputs: Inputs) -> None:
    """Warn of what the files do not say, and of what the storage type loses."""
    pairs, origin, request = inputs.pairs, inputs.request.imported, inputs.request
    assert origin is not None
    if not origin.positions:
        warn(
            f"rows do not come in sequences, so windows are {request.context_size} neighbouring rows each: there are "
            "no position strata, position 0 cannot be left out of training, and contexts of latents are neighbouring "
            "rows. If the rows are in order of sequences, pass --context-size"
        )
    if origin.tokens is None:
        warn("there are no token ids: samples and reports show token 0 everywhere, and no text")
    elif inputs.model is None:
        warn("no model is named, so there is no tokenizer, and samples show token ids: pass --model FOLDER or NAME")
    for side in {id(side): side for side in (pairs.source, pairs.target)}.values():
        if (side.dtype, request.storage) == ("float16", "bfloat16"):
            warn(
                f"{side.parts[0].name} is float16, and bfloat16 keeps 8 of its 11 bits; "
                "keep all with --set store.storage=float16"
            )
    if not pairs.has_position_0:
        warn("the files lack each sequence's BOS: position p of the store is the model's p + 1")
    if pairs.short:
        warn(f"{pairs.short:,} sequences are shorter than {request.context_size:,} tokens and are left out")
    left = len(inputs.windows.tokens) % request.block_sequences
    if left:
        warn(f"the last {left:,} of {len(inputs.windows.tokens):,} sequences do not fill a block and are left out")
