"""Token windows on disk, and the plan of a store: exact before any model is loaded.

A segment's windows are spooled in order of the text, then permuted on their own into whole blocks. The order of
publishing is request, groups, shards of tokens and documents, array metadata, plan: a plan that exists names tokens
that exist.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from harvest.text.corpus import Corpus
from harvest.text.packing import Packed, Quota, TokenStream, Windows, model_positions, pack
from harvest.text.prefetch import ahead
from harvest.text.tokenize import Encoder
from harvest.writer.blocks import block_counts, quotas
from harvest.writer.target import Target, begin
from shared.bounds import MAX_BLOCKS
from shared.console.progress import Progress
from shared.errors import CorruptData, UserError, warn
from shared.files import durable
from shared.keyed import permutation
from shared.store.checks import buffers_record, fault, read_ledger
from shared.store.layout import (
    ARRAYS,
    DOCUMENTS,
    LEDGER,
    PLAN,
    TOKENS,
    FileRecord,
    RowCounts,
    StorePlan,
    StoreRequest,
    StratumPlan,
    documents_spec,
    moments_path,
    tokens_spec,
)
from shared.store.strata import stratum_ranges

_DOCUMENTS_AHEAD = 256
_MOST_REPLACED, _MOST_EMPTY = 1e-4, 0.5
"""Replaced characters per token, and the share of rows without text, above which there is a warning."""


def extend(targets: Sequence[Target], training_blocks: int, corpus: Corpus, encoder: Encoder) -> list[Target]:
    """Add a segment to each target, so that it plans `training_blocks`, or all that the corpus holds.

    The targets' requests differ in nothing that tokens depend on, and their segments are the same. Raises `UserError`,
    with nothing written, when the corpus has no whole training block.
    """
    first, before = targets[0], sum(targets[0].segments)
    if (blocks := first.request.held_out_blocks + training_blocks) > MAX_BLOCKS:
        raise UserError(f"{blocks:,} blocks, and a store has at most {MAX_BLOCKS:,}; raise store.block_sequences")
    with _packed(first, before, training_blocks, corpus, encoder) as (windows, packed, quota):
        segment = _Segment(first.request, len(first.segments), before, windows, packed.held_out)
        _check(packed, quota, before + segment.blocks, training_blocks, first.request)
        _warn_of_losses(packed, first.request.corpus.name, encoder.first_refusal)
        if not segment.blocks:
            return [_exhausted(target) for target in targets]
        special = first.plan.special_tokens if first.plan else encoder.special if first.request.exclude_special else ()
        strata = _plan_strata(first, segment, special)
        exhausted = packed.windows < quota.wanted
        return [_publish(target, segment, packed, strata, special, exhausted=exhausted) for target in targets]


def lay_out(target: Target, windows: Windows) -> Target:
    """Plan a store of windows that are there already: the first are held out, the others permuted into whole blocks.

    Raises `UserError`, with nothing written, when there is no whole training block.
    """
    segment, packed = _given(target.request, windows)
    if not segment.blocks:
        size, held_out = target.request.block_sequences, target.request.held_out_blocks
        raise UserError(
            f"{len(windows.tokens):,} sequences, and {held_out} held-out blocks and one training block take "
            f"{(held_out + 1) * size:,}; import more, or lower block_sequences or held_out_blocks"
        )
    return _publish(target, segment, packed, _plan_strata(target, segment, ()), (), exhausted=True)


def lay_out_again(target: Target, files: Sequence[str], windows: Windows) -> None:
    """Write damaged shard files of `tokens` and `documents` again from the windows that the store was laid out from."""
    segment, _ = _given(target.request, windows)
    _publish_again(target, files, segment)
    _check_restored(target, files, "these files", "import it again")


def _given(request: StoreRequest, windows: Windows) -> tuple["_Segment", Packed]:
    """Return the only segment of a store of given windows, and the counts of its tokens."""
    size, (count, context) = request.block_sequences, windows.tokens.shape
    held_out, whole = request.held_out_blocks * size, count // size * size
    parts = [
        Windows(*(part[rows] for part in windows)) for rows in (slice(held_out), slice(held_out, max(held_out, whole)))
    ]
    packed = Packed(
        held_out=parts[0],
        windows=len(parts[1].tokens),
        documents=count,
        held_out_documents=len(parts[0].tokens),
        empty_documents=0,
        tokens=count * (context - request.bos),
        left_out={},
        dropped=0,
    )
    return _Segment(request, 0, 0, parts[1], parts[0]), packed


def restore(target: Target, files: Sequence[str], corpus: Corpus, encoder: Encoder) -> None:
    """Write damaged shards of `tokens` and `documents` again from the text. Raises `CorruptData` if they differ."""
    assert target.plan is not None
    before = 0
    for number, blocks in enumerate(target.segments):
        with _packed(target, before, before + blocks, corpus, encoder) as (windows, packed, _):
            _publish_again(target, files, _Segment(target.request, number, before, windows, packed.held_out))
        before += blocks
    _check_restored(target, files, "this text", "harvest it again")


def _publish_again(target: Target, files: Sequence[str], segment: "_Segment") -> None:
    """Write those of `files` again that a segment has, and that come out as planned."""
    assert target.plan is not None
    for block, part in segment:
        for name, data in _window_shards(target.request, block, part).items():
            if name in files and buffers_record(data) == target.plan.token_files[name]:
                durable.publish_bytes(target.path / ARRAYS / name, data)


def _check_restored(target: Target, files: Sequence[str], origin: str, remedy: str) -> None:
    assert target.plan is not None
    if wrong := [name for name in files if fault(target.path / ARRAYS / name, target.plan.token_files[name])]:
        raise CorruptData(
            f"{target.path / ARRAYS / wrong[0]} does not come out of {origin} as it was; remove {target.path} and "
            f"{remedy}"
        )


class _Segment:
    """The blocks that a segment adds, in order: number and windows. The first segment has the held-out ones, too."""

    def __init__(self, request: StoreRequest, number: int, before: int, windows: Windows, held_out: Windows) -> None:
        """Take the windows of a segment; `before`: training blocks of the segments before."""
        self.blocks = len(windows.tokens) // request.block_sequences
        self.held_out_blocks = len(held_out.tokens) // request.block_sequences
        self._size, self._windows, self._held_out = request.block_sequences, windows, held_out
        self._first = request.held_out_blocks + before
        self._order = permutation(len(windows.tokens), "windows", request.seed, number)

    def __iter__(self) -> Iterator[tuple[int, Windows]]:
        """Yield (block, windows)."""
        size = self._size
        for i in range(self.held_out_blocks):
            yield i, Windows(*(part[i * size : (i + 1) * size] for part in self._held_out))
        for i in range(self.blocks):
            chosen = self._order[i * size : (i + 1) * size]
            yield self._first + i, Windows(*(part[chosen] for part in self._windows))

    def training(self) -> Iterator[Windows]:
        """Yield the windows of the blocks to train on."""
        yield from (windows for _, windows in islice(self, self.held_out_blocks, None))


@contextmanager
def _packed(
    target: Target, before: int, after: int, corpus: Corpus, encoder: Encoder
) -> Iterator[tuple[Windows, Packed, Quota]]:
    """Yield the windows of training blocks `before` to `after`, whole blocks of them, in order of the text."""
    request, size = target.request, target.request.block_sequences
    quota = Quota(held_out=request.held_out_blocks * size, skipped=before * size, wanted=(after - before) * size)
    bos = encoder.bos if request.bos else None
    encoder.require_embedded(bos, encoder.separator)
    stream = TokenStream(
        ahead(encoder.encode(corpus.read()), _DOCUMENTS_AHEAD),
        bos=bos,
        separator=encoder.separator,
        context=request.context_size,
        kind=request.documents,
    )
    with _spool(target.path) as path, Progress("pack", quota.wanted * request.context_size, "tokens") as bar:
        written = 0

        def keep(part: Windows) -> None:
            """Write the tokens and documents of one window after the other."""
            nonlocal written
            data = np.stack(part, axis=1).tobytes()
            durable.write_at(path, written, data)
            written += len(data)
            bar.update(written // 8)

        packed = pack(stream, request.context_size, quota, keep)
        whole = packed.windows // size * size
        shape = (whole, 2, request.context_size)
        spooled = np.memmap(path, np.int32, "r", shape=shape) if whole else np.zeros(shape, np.int32)
        yield Windows(spooled[:, 0], spooled[:, 1]), packed, quota


def _plan_strata(target: Target, segment: _Segment, special: Sequence[int]) -> tuple[StratumPlan, ...]:
    """Plan the strata of a target with one segment more. Rows per block are those that every block of the first has."""
    request = target.request
    fixed = [stratum.rows for stratum in target.plan.strata] if target.plan else None
    if request.documents == "joined" and not special:
        _, windows = next(iter(segment))
        counts = [block_counts(request, windows, special)] * (segment.held_out_blocks + segment.blocks)
    else:
        counts = [block_counts(request, windows, special) for _, windows in segment]
    usable = [[c.natural - c.special - c.over_norm for c in by_block] for by_block in zip(*counts, strict=True)]
    rows = fixed or quotas(request, [min(found) for found in usable])
    ranges = stratum_ranges(request.edges, request.context_size)
    for (start, stop), found, wanted in zip(ranges, usable, rows, strict=True):
        if wanted and not min(found):
            raise UserError(
                f"a block of the tokens now asked for has no row at positions {start} to {stop - 1}, of which the "
                "store holds some from every block; ask for fewer tokens, or harvest another store with other edges"
            )
    before = [stratum.segments for stratum in target.plan.strata] if target.plan else [()] * len(ranges)
    training = zip(*counts[segment.held_out_blocks :], strict=True)
    added = [_total(by_block, wanted) for by_block, wanted in zip(training, rows, strict=True)]
    return tuple(
        StratumPlan(start=start, stop=stop, rows=wanted, segments=(*earlier, counts_))
        for (start, stop), wanted, earlier, counts_ in zip(ranges, rows, before, added, strict=True)
    )


def _total(blocks: Sequence[RowCounts], rows: int) -> RowCounts:
    """Return the counts of all `blocks` of a stratum, each storing `rows`."""
    natural, special, over = (sum(getattr(c, kind) for c in blocks) for kind in ("natural", "special", "over_norm"))
    repeated = sum(max(0, rows - (c.natural - c.special - c.over_norm)) for c in blocks)
    return RowCounts(natural=natural, special=special, over_norm=over, stored=rows * len(blocks), repeated=repeated)


def _publish(
    target: Target,
    segment: _Segment,
    packed: Packed,
    strata: tuple[StratumPlan, ...],
    special: tuple[int, ...],
    *,
    exhausted: bool,
) -> Target:
    request, root = target.request, target.path / ARRAYS
    if target.plan is None:
        begin(target, strata)
    files = dict(target.plan.token_files) if target.plan else {}
    _remove_unplanned(root, files)
    _remove_beyond(target.path, target.blocks + segment.blocks)
    for block, windows in segment:
        shards = _window_shards(request, block, windows)
        durable.publish_files({root / name: data for name, data in shards.items()})
        files |= {name: buffers_record(data) for name, data in shards.items()}
    kept = sum(_payload(request, windows) for windows in segment.training())
    counts = packed.counts(kept, _payload(request, packed.held_out))
    plan = StorePlan(
        request=request.digest,
        segments=(*target.segments, segment.blocks),
        packing=(*(target.plan.packing if target.plan else ()), counts),
        strata=strata,
        special_tokens=special,
        token_files=files,
        exhausted=exhausted,
    )
    done = replace(target, plan=plan)
    for spec in (tokens_spec(request), documents_spec(request)):
        durable.publish_json(root / spec.path / "zarr.json", spec.metadata(done.blocks))
    durable.publish_json(target.path / PLAN, plan.model_dump(mode="json"))
    return done


def _exhausted(target: Target) -> Target:
    """Return the target with its plan saying that the corpus holds no further block."""
    assert target.plan is not None
    plan = target.plan.model_copy(update={"exhausted": True})
    durable.publish_json(target.path / PLAN, plan.model_dump(mode="json"))
    return replace(target, plan=plan)


def _payload(request: StoreRequest, windows: Windows) -> int:
    """Count the tokens that are not a BOS put in."""
    starts = (model_positions(windows, request.documents) == 0).sum() if request.bos else 0
    return windows.tokens.size - int(starts)


def _window_shards(request: StoreRequest, block: int, windows: Windows) -> dict[str, list[Any]]:
    """Return the shard files of a block's tokens and documents: buffers by path below the Zarr root."""
    return {
        spec.shard_path(shard): data
        for spec, rows in zip((tokens_spec(request), documents_spec(request)), windows, strict=True)
        for shard, data in zip(spec.block_shards(block), spec.shard_buffers(np.asarray(rows)), strict=True)
    }


def _remove_unplanned(root: Path, planned: Mapping[str, FileRecord]) -> None:
    """Remove token shards that a killed harvest wrote before it could publish its plan."""
    for path in [*(root / TOKENS / "c").glob("*/*"), *(root / DOCUMENTS / "c").glob("*/*")]:
        if path.relative_to(root).as_posix() not in planned:
            path.unlink()
            path.parent.rmdir()


def _remove_beyond(path: Path, blocks: int) -> None:
    """Remove the blocks of a longer plan that was lost: their records, and the files that those name."""
    for record in sorted((path / LEDGER).glob("[0-9]*.json")):
        block = int(record.stem)
        if block < blocks:
            continue
        with suppress(CorruptData):
            for name in read_ledger(path, block).files:
                (path / ARRAYS / name).unlink(missing_ok=True)
        (path / moments_path(block)).unlink(missing_ok=True)
        record.unlink()


def spool_path(store: Path) -> Path:
    """Return the path where a store's windows are spooled; litter if a harvest was killed."""
    return store.parent / f"{store.name}.spool{durable.TEMPORARY}"


@contextmanager
def _spool(store: Path) -> Iterator[Path]:
    """Make a file beside the store for windows in order of the text: a large harvest's tokens do not fit in memory."""
    path = spool_path(store)
    try:
        durable.make_sparse(path, 0)
        yield path
    finally:
        path.unlink(missing_ok=True)


def _check(packed: Packed, quota: Quota, blocks: int, wanted: int, request: StoreRequest) -> None:
    """Refuse a corpus without a whole training block, and warn about one that is shorter than asked."""
    per_block = request.block_tokens
    if blocks == 0 or (not quota.skipped and len(packed.held_out.tokens) < quota.held_out):
        needed = (request.held_out_blocks + 1) * request.block_sequences * (request.context_size - request.bos)
        if packed.dropped and packed.tokens >= needed:
            raise UserError(
                f"{request.corpus.name}: no whole training block is left: {_dropped(packed)}; split the text into more "
                "documents, or --set store.held_out_blocks=0"
            )
        raise UserError(
            f"{request.corpus.name}: its {packed.documents:,} documents hold {packed.tokens:,} tokens, and "
            f"{request.held_out_blocks} held-out blocks and one training block need {needed:,}; give more text, or "
            "lower store.block_sequences or store.held_out_blocks"
        )
    if blocks < wanted:
        warn(
            f"{request.corpus.name} holds {blocks * per_block:,} training tokens in whole blocks, "
            f"{wanted * per_block:,} were asked for; taking what there is"
            f"{f' ({_dropped(packed)})' if packed.dropped >= per_block else ''}"
        )


def _dropped(packed: Packed) -> str:
    """Say what is lost where the held-out part ends."""
    return (
        f"document {packed.held_out_documents:,} of {packed.documents:,} begins in the held-out part, and its other "
        f"{packed.dropped:,} of {packed.tokens:,} tokens are left out, so that no document is on both sides"
    )


def _warn_of_losses(packed: Packed, name: str, first_refusal: str | None) -> None:
    """Warn about rows and characters that were given and are in no document."""
    rows = packed.documents + packed.empty_documents + packed.left_out.get("refused_rows", 0)
    if refused := packed.left_out.get("refused_rows"):
        warn(f"{name}: {refused:,} of {rows:,} rows ({refused / rows:.1%}) were left out; the first: {first_refusal}")
    if packed.empty_documents > _MOST_EMPTY * rows:
        warn(f"{name}: {packed.empty_documents:,} of {rows:,} rows ({packed.empty_documents / rows:.0%}) hold nothing")
    if (replaced := packed.left_out.get("replaced_characters", 0)) > _MOST_REPLACED * packed.tokens:
        warn(
            f"{name}: {replaced:,} characters, one for every {packed.tokens // replaced:,} tokens, are not UTF-8 and "
            "became U+FFFD; if the text has another encoding, convert it: iconv -f ENCODING -t UTF-8, such as LATIN1"
        )
