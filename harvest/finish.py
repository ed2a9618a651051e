"""The last steps of a harvest: statistics over the training blocks, the tokenizer, and `store.json`."""

import platform
from collections.abc import Iterable
from importlib.metadata import version

from safetensors import SafetensorError
from safetensors.numpy import load, save

from harvest.blocks import SIDES, Array, unpack_moments
from harvest.model_files import ModelFiles
from harvest.plan import Target
from shared import durable
from shared.errors import CorruptData
from shared.layout import (
    FORMAT_VERSION,
    STATISTICS,
    STORE,
    TOKENIZER,
    NormSummary,
    StoreRecord,
    StratumSummary,
    moments_path,
    record_path,
)
from shared.statistics import OUTLIER_RATIO, QUANTILES, Moments, merge
from shared.store import buffers_record, fault, read_ledger
from shared.strata import Stratum

_PACKAGES = ("torch", "transformers", "transformer-lens", "numpy")
Sides = dict[str, Moments]


def finish(target: Target, model: ModelFiles) -> None:
    """Publish what makes the store a finished one. All its blocks are committed.

    Until the last file, `store.json`, is replaced, the record of a shorter store stays in force.
    """
    assert target.plan is not None
    training = range(target.request.held_out_blocks, target.blocks)
    moments = training_moments(target, training)
    summaries, overall, tensors = summarise(target.request.strata, moments, len(training))
    files = {STATISTICS: save(tensors)}
    files |= {f"{TOKENIZER}/{path.name}": path.read_bytes() for path in model.tokenizer_files}
    first = read_ledger(target.path, 0)
    record = StoreRecord(
        format_version=FORMAT_VERSION,
        request=target.request,
        plan=target.plan,
        d_in=first.d_in,
        d_out=first.d_out,
        blocks=target.blocks,
        strata=summaries,
        overall=overall,
        files={name: buffers_record([data]) for name, data in files.items()},
        software={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    )
    durable.publish_files({target.path / name: data for name, data in files.items()})
    durable.publish_json(target.path / STORE, record.model_dump(mode="json"))


def training_moments(target: Target, blocks: Iterable[int]) -> dict[str, Sides]:
    """By stratum and side, the moments of `blocks`, merged in their order."""
    gathered: dict[str, Sides] = {}
    for block in blocks:
        tensors = _load_moments(target, block)
        for stratum in target.request.strata:
            sides = gathered.setdefault(stratum.name, {})
            for side in SIDES:
                found = unpack_moments(tensors, f"{stratum.name}/{side}")
                sides[side] = merge([sides[side], found]) if side in sides else found
    return gathered


def summarise(
    strata: tuple[Stratum, ...], moments: dict[str, Sides], blocks: int
) -> tuple[tuple[StratumSummary, ...], StratumSummary, dict[str, Array]]:
    """Summaries by stratum, the overall one, and the tensors of `statistics.safetensors`.

    Overall is at natural frequencies and without position 0; a first stratum that is wider than one position cannot
    be taken apart, and is then part of it as a whole.
    """
    later = [s for s in strata if s.stop > 1]
    overall = {side: merge([moments[s.name][side].scaled(s.natural_rows / s.rows) for s in later]) for side in SIDES}
    tensors = {
        f"{name}/{side}/{kind}": values
        for name, sides in {**moments, "overall": overall}.items()
        for side, found in sides.items()
        for kind, values in (("mean", found.mean), ("variance", found.variance))
    }
    return tuple(_summary([s], moments[s.name], blocks) for s in strata), _summary(later, overall, blocks), tensors


def _summary(strata: list[Stratum], sides: Sides, blocks: int) -> StratumSummary:
    return StratumSummary(
        start=strata[0].start,
        stop=strata[-1].stop,
        rows=blocks * sum(s.rows for s in strata),
        natural_rows=blocks * sum(s.natural_rows for s in strata),
        source=_norms(sides["source"]),
        target=_norms(sides["target"]),
    )


def _norms(moments: Moments) -> NormSummary:
    return NormSummary(
        mean_squared_norm=moments.mean_squared_norm,
        norm_quantiles={str(share): moments.norm_quantile(share) for share in QUANTILES},
        mean_to_deviation=moments.mean_to_deviation,
        outlier_rows=round(moments.rows_above(OUTLIER_RATIO * moments.norm_quantile(0.5))),
    )


def _load_moments(target: Target, block: int) -> dict[str, Array]:
    path = target.path / moments_path(block)
    remedy = f"remove {target.path / record_path(block)} and run the same harvest again"
    if wrong := fault(path, read_ledger(target.path, block).moments):
        raise CorruptData(f"{path}: {wrong}; {remedy}")
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise CorruptData(f"{path}: {error}; {remedy}") from error
