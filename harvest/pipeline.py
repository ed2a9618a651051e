"""A harvest from settings to finished stores: identify, plan, capture, finish."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from harvest import finish, ledger, plan
from harvest.corpus import Corpus, open_corpus
from harvest.model_files import (
    ModelFiles,
    ModelShape,
    find_model,
    read_shape,
    read_special_tokens,
    resolve_device,
)
from harvest.plan import Target
from harvest.settings import Settings
from shared import durable
from shared.errors import CorruptData, UserError
from shared.layout import STORE, ModelIdentity, StoreRequest, block_bytes
from shared.progress import Progress
from shared.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A model and a text, found and identified, and the request of each layer's store."""

    model: ModelFiles
    shape: ModelShape
    corpus: Corpus
    requests: tuple[StoreRequest, ...]


def harvest(settings: Settings, cache: Path, *, force: bool = False) -> list[Path]:
    """Make (or find, or extend) one store per layer in `cache`; returns their folders, in order of the layers.

    Finished stores are found without torch. `force` goes on where the disk looks too small.
    """
    inputs = identify(settings)
    paths = [cache / request.folder for request in inputs.requests]
    unfinished = [
        (path, request)
        for path, request in zip(paths, inputs.requests, strict=True)
        if not is_finished(path, request, settings.training_blocks)
    ]
    with ExitStack() as locks:
        for path, _ in unfinished:
            locks.enter_context(durable.lock(path.with_name(f"{path.name}.lock"), f"store {path.name}"))
        if unfinished:
            targets = [plan.load_target(path, request) for path, request in unfinished]
            _make(targets, inputs, settings, force=force)
    return paths


def identify(settings: Settings) -> Inputs:
    """Find model and text, and state what determines the stores' bytes. Raises `UserError` on what cannot work."""
    model = find_model(settings.model)
    shape, special = read_shape(model.folder), read_special_tokens(model)
    if settings.windows.separator and special.eos in (None, special.bos):
        raise UserError(
            f"the tokenizer in {model.folder} has no EOS apart from its BOS to put between documents; "
            "pass --set windows.separator=false"
        )
    _check_sizes(settings, shape)
    corpus = open_corpus(settings.text, special.eos if settings.windows.separator else None, settings.seed)
    common = {
        "model": _model_identity(settings, model),
        "tokenizer": model.tokenizer_digest(),
        "corpus": corpus.identity,
    }
    requests = tuple(_request(settings, layer, common) for layer in settings.capture.layers)
    return Inputs(model=model, shape=shape, corpus=corpus, requests=requests)


def is_finished(path: Path, request: StoreRequest, training_blocks: int) -> bool:
    """Whether the store at `path` holds what is asked for; one that is damaged does not, and is made whole again."""
    if not (path / STORE).is_file():
        return False
    plan.load_target(path, request)
    try:
        record = Store.open(path).record
    except CorruptData as error:
        print(f"warning: {error}", file=sys.stderr)
        return False
    return record.plan.exhausted or len(record.training_blocks) >= training_blocks


def _model_identity(settings: Settings, model: ModelFiles) -> ModelIdentity:
    return ModelIdentity(
        name=model.name,
        revision=model.revision,
        weights=model.weights_digest(),
        dtype=settings.model.dtype,
        device=resolve_device(settings.model.device),
    )


def _request(settings: Settings, layer: int, common: Mapping[str, object]) -> StoreRequest:
    source, target = settings.capture.hooks(layer)
    store = settings.store
    return StoreRequest.model_validate(
        {
            **common,
            "label": settings.label,
            "context_size": settings.windows.context_size,
            "layer": layer,
            "source_hook": source,
            "target_hook": target,
            "edges": store.edges,
            "keep": store.keep,
            "storage": store.storage,
            "block_sequences": store.block_sequences,
            "held_out_blocks": store.held_out_blocks,
            "batch_sequences": settings.capture.batch_sequences,
            "seed": settings.seed,
        }
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


def _make(targets: list[Target], inputs: Inputs, settings: Settings, *, force: bool) -> None:
    """Plan, capture and finish stores whose locks are held."""
    from harvest.model import check_device, probe

    check_device(targets[0].request.model.device)
    for target in targets:
        durable.sweep(target.path)
    hooks = sorted({name for t in targets for name in (t.request.source_hook, t.request.target_hook)})
    widths = probe(inputs.model.folder, hooks, settings.windows.context_size)
    if not force:
        _require_space(targets, widths, settings.training_blocks)
    planned = _plan(targets, inputs, settings)
    for group in _alike(planned):
        _capture(group, inputs, settings, widths)
    for target in planned:
        finish.finish(target, inputs.model)


def _require_space(targets: Sequence[Target], widths: Mapping[str, int], training_blocks: int) -> None:
    """Refuse a disk that is too small for the blocks to come and for the spool of their windows."""
    needed = 0
    for target in targets:
        request = target.request
        blocks = request.held_out_blocks + training_blocks
        done = target.blocks - len(ledger.missing_blocks(target)) if target.plan else 0
        size = block_bytes(request, widths[request.source_hook], widths[request.target_hook])
        needed += max(0, blocks - done) * size
    spool = 4 * training_blocks * targets[0].request.block_sequences * targets[0].request.context_size
    durable.require_space(targets[0].path.parent, needed + spool, "the store (--force to try all the same)")


def _plan(targets: Sequence[Target], inputs: Inputs, settings: Settings) -> list[Target]:
    """The targets with tokens for all that is asked; those that stand at the same point are packed together."""
    blocks = settings.training_blocks
    needing = [target for target in targets if plan.needs_packing(target, blocks)]
    planned = {target.path: target for target in targets}
    if needing:
        from harvest.encoding import Encoder

        encoder = Encoder(inputs.model.folder, inputs.corpus.identity, inputs.shape.vocabulary)
        for group in _alike(needing):
            planned |= {t.path: t for t in plan.extend(group, blocks, inputs.corpus, encoder)}
    return list(planned.values())


def _alike(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Groups of targets with the same segments: their blocks hold the same tokens."""
    for _, group in groupby(sorted(targets, key=lambda t: t.segments), key=lambda t: t.segments):
        yield list(group)


def _capture(targets: Sequence[Target], inputs: Inputs, settings: Settings, widths: Mapping[str, int]) -> None:
    """Commit every block that a target lacks; all targets take their rows from one forward pass."""
    missing = {target.path: set(ledger.missing_blocks(target)) for target in targets}
    todo = sorted(set().union(*missing.values()))
    open_targets = [target for target in targets if missing[target.path]]
    if todo:
        _run_blocks(open_targets, todo, missing, inputs, settings, widths)
    for target in targets:
        ledger.grow_arrays(target, range(target.blocks))


def _run_blocks(
    targets: Sequence[Target],
    todo: Sequence[int],
    missing: Mapping[Path, set[int]],
    inputs: Inputs,
    settings: Settings,
    widths: Mapping[str, int],
) -> None:
    from harvest.capture import open_capture
    from harvest.model import load_model

    request = targets[0].request
    hooks = {name: widths[name] for t in targets for name in (t.request.source_hook, t.request.target_hook)}
    model = load_model(inputs.model.folder, request.model.dtype, request.model.device, list(hooks))
    per_block = request.block_sequences * request.context_size
    with (
        open_capture(model, settings.workers, request.model.device, request.storage) as capture,
        Progress(
            "harvest", targets[0].blocks * per_block, "tokens", (targets[0].blocks - len(todo)) * per_block
        ) as bar,
    ):
        count = _counter(bar, (targets[0].blocks - len(todo)) * per_block)
        for block in todo:
            rows = capture.block(plan.read_block(targets[0], block), request.batch_sequences, hooks, count)
            for target in targets:
                if block in missing[target.path]:
                    ledger.commit(target, block, rows)
                    missing[target.path].discard(block)
                    ledger.grow_arrays(target, set(range(target.blocks)) - missing[target.path])
            del rows  # before the next block is captured: a block and its permuted copy are the most that is held


def _counter(bar: Progress, done: int) -> Callable[[int], None]:
    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        bar.update(done)

    return count
