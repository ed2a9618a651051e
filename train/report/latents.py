"""A row per latent of all that the report knows of it: `report/latents.parquet`, and the browser shows it.

Legend: F latents, O d_out, P position strata, n live latents, M neighbours, N active pairs of a row and a latent.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.errors import UserError
from shared.store.store import Store
from shared.store.strata import POSITION_0
from train.data.batches import StoreRows
from train.duplicates.co_activation import most_correlated
from train.duplicates.directions import nearest_directions
from train.evaluation.held_out import held_out_active
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder
from train.probe.probe_record import ProbeRecord
from train.report.latent_labels import LatentLabel
from train.report.relations import direction_map, refinements
from train.samples import histograms
from train.samples.token_effects import decoder_directions, tokens_of, unembedding_of

Array = NDArray[Any]

NEIGHBOURS = 5
"""Of each kind that are listed of a latent."""
EFFECTS = 10
"""Tokens that a latent promotes, and as many that it suppresses."""
LEAST_TOGETHER = 10
"""Rows on which two latents must both be active for their correlation to count."""
_TAKEN = ("latent", "prefix", "contexts", "density", "max", "mean", "bin_edges")
_GROWN = {
    "min": (pa.float32(), "smallest activation on a stored row"),
    "histogram": (pa.list_(pa.int32()), "stored rows on which it is active, in bars of equal width from min to max"),
}
"""Columns that samples of earlier versions do not have."""
MAP_SHARE = b"transcoder_cache.map_share"
"""The key, in the table's metadata, of the share of the variance of directions that `map_x` and `map_y` show."""


def latents_table(
    transcoder: Transcoder,
    rows: StoreRows,
    threshold: Tensor,  # [F]
    latents: pa.Table,
    contexts: pa.Table,
    probed: ProbeRecord | None = None,
    said: Sequence[LatentLabel] = (),
) -> pa.Table:
    """Return all columns, each with a description; `latents` and `contexts` are the samples of `transcoder`.

    `probed` is what `train probe` found, and without it the columns of labels are null. `said` is what people call
    latents.

    Correlations are of latents under `threshold` on the store's report rows.
    """
    taken = [latents.schema.field(name) for name in _TAKEN] + [f for f in latents.schema if _stratum(f.name)]
    columns = {f.name: (latents[f.name].combine_chunks(), f.metadata[b"description"].decode()) for f in taken}
    live = torch.from_numpy(np.flatnonzero(latents["max"].is_valid().to_numpy()))
    near, cosines = nearest_directions(transcoder.unit_decoder(), live, NEIGHBOURS, transcoder.blas)
    store = rows.store
    active = held_out_active(transcoder, rows, store.record.report_blocks, threshold).without_position_0
    together, correlations = most_correlated(active, LEAST_TOGETHER, NEIGHBOURS)
    places, map_share = direction_map(transcoder.unit_decoder().detach().cpu().numpy(), live.numpy())
    columns |= {
        "position_0_share": (
            position_0_share(latents, store),
            "share of position 0 among the rows on which it is active, at natural frequencies: of density times "
            "natural rows, that of position 0 by the sum over strata; null: never active, or position 0 is no stratum "
            "of its own",
        ),
        "nearest_latents": (_lists(near, near), "the live latents with the largest cosines of decoder rows, falling"),
        "nearest_cosines": (_lists(near, cosines.float()), "their cosines"),
        "correlated_latents": (
            _lists(together, together),
            f"latents with the largest correlations above 0 on held-out rows without position 0, falling; of those "
            f"active on at least {LEAST_TOGETHER} rows with it",
        ),
        "correlations": (_lists(together, correlations.float()), "their correlations"),
        **_effects(transcoder, store),
        **_grown(latents),
        **_refinements(active, latents["prefix"].to_numpy()),
        "map_x": (_known(places[:, 0]), "first principal component of its unit decoder row; null: it is never active"),
        "map_y": (_known(places[:, 1]), "second principal component"),
        **_labels(probed, len(latents)),
        **_said(said, len(latents)),
        "peaks": (peaks(contexts, len(latents)), "tokens at the peaks of its top contexts, the most frequent first"),
    }
    fields = [pa.field(name, values.type, metadata={"description": told}) for name, (values, told) in columns.items()]
    metadata = {MAP_SHARE: f"{map_share:.6g}"}
    return pa.table([values for values, _ in columns.values()], schema=pa.schema(fields, metadata=metadata))


def position_0_share(latents: pa.Table, store: Store) -> pa.Array:
    """Return [F] the share of position 0 among the rows on which each latent is active, at natural frequencies.

    `density_0 * natural_0 / sum_s density_s * natural_s` over strata s: samples look at stored rows, of which a stratum
    has more or fewer than it would by nature. Null for a latent that is never active, and for all where position 0 is
    in no stratum of its own.
    """
    natural = {s.name: s.natural_rows for s in store.record.plan.stored_strata}
    names = [name for field in latents.schema.names if (name := _stratum(field))]
    if POSITION_0 not in names:
        return pa.nulls(len(latents), pa.float64())
    rows = np.stack([latents[f"density_{name}"].to_numpy() * natural[name] for name in names])
    total = rows.sum(0)
    share = np.divide(rows[names.index(POSITION_0)], total, out=np.zeros(len(total)), where=total > 0)
    return pa.array(share, mask=total == 0)


def peaks(contexts: pa.Table, d_sae: int) -> pa.Array:
    """List [F] the distinct tokens at the peaks of each latent's top, the most frequent first, then the strongest.

    `contexts` are sorted by latent, the strongest first.
    """
    top = contexts.filter(pc.equal(contexts["kind"].cast(pa.string()), "top")).select(["latent", "peak", "tokens"])
    tokens = top["tokens"].combine_chunks()
    at = tokens.offsets.to_numpy()[:-1] + top["peak"].to_numpy()
    pairs = np.stack([top["latent"].to_numpy(), tokens.values.to_numpy()[at]])
    (latents, found), first, counts = np.unique(pairs, axis=1, return_index=True, return_counts=True)
    order = np.lexsort((first, -counts, latents))
    ends = np.concatenate([[0], np.cumsum(np.bincount(latents, minlength=d_sae))])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(found[order], pa.int32()))


def _labels(probed: ProbeRecord | None, d_sae: int) -> dict[str, tuple[pa.Array, str]]:
    """Return columns of the labels that each latent stands for."""
    unknown = "null: not measured at this step"
    told = {
        "f1": "F1 of `the latent is above its cut` for each",
        "f1_low": "lower end of its 95 % interval over documents",
        "f1_high": "upper end",
        "precision": "share of rows above the cut that have the label",
        "recall": "share of rows with the label that are above the cut",
        "auroc": "area under the ROC curve of its activation for each",
    }
    kinds = {"labels": pa.string(), **{f"label_{name}": pa.float64() for name in told}}
    if not probed:
        columns = {name: pa.nulls(d_sae, pa.list_(kind)) for name, kind in kinds.items()}
    else:
        ends = pa.array(np.searchsorted(probed.latents.latent, np.arange(d_sae + 1)), pa.int32())
        names = [probed.summary.labels[label].name for label in probed.latents.label]
        values = {"labels": names, **{f"label_{name}": getattr(probed.latents, name) for name in told}}
        columns = {name: pa.ListArray.from_arrays(ends, pa.array(values[name], kind)) for name, kind in kinds.items()}
    words = {"labels": f"labels of tokens that it tells best, by `train probe`; {unknown}"}
    words |= {f"label_{name}": one for name, one in told.items()}
    return {name: (column, words[name]) for name, column in columns.items()}


def _effects(transcoder: Transcoder, store: Store) -> dict[str, tuple[pa.Array, str]]:
    """Return columns of tokens and logits, of what an activation of 1 adds to the targets.

    That is a decoder row, in the targets' units.
    """
    unknown = "null: the store has no unembedding, or its targets are not part of the residual stream"
    what = "logits that an activation of 1 adds to each directly, up to the final norm's scale"
    told = {
        "promoted": f"tokens that it promotes most, falling; {unknown}",
        "promoted_effects": what,
        "suppressed": "tokens that it suppresses most",
        "suppressed_effects": what,
        "logit_histogram": "tokens by logit, in bars of equal width from the smallest to the largest",
    }
    d_sae, tokens, logits = transcoder.d_sae, pa.list_(pa.int32()), pa.list_(pa.float32())
    if (unembedding := unembedding_of(store)) is None:
        none = [pa.nulls(d_sae, kind) for kind in (tokens, logits, tokens, logits, tokens)]
        return {name: (column, words) for column, (name, words) in zip(none, told.items(), strict=True)}
    directions = torch.from_numpy(decoder_directions(transcoder)).to(transcoder.W_dec.device)
    vocabulary, weight = unembedding.scaled(tokens_of(store))
    if weight.shape[1] != directions.shape[1]:
        raise UserError(
            f"directions have {directions.shape[1]} values, and {store.path} unembeds {weight.shape[1]}; the tokens "
            "that a latent promotes are known only where the target is part of the residual stream"
        )
    found = histograms.of_logits(directions, vocabulary, weight, EFFECTS)
    columns = [_whole(part) for part in found[:4]] + [histograms.column(found.histograms.heights)]
    return {name: (column, words) for column, (name, words) in zip(columns, told.items(), strict=True)}


def _grown(latents: pa.Table) -> dict[str, tuple[pa.Array, str]]:
    """Return the columns that samples of earlier versions do not have; of such samples they are null."""
    none = "null: never active, or samples of an earlier version"
    there = set(latents.column_names)
    return {
        name: (latents[name].combine_chunks() if name in there else pa.nulls(len(latents), kind), f"{told}; {none}")
        for name, (kind, told) in _GROWN.items()
    }


def _refinements(active: SparseLatents, prefixes: Array) -> dict[str, tuple[pa.Array, str]]:
    """Return which earlier latent each one refines."""
    found = refinements(active, prefixes)
    none = found.parent < 0
    return {
        "refines": (
            pa.array(found.parent.astype(np.int32), mask=none),
            "the latent of an earlier Matryoshka group that is active on most of its held-out rows, and seldom "
            "elsewhere; null: none is",
        ),
        "refines_share": (pa.array(found.share, mask=none), "share of its active rows on which that one is active"),
    }


def _said(said: Sequence[LatentLabel], d_sae: int) -> dict[str, tuple[pa.Array, str]]:
    """Return what people call latents."""
    by_latent = {one.latent: one for one in said}
    every = [by_latent.get(f) for f in range(d_sae)]
    return {
        "label": (pa.array([one.label or None if one else None for one in every], pa.string()), "what people call it"),
        "note": (pa.array([one.note or None if one else None for one in every], pa.string()), "what they say of it"),
        "star": (pa.array([bool(one and one.star) for one in every]), "whether they marked it"),
    }


def _known(values: Array) -> pa.Array:
    """Return numbers [F] as float32, null where they are NaN."""
    return pa.array(values.astype(np.float32), mask=np.isnan(values))


def _whole(values: Array) -> pa.Array:
    """Return [F] lists of as many values each."""
    kind = np.float32 if values.dtype.kind == "f" else np.int32
    ends = np.arange(len(values) + 1) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values.astype(kind).ravel()))


def _lists(latents: Tensor, values: Tensor) -> pa.Array:
    """Return [F] lists of those `values` [F, M] at which `latents` are not -1."""
    there, flat = (latents >= 0).numpy(), values.numpy()
    ends = np.concatenate([[0], np.cumsum(there.sum(1))])
    kind = np.float32 if flat.dtype.kind == "f" else np.int32
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat[there].astype(kind)))


def _stratum(column: str) -> str | None:
    """Return the stratum of a column of densities; none for another column."""
    return column.removeprefix("density_") if column.startswith("density_") else None
