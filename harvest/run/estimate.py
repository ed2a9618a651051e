"""What a harvest will write, known before a model is loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.table import Table

from harvest.llm.model_files import ModelFiles, read_shape
from harvest.text.tokenizer_files import TOKENIZER_JSON
from harvest.writer import ledger
from harvest.writer.blocks import most_rows, over_norm, quotas
from harvest.writer.target import Target
from shared.console.terminal import PlainConsole
from shared.files import durable
from shared.store.layout import UNEMBEDDING, StoreRequest, block_bytes, row_specs, store_specs
from shared.store.reader import MOST_RUN_ROWS, RowsConfig
from shared.store.row_arrays import BLOCK_UNITS
from shared.store.statistics import BINS
from shared.store.strata import Stratum, stratum_ranges

_RECORD_BYTES, _TENSOR_BYTES, _METADATA_BYTES = 256, 512, 2048
"""More than one file's entry in a record, a tensor's entry in a header and an array's `zarr.json` take."""
_WITH_ONE_MORE_FILE = 4
"""At most as many times the bytes of a tokenizer's files does it take when `tokenizer.json` is made from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Sizes of one store, in bytes, with all that is asked for."""

    path: Path
    request: StoreRequest
    blocks: int
    """Held-out ones included."""
    exact: bool
    """Whether rows and shard bytes are exact: documents apart and special tokens are counted when tokens are packed,
    and until then figures are upper bounds."""
    rows: dict[str, int]
    """Stored rows by stratum, held-out ones included."""
    stratum_bytes: dict[str, int]
    """Shard files by stratum, and those of tokens and documents as `tokens`."""
    shard_bytes: int
    """All shard files: less than the sum over strata where each has a bound of its own."""
    shards: int
    other_bytes: int
    """At most: records, statistics, tokenizer, and the unembedding."""
    unembedding_bytes: int
    """Of `other_bytes`; stores that are made together hold one between them."""
    spool_bytes: int
    """At most, beside the store, and only while tokens are packed."""
    present_bytes: int
    """Of the shard files, those of blocks that are there already."""
    widths: dict[str, int]
    """Of the source's and the target's hook."""
    block_rows: int
    """Most rows of a block that are in memory."""

    @property
    def needed_bytes(self) -> int:
        """What must be free."""
        return self.shard_bytes - self.present_bytes + self.other_bytes + self.spool_bytes

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        request = self.request
        return {
            "path": str(self.path),
            "blocks": self.blocks,
            "held_out_blocks": request.held_out_blocks,
            "block_sequences": request.block_sequences,
            "tokens": self.blocks * request.block_tokens,
            "training_tokens": (self.blocks - request.held_out_blocks) * request.block_tokens,
            "exact": self.exact,
            "rows": self.rows,
            "bytes": self.stratum_bytes,
            "shards": self.shards,
            "shard_bytes": self.shard_bytes,
            "other_bytes_at_most": self.other_bytes,
            "unembedding_bytes_at_most": self.unembedding_bytes,
            "spool_bytes_at_most": self.spool_bytes,
            "present_bytes": self.present_bytes,
            "free_bytes": durable.free_bytes(self.path.parent),
        }

    def table(self) -> Table:
        """Return a table of rows and bytes by stratum."""
        bound = "" if self.exact else "at most "
        table = Table("positions", "rows", "bytes", title=self.path.name)
        for name, size in self.stratum_bytes.items():
            table.add_row(name, f"{bound}{self.rows[name]:,}" if name in self.rows else "", f"{bound}{size:,}")
        table.add_section()
        table.add_row(
            f"{self.shards:,} shard files", f"{bound}{sum(self.rows.values()):,}", f"{bound}{self.shard_bytes:,}"
        )
        table.add_row("everything else", "", f"at most {self.other_bytes:,}")
        return table


def estimate(target: Target, training_blocks: int, widths: Mapping[str, int], model: ModelFiles) -> Estimate:
    """Estimate the sizes of a store with `training_blocks`; `widths` of its hooks."""
    request = target.request
    d_in, d_out = widths[request.source_hook], widths[request.target_hook]
    planned = sum(target.segments)
    exhausted = target.plan is not None and target.plan.exhausted
    blocks = request.held_out_blocks + (planned if exhausted else max(planned, training_blocks))
    strata = target.strata or expected_strata(request)
    exact = bool(target.plan) or (request.documents == "joined" and not request.exclude_special)
    specs = store_specs(request, strata, d_in, d_out)
    tokens, rows = specs[: -len(row_specs(request, strata, d_in, d_out))], {}
    sizes = {"tokens": blocks * block_bytes(tokens)}
    for stratum in strata:
        rows[stratum.name] = blocks * stratum.rows
        sizes[stratum.name] = blocks * block_bytes(row_specs(request, [stratum], d_in, d_out))
    shard_bytes = sum(sizes.values())
    if not exact:  # however the tokens fall into strata, there are no more rows than tokens
        every, first = row_specs(request, strata, d_in, d_out), row_specs(request, strata[:1], d_in, d_out)
        units = [spec for spec in every if spec.path.endswith(f"/{BLOCK_UNITS}")]
        row = sum(spec.row_bytes for spec in first if spec not in units)
        fixed = sum(spec.row_bytes * spec.rows_per_block for spec in units)
        fixed += sum(len(s.footer()) * s.shards_per_block for s in every)
        shard_bytes = min(shard_bytes, sizes["tokens"] + blocks * (request.block_tokens * row + fixed))
    done = target.blocks - len(ledger.missing_blocks(target)) if target.plan else 0
    unembedding = 0 if (target.path / UNEMBEDDING).is_file() else _unembedding_bytes(request, model)
    to_pack = 0 if exhausted else max(0, training_blocks - planned)
    return Estimate(
        path=target.path,
        request=request,
        blocks=blocks,
        exact=exact,
        rows=rows,
        stratum_bytes=sizes,
        shard_bytes=shard_bytes,
        shards=blocks * sum(spec.shards_per_block for spec in specs),
        other_bytes=_record_bytes(request, strata, blocks, d_in + d_out, model) + unembedding,
        unembedding_bytes=unembedding,
        spool_bytes=2 * 4 * to_pack * request.block_tokens,
        present_bytes=done * block_bytes(specs),
        widths={request.source_hook: d_in, request.target_hook: d_out},
        block_rows=most_rows(request, strata),
    )


def expected_strata(request: StoreRequest) -> tuple[Stratum, ...]:
    """Return the strata of joined documents; where rows depend on the tokens, the most that each can come to."""
    ranges = stratum_ranges(request.edges, request.context_size)
    whole = request.block_tokens
    natural = [whole if request.documents == "apart" else (b - a) * request.block_sequences for a, b in ranges]
    rows = quotas(request, [n - over_norm(n, request.max_norm_quantile) for n in natural])
    return tuple(
        Stratum(start=start, stop=stop, rows=kept, natural_rows=n)
        for (start, stop), kept, n in zip(ranges, rows, natural, strict=True)
    )


def _record_bytes(request: StoreRequest, strata: Sequence[Stratum], blocks: int, width: int, model: ModelFiles) -> int:
    """Return a bound on records, statistics and tokenizer; `width` is that of source and target together."""
    per_block = sum(
        2 * (6 * _TENSOR_BYTES + 12 * min(BINS, stratum.rows)) + 16 * width for stratum in strata
    ) + _RECORD_BYTES * sum(spec.shards_per_block for spec in store_specs(request, strata, width, width))
    statistics = (len(strata) + 1) * (4 * _TENSOR_BYTES + 16 * width)
    metadata = _METADATA_BYTES * (4 + 8 * len(strata)) + 2**16
    tokenizer = sum(path.stat().st_size for path in model.tokenizer_files)
    if not any(path.name == TOKENIZER_JSON for path in model.tokenizer_files):
        tokenizer *= _WITH_ONE_MORE_FILE
    plans = 2 * _RECORD_BYTES * blocks * math.ceil(2 * request.block_tokens * 4 / 2**27 + 2)
    return blocks * per_block + statistics + metadata + tokenizer + plans


def _unembedding_bytes(request: StoreRequest, model: ModelFiles) -> int:
    """Return a bound on the unembedding and the final norm."""
    shape, item = read_shape(model.folder), 4 if request.model.dtype == "float32" else 2
    return shape.vocabulary * (item * shape.d_model + 4) + 8 * shape.d_model + 4096 if request.unembedding else 0


def block_memory(estimates: Sequence[Estimate]) -> dict[str, int]:
    """Return the bytes of the rows of two blocks, which are in memory at once: on the `host`, and on the `device`.

    On CUDA those of the host are pinned, and torch pins a power of two for each hook. Of int8, the block that is
    written is there in both types.
    """
    widths = {name: width for one in estimates for name, width in one.widths.items()}
    request, rows = estimates[0].request, estimates[0].block_rows
    item = 4 if request.storage == "float32" else 2
    host = [rows * width * item for width in widths.values()]
    written = rows * sum(widths.values()) if request.storage == "int8" else 0
    if request.model.device == "cpu":
        return {"host": 2 * sum(host) + written, "device": 0}
    device = (rows + request.block_tokens) * sum(widths.values()) * item
    return {"host": 2 * sum(1 << (size - 1).bit_length() for size in host) + written, "device": device}


def needed(estimates: Sequence[Estimate]) -> int:
    """Return the bytes that all stores together still need: one unembedding, and one spool at a time."""
    shared = [[one.unembedding_bytes for one in estimates], [one.spool_bytes for one in estimates]]
    return sum(one.needed_bytes for one in estimates) - sum(sum(sizes) - max(sizes) for sizes in shared)


def require_space(estimates: Sequence[Estimate]) -> None:
    """Refuse a disk that is too small for the stores together. Raises `UserError`."""
    durable.require_space(estimates[0].path.parent, needed(estimates), "the store (--force continues anyway)")


def show(estimates: Sequence[Estimate], pair: Sequence[str], seconds: float | None) -> None:
    """Print the estimates as tables on stdout, and lines on what is stored, `pair`.

    `seconds` that the forward passes will take, if measured.
    """
    console = PlainConsole(width=None if PlainConsole().is_terminal else 140)
    for one in estimates:
        console.print(one.table())
    first = estimates[0]
    blocks, held_out = first.blocks, first.request.held_out_blocks
    lines = [
        *pair,
        f"{blocks * first.request.block_tokens:,} tokens: {blocks:,} blocks of {first.request.block_sequences:,} "
        f"windows of {first.request.context_size:,}, {held_out} of them held out",
        f"{needed(estimates):,} bytes needed, {durable.free_bytes(first.path.parent):,} free",
    ]
    memory = block_memory(estimates)
    on_device = f" and {memory['device']:,} on the GPU" if memory["device"] else ""
    lines.append(f"two blocks are in memory at once: {memory['host']:,} bytes{on_device}, besides the model")
    run = RowsConfig().resolve(first.request.block_sequences).run_rows
    if run != MOST_RUN_ROWS:
        lines.append(
            f"blocks are small: training reads runs of {run} rows instead of {MOST_RUN_ROWS}, slower from a cold disk; "
            "with memory for two of them make blocks larger (store.block_sequences, store.max_block_bytes)"
        )
    if seconds is not None:
        lines.append(f"about {timedelta(seconds=round(seconds))} at the speed of a few batches")
    for line in lines:
        console.print(line, highlight=False)
