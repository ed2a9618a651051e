"""Files that Neuronpedia imports: what is known of every latent, and contexts in which it is active.

    MODEL/LAYER-SET/{release,model,sourceset,source}.jsonl
    MODEL/LAYER-SET/features/batch-N.jsonl.gz         a line for each latent
    MODEL/LAYER-SET/activations/batch-N.jsonl.gz      a line for each context

Names of fields are those of Neuronpedia's database; SAEDashboard writes the same. Of a first line's fields, the import
takes the columns, so every line has all of them; what is left out (times above all) gets the database's defaults.
Legend: F latents, O d_out, b bins, n contexts.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from shared.console.progress import Progress
from shared.errors import UserError
from shared.files import durable
from train.duplicates.directions import nearest_directions
from train.interchange.origin import Origin, origin_of
from train.interchange.sampled import Sampled, sampled
from train.run.load_run import LoadedRun
from train.samples import histograms
from train.samples.histograms import Histograms, LogitEffects
from train.samples.token_effects import decoder_directions, tokens_of, unembedding_of
from train.samples.token_text import pieces

Array = NDArray[Any]

CREATOR = "clkht01d40000jv08hvalcvly"
"""The user of a fresh Neuronpedia, to whom what is imported belongs."""
BATCH = 1024
"""Latents of a file."""
TOKENS, NEIGHBOURS, ALIGNED = 10, 10, 3
"""Of a latent: tokens that it promotes most, latents with the largest cosines, largest entries of its decoder row."""
_COMPRESSION = 3
_TOP = -1
"""SAEDashboard's mark for the strongest contexts, which are of no bin."""


class _Source(NamedTuple):
    """How Neuronpedia addresses the latents of a run."""

    model: str
    set: str
    layer: int
    hook: str

    @property
    def id(self) -> str:
        """Return LAYER-SET."""
        return f"{self.layer}-{self.set}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Latents:
    """Columns of all latents."""

    vectors: Array
    """[F, O] float32, rows of the decoder in the targets' units"""
    near: Array
    """[F, `NEIGHBOURS`] int64; -1 where there are no more"""
    cosines: Array
    density: Array
    largest: Array
    activations: Histograms
    shares: Array
    """[F, b] of the rows that were looked at, by bin"""
    logits: LogitEffects | None
    text: dict[int, str]
    """Of the tokens in `logits`"""


def write(loaded: LoadedRun, folder: Path) -> str:
    """Write all files into `folder`, and return what they hold. Raises `UserError` when the run has no samples."""
    known = sampled(loaded)
    if known.contexts["text"].null_count:
        raise UserError(
            f"{loaded.rows.store.path} holds no tokenizer.json, and Neuronpedia shows text; harvest it again"
        )
    origin = origin_of(loaded)
    source = _source(loaded, origin)
    place = folder / source.model / source.id
    for name in ("features", "activations"):
        durable.make_folder(place / name)
    for name, line in _about(loaded, origin, source, known).items():
        durable.publish_bytes(place / f"{name}.jsonl", (json.dumps(line) + "\n").encode())
    latents = _latents(loaded, known)
    starts = np.searchsorted(known.contexts["latent"].to_numpy(), np.arange(len(known.latents) + 1))
    with Progress("neuronpedia", len(known.latents), "latents") as progress:
        for number, low in enumerate(range(0, len(known.latents), BATCH)):
            high = min(low + BATCH, len(known.latents))
            contexts = known.contexts.slice(starts[low], starts[high] - starts[low]).combine_chunks()
            _publish(place / "features" / f"batch-{number}.jsonl.gz", _features(source, latents, low, high))
            _publish(place / "activations" / f"batch-{number}.jsonl.gz", _activations(source, known, latents, contexts))
            progress.update(high)
    return f"{len(known.latents):,} latents and {len(known.contexts):,} contexts, for the source {source.id}"


def _source(loaded: LoadedRun, origin: Origin) -> _Source:
    name = re.sub(r"[^a-z0-9]+", "-", loaded.path.resolve().name.lower()).strip("-") or "run"
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", origin.model.rsplit("/", 1)[-1]).lstrip(".") or "model"
    return _Source(model, name, origin.layer, origin.target_hook)


def _about(loaded: LoadedRun, origin: Origin, source: _Source, known: Sampled) -> dict[str, dict[str, Any]]:
    """Return the records of the release, the model, the set of sources and the source."""
    what = "transcoder" if origin.is_transcoder else "autoencoder"
    told = (
        f"{what} of {origin.model}: {origin.source_hook} to {origin.target_hook}, {loaded.transcoder.d_sae:,} latents"
    )
    by = {"creatorId": CREATOR}
    return {
        "release": by | {
            "name": source.set, "description": told, "descriptionShort": told, "urls": [],
            "creatorName": "transcoder-cache", "creatorNameShort": "transcoder-cache", "visibility": "PUBLIC",
        },
        "model": by | {
            "id": source.model, "instruct": False, "displayName": origin.model, "displayNameShort": source.model,
            "visibility": "PUBLIC",
        },
        "sourceset": by | {
            "modelId": source.model, "name": source.set, "creatorName": "transcoder-cache", "releaseName": source.set,
            "description": told, "type": what, "visibility": "PUBLIC", "hasDashboards": True,
        },
        "source": by | {
            "id": source.id, "modelId": source.model, "setName": source.set, "visibility": "PUBLIC",
            "dataset": origin.text, "num_prompts": len(known.activations.tokens),
            "num_tokens_in_prompt": origin.context_size, "hasDashboards": True, "inferenceEnabled": False,
            "notes": f"transcoder-cache, {origin.run}",
        },
    }  # fmt: skip


def _latents(loaded: LoadedRun, known: Sampled) -> _Latents:
    """Measure what the samples do not tell."""
    found, model, store = known.activations, loaded.transcoder, loaded.rows.store
    live = torch.from_numpy(np.flatnonzero(known.latents["max"].is_valid().to_numpy()))
    near, cosines = nearest_directions(model.unit_decoder(), live, NEIGHBOURS, model.blas)
    vectors, logits, text = decoder_directions(model), None, dict[int, str]()
    if unembedding := unembedding_of(store):
        vocabulary, weight = unembedding.scaled(tokens_of(store))
        if weight.shape[1] != vectors.shape[1]:
            raise UserError(
                f"{store.path}: its unembedding reads {weight.shape[1]} values, and the targets have {vectors.shape[1]}"
            )
        directions = torch.from_numpy(vectors).to(model.W_dec.device)
        with Progress("logits", len(vectors), "latents") as progress:
            logits = histograms.of_logits(directions, vocabulary, weight, TOKENS, update=progress.update)
        shown = np.unique(np.concatenate([logits.promoted, logits.suppressed])).tolist()
        text = dict(zip(shown, pieces(store.tokenizer / "tokenizer.json", shown), strict=True))
    return _Latents(
        vectors=vectors,
        near=near.numpy(),
        cosines=cosines.numpy(),
        density=known.latents["density"].to_numpy(),
        largest=pc.fill_null(known.latents["max"], 0.0).to_numpy(),
        activations=histograms.of_activations(found.starts, found.values),
        shares=histograms.share_in_bins(found.starts, found.values, _edges(known), int(found.rows.sum())),
        logits=logits,
        text=text,
    )


def _edges(known: Sampled) -> Array:
    """Return the edges of quantile bins [F, b + 1] float32; NaN for a latent without bins."""
    edges = np.full((len(known.latents), known.record.settings.bins + 1), np.nan, np.float32)
    column = known.latents["bin_edges"].combine_chunks()
    there = column.is_valid().to_numpy(zero_copy_only=False)
    if there.any():
        edges[there] = column.drop_null().flatten().to_numpy().reshape(there.sum(), -1)
    return edges


def _features(source: _Source, latents: _Latents, low: int, high: int) -> Iterator[str]:
    """Yield a line for each latent from `low` to `high`."""
    vectors = _number_lists(_rows(_rounded(latents.vectors[low:high])))
    for f in range(low, high):
        steer = max(float(latents.largest[f]), 1e-6)
        line = {
            "modelId": source.model, "layer": source.id, "index": str(f), "creatorId": CREATOR,
            "maxActApprox": _short(latents.largest[f]), "hasVector": True, "vectorLabel": None,
            "vectorDefaultSteerStrength": _short(steer), "hookName": source.hook,
            "frac_nonzero": float(latents.density[f]), "decoder_weights_dist": [],
            **_neighbours(latents, f), **_aligned(latents.vectors[f]), **_logits(latents, f),
            **_bars("freq_hist_data", latents.activations, f, bool(latents.largest[f])),
        }  # fmt: skip
        yield f'{json.dumps(line)[:-1]}, "vector": {vectors[f - low]}}}'


def _neighbours(latents: _Latents, f: int) -> dict[str, Any]:
    """Return the latents with the largest cosines. Correlations are left empty."""
    there = latents.near[f] >= 0
    empty = ("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1",
             "correlated_features_indices", "correlated_features_pearson", "correlated_features_l1")  # fmt: skip
    cosines = [_short(one) for one in latents.cosines[f][there]]
    found = {"topkCosSimIndices": latents.near[f][there].tolist(), "topkCosSimValues": cosines}
    return found | {key: [] for key in empty}


def _aligned(vector: Array) -> dict[str, Any]:
    """Return the largest entries of a decoder row [O], and their shares of its L1 norm."""
    order = np.argsort(-vector, kind="stable")[:ALIGNED]
    values, norm = vector[order], max(float(np.abs(vector).sum()), 1e-30)
    return {
        "neuron_alignment_indices": order.tolist(),
        "neuron_alignment_values": [_short(value) for value in values],
        "neuron_alignment_l1": [_short(abs(value) / norm) for value in values],
    }


def _logits(latents: _Latents, f: int) -> dict[str, Any]:
    """Return the tokens that a latent promotes and suppresses most, and the histogram of all; empty if not known."""
    found = latents.logits
    if found is None:
        lists = ("pos_str", "pos_values", "neg_str", "neg_values")
        return {key: [] for key in lists} | _bars("logits_hist_data", latents.activations, f, False)
    return {
        "pos_str": [latents.text[token] for token in found.promoted[f].tolist()],
        "pos_values": [_short(value) for value in found.promoted_effects[f]],
        "neg_str": [latents.text[token] for token in found.suppressed[f].tolist()],
        "neg_values": [_short(value) for value in found.suppressed_effects[f]],
        **_bars("logits_hist_data", found.histograms, f, True),
    }


def _bars(name: str, found: Histograms, f: int, there: bool) -> dict[str, Any]:
    return {
        f"{name}_bar_heights": found.heights[f].tolist() if there else [],
        f"{name}_bar_values": [_short(centre) for centre in found.centres[f]] if there else [],
    }


def _activations(source: _Source, known: Sampled, latents: _Latents, contexts: pa.Table) -> Iterator[str]:
    """Yield a line for each of `contexts`; tokens whose rows are not stored have the value 0."""
    edges, values = _edges(known), contexts["activations"].combine_chunks()
    offsets = pa.array(values.offsets.to_numpy() - values.offsets[0].as_py())
    lists = pa.ListArray.from_arrays(offsets, pc.fill_null(values.flatten(), 0.0))
    texts, numbers = _text_lists(contexts["text"].combine_chunks()), _number_lists(lists)
    columns = (contexts[name].to_pylist() for name in ("latent", "bin", "rank", "peak"))
    head = f'"modelId": {json.dumps(source.model)}, "layer": {json.dumps(source.id)}, "creatorId": "{CREATOR}"'
    for f, bin_, rank, peak, text, shown, low, high, at in zip(
        *columns, texts, numbers, *_extremes(lists), strict=True
    ):
        bounds = (_TOP, latents.largest[f], _TOP) if bin_ is None else (
            edges[f, bin_], edges[f, bin_ + 1], latents.shares[f, bin_])  # fmt: skip
        name = hashlib.sha256(f"{source.model}/{source.id}/{f}/{bin_}/{rank}".encode()).hexdigest()[:24]
        yield (
            f'{{"id": "c{name}", {head}, "index": "{f}", "maxValue": {_short(high)}, "maxValueTokenIndex": {at}, '
            f'"minValue": {_short(low)}, "binMin": {_short(bounds[0])}, "binMax": {_short(bounds[1])}, '
            f'"binContains": {_short(bounds[2])}, "qualifyingTokenIndex": {peak}, "dfaValues": [], "lossValues": [], '
            f'"tokens": {text}, "values": {shown}}}'
        )


def _short(value: Any) -> float:
    """Return a number with seven significant digits, as many as float32 has."""
    return float(f"{value:.7g}")


def _rounded(rows: Array) -> Array:
    """Round each row to about five significant digits of its largest entry."""
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=1e-30)
    unit = 10.0 ** (np.floor(np.log10(largest)) - 5)
    return (np.round(rows / unit) * unit).astype(np.float32)


def _rows(rows: Array) -> pa.ListArray:
    ends = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(rows.ravel()))


def _extremes(lists: pa.ListArray) -> tuple[list[float], list[float], list[int]]:
    """Return the smallest and the largest of each list, and where the largest stands; no list is empty."""
    values, starts = lists.values.to_numpy(), lists.offsets.to_numpy()[:-1]
    if not len(starts):
        return [], [], []
    least, largest = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    found = np.flatnonzero(values == np.repeat(largest, np.diff(lists.offsets.to_numpy())))
    firsts = found[np.searchsorted(found, starts)]
    return least.tolist(), largest.tolist(), (firsts - starts).tolist()


def _number_lists(lists: pa.ListArray) -> list[str]:
    """Return each list as JSON: by Arrow, several times as fast as by Python's numbers."""
    return _joined(pa.ListArray.from_arrays(lists.offsets, lists.values.cast(pa.string())))


def _text_lists(lists: pa.ListArray) -> list[str]:
    """Return each list of texts as JSON."""
    known = lists.flatten().dictionary_encode()
    quoted = pa.array([json.dumps(text) for text in known.dictionary.to_pylist()], pa.string())
    offsets = pa.array(lists.offsets.to_numpy() - lists.offsets[0].as_py())
    return _joined(pa.ListArray.from_arrays(offsets, quoted.take(known.indices)))


def _joined(lists: pa.ListArray) -> list[str]:
    return [f"[{one}]" for one in pc.binary_join(lists, ", ").to_pylist()]


def _publish(path: Path, lines: Iterator[str]) -> None:
    """Write lines, compressed, without a time stamp."""
    text = "".join(f"{line}\n" for line in lines).encode()
    durable.publish_bytes(path, gzip.compress(text, _COMPRESSION, mtime=0))
