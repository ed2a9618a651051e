"""The store format: what its records say and where its bytes lie. Pure; nothing here touches a disk.

cache/tiny-L8-3f9c21/
request.json             what was asked for; the folder's name ends in its digest
plan.json                what the store will hold, known before a model is loaded: segments, packing, tokens
store.json               the finished store: widths, blocks, statistics; written last
activations.zarr/        Zarr v3: tokens, documents,
strata/<start>-<stop>/{source,target,position,sequence,offset}, of int8 {row_scale,block_units} as well
ledger/000000.json       one record per committed block: size and crc32c of every shard file
statistics-000019.safetensors   means and variances per dimension of a store of so many blocks
tokenizer/
"""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from shared.bounds import (
    MAX_BLOCKS,
    MAX_CONTEXT,
    MAX_FILES,
    MAX_STRATA,
    Blocks,
    Count,
    Digest,
    Edges,
    FileName,
    Label,
    Layer,
    Name,
    Position,
    Seed,
    Sequences,
    Text,
    TokenId,
    Width,
)
from shared.config import Config, GrownConfig, json_digest
from shared.store.arrays import INNER_ROWS, ArraySpec
from shared.store.import_origin import ImportOrigin
from shared.store.row_arrays import FloatType, StorageType, row_arrays
from shared.store.statistics import QUANTILES
from shared.store.strata import Stratum, check_strata, stratum_name

FORMAT_VERSION = 3

REQUEST, PLAN, STORE = "request.json", "plan.json", "store.json"
ARRAYS, LEDGER, TOKENIZER, TOKENS, DOCUMENTS = "activations.zarr", "ledger", "tokenizer", "tokens", "documents"
UNEMBEDDING, PACKED, STATISTICS = "unembedding.safetensors", "packed.json", "statistics-*.safetensors"
UNFINISHED = "unfinished.json"
"""Where `pack` or `unpack` is writing, until it has finished."""

Attention = Literal["eager", "sdpa", "flex_attention", "flash_attention_2"]
"""How attention is computed, as transformers names it."""
Documents = Literal["joined", "apart"]
"""`joined`: attention crosses from a document to the next; `apart`: positions restart, and it does not."""


class ModelIdentity(GrownConfig):
    """Which weights computed the activations."""

    later = ("attention",)
    name: Name
    """A hub name, or the name of a local folder."""
    revision: Name | None
    """The hub's commit, resolved; none for a local folder."""
    weights: Digest
    """SHA-256 over the configuration and the weight files."""
    dtype: FloatType
    """The type the forward pass ran in."""
    device: Literal["cpu", "cuda"]
    """The kind of device it ran on."""
    attention: Attention = "eager"
    """How attention was computed."""


class CorpusIdentity(Config):
    """Which text was read, and how it became windows."""

    name: str = Field(max_length=2**20, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")
    """`embedded`, a hub name, or the names of local files."""
    digest: Digest
    """SHA-256 over the documents, or over the files, or over a hub data set's name, commit, subset and split."""
    revision: Name | None = None
    """The commit of a hub data set."""
    subset: Name | None = None
    """The configuration of a hub data set."""
    split: Name | None = None
    """The split of a hub data set."""
    column: Text | None
    """The column of text, chat messages or token ids; none for the embedded corpus."""
    kind: Literal["text", "messages", "input_ids"]
    order: Literal["shuffled", "as_read"]
    """Whether documents were permuted before packing (a stream is taken as read); windows are always permuted."""
    separator: Text | None
    """The token between documents, none for no separator."""


class StoreRequest(GrownConfig):
    """All that determines a store's bytes, except the number of tokens."""

    later = ("imported",)
    format_version: int = FORMAT_VERSION
    label: Label
    """The preset's name, or the user's; the start of the folder's name."""
    model: ModelIdentity
    tokenizer: Digest
    """SHA-256 over the tokenizer's files."""
    corpus: CorpusIdentity
    context_size: int = Field(ge=1, le=MAX_CONTEXT)
    """Tokens per window, BOS included."""
    bos: bool
    """Whether every window (and with documents apart, every document) starts with the tokenizer's BOS."""
    documents: Documents
    layer: Layer
    source_hook: Name
    target_hook: Name
    edges: Edges
    keep: dict[Position, float] = Field(max_length=MAX_STRATA)
    """Share of a stratum's rows that is stored, by the stratum's first position."""
    cap: dict[Position, Count] = Field(max_length=MAX_STRATA)
    """Most rows of a stratum that a block stores, by the stratum's first position."""
    exclude_special: bool
    """Whether rows at the tokenizer's special tokens are left out."""
    max_norm_quantile: float = Field(gt=0, le=1)
    """Of every stratum of a block, rows whose source norm is above this quantile are left out; 1 leaves out none."""
    storage: StorageType
    block_sequences: Sequences
    held_out_blocks: Blocks
    batch_sequences: Sequences
    """Windows per forward pass, halved until they fit: the shape of a matrix product can change its last bits."""
    unembedding: bool
    """Whether the store holds `unembedding.safetensors`."""
    seed: Seed
    imported: ImportOrigin | None = None
    """Of a store that was imported. Its `documents` number the sequences of the files."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_strata(self.edges, self.keep, self.cap, self.context_size)
        if self.block_sequences > INNER_ROWS and self.block_sequences % INNER_ROWS:
            raise ValueError(f"block_sequences must be a multiple of {INNER_ROWS} or less, got {self.block_sequences}")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of the request."""
        return json_digest(self.model_dump(mode="json"))

    @property
    def folder(self) -> str:
        """The store's folder in the cache, for example `tiny-L8-3f9c21`."""
        return f"{self.label}-L{self.layer}-{self.digest[:6]}"

    @property
    def block_tokens(self) -> int:
        """Tokens of one block's windows."""
        return self.block_sequences * self.context_size


class FileRecord(Config):
    """The size and checksum of one file."""

    bytes: Count
    crc32c: str = Field(pattern="^[0-9a-f]{8}$")


class PackingCounts(GrownConfig):
    """Where every token of the corpus went: read = kept + held out + left over."""

    later = ("replaced_characters", "padding_tokens", "refused_rows")
    documents: Count
    held_out_documents: Count
    empty_documents: Count = 0
    """Rows that hold no token; they are not counted as documents."""
    tokens_read: Count
    """Tokens of the documents that were read, separators included, BOS excluded."""
    tokens_kept: Count
    """In training windows, BOS excluded."""
    tokens_held_out: Count
    tokens_left_over: Count
    """Read, but not enough for another whole block, or past a held-out block's end."""
    replaced_characters: Count = 0
    """Characters of documents that became U+FFFD: bytes that are no UTF-8, and halves of surrogate pairs."""
    padding_tokens: Count = 0
    """Given token ids that are no text: where `attention_mask` is 0, or padding at a row's ends; in no other count."""
    refused_rows: Count = 0
    """Rows that are no document, left out because `text.max_refused` allows it; not counted as empty."""


class RowCounts(Config):
    """Where the rows of one stratum of a segment's training blocks go: natural = special + over_norm + rest.

    Of the rest, `stored - repeated` distinct rows are stored and the others dropped.
    """

    natural: Count
    """Computed by the model."""
    special: Count
    """Excluded: at special tokens."""
    over_norm: Count
    """Excluded: source norm above the quantile."""
    stored: Count
    repeated: Count
    """Of those stored, copies of others: a later segment's block has fewer rows than every block stores."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.special + self.over_norm > self.natural or self.repeated > self.stored:
            raise ValueError("more rows are excluded or repeated than there are")
        return self


class StratumPlan(Config):
    """The rows of one stratum."""

    start: Position
    stop: Position
    rows: Count
    """Per block; fixed with the first segment. A stratum without rows is not in the store."""
    segments: tuple[RowCounts, ...]

    @property
    def name(self) -> str:
        """The name of its group."""
        return stratum_name(self.start, self.stop)

    def total(self, kind: str) -> int:
        """Return the rows of a kind of `RowCounts` over all segments."""
        return sum(getattr(counts, kind) for counts in self.segments)

    @property
    def represented(self) -> int:
        """Training rows that the stored ones stand for: `represented / stored` restores natural frequencies."""
        return self.total("natural") - self.total("special") - self.total("over_norm")


class StorePlan(Config):
    """What the store will hold, exact before any model is loaded."""

    request: Digest
    """Digest of the request."""
    segments: tuple[Blocks, ...]
    """Training blocks per segment; each segment's windows were permuted on their own. Held-out blocks come first."""
    packing: tuple[PackingCounts, ...]
    """One entry per segment."""
    strata: tuple[StratumPlan, ...] = Field(max_length=MAX_STRATA)
    """In order of position, those without rows included."""
    special_tokens: tuple[TokenId, ...] = ()
    """The tokens whose rows are excluded."""
    token_files: dict[FileName, FileRecord]
    """The shard files of `tokens` and `documents`, by path below the Zarr root."""
    exhausted: bool = False
    """Whether the corpus is known to hold no further whole block: asking for more tokens gives this same store."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.training_blocks > MAX_BLOCKS:
            raise ValueError(f"more than {MAX_BLOCKS:,} blocks are planned; use larger blocks (store.block_sequences)")
        if {len(self.segments)} != {len(self.packing), *(len(stratum.segments) for stratum in self.strata)}:
            raise ValueError("the packing or a stratum has another number of segments than the plan")
        if empty := [s.name for s in self.strata if s.rows and self.training_blocks and not s.represented]:
            raise ValueError(f"stratum {empty[0]} stores rows that stand for none")
        return self

    @property
    def training_blocks(self) -> int:
        """Blocks that are not held out."""
        return sum(self.segments)

    def continues(self, other: "StorePlan") -> bool:
        """Tell whether this is `other`, or `other` with more segments."""
        count = len(other.segments)
        mine = (self.request, self.segments[:count], self.packing[:count], self.special_tokens)
        rows = [(s.rows, s.segments[:count]) for s in self.strata]
        return (
            mine == (other.request, other.segments, other.packing, other.special_tokens)
            and rows == [(s.rows, s.segments) for s in other.strata]
            and other.token_files.items() <= self.token_files.items()
        )

    @property
    def stored_strata(self) -> tuple[Stratum, ...]:
        """The strata that are in the store, in order of position."""
        blocks = max(1, self.training_blocks)
        return tuple(
            Stratum(start=s.start, stop=s.stop, rows=s.rows, natural_rows=s.represented / blocks)
            for s in self.strata
            if s.rows
        )


class LedgerRecord(GrownConfig):
    """One committed block."""

    later = ("computed_on",)
    block: Blocks
    batch_sequences: Sequences
    """Windows per forward pass that it was computed with; the same for all blocks."""
    d_in: Width
    d_out: Width
    files: dict[FileName, FileRecord]
    """Shard files by path below the Zarr root."""
    tokens: dict[FileName, FileRecord]
    """The shard files of `tokens` and `documents` that it was computed from: rows of other tokens are not its rows."""
    moments: FileRecord
    """The block's statistics, `ledger/<block>.moments.safetensors`."""
    computed_on: dict[Name, Name] | None = Field(default=None, max_length=20)
    """What the last bits of its rows depend on: torch, the processor's vector instructions, GPU, driver, CUDA.

    None of rows that were imported, or recorded before there was this.
    """


class NormSummary(Config):
    """The size of the rows of one stratum (or overall), one side."""

    mean_squared_norm: float
    norm_quantiles: dict[str, float]
    """Quantiles of the Euclidean norm, by share; from a histogram of 1/64 octave, so within 1.1 %."""
    mean_to_deviation: float
    """Norm of the mean over root of the summed variance: above 1, the mean dominates."""
    outlier_rows: Count
    """Stored rows with a norm above 10 times the overall median."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.norm_quantiles) != (wanted := {str(share) for share in QUANTILES}):
            raise ValueError(f"norm_quantiles must be of {', '.join(sorted(wanted))}")
        return self


class StratumSummary(Config):
    """One stratum of a finished store, over its training blocks."""

    start: Position
    stop: Position
    rows: Count
    natural_rows: Count
    """Rows the model computed, less those excluded; natural_rows / rows is the weight that restores frequencies."""
    source: NormSummary
    target: NormSummary


class StorageFloor(Config):
    """The squared error of the stored rows over their variance, without outliers and position 0.

    No transcoder that is trained on them has less fvu.
    """

    source: float = Field(ge=0)
    target: float = Field(ge=0)


class StoreRecord(GrownConfig):
    """A finished store: `store.json`."""

    later = ("storage_floor",)
    format_version: int
    request: StoreRequest
    plan: StorePlan
    d_in: Width
    d_out: Width
    blocks: Blocks
    """All blocks, the held-out ones (which come first) included."""
    strata: tuple[StratumSummary, ...]
    overall: StratumSummary
    """At natural frequencies, without position 0."""
    files: dict[FileName, FileRecord]
    """Statistics and tokenizer files, by path below the store."""
    software: dict[Name, Name]
    """Versions that produced the bytes."""
    storage_floor: StorageFloor | None = None
    """Of int8."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        stored = self.plan.stored_strata
        if [(s.start, s.stop) for s in self.strata] != [(s.start, s.stop) for s in stored]:
            raise ValueError("strata are not those that the plan stores rows of")
        if most := [s for s in stored if s.rows > self.request.block_tokens]:
            raise ValueError(f"stratum {most[0].name} stores more rows of a block than it has tokens")
        specs = store_specs(self.request, stored, self.d_in, self.d_out)
        files = self.blocks * sum(spec.shards_per_block for spec in specs)
        if files > MAX_FILES:
            raise ValueError(f"the store would have {files:,} shard files, and at most {MAX_FILES:,} are read")
        return self

    @property
    def training_blocks(self) -> range:
        """The blocks to train on."""
        return range(self.request.held_out_blocks, self.blocks)

    @property
    def calibration_blocks(self) -> range:
        """The held-out blocks that thresholds are calibrated on; empty when fewer than two are held out."""
        return range(self.request.held_out_blocks // 2)

    @property
    def report_blocks(self) -> range:
        """The held-out blocks that figures are reported on."""
        return range(self.request.held_out_blocks // 2, self.request.held_out_blocks)


def tokens_spec(request: StoreRequest) -> ArraySpec:
    """Return the array of token windows [sequences, context]."""
    return _windows_spec(request, TOKENS)


def documents_spec(request: StoreRequest) -> ArraySpec:
    """Return the array of the document that each token belongs to, [sequences, context].

    Documents are counted from 0 in order of packing. A BOS belongs to the document that follows it.
    """
    return _windows_spec(request, DOCUMENTS)


def _windows_spec(request: StoreRequest, path: str) -> ArraySpec:
    return ArraySpec(
        path=path,
        dtype="int32",
        width=request.context_size,
        rows_per_block=request.block_sequences,
        dimension_names=("sequence", "offset"),
    )


def stratum_specs(request: StoreRequest, stratum: Stratum, d_in: int, d_out: int) -> dict[str, ArraySpec]:
    """Return the arrays of a stratum, by name.

    They hold its rows, and for each row the position the model saw and the place of its token; of int8 the scales, too.
    """
    hooks = {"source": request.source_hook, "target": request.target_hook}
    return row_arrays(request.storage, hooks, stratum, d_in, d_out)


def row_specs(request: StoreRequest, strata: Sequence[Stratum], d_in: int, d_out: int) -> list[ArraySpec]:
    """Return the arrays of all strata, in order of position."""
    return [spec for s in strata for spec in stratum_specs(request, s, d_in, d_out).values()]


def store_specs(request: StoreRequest, strata: Sequence[Stratum], d_in: int, d_out: int) -> list[ArraySpec]:
    """Return all arrays: tokens, documents and rows."""
    return [tokens_spec(request), documents_spec(request), *row_specs(request, strata, d_in, d_out)]


def block_bytes(specs: Sequence[ArraySpec]) -> int:
    """Return the exact bytes of one block's shard files."""
    return sum(spec.shards_per_block * spec.shard_bytes for spec in specs)


def statistics_path(blocks: int) -> str:
    """Return the path of the statistics of a store of `blocks` blocks.

    Extending the store leaves those of the shorter one alone.
    """
    return STATISTICS.replace("*", f"{blocks:06d}")


def block_row_files(
    request: StoreRequest, strata: Sequence[Stratum], d_in: int, d_out: int, block: int
) -> dict[str, int]:
    """Return the size of every shard file of a block's rows, by path below the Zarr root."""
    specs = row_specs(request, strata, d_in, d_out)
    return {spec.shard_path(shard): spec.shard_bytes for spec in specs for shard in spec.block_shards(block)}


def block_token_files(plan: StorePlan, request: StoreRequest, block: int) -> dict[str, FileRecord]:
    """Return the shard files of a block's tokens and documents, as planned, by path below the Zarr root."""
    specs = (tokens_spec(request), documents_spec(request))
    names = [spec.shard_path(shard) for spec in specs for shard in spec.block_shards(block)]
    return {name: plan.token_files[name] for name in names if name in plan.token_files}


def record_path(block: int) -> str:
    """Return a ledger record's path below the store."""
    return f"{LEDGER}/{block:06d}.json"


def moments_path(block: int) -> str:
    """Return the path of a block's statistics below the store."""
    return f"{LEDGER}/{block:06d}.moments.safetensors"
