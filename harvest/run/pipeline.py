"""A harvest from settings to finished stores: identify, plan, capture, finish."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from harvest.llm.model_files import (
    ModelFiles,
    ModelShape,
    find_model,
    read_shape,
    read_special_tokens,
    resolve_device,
    window_tokens,
)
from harvest.run import object_cache
from harvest.run.estimate import Estimate, estimate, require_space
from harvest.run.ranks import Ranks
from harvest.settings import Settings
from harvest.text.corpus import Corpus, open_corpus
from harvest.writer import finish, ledger
from harvest.writer.recover_records import check_request, read_records
from harvest.writer.request_differences import explain_new, find_same
from harvest.writer.target import Push, Target, damaged_files, load_target, needs_packing, publish_records, push_nowhere
from harvest.writer.tokens import extend, restore, spool_path
from shared.config import build
from shared.console.terminal import say
from shared.errors import CorruptData, UserError, warn
from shared.files import durable
from shared.files.object_store import is_address, local_folder
from shared.store.arrays import INNER_ROWS
from shared.store.checks import read_plan
from shared.store.layout import PLAN, STATISTICS, STORE, ModelIdentity, StoreRequest
from shared.store.store import Store

_CUDA_TOKENS, _CPU_TOKENS, _CPU_VALUES = 8192, 2048, 2**22
"""Tokens per forward pass, and on CPU the values of one activation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A model and a text, found and identified, and the request of each layer's store."""

    model: ModelFiles
    shape: ModelShape
    corpus: Corpus
    requests: tuple[StoreRequest, ...]
    training_blocks: int
    """Blocks that hold at least the tokens asked for."""


def harvest(settings: Settings, cache: Path | str, *, force: bool = False, inexact: bool = False) -> list[Path]:
    """Make (or find, or extend) one store per layer in `cache`; returns their folders, in order of the layers.

    Finished stores are found without torch. `force` goes on where the disk looks too small, and `inexact` where blocks
    that are there were computed on a GPU of another kind. Of several processes, the
    first plans and finishes the stores, under a lock that it then shares with the others, and returns the folders.

    `cache` may be an address of objects: stores are made in a local folder, and every block is sent once it is there.
    """
    inputs, cache = identify(settings), local_folder(cache)
    if not is_address(cache):
        return _harvest(inputs, settings, cache, force=force, inexact=inexact)
    paths = [cache / request.folder for request in inputs.requests]
    wanted, names = zip(paths, inputs.requests, strict=True), [path.name for path in paths]
    if all(object_cache.is_finished(path, request, inputs.training_blocks) for path, request in wanted):
        object_cache.remove_leases_of_dead(cache, names)
    else:
        with object_cache.writing(cache, names) as objects:
            # Rows do not stay here: no room for all is needed.
            for path in _harvest(inputs, settings, objects.folder, force=True, inexact=inexact, push=objects.push):
                objects.push(path)
    return paths


def _harvest(
    inputs: Inputs,
    settings: Settings,
    cache: Path,
    *,
    force: bool,
    inexact: bool,
    push: Push = push_nowhere,
) -> list[Path]:
    """Make the stores in a folder; `push` hears of each when its tokens or a block are published."""
    inputs, paths = locate(inputs, cache)
    with Ranks() as ranks, ExitStack() as locks:
        if ranks.first:
            _warn_if_short(paths, inputs)
            with ranks.leading():
                held = [locks.enter_context(lock_store(path)) for path, _ in _unfinished(paths, inputs)]
                found = _targets(paths, inputs) if held else []  # others may have finished some by then
                planned, widths = prepare(found, inputs, settings, force=force)
                # Without those that `prepare` alone made whole: other processes find them finished.
                targets = [t for t in planned if not is_finished(t.path, t.request, inputs.training_blocks)]
                for lock in held:
                    lock.share()
        else:
            ranks.follow()
            for path, _ in _unfinished(paths, inputs):
                locks.enter_context(lock_store(path, shared=True))
            targets, widths = _targets(paths, inputs), {}
        if targets:
            _make(targets, inputs, settings, ranks, widths, inexact=inexact, push=push)
    return paths if ranks.first else []


def estimates(settings: Settings, cache: Path | str) -> list[Estimate]:
    """Estimate what `harvest` would write, a store per layer; no weights are loaded, nothing is written."""
    with _located(settings, cache) as (inputs, paths):
        _warn_if_short(paths, inputs)
        targets = [load_target(path, request) for path, request in zip(paths, inputs.requests, strict=True)]
        widths = hook_widths(targets, inputs)
        return [estimate(target, inputs.training_blocks, widths, inputs.model) for target in targets]


@contextmanager
def _located(settings: Settings, cache: Path | str) -> Iterator[tuple[Inputs, list[Path]]]:
    """Give the inputs, and the folders of their stores; of those in object storage, folders with their records."""
    inputs, cache = identify(settings), local_folder(cache)
    names = [request.folder for request in inputs.requests]
    with object_cache.looking(cache, names) if is_address(cache) else nullcontext(cache) as folder:
        yield locate(inputs, folder)


def explain(settings: Settings) -> list[str]:
    """Return lines on what the source and the target of the first layer mean in this model; no weights are loaded."""
    inputs = identify(settings)
    from harvest.llm.pair_meaning import explain_pair

    request = inputs.requests[0]
    return explain_pair(inputs.model.folder, request.source_hook, request.target_hook)


def measure(settings: Settings, cache: Path | str) -> float:
    """Return the seconds that the forward passes of all blocks to come will take, by the speed of a few batches."""
    with _located(settings, cache) as (inputs, paths):
        targets = [load_target(path, request) for path, request in zip(paths, inputs.requests, strict=True)]
        blocks = targets[0].request.held_out_blocks + inputs.training_blocks
        todo = max(blocks - (t.blocks - len(ledger.missing_blocks(t)) if t.plan else 0) for t in targets)
    from harvest.run.runner import seconds_per_token

    workers = settings.workers or Ranks().cores
    per_token = seconds_per_token(inputs.model.folder, targets, inputs.shape.vocabulary, workers)
    return per_token * todo * targets[0].request.block_tokens


def identify(settings: Settings) -> Inputs:
    """Find model and text, and state what determines the stores' bytes. Raises `UserError` on what cannot work."""
    model = find_model(settings.model)
    shape = read_shape(model.folder)
    bos, separator = window_tokens(settings.windows, model.folder, read_special_tokens(model))
    _check_sizes(settings, shape)
    corpus = open_corpus(settings.text, separator, settings.seed)
    if corpus.identity.kind != "input_ids" or settings.store.exclude_special:
        model.require_tokenizer()
    common = {
        "model": _model_identity(settings, model),
        "tokenizer": model.tokenizer_digest(),
        "corpus": corpus.identity,
        "bos": bos,
        "block_sequences": block_sequences(settings, shape),
        "batch_sequences": batch_sequences(settings, shape),
    }
    requests = tuple(_request(settings, layer, common) for layer in settings.capture.layers)
    blocks = -(-settings.tokens // requests[0].block_tokens)
    return Inputs(model=model, shape=shape, corpus=corpus, requests=requests, training_blocks=blocks)


def locate(inputs: Inputs, cache: Path) -> tuple[Inputs, list[Path]]:
    """Return the folder of each request's store: in `cache` under its own name, or of the same content under another.

    A store that was found under another name keeps its own request: that becomes the one in the returned inputs.
    """
    requests, paths = [], []
    for wanted in inputs.requests:
        path, request = cache / wanted.folder, wanted
        if not path.exists() and (same := find_same(cache, wanted)):
            path, request = same
            say(f"{path} holds what would be {wanted.folder}: that store is used, under its own name")
        paths.append(path)
        requests.append(request)
    return replace(inputs, requests=tuple(requests)), paths


def _warn_if_short(paths: Sequence[Path], inputs: Inputs) -> None:
    """Warn where the text of a store that is there was found to hold fewer tokens than are asked for now."""
    for path, request in zip(paths, inputs.requests, strict=True):
        plan = None
        with suppress(CorruptData):  # it is made again
            plan = read_plan(path) if (path / PLAN).is_file() else None
        if plan and plan.exhausted and plan.training_blocks < inputs.training_blocks:
            found, wanted = (blocks * request.block_tokens for blocks in (plan.training_blocks, inputs.training_blocks))
            warn(
                f"{request.corpus.name} holds {found:,} training tokens in whole blocks, {wanted:,} were asked for; "
                "taking what there is"
            )
            return  # stores that are made together are of one text


def block_sequences(settings: Settings, shape: ModelShape) -> int:
    """Return windows per block: as set, or half of that and so on, until a block of all layers keeps `max_block_bytes`.

    Rows are taken to be as wide as the residual stream.
    """
    store = settings.store
    hooks = {name for layer in settings.capture.layers for name in settings.capture.hooks(layer)}
    item = 4 if store.storage == "float32" else 2
    window = settings.windows.context_size * shape.d_model * item * len(hooks)
    sequences = store.block_sequences
    while sequences > 1 and sequences * window > store.max_block_bytes:
        sequences //= 2
        sequences -= sequences % INNER_ROWS if sequences > INNER_ROWS else 0
    return sequences


def batch_sequences(settings: Settings, shape: ModelShape) -> int:
    """Return windows per forward pass: as set, or as many as keep a processor busy and its temporary tensors small."""
    if settings.capture.batch_sequences != "auto":
        return settings.capture.batch_sequences
    context = settings.windows.context_size
    if resolve_device(settings.model.device) == "cuda":
        return max(1, _CUDA_TOKENS // context)
    return max(1, min(_CPU_TOKENS, _CPU_VALUES // shape.d_model) // context)


def is_finished(path: Path, request: StoreRequest, training_blocks: int) -> bool:
    """Tell whether the store at `path` holds what is asked for; a damaged one does not, and is made whole again."""
    if not (path / STORE).is_file():
        return False
    check_request(path, read_records(path).request, request)
    try:
        record = Store.open(path).record
    except CorruptData as error:
        warn(f"{error}")
        return False
    if len(list(path.glob(STATISTICS))) > 1:
        return False  # killed in its last step
    return record.plan.exhausted or len(record.training_blocks) >= training_blocks


def _unfinished(paths: Sequence[Path], inputs: Inputs) -> list[tuple[Path, StoreRequest]]:
    return [
        (path, request)
        for path, request in zip(paths, inputs.requests, strict=True)
        if not is_finished(path, request, inputs.training_blocks)
    ]


def _targets(paths: Sequence[Path], inputs: Inputs) -> list[Target]:
    return [load_target(path, request) for path, request in _unfinished(paths, inputs)]


def lock_store(path: Path, *, shared: bool = False) -> AbstractContextManager[durable.Lock]:
    """Return the writers' lock of the store at `path`."""
    path = path.resolve()
    return durable.lock(path.with_name(f"{path.name}.lock"), f"store {path.name}", shared=shared)


def _model_identity(settings: Settings, model: ModelFiles) -> ModelIdentity:
    found = {
        "name": model.name,
        "revision": model.revision,
        "weights": model.weights_digest(),
        "dtype": settings.model.dtype,
        "device": resolve_device(settings.model.device),
        "attention": settings.model.attention,
    }
    return build(ModelIdentity, found, f"model {settings.model.name}")


def _request(settings: Settings, layer: int, common: Mapping[str, object]) -> StoreRequest:
    source, target = settings.capture.hooks(layer)
    store = settings.store
    return build(
        StoreRequest,
        {
            **common,
            "label": settings.label,
            "context_size": settings.windows.context_size,
            "documents": settings.windows.documents,
            "layer": layer,
            "source_hook": source,
            "target_hook": target,
            "edges": store.edges,
            "keep": store.keep,
            "cap": store.cap,
            "exclude_special": store.exclude_special,
            "max_norm_quantile": store.max_norm_quantile,
            "storage": store.storage,
            "held_out_blocks": store.held_out_blocks,
            "unembedding": store.unembedding,
            "seed": settings.seed,
        },
        f"request of layer {layer}",
    )


def _check_sizes(settings: Settings, shape: ModelShape) -> None:
    names = [name for layer in settings.capture.layers for name in settings.capture.hooks(layer)]
    for name in names:
        number = name.split(".")[1]
        if not number.isdigit() or int(number) >= shape.layers:
            raise UserError(f"no layer for hook {name}: the model has {shape.layers} layers, 0 to {shape.layers - 1}")
    if shape.max_context is not None and settings.windows.context_size > shape.max_context:
        raise UserError(
            f"windows.context_size is {settings.windows.context_size}, and the model has {shape.max_context} positions"
        )


def prepare(
    targets: Sequence[Target], inputs: Inputs, settings: Settings, *, force: bool
) -> tuple[list[Target], dict[str, int]]:
    """Plan the tokens of stores whose locks are held, once it is known that the model and the disk will do.

    Returns the targets with their plans, and the width of each hook.
    """
    if not targets:
        return [], {}
    for target in targets:
        _require_writable(target.path)
        durable.sweep(target.path)
        spool_path(target.path).unlink(missing_ok=True)
        if target.plan:
            publish_records(target)
            finish.drop_damaged(target)
        elif line := explain_new(target.path, target.request):
            say(line)
    widths = hook_widths(targets, inputs)
    if not force:
        require_space([estimate(target, inputs.training_blocks, widths, inputs.model) for target in targets])
    planned = {target.path: target for target in targets}
    needing = [target for target in targets if needs_packing(target, inputs.training_blocks)]
    damaged = {target.path: damaged_files(target) for target in targets}
    if needing or any(damaged.values()):
        from harvest.text.tokenize import Encoder

        text, vocabulary = inputs.corpus.identity, inputs.shape.vocabulary
        encoder = Encoder(inputs.model.folder, text, vocabulary, settings.text.max_refused)
        for target in targets:
            if damaged[target.path]:
                restore(target, damaged[target.path], inputs.corpus, encoder)
        for group in _alike(needing):
            planned |= {t.path: t for t in extend(group, inputs.training_blocks, inputs.corpus, encoder)}
        if not force:  # now that rows are counted where they depend on the tokens
            require_space([estimate(t, inputs.training_blocks, widths, inputs.model) for t in planned.values()])
    return list(planned.values()), widths


def _require_writable(path: Path) -> None:
    """Raise `UserError` where the store at `path` cannot grow: a lock file that is there already tells nothing."""
    for folder in (path.parent, path):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {folder}: it is read-only; make it writable, or choose another --cache")


def hook_widths(targets: Sequence[Target], inputs: Inputs) -> dict[str, int]:
    """Return the width of each hook that the targets record, from the model without its weights."""
    from harvest.llm.model import check_device, probe

    check_device(targets[0].request.model.device)
    hooks = sorted({name for t in targets for name in (t.request.source_hook, t.request.target_hook)})
    return probe(inputs.model.folder, hooks, targets[0].request.context_size, targets[0].request.model.attention)


def _alike(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield groups of targets whose blocks hold the same tokens, and are made with as many windows per pass."""

    def kind(target: Target) -> tuple[tuple[int, ...], int]:
        return target.segments, ledger.fixed_batch(target) or 0

    for _, group in groupby(sorted(targets, key=kind), key=kind):
        yield list(group)


def _make(
    targets: Sequence[Target],
    inputs: Inputs,
    settings: Settings,
    ranks: Ranks,
    widths: dict[str, int],
    *,
    inexact: bool,
    push: Push,
) -> None:
    """Commit what planned stores lack, and finish them. `widths` of the hooks, if they are known already."""
    for target in targets:
        push(target.path)
    missing = {target.path: set(ledger.missing_blocks(target)) for target in targets}
    groups = list(_alike(targets))
    ranks.wait()
    from harvest.run.runner import Runner

    runner = Runner(
        folder=inputs.model.folder,
        widths=widths or hook_widths(targets, inputs),
        workers=settings.workers or ranks.cores,
        ranks=ranks,
        inexact=inexact,
        push=push,
    )
    for group in groups:
        runner.capture(group, {target.path: missing[target.path] for target in group})
    if ranks.first:
        for target in targets:
            ledger.grow_arrays(target, range(target.blocks))
            finish.finish(target, inputs.model)
