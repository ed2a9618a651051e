"""Finished stores made from random numbers, for tests that need no LLM.

`make_store` writes every file a harvest writes, with rows that a transcoder can learn: the source is the token's
vector plus noise around a mean far from zero, the target a fixed two-layer map of the source plus noise. Position 0
holds one and the same row of large norm, as a BOS does in a real model.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from shared import keyed
from shared.files import durable
from shared.store import arrays, layout, row_arrays, statistics
from shared.store.store import Store
from shared.store.strata import Stratum, quota, stratum_ranges

if TYPE_CHECKING:
    import zarr

Array = NDArray[Any]
SIDES = row_arrays.SIDES
Draw = Callable[[Array, Array, Array | float], dict[str, Array]]
"""Rows by side, float32 or as they are stored, for the tokens and positions of a stratum and what each has of its
document."""
BOS = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentLayout:
    """Documents of one length, and how much of its rows each decides."""

    tokens: int
    deviation: float
    """Of the vector that a document adds to its rows; a token's own has 1.04."""
    shuffled: bool
    """Whether windows are permuted over the store and rows within their block, or all lie in order of documents."""

    def owners(self, block: int, blocks: int, request: layout.StoreRequest) -> Array:
        """The document of each token of a block's windows [S, T]."""
        windows = blocks * request.block_sequences
        place = keyed.permutation(windows, request.seed, "windows") if self.shuffled else np.arange(windows)
        first = place.reshape(blocks, -1, 1)[block] * request.context_size
        return ((first + np.arange(request.context_size)) // self.tokens).astype(np.int32)

    def vectors(self, owners: Array, d_in: int) -> Array:
        """What each row has of its document [n, D]."""
        numbers, places = np.unique(owners, return_inverse=True)
        drawn = [np.random.default_rng(int(number)).normal(size=d_in) for number in numbers]
        return self.deviation * np.array(drawn)[places]


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticStore:
    """A store on disk and what it must contain."""

    path: Path
    record: layout.StoreRecord
    arrays: dict[str, Array]
    """All rows of every array as stored, by path below the Zarr root, for example `strata/004-016/source`."""

    def values(self, name: str) -> NDArray[np.float32]:
        """The rows of a source or target array as numbers."""
        if self.record.request.storage == "int8":
            stratum, _, side = name.rpartition("/")
            return decode_int8(self.arrays, stratum, side, self.record.d_in)
        return decode(self.arrays[name], self.record.request.storage)


def make_request(
    *,
    context_size: int = 32,
    edges: Sequence[int] = (0, 1, 4, 16),
    keep: Mapping[int, float] | None = None,
    storage: row_arrays.StorageType = "bfloat16",
    block_sequences: int = 16,
    held_out_blocks: int = 2,
    layer: int = 3,
    seed: int = 0,
    label: str = "synthetic",
    unembedding: bool = False,
) -> layout.StoreRequest:
    """A request like a harvest's, for a model and a corpus that do not exist."""
    return layout.StoreRequest(
        label=label,
        model=layout.ModelIdentity(name="synthetic", revision=None, weights="ab" * 32, dtype="float32", device="cpu"),
        tokenizer="cd" * 32,
        corpus=layout.CorpusIdentity(
            name="synthetic", digest="ef" * 32, column=None, kind="text", order="shuffled", separator=None
        ),
        context_size=context_size,
        bos=True,
        documents="joined",
        layer=layer,
        source_hook=f"blocks.{layer}.hook_resid_mid",
        target_hook=f"blocks.{layer}.hook_mlp_out",
        edges=tuple(edges),
        keep=dict(keep or {}),
        cap={},
        exclude_special=False,
        max_norm_quantile=1.0,
        storage=storage,
        block_sequences=block_sequences,
        held_out_blocks=held_out_blocks,
        batch_sequences=4,
        unembedding=unembedding,
        seed=seed,
    )


def make_strata(request: layout.StoreRequest) -> tuple[Stratum, ...]:
    """The strata of joined documents, none of whose rows are excluded."""
    ranges = stratum_ranges(request.edges, request.context_size)
    strata = []
    for start, stop in ranges:
        natural = (stop - start) * request.block_sequences
        rows = quota(natural, request.keep.get(start, 1.0), request.cap.get(start))
        strata.append(Stratum(start=start, stop=stop, rows=rows, natural_rows=natural))
    return tuple(strata)


def make_store(
    path: Path,
    *,
    d_in: int = 16,
    d_out: int = 24,
    training_blocks: int = 3,
    vocabulary: int = 61,
    noise: float = 0.05,
    bos_norm: float = 20.0,
    tokenizer: bool = False,
    documents: DocumentLayout | None = None,
    draw: Draw | None = None,
    sinks: Mapping[int, float] | None = None,
    histograms: bool = False,
    **request: Any,
) -> SyntheticStore:
    """Write a finished store at `path`; further options are those of `make_request`.

    `noise` is the share of the target's deviation that the source does not explain; `bos_norm` the norm of the row at
    position 0 over that of other rows. Without `documents`, they are short and have no part in the rows. `draw` makes
    other rows, without documents. `sinks` are tokens whose rows are attention sinks wherever they stand: each has so
    many times the norm of other rows. With `histograms`, blocks tell how long their rows are, as those of a harvest do,
    and training need not look at all of them.
    """
    wanted = make_request(**request)
    rng = np.random.default_rng(wanted.seed)
    draw = draw or _Rows(rng, d_in, d_out, vocabulary, noise, bos_norm, sinks or {})
    files: dict[str, layout.FileRecord] = {}
    blocks = wanted.held_out_blocks + training_blocks

    parts: dict[str, list[Array]] = {}
    token_files: dict[str, layout.FileRecord] = {}
    moments: list[_Gathered] = []
    for block in range(blocks):
        tokens = rng.integers(BOS + 1, vocabulary, (wanted.block_sequences, wanted.context_size), dtype=np.int32)
        tokens[:, 0] = BOS
        owners = _short_documents(block, tokens)
        if documents:
            owners = documents.owners(block, blocks, wanted)
        for spec, rows in ((layout.tokens_spec(wanted), tokens), (layout.documents_spec(wanted), owners)):
            parts.setdefault(spec.path, []).append(rows)
            token_files |= _write_block(path, spec, block, rows)
        written, gathered = _write_strata(path, wanted, draw, d_in, block, tokens, owners, documents, parts)
        moments.append(gathered)
        tensors = {f"{stratum}/{side}/mean": every.mean for (stratum, side), (every, _) in gathered.items()}
        raw = save(tensors | (_histograms(gathered) if histograms else {}))
        done = layout.LedgerRecord(
            block=block,
            batch_sequences=4,
            d_in=d_in,
            d_out=d_out,
            files=written,
            tokens={name: record for name, record in token_files.items() if f"/c/{block}/" in name},
            moments=_record(raw),
        )
        _write(path / layout.moments_path(block), raw)
        _write_json(path / layout.record_path(block), done.model_dump(mode="json"))

    _write_metadata(path, wanted, d_in, d_out, blocks)
    summaries, overall, tensors = _summarise(wanted, moments[wanted.held_out_blocks :])
    _write_file(path, layout.statistics_path(blocks), save(tensors), files)
    if tokenizer:
        _write_file(path, f"{layout.TOKENIZER}/tokenizer.json", _tokenizer(vocabulary), files)
    record = layout.StoreRecord(
        format_version=layout.FORMAT_VERSION,
        request=wanted,
        plan=_plan(wanted, training_blocks, token_files),
        d_in=d_in,
        d_out=d_out,
        blocks=blocks,
        strata=summaries,
        overall=overall,
        files=files,
        software={"python": platform.python_version(), "numpy": np.__version__},
    )
    _write_json(path / layout.REQUEST, wanted.model_dump(mode="json"))
    _write_json(path / layout.PLAN, record.plan.model_dump(mode="json"))
    _write_json(path / layout.STORE, record.model_dump(mode="json"))
    arrays = {name: np.concatenate(blocks_) for name, blocks_ in parts.items()}
    return SyntheticStore(path=path, record=record, arrays=arrays)


def encode(rows: Array, storage: str) -> Array:
    """`rows` as they are stored; bfloat16 rounds to nearest, ties to even, and is returned as its bits."""
    if rows.dtype == np.uint16:  # they are
        return rows
    if storage != "bfloat16":
        return rows.astype(storage)
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(stored: Array, storage: str) -> NDArray[np.float32]:
    """The numbers that stored rows stand for."""
    if storage != "bfloat16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def decode_int8(arrays: Mapping[str, Array], stratum: str, side: str, d_in: int) -> NDArray[np.float32]:
    """The numbers that a stratum's int8 rows stand for, in float32 and one step after the other."""
    values, units = arrays[f"{stratum}/{side}"], arrays[f"{stratum}/{row_arrays.BLOCK_UNITS}"]
    scale = arrays[f"{stratum}/{row_arrays.ROW_SCALE}"][:, SIDES.index(side)]
    units = units[:, :d_in] if side == "source" else units[:, d_in:]
    times = len(values) // (len(units) // 2)
    mean, unit = (np.repeat(units[k::2], times, axis=0) for k in (0, 1))
    return values.astype(np.float32) * scale[:, None] * unit + mean


def _encoded(sides: Mapping[str, Array], storage: str) -> tuple[dict[str, Array], dict[str, statistics.RowParts]]:
    """A stratum's rows as they are stored, with their scales, and what will be read by side."""
    if storage != "int8":
        arrays = {side: encode(rows, storage) for side, rows in sides.items()}
        return arrays, dict(arrays)
    from shared.store import int8_rows

    rows = {side: int8_rows.encode(encode(one, "bfloat16")) for side, one in sides.items()}
    units = [np.stack([one.mean, one.unit]) for one in rows.values()]
    arrays = {side: one.values for side, one in rows.items()}
    arrays[row_arrays.ROW_SCALE] = np.stack([one.row_scale for one in rows.values()], axis=1)
    return arrays | {row_arrays.BLOCK_UNITS: np.concatenate(units, axis=1)}, dict(rows)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in place; `change` edits what it is given."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def record_as_it_is(store: Path, shard: Path) -> None:
    """Make the recorded checksum of a shard file of rows that of the file: only its values can tell that it changed."""
    name = str(shard.relative_to(store / layout.ARRAYS))
    block = int(name.split("/c/")[1].split("/")[0])
    found = _record(shard.read_bytes()).model_dump(mode="json")
    edit(store / layout.record_path(block), lambda record: record["files"].update({name: found}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def faults(path: Path) -> dict[str, str]:
    return {name: wrong for name, wrong in Store.open(path).verify() if wrong}


def stock_array(path: Path, name: str) -> "zarr.Array[Any]":
    """An array of the store at `path`, as any reader opens it."""
    import zarr

    found = zarr.open_group(path / layout.ARRAYS, mode="r")[name]
    assert isinstance(found, zarr.Array)
    return found


def stock_rows(path: Path, name: str) -> Array:
    """All rows of it."""
    return np.asarray(stock_array(path, name)[:])


class _Rows:
    """Draws (source, target) rows for tokens; the map from one to the other is fixed by the first draws of `rng`."""

    def __init__(
        self,
        rng: np.random.Generator,
        d_in: int,
        d_out: int,
        vocabulary: int,
        noise: float,
        bos_norm: float,
        sinks: Mapping[int, float],
    ) -> None:
        hidden = 4 * d_in
        self.rng, self.noise, self.sinks = rng, noise, sinks
        self.vectors = rng.normal(size=(vocabulary, d_in))
        self.mean = 2.0 * rng.normal(size=d_in)
        self.up = rng.normal(size=(d_in, hidden)) / np.sqrt(d_in)
        self.down = rng.normal(size=(hidden, d_out)) / np.sqrt(hidden)
        self.offset = rng.normal(size=d_out)
        bos = rng.normal(size=d_in)
        self.bos = bos * (bos_norm * np.sqrt(d_in) / np.linalg.norm(bos))

    def __call__(self, tokens: Array, position: Array, shared: Array | float) -> dict[str, NDArray[np.float32]]:
        source = self.vectors[tokens] + self.mean + 0.3 * self.rng.normal(size=(len(tokens), len(self.mean))) + shared
        source[position == 0] = self.bos
        for token, times in self.sinks.items():
            source[(tokens == token) & (position > 0)] = times / 20.0 * self.bos[::-1]
        target = np.maximum(source @ self.up, 0) @ self.down + self.offset
        target[position > 0] += self.noise * self.rng.normal(size=target[position > 0].shape)
        return {"source": source.astype(np.float32), "target": target.astype(np.float32)}


def _short_documents(block: int, tokens: Array) -> Array:
    owners = np.cumsum(tokens % 8 == 1, axis=1, dtype=np.int32) + np.int32(block * tokens.size)
    return owners + np.arange(len(tokens), dtype=np.int32)[:, None] * tokens.shape[1]


_Gathered = dict[tuple[str, str], tuple[statistics.Moments, statistics.Moments]]
"""By stratum and side: moments of all rows, and of those past position 0 at their natural weight."""


def _histograms(gathered: _Gathered) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for (stratum, side), (every, _) in gathered.items():
        bins = np.flatnonzero(every.norms)
        found |= {f"{stratum}/{side}/bins": bins.astype(np.int32), f"{stratum}/{side}/counts": every.norms[bins]}
    return found


def _write_strata(
    path: Path,
    request: layout.StoreRequest,
    draw: Draw,
    d_in: int,
    block: int,
    tokens: Array,
    owners: Array,
    documents: DocumentLayout | None,
    parts: dict[str, list[Array]],
) -> tuple[dict[str, layout.FileRecord], _Gathered]:
    written: dict[str, layout.FileRecord] = {}
    gathered: _Gathered = {}
    for stratum in make_strata(request):
        width = stratum.stop - stratum.start
        order = keyed.permutation(int(stratum.natural_rows), request.seed, block, stratum.name)
        order = (order if documents is None or documents.shuffled else np.sort(order))[: stratum.rows]
        sequence, position = order // width, stratum.start + order % width
        owner = owners[sequence, position]
        sides = draw(tokens[sequence, position], position, documents.vectors(owner, d_in) if documents else 0.0)
        arrays, stored = _encoded(sides, request.storage)
        arrays["position"] = position.astype(np.uint16)
        arrays["sequence"] = (sequence + block * request.block_sequences).astype(np.uint32)
        arrays["offset"] = arrays["position"]
        specs = layout.stratum_specs(request, stratum, sides["source"].shape[1], sides["target"].shape[1])
        for name, spec in specs.items():
            written |= _write_block(path, spec, block, arrays[name])
            parts.setdefault(spec.path, []).append(arrays[name])
        for side in SIDES:
            rows, past_0 = stored[side], position > 0
            every = statistics.moments_of(rows)
            later = every if past_0.all() else statistics.moments_of(rows[:][past_0])
            gathered[stratum.name, side] = every, later.scaled(stratum.natural_rows / stratum.rows)
    return written, gathered


def _write_block(path: Path, spec: arrays.ArraySpec, block: int, rows: Array) -> dict[str, layout.FileRecord]:
    written: dict[str, layout.FileRecord] = {}
    for shard, buffers in zip(spec.block_shards(block), spec.shard_buffers(rows), strict=True):
        name = spec.shard_path(shard)
        _write_file(path / layout.ARRAYS, name, b"".join(bytes(part) for part in buffers), written)
    return written


def _write_file(root: Path, name: str, data: bytes, records: dict[str, layout.FileRecord]) -> None:
    _write(root / name, data)
    records[name] = _record(data)


def _write_json(path: Path, value: Any) -> None:
    _write(path, durable.json_bytes(value))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)  # not published: hundreds of fsyncs would be most of the tests' time


def _record(data: bytes) -> layout.FileRecord:
    return layout.FileRecord(bytes=len(data), crc32c=f"{google_crc32c.value(data):08x}")


def _write_metadata(path: Path, request: layout.StoreRequest, d_in: int, d_out: int, blocks: int) -> None:
    root = path / layout.ARRAYS
    strata = make_strata(request)
    for group in ("", "strata", *(f"strata/{stratum.name}" for stratum in strata)):
        _write_json(root / group / "zarr.json", arrays.group_metadata())
    for spec in layout.store_specs(request, strata, d_in, d_out):
        _write_json(root / spec.path / "zarr.json", spec.metadata(blocks))


def _plan(
    request: layout.StoreRequest, training_blocks: int, token_files: dict[str, layout.FileRecord]
) -> layout.StorePlan:
    per_block = request.block_sequences * (request.context_size - 1)
    kept, held_out = training_blocks * per_block, request.held_out_blocks * per_block
    counts = layout.PackingCounts(
        documents=training_blocks + request.held_out_blocks,
        held_out_documents=request.held_out_blocks,
        tokens_read=kept + held_out,
        tokens_kept=kept,
        tokens_held_out=held_out,
        tokens_left_over=0,
    )
    strata = []
    for s in make_strata(request):
        natural, stored = int(s.natural_rows) * training_blocks, s.rows * training_blocks
        rows = layout.RowCounts(natural=natural, special=0, over_norm=0, stored=stored, repeated=0)
        strata.append(layout.StratumPlan(start=s.start, stop=s.stop, rows=s.rows, segments=(rows,)))
    return layout.StorePlan(
        request=request.digest,
        segments=(training_blocks,),
        packing=(counts,),
        strata=tuple(strata),
        token_files=token_files,
    )


def _summarise(
    request: layout.StoreRequest, blocks: list[_Gathered]
) -> tuple[tuple[layout.StratumSummary, ...], layout.StratumSummary, dict[str, Array]]:
    tensors: dict[str, Array] = {}

    def summary(name: str, where: dict[str, float], sides: dict[str, statistics.Moments]) -> layout.StratumSummary:
        for side, moments in sides.items():
            tensors[f"{name}/{side}/mean"], tensors[f"{name}/{side}/variance"] = moments.mean, moments.variance
        return layout.StratumSummary.model_validate(
            {**where, **{side: _norms(moments) for side, moments in sides.items()}}
        )

    def rows(stratum: Stratum) -> dict[str, float]:
        counts = {"rows": stratum.rows * len(blocks), "natural_rows": stratum.natural_rows * len(blocks)}
        return {"start": stratum.start, "stop": stratum.stop, **counts}

    strata = tuple(
        summary(s.name, rows(s), {side: statistics.merge([b[s.name, side][0] for b in blocks]) for side in SIDES})
        for s in make_strata(request)
    )
    later = [s for s in make_strata(request) if s.stop > 1]
    whole = {side: statistics.merge([block[s.name, side][1] for s in later for block in blocks]) for side in SIDES}
    natural = (request.context_size - 1) * request.block_sequences * len(blocks)
    rows_ = sum(s.rows for s in later) * len(blocks)
    where: dict[str, float] = {"start": 1, "stop": request.context_size, "rows": rows_}
    return strata, summary("overall", {**where, "natural_rows": natural}, whole), tensors


def _norms(moments: statistics.Moments) -> layout.NormSummary:
    return layout.NormSummary(
        mean_squared_norm=moments.mean_squared_norm,
        norm_quantiles={str(share): moments.norm_quantile(share) for share in statistics.QUANTILES},
        mean_to_deviation=moments.mean_to_deviation,
        outlier_rows=round(moments.rows_above(statistics.OUTLIER_RATIO * moments.norm_quantile(0.5))),
    )


def _tokenizer(vocabulary: int) -> bytes:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<bos>": BOS} | {f"word{i}": i for i in range(BOS + 1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()
