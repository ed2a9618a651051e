"""The files of samples: `samples/step-<step>.parquet`, a row per context, and `latents-<step>.parquet`, one per latent.

Both open in pandas, polars or duckdb. The description of each column, and a record of what was looked at, are in the
schema's metadata. No time stamps and no paths: the same run gives the same bytes.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from shared.config import Config, brief
from shared.errors import CorruptData
from shared.files import durable
from train.samples import context_loops, histograms
from train.samples.encode import Activations
from train.samples.select import TOP, SamplesConfig, Selection
from train.samples.token_text import pieces

Array = NDArray[Any]

FOLDER = "samples"
RECORD = b"transcoder_cache.samples"
"""The key of the record in the schema's metadata."""
_DIGEST = b"transcoder_cache.schema_sha256"
"""The key of the digest of the columns and all other metadata, which checksums of pages leave out."""
_GROUP_ROWS = 8192
"""Contexts that are compressed together: a reader that wants one latent's reads those of some hundred."""
_REMOVE = "remove it, and the report makes it again"


def _list_of(kind: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    return lambda found: pa.types.is_list(found) and kind(found.value_type)


_CONTEXTS = {
    "latent": pa.types.is_integer,
    "kind": pa.types.is_dictionary,
    "rank": pa.types.is_integer,
    "activation": pa.types.is_floating,
    "position": pa.types.is_integer,
    "peak": pa.types.is_integer,
    "tokens": _list_of(pa.types.is_integer),
    "text": _list_of(pa.types.is_string),
    "activations": _list_of(pa.types.is_floating),
}
"""The columns that a report reads, and what they hold; there are more."""
_LATENTS = {
    "latent": pa.types.is_integer,
    "prefix": pa.types.is_integer,
    "contexts": pa.types.is_integer,
    "density": pa.types.is_floating,
    "max": pa.types.is_floating,
    "mean": pa.types.is_floating,
    "bin_edges": _list_of(pa.types.is_floating),
}
_WITH_NULLS = ("max", "mean", "bin_edges")


class SamplesRecord(Config):
    """What the samples were made from; JSON in the metadata of both files."""

    schema_version: Literal[1] = 1
    request: str
    """Digest of the store's request."""
    step: int
    source: str
    """The side of the pairs that the transcoder reads."""
    d_sae: int
    first_sequence: int
    """Sequences are rows of the store's `tokens`, this one and those after it."""
    sequences: int
    rows: dict[str, int]
    """Stored rows that were looked at, by position stratum."""
    latents: int
    """Latents with samples: all that are active on any of the rows."""
    contexts: int
    seed: int
    settings: SamplesConfig


class Samples(NamedTuple):
    """Two tables that are not written yet."""

    record: SamplesRecord
    contexts: pa.Table
    latents: pa.Table

    def publish(self, run: Path) -> Path:
        """Write both files; returns that of the contexts. Raises `DiskFull`, and then leaves what was there before."""
        contexts, latents = paths(run, self.record.step)
        durable.publish_files({latents: parquet(self.latents), contexts: parquet(self.contexts)})
        return contexts


def paths(run: Path, step: int) -> tuple[Path, Path]:
    """Return the files of contexts and of latents."""
    return run / FOLDER / f"step-{step:06d}.parquet", run / FOLDER / f"latents-{step:06d}.parquet"


def contexts_table(found: Activations, chosen: Selection, context: int, tokenizer: Path) -> pa.Table:
    """Make a row per sample, of `context` tokens at most; without `tokenizer`, a file, their text is null."""
    n, (known_tokens, known_places) = len(chosen.pairs), found.known
    context = min(context, found.tokens.shape[1])
    peaks = found.places[chosen.pairs].astype(np.int64)
    first, length, position = np.empty((3, n), np.int64)
    activations, stored = np.empty((n, context), np.float32), np.empty((n, context), bool)
    tokens, documents = found.tokens.ravel(), found.documents.ravel()
    context_loops.contexts(
        peaks, chosen.latents, found.starts, found.places, found.values, found.stratum, tokens, documents, found.apart,
        found.tokens.shape[1], context // 4, known_tokens, known_places, first, length, position, activations, stored,
    )  # fmt: skip
    within = np.arange(context) < length[:, None]
    shown = tokens[(first[:, None] + np.arange(context))[within]]
    ends = pa.array(np.concatenate([[0], np.cumsum(length)]), pa.int32())

    def listed(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(ends, values)

    sequence, offset = np.divmod(peaks, found.tokens.shape[1])
    top = chosen.bins == TOP
    columns = {
        "latent": (pa.array(chosen.latents), "which latent, from 0"),
        "kind": (_named(~top, ["top", "quantile"]), "'top': of the largest activations; 'quantile': of a bin"),
        "bin": (
            pa.array(chosen.bins, mask=top),
            "quantile bin of the sequences that are not in the top, from 0, the weakest; null in the top",
        ),
        "rank": (pa.array(chosen.ranks), "from 0, the strongest of the top or of the bin"),
        "activation": (pa.array(found.values[chosen.pairs]), "of the latent at the peak, its largest in the sequence"),
        "stratum": (_named(found.stratum[peaks], list(found.strata)), "position stratum of the peak"),
        "position": (pa.array(position, pa.int32()), "of the peak, as the model counted"),
        "sequence": (pa.array(sequence + found.first, pa.int64()), "row of the store's `tokens`"),
        "offset": (pa.array(offset, pa.int32()), "column of the store's `tokens`, of the peak"),
        "document": (pa.array(documents[peaks]), "of the peak's token, numbered in order of packing"),
        "peak": (pa.array(peaks - first, pa.int32()), "which token of the context is the peak, from 0"),
        "tokens": (listed(pa.array(shown)), "of the context"),
        "text": (listed(_texts(shown, tokenizer)), "of each token; joined, that of the context"),
        "activations": (
            listed(pa.array(activations[within], mask=~stored[within])),
            "of the latent at each token; null: its row is not stored. Position 0 is that of a stored row of its token",
        ),
    }
    return _table(columns)


def latents_table(found: Activations, chosen: Selection, prefixes: Array, weights: Array) -> pa.Table:
    """Make a row per latent; `prefixes` [F] hold them, and rows of each stratum weigh `weights` [P] in the whole."""
    shape = (found.d_sae, len(found.strata))
    rows, windows = np.zeros(shape, np.int64), np.zeros(found.d_sae, np.int64)
    sums, largest = np.zeros(shape), np.zeros(found.d_sae, np.float32)
    pairs = (found.starts, found.places, found.values, found.stratum, found.tokens.shape[1])
    context_loops.profile(*pairs, rows, sums, windows, largest)
    active, weighted, looked_at = rows.sum(1) > 0, rows @ weights, found.rows
    mean = np.divide(sums @ weights, weighted, out=np.zeros(found.d_sae), where=weighted > 0)
    bars, edges = histograms.of_activations(found.starts, found.values), chosen.edges
    there = np.isfinite(edges).all(1) & (edges.shape[1] > 0)
    ends = np.concatenate([[0], np.cumsum(there * edges.shape[1])])
    whole = "at natural frequencies, without position 0"
    columns = {
        "latent": (pa.array(np.arange(found.d_sae, dtype=np.int32)), "which latent, from 0"),
        "prefix": (pa.array(prefixes, pa.int32()), "size of the smallest Matryoshka prefix that holds it"),
        "contexts": (pa.array(np.bincount(chosen.latents, minlength=found.d_sae), pa.int32()), "samples of it"),
        "rows": (pa.array(rows.sum(1)), "stored rows on which it is active"),
        "sequences": (pa.array(windows), "in which it is active on a stored row"),
        "density": (pa.array(weighted / max(float(looked_at @ weights), 1e-9)), f"share of rows, {whole}"),
        "max": (pa.array(largest, mask=~active), "largest activation on a stored row; null: it is never active"),
        "mean": (pa.array(mean, mask=~(weighted > 0)), f"activation where it is active, {whole}; null: nowhere"),
        "bin_edges": (
            pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(edges[there].ravel()), mask=pa.array(~there)),
            "activations between the quantile bins, rising; null: no sequence is in any",
        ),
        "min": (
            pa.array(bars.least.astype(np.float32), mask=~active),
            "smallest activation on a stored row; null: it is never active",
        ),
        "histogram": (
            histograms.column(bars.heights),
            f"stored rows on which it is active, in {histograms.BARS} bars of equal width from min to max",
        ),
    } | {
        f"density_{name}": (
            pa.array(rows[:, i] / max(int(looked_at[i]), 1)),
            f"share of the rows of positions {name} on which it is active",
        )
        for i, name in enumerate(found.strata)
    }
    return _table(columns)


def _named(numbers: Array, names: list[str]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(numbers.astype(np.int32)), names)


def _texts(tokens: Array, tokenizer: Path) -> pa.Array:
    if not tokenizer.is_file():
        return pa.nulls(len(tokens), pa.string())
    known, places = np.unique(tokens, return_inverse=True)
    return pa.array(pieces(tokenizer, known.tolist()), pa.string()).take(pa.array(places))


def _table(columns: dict[str, tuple[pa.Array, str]]) -> pa.Table:
    fields = [pa.field(name, values.type, metadata={"description": told}) for name, (values, told) in columns.items()]
    return pa.table([values for values, _ in columns.values()], schema=pa.schema(fields))


def parquet(table: pa.Table) -> bytes:
    """Return the table as a file, with a checksum of every page and a digest of its schema."""
    out = pa.BufferOutputStream()
    metadata = table.schema.metadata or {}
    table = table.replace_schema_metadata({**metadata, _DIGEST: _schema_digest(table.schema)})
    pq.write_table(table, out, compression="zstd", row_group_size=_GROUP_ROWS, write_page_checksum=True)
    return out.getvalue().to_pybytes()


def read_contexts(path: Path) -> pa.Table:
    """Read a file of contexts, its checksums compared. Raises `CorruptData` when it is not one, or is damaged."""
    table, record = _read(path, _CONTEXTS)
    latents, peaks = (table[name].to_numpy() for name in ("latent", "peak"))
    sizes = [pc.list_value_length(table[name]).to_numpy() for name in ("tokens", "activations", "text")]
    good = len(table) == record.contexts and ((latents >= 0) & (latents < record.d_sae)).all()
    good = good and (np.diff(latents) >= 0).all() and ((peaks >= 0) & (peaks < sizes[0])).all()
    if not (good and all((size == sizes[0]).all() for size in sizes)):
        raise CorruptData(f"{path}: its contexts are not those that its record counts; {_REMOVE}")
    return table


def read_latents(path: Path) -> pa.Table:
    """Read a file of latents, its checksums compared. Raises `CorruptData` when it is not one, or is damaged."""
    table, record = _read(path, _LATENTS)
    for name in (f"density_{stratum}" for stratum in record.rows):
        if name not in table.column_names or not pa.types.is_floating(table.schema.field(name).type):
            raise CorruptData(f"{path}: column {name} is missing, or holds no numbers; {_REMOVE}")
    if len(table) != record.d_sae or (table["latent"].to_numpy() != np.arange(record.d_sae)).any():
        raise CorruptData(f"{path}: its rows are not the {record.d_sae:,} latents of its record; {_REMOVE}")
    return table


def _schema_digest(schema: pa.Schema) -> bytes:
    """Return a SHA-256 of names, types and descriptions of columns and of the metadata; Parquet renames list items."""
    types = [f"list of {f.type.value_type}" if pa.types.is_list(f.type) else str(f.type) for f in schema]
    described = [(field.metadata or {}).get(b"description", b"") for field in schema]
    kept = sorted(item for item in (schema.metadata or {}).items() if item[0] != _DIGEST)
    told = repr((schema.names, types, described, kept))
    return hashlib.sha256(told.encode()).hexdigest().encode()


def _read(path: Path, columns: Mapping[str, Callable[[pa.DataType], bool]]) -> tuple[pa.Table, SamplesRecord]:
    """Read a file that has `columns` of these types, without nulls but in lists."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise CorruptData(f"{path}: not readable ({brief(str(error))}); {_REMOVE}") from error
    if (table.schema.metadata or {}).get(_DIGEST, b"") not in (b"", _schema_digest(table.schema)):
        raise CorruptData(f"{path}: its columns or its record are not what was written; {_REMOVE}")
    for name, kind in columns.items():
        if table.schema.get_field_index(name) < 0 or not kind(table.schema.field(name).type):
            raise CorruptData(f"{path}: column {name} is missing, or of another type; {_REMOVE}")
        if table[name].null_count and name not in _WITH_NULLS:
            raise CorruptData(f"{path}: column {name} has nulls; {_REMOVE}")
    try:
        return table, SamplesRecord.model_validate_json((table.schema.metadata or {}).get(RECORD, b""))
    except ValidationError as error:
        raise CorruptData(f"{path}: it has no record of what it was made from; {_REMOVE}") from error
