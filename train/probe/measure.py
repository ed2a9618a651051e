"""Probes a checkpoint: encode held-out rows, label their tokens, score latents, fit probes.

Legend: R rows, D d_in, O d_out, F latents, L labels.
"""

import hashlib
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared.config import json_digest
from shared.console.progress import Progress
from shared.keyed import key_bits
from shared.store.mapped_array import RowArray
from shared.store.store import Store
from train.data.batches import StoreRows
from train.model import blas
from train.model.transcoder import Transcoder
from train.probe.absorption import Absorbed, absorptions, main_latents
from train.probe.dense_probes import dense_probes
from train.probe.label_latents import Scores, label_latents
from train.probe.labels import make_labels
from train.probe.probe_record import EXPLAINED, Absorption, Kind, LabelProbe, LatentLabels, ProbeRecord, ProbeSummary
from train.probe.probed_rows import ByLatent, ProbedRows, probed_rows
from train.probe.sparse_probes import SHOWN, DenseColumns, SparseColumns, SparseProbes, sparse_probes
from train.run.load_run import LoadedRun
from train.samples.encode import Activations, encode

Array = NDArray[Any]

ROWS = 2**17
"""That are probed: on more, figures hardly change."""
_CHUNK, _SOME = 4096, 8192
"""Rows of a product with all directions; rows that the cut of random directions is taken from."""


class _Probed(NamedTuple):
    """Everything that was measured."""

    rows: ProbedRows
    scores: Scores
    sparse: dict[Kind, SparseProbes]
    dense_f1: Array
    """[L]"""
    main: list[int]
    """Main latents of each label."""
    absorbed: list[Absorbed | None]
    live: int
    l0: float
    explained: dict[Kind, dict[str, float]]


def measure_probe(loaded: LoadedRun, labels: str, most_rows: int = ROWS, stop: Sequence[object] = ()) -> ProbeRecord:
    """Probe a loaded checkpoint on held-out rows, at most `most_rows`. `labels` as in `make_labels`.

    Raises `UserError` when the store or the labels do not fit, and `Stopped` when `stop` is filled meanwhile.
    """
    store, model = loaded.rows.store, loaded.transcoder
    blocks = range(store.request.held_out_blocks)
    found = encode(model, loaded.rows, blocks, loaded.threshold, most_rows, stop)
    labelled = make_labels(labels, found, store)
    rows = probed_rows(found, labelled, position_0(store))
    probed = _probed(loaded, found, rows)
    asked = {
        "store": store.request.digest,
        "labels": labelled.kind,
        "rows": hashlib.sha256(rows.number.tobytes()).hexdigest(),
    }
    summary = _summary(loaded, labelled.kind, json_digest(asked), probed)
    return ProbeRecord(summary=summary, latents=_latent_labels(probed.scores))


def _probed(loaded: LoadedRun, found: Activations, rows: ProbedRows) -> _Probed:
    model, pairs = loaded.transcoder, rows.pairs(found)
    with Progress("probe", 4, "parts") as progress:
        progress.update(0, "labels of latents")
        scores = label_latents(pairs, rows)
        source, target = rows_of(loaded.rows, model, found, rows)
        l0, live = len(pairs.rows) / len(source), int((np.diff(pairs.starts) > 0).sum())
        random = random_pairs(source, model.d_sae, l0, model.blas)
        of_random = label_latents(random, rows, labels=1, draws=0)
        progress.update(1, "k-sparse probes")
        sparse: dict[Kind, SparseProbes] = {
            "latents": sparse_probes(SparseColumns(pairs, len(source)), rows),
            "random": sparse_probes(SparseColumns(random, len(source)), rows),
            "residual": sparse_probes(DenseColumns(source), rows),
        }
        progress.update(2, "dense probes")
        dense, of_target = dense_probes(source, rows), dense_probes(target, rows)
        progress.update(3, "absorption")
        main = [main_latents(f1) for f1 in sparse["latents"].f1]
        chosen = [few[:count] for few, count in zip(sparse["latents"].chosen, main, strict=True)]
        absorbed = absorptions(pairs, rows, chosen, target, model.W_dec.detach().cpu(), of_target)
        progress.update(4)
    explained: dict[Kind, dict[str, float]] = {
        "latents": _explained(scores, live), "random": _explained(of_random, model.d_sae),
    }  # fmt: skip
    return _Probed(rows, scores, sparse, dense.f1, main, absorbed, live, l0, explained)


def position_0(store: Store) -> int | None:
    """Return the number of the stratum of position 0; none where it is in no stratum of its own."""
    strata = list(store.strata.values())
    return next((i for i, part in enumerate(strata) if part.stratum.is_position_0 and len(strata) > 1), None)


def rows_of(rows: StoreRows, model: Transcoder, found: Activations, probed: ProbedRows) -> tuple[Tensor, Tensor]:
    """Return normalised source and target of the probed rows, [R, D] and [R, O], on CPU."""
    count, store, context = len(probed.scored), rows.store, found.tokens.shape[1]
    source, target = torch.empty(count, len(model.W_enc)), torch.empty(count, model.W_dec.shape[1])
    blocks = range(-(-(found.first + len(found.tokens)) // store.request.block_sequences))
    seen = dict.fromkeys(store.strata, 0)
    for chunk in rows.chunks(blocks, model.W_enc.device):
        part, low = store.strata[chunk.stratum], seen[chunk.stratum]
        seen[chunk.stratum] = high = low + len(chunk.source)
        sequence, offset = (_marks(array, low, high) for array in (part.sequence, part.offset))
        place = (sequence - found.first) * context + offset
        inside = place < len(probed.number)
        number = torch.from_numpy(np.where(inside, probed.number[np.where(inside, place, 0)], -1))
        kept = number >= 0
        x, y = model.normalised(chunk.source, chunk.target)
        source[number[kept]], target[number[kept]] = x.cpu()[kept], y.cpu()[kept]
    return source, target


def random_pairs(source: Tensor, count: int, l0: float, library: blas.Blas) -> ByLatent:
    """Return the active pairs of `count` random directions, on `source` [R, D], with about `l0` active on a row.

    All have one cut, that of the first rows.
    """
    generator = torch.Generator().manual_seed(key_bits("probe directions") % 2**63)
    W = torch.randn(count, source.shape[1], generator=generator)
    W = (W / W.norm(dim=1, keepdim=True)).T.contiguous()
    some = blas.product(library, source[:_SOME], W).ravel()
    cut = max(float(some.topk(max(1, round(l0 * min(_SOME, len(source))))).values[-1]), 0.0)
    found = []
    for low in range(0, len(source), _CHUNK):
        values = blas.product(library, source[low : low + _CHUNK], W)
        rows, latents = (values > cut).nonzero(as_tuple=True)
        found.append(((rows + low).numpy(), latents.numpy(), values[rows, latents].numpy()))
    rows_, latents_, values_ = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(latents_, kind="stable")
    return ByLatent(np.searchsorted(latents_[order], np.arange(count + 1)), rows_[order], values_[order])


def _summary(loaded: LoadedRun, kind: str, asked: str, probed: _Probed) -> ProbeSummary:
    rows, labels = probed.rows, _labels(probed)
    rated = [one.absorption for one in labels if one.absorption]
    return ProbeSummary(
        asked=asked,
        store=loaded.rows.store.request.digest,
        step=loaded.step,
        kind=kind,
        unit=rows.unit,
        units=_halves(np.bincount(rows.groups[~rows.scored]) > 0, np.bincount(rows.groups[rows.scored]) > 0),
        rows=_halves(~rows.scored, rows.scored),
        d_sae=loaded.transcoder.d_sae,
        live=probed.live,
        l0=probed.l0,
        explained=probed.explained,
        mean_f1={name: _by_count(one.f1.mean(0)) for name, one in probed.sparse.items()},
        mean_dense_f1=float(probed.dense_f1.mean()),
        mean_splits=fmean(one.splits for one in labels),
        mean_absorption=fmean(one.rate for one in rated) if rated else None,
        mean_absorption_fraction=fmean(one.fraction for one in rated) if rated else None,
        labels=labels,
        left_out=list(rows.left_out),
    )


def _labels(probed: _Probed) -> list[LabelProbe]:
    rows, best = probed.rows, first_of_latents(probed.scores.latents)
    told = best & (probed.scores.f1[:, 0] >= EXPLAINED[0])
    explains = np.bincount(probed.scores.labels[told], minlength=len(rows.names))
    return [
        LabelProbe(
            name=name,
            share=float(rows.masks[i, rows.scored].mean()),
            f1={kind: _by_count(one.f1[i]) for kind, one in probed.sparse.items()},
            dense_f1=float(probed.dense_f1[i]),
            latents=probed.sparse["latents"].chosen[i].tolist(),
            splits=probed.main[i] - 1,
            absorption=_absorption(probed.absorbed[i]),
            explains=int(explains[i]),
        )
        for i, name in enumerate(rows.names)
    ]


def _absorption(found: Absorbed | None) -> Absorption | None:
    if not found or not found.tokens:
        return None
    return Absorption(tokens=found.tokens, rate=found.whole / found.tokens, fraction=found.parts / found.tokens)


def _latent_labels(scores: Scores) -> LatentLabels:
    def rounded(values: Array) -> list[float]:
        return [float(f"{value:.4g}") for value in values.tolist()]

    return LatentLabels(
        latent=scores.latents.tolist(),
        label=scores.labels.tolist(),
        cut=rounded(scores.cuts),
        precision=rounded(scores.precision),
        recall=rounded(scores.recall),
        **{f"f1{end}": rounded(values) for end, values in zip(("", "_low", "_high"), scores.f1.T, strict=True)},
        **{f"auroc{end}": rounded(values) for end, values in zip(("", "_low", "_high"), scores.auroc.T, strict=True)},
    )


def first_of_latents(latents: Array) -> Array:
    """Tell which of `latents` [E], which rise, are the first of their kind."""
    return np.diff(latents, prepend=-1) != 0


def _explained(scores: Scores, of: int) -> dict[str, float]:
    best = scores.f1[first_of_latents(scores.latents), 0]
    return {str(limit): float((best >= limit).sum()) / max(of, 1) for limit in EXPLAINED}


def _halves(first: Array, second: Array) -> tuple[int, int]:
    return int(first.sum()), int(second.sum())


def _by_count(f1: Array) -> dict[str, float]:
    return {str(k): float(f1[k - 1]) for k in SHOWN if k <= len(f1)}


def _marks(array: RowArray, low: int, high: int) -> Array:
    """Read a part of an array of integers."""
    out = array.room(high - low)
    array.read(low, high, out)
    return out.astype(np.int64)
