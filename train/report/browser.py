"""The browser of latents: the page `latents.html`, and its data as compressed scripts beside it.

A page that is opened from disk may not fetch files or load modules. So data come as classic scripts, each one call
of a function of the page with a string: JSON, gzipped, in base64. Such a string holds nothing that a script or a page
could take for its own. An index of all latents is loaded at once, chunks of latents with their contexts when one of
them is looked at.

Legend: F latents, n contexts, C tokens of all contexts.
"""

import base64
import gzip
import json
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shared.store.store import Store
from train.report.context_text import context_text
from train.report.page import environment
from train.samples.parquet import RECORD, SamplesRecord, parquet
from train.samples.token_text import pieces

Array = NDArray[Any]

CHUNK = 256
"""Latents of a file: some 0.4 MB, read in a fraction of a second."""
CONTEXTS, TOKENS = 25, 32
"""Most contexts of a latent, and most tokens of a context; the file of samples has the rest."""
_OF_LABELS = ("label_f1", "label_f1_low", "label_f1_high", "label_precision", "label_recall", "label_auroc")
"""Figures of a latent's labels."""
_PEAKS = 10
"""Most tokens at peaks of a latent in the index."""
_DIGITS = 3
"""Of numbers that are shown."""
_SCRIPTS = (
    "latents.js",
    "latents_list.js",
    "latents_one.js",
    "latents_charts.js",
    "latents_text.js",
    "latents_labels.js",
    "theme.js",
)
"""Together the page's one script."""


class Contexts(NamedTuple):
    """Contexts as they are shown: cut to `TOKENS`, at most `CONTEXTS` of each latent."""

    table: pa.Table
    """Of the contexts [n], as sampled"""
    starts: Array
    """[F + 1] where each latent's begin"""
    peaks: Array
    """[n] which token of each is its peak"""
    ends: Array
    """[n + 1] where the tokens of each begin"""
    tokens: Array
    """[C] int32"""
    values: list[int | float | None]
    """[C] activations; none: the row is not stored"""


def browser_files(run: str, store: Store, table: pa.Table, contexts: pa.Table) -> dict[str, bytes]:
    """Return all files of the folder `report/`, by their names below it.

    `run` is a name for people, `table` what `latents_table` made, and `contexts` the run's samples. The same input
    gives the same bytes.
    """
    record = SamplesRecord.model_validate_json(contexts.schema.metadata[RECORD])
    shown = cut(contexts, len(table))
    words = _Words(table, shown)
    chunks = range(0, len(table), CHUNK)
    scripts = {
        "index": _call("index", _index(run, table, words, record)),
        "tokens": _call("tokens", _texts(store, words.ids)),
        "text": _call("text", _text(store, record, shown, words)),
        **{f"{i:03d}": _call("chunk", _chunk(table, shown, words, low), i) for i, low in enumerate(chunks)},
    }
    assets = files("train.report") / "assets"
    style = (assets / "style.css").read_bytes() + (assets / "latents.css").read_bytes()
    return {
        "latents.html": _page(run, record).encode(),
        "latents.parquet": parquet(table),
        "latents/page.css": style,
        "latents/page.js": b"".join((assets / name).read_bytes() for name in _SCRIPTS),
        **{f"latents/{name}.js": data for name, data in scripts.items()},
    }


def cut(contexts: pa.Table, d_sae: int) -> Contexts:
    """Keep the first contexts of each latent, and of each the tokens around its peak, a quarter of them after it."""
    latents = contexts["latent"].to_numpy()
    rank = np.arange(len(latents)) - np.searchsorted(latents, latents)
    table = contexts.filter(pa.array(rank < CONTEXTS)).combine_chunks()
    tokens, activations = (table[name].combine_chunks() for name in ("tokens", "activations"))
    sizes, peaks = np.diff(tokens.offsets.to_numpy()), table["peak"].to_numpy()
    lengths = np.minimum(sizes, TOKENS)
    skipped = np.clip(peaks - (TOKENS - TOKENS // 4 - 1), 0, sizes - lengths)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    at = np.arange(ends[-1]) + np.repeat(tokens.offsets.to_numpy()[:-1] + skipped - ends[:-1], lengths)
    stored = activations.values.is_valid().to_numpy(zero_copy_only=False)[at]
    values = activations.values.fill_null(0).to_numpy()[at]
    return Contexts(
        table=table,
        starts=np.searchsorted(table["latent"].to_numpy(), np.arange(d_sae + 1)),
        peaks=peaks - skipped,
        ends=ends,
        tokens=tokens.values.to_numpy()[at],
        values=_rounded(values, stored),
    )


class _Words:
    """Every token that is shown, in falling frequency: a small number stands for a frequent one."""

    def __init__(self, table: pa.Table, shown: Contexts) -> None:
        listed = [table[name].combine_chunks().flatten().to_numpy() for name in ("peaks", "promoted", "suppressed")]
        known, counts = np.unique(np.concatenate([shown.tokens, *listed]), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        self.ids: Array = known[order]
        self._known, self._places = known, np.argsort(order)

    def of(self, tokens: Array) -> list[int]:
        """Return the number that stands for each of `tokens`."""
        return self._places[np.searchsorted(self._known, tokens)].tolist()

    def lists(self, column: pa.Array, most: int | None = None) -> list[list[int] | None]:
        """Return the same for a list of tokens per latent."""
        return [None if one is None else self.of(np.array(one[:most], np.int64)) for one in column.to_pylist()]


def _texts(store: Store, ids: Array) -> dict[str, Any]:
    """Return tokens and, where the store has a tokenizer, their text."""
    file = store.tokenizer / "tokenizer.json"
    return {"ids": ids.tolist(), "texts": pieces(file, ids.tolist()) if file.is_file() else None}


def _text(store: Store, record: SamplesRecord, shown: Contexts, words: _Words) -> dict[str, Any]:
    """Return the sequences that contexts are from; tokens that no context shows have the numbers after `words`."""
    found = context_text(store, record, shown.table, shown.peaks)
    flat = found.tokens.ravel()
    known, counts = np.unique(flat, return_counts=True)
    more = known[~np.isin(known, words.ids)]
    more = more[np.argsort(-counts[np.isin(known, more)], kind="stable")]
    numbers = np.concatenate([words.ids, more])
    order = np.argsort(numbers)
    return {
        **_texts(store, more),
        "width": found.tokens.shape[1],
        "tokens": order[np.searchsorted(numbers, flat, sorter=order)].tolist(),
        "breaks": found.breaks,
        "sequence": found.sequence.tolist(),
        "first": found.first.tolist(),
        "peak": shown.peaks.tolist(),
        "length": np.diff(shown.ends).tolist(),
        "contexts": np.diff(shown.starts).tolist(),
    }


def _index(run: str, table: pa.Table, words: _Words, record: SamplesRecord) -> dict[str, Any]:
    """Return the data by which the page lists, sorts and finds latents."""
    said = table.select(["latent", "label", "note", "star"]).to_pylist()
    strata = np.stack([table[f"density_{name}"].to_numpy() for name in record.rows])
    return {
        "run": run,
        "step": record.step,
        "store": record.request[:12],
        "chunk": CHUNK,
        "strata": list(record.rows),
        "bins": record.settings.bins,
        "prefix": table["prefix"].to_pylist(),
        **{name: _column(table[name]) for name in ("density", "max", "mean", "position_0_share")},
        "peaks": words.lists(table["peaks"], _PEAKS),
        "promoted": words.lists(table["promoted"]),
        "suppressed": words.lists(table["suppressed"]),
        "nearest": [one[0] if one else None for one in table["nearest_latents"].to_pylist()],
        "cosine": _firsts(table["nearest_cosines"]),
        "correlation": _firsts(table["correlations"]),
        "refines": table["refines"].to_pylist(),
        "refines_share": _column(table["refines_share"]),
        "stratum": strata.argmax(0).tolist(),
        "said": {
            str(one["latent"]): [one["label"] or "", one["note"] or "", one["star"]]
            for one in said
            if one["label"] or one["note"] or one["star"]
        },
    }


def _chunk(table: pa.Table, shown: Contexts, words: _Words, low: int) -> dict[str, Any]:
    """Return what else is shown of the chunk of latents from `low` on."""
    part = table.slice(low, CHUNK)
    first, last = shown.starts[low], shown.starts[min(low + CHUNK, len(table))]
    of_tokens, contexts = slice(shown.ends[first], shown.ends[last]), shown.table.slice(first, last - first)
    names = [name.removeprefix("density_") for name in table.schema.names if name.startswith("density_")]
    return {
        **{f"density_{name}": _column(part[f"density_{name}"]) for name in names},
        "min": _column(part["min"]),
        **{
            name: part[name].to_pylist()
            for name in ("nearest_latents", "correlated_latents", "labels", "histogram", "logit_histogram")
        },
        **{
            name: [None if one is None else _rounded(np.array(one)) for one in part[name].to_pylist()]
            for name in (
                "nearest_cosines",
                "correlations",
                "promoted_effects",
                "suppressed_effects",
                "bin_edges",
                *_OF_LABELS,
            )
        },
        "contexts": np.diff(shown.starts[low : low + CHUNK + 1]).tolist(),
        "bin": contexts["bin"].to_pylist(),
        "activation": _column(contexts["activation"]),
        **{name: contexts[name].to_pylist() for name in ("position", "sequence", "document")},
        "peak": shown.peaks[first:last].tolist(),
        "length": np.diff(shown.ends[first : last + 1]).tolist(),
        "tokens": words.of(shown.tokens[of_tokens]),
        "values": shown.values[of_tokens],
    }


def _call(function: str, value: Any, number: int | None = None) -> bytes:
    """Return a script that hands `value` to the page."""
    plain = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode()
    packed = base64.b64encode(gzip.compress(plain, compresslevel=6, mtime=0))
    argument = b"" if number is None else b"%d," % number
    return b"transcoderCache.%s(%s" % (function.encode(), argument) + b'"' + packed + b'")\n'


def _page(run: str, record: SamplesRecord) -> str:
    template = environment().get_template("latents.html")
    return template.render(run=run, record=record, contexts=CONTEXTS, tokens=TOKENS)


def _column(values: pa.ChunkedArray) -> list[int | float | None]:
    return _rounded(values.fill_null(0).to_numpy(), values.is_valid().to_numpy())


def _firsts(lists: pa.ChunkedArray) -> list[int | float | None]:
    """Return the first of each list, if there is one."""
    found = [one[0] if one else None for one in lists.to_pylist()]
    return _rounded(np.array([one or 0 for one in found]), np.array([one is not None for one in found], bool))


def _rounded(values: Array, there: Array | None = None) -> list[int | float | None]:
    """Round numbers to few digits, 0 as an integer, none where they are not `there`."""
    out = np.zeros(len(values), object)
    some = np.flatnonzero(values)
    out[some] = [float(f"{value:.{_DIGITS}g}") for value in values[some].tolist()]
    if there is not None:
        out[~there] = None
    found: list[int | float | None] = out.tolist()
    return found
