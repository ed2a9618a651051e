"""The last steps of a harvest: statistics over the training blocks, the tokenizer, and `store.json`."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version

from safetensors import SafetensorError
from safetensors.numpy import load, save

from harvest.llm.model_files import ModelFiles
from harvest.text.tokenizer_files import TOKENIZER_JSON, as_tokenizer_json
from harvest.writer.attention_sinks import overall
from harvest.writer.blocks import Array, unpack_moments
from harvest.writer.int8_blocks import floors, warnings
from harvest.writer.recover_records import read_records
from harvest.writer.target import Target
from shared.errors import CorruptData, warn
from shared.files import durable
from shared.store.checks import buffers_record, fault, file_record, read_ledger
from shared.store.layout import (
    FORMAT_VERSION,
    STATISTICS,
    STORE,
    TOKENIZER,
    UNEMBEDDING,
    NormSummary,
    StorageFloor,
    StorePlan,
    StoreRecord,
    StratumPlan,
    StratumSummary,
    moments_path,
    record_path,
    statistics_path,
)
from shared.store.row_arrays import SIDES
from shared.store.statistics import OUTLIER_RATIO, QUANTILES, Moments, merge

_PACKAGES = ("torch", "transformers", "transformer-lens", "numpy")


def finish(target: Target, model: ModelFiles | None) -> None:
    """Publish what makes the store a finished one. All its blocks are committed.

    `model`: whose tokenizer goes with it; none for rows of a model that is not known.
    Until `store.json` is replaced, the record of a shorter store stays in force, and so do its statistics.
    """
    assert target.plan is not None
    statistics = statistics_path(target.blocks)
    training = range(target.request.held_out_blocks, target.blocks)
    moments = training_moments(target, training)
    summaries, overall_, tensors = summarise(target.plan, moments)
    files = {statistics: save(tensors)}
    files |= _tokenizer(model) if model else {}
    records = {name: buffers_record([data]) for name, data in files.items()}
    if target.request.unembedding:
        records[UNEMBEDDING] = file_record(target.path / UNEMBEDDING)
    first = read_ledger(target.path, 0)
    floor = storage_floor(target, training)
    record = StoreRecord(
        format_version=FORMAT_VERSION,
        request=target.request,
        plan=target.plan,
        d_in=first.d_in,
        d_out=first.d_out,
        blocks=target.blocks,
        strata=summaries,
        overall=overall_,
        files=records,
        software={"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        storage_floor=StorageFloor(**floor) if floor else None,
    )
    durable.publish_files({target.path / name: data for name, data in files.items()})
    durable.publish_json(target.path / STORE, record.model_dump(mode="json"))
    for path in target.path.glob(STATISTICS):
        if path.name != statistics:
            path.unlink()


def storage_floor(target: Target, blocks: Iterable[int]) -> dict[str, float] | None:
    """Return by side what the storage type took of the variance of rows of `blocks`; None where nothing is measured."""
    if target.request.storage != "int8":
        return None
    return floors(target.strata, [_load_moments(target, block) for block in blocks])


def floor_warnings(target: Target, blocks: Iterable[int]) -> list[str]:
    """Tell of sides whose rows lost too much in `blocks`, which are committed."""
    return warnings(storage_floor(target, blocks) or {})


def _tokenizer(model: ModelFiles) -> dict[str, bytes]:
    """Return the tokenizer's files by their names in the store, and `tokenizer.json`, which stage 2 reads."""
    files = {path.name: path.read_bytes() for path in model.tokenizer_files}
    if files and TOKENIZER_JSON not in files:
        if made := as_tokenizer_json(model.folder):
            files[TOKENIZER_JSON] = made
        else:
            warn(f"{model.folder}: its tokenizer cannot be written as {TOKENIZER_JSON}; samples will show no text")
    return {f"{TOKENIZER}/{name}": data for name, data in files.items()}


def drop_damaged(target: Target) -> None:
    """Remove an unembedding that is not what the finished store at `target` says: it is written again."""
    record = read_records(target.path).finished
    files = record.files if record else {}
    if UNEMBEDDING in files and fault(target.path / UNEMBEDDING, files[UNEMBEDDING]):
        (target.path / UNEMBEDDING).unlink(missing_ok=True)


def training_moments(target: Target, blocks: Iterable[int]) -> dict[str, Moments]:
    """Return the moments of `blocks` by `stratum/side`, merged in the order of the blocks."""
    gathered: dict[str, Moments] = {}
    for block in blocks:
        tensors = _load_moments(target, block)
        for name in (f"{stratum.name}/{side}" for stratum in target.strata for side in SIDES):
            found = unpack_moments(tensors, name)
            gathered[name] = merge([gathered[name], found]) if name in gathered else found
    return gathered


def summarise(
    plan: StorePlan, moments: dict[str, Moments]
) -> tuple[tuple[StratumSummary, ...], StratumSummary, dict[str, Array]]:
    """Return summaries by stratum, the overall one, and the tensors of the statistics' file."""
    strata = plan.stored_strata
    whole = {f"overall/{side}": overall(strata, moments, side) for side in SIDES}
    medians = {side: whole[f"overall/{side}"].norm_quantile(0.5) for side in SIDES}
    tensors = {
        f"{name}/{kind}": values
        for name, found in {**moments, **whole}.items()
        for kind, values in (("mean", found.mean), ("variance", found.variance))
    }
    planned = {s.name: s for s in plan.strata}
    by_stratum = tuple(_summary([planned[s.name]], moments, s.name, medians) for s in strata)
    later = [planned[s.name] for s in strata if not s.is_position_0] or list(planned.values())
    return by_stratum, _summary(later, whole, "overall", medians), tensors


def _summary(
    strata: Sequence[StratumPlan], moments: Mapping[str, Moments], name: str, medians: Mapping[str, float]
) -> StratumSummary:
    return StratumSummary(
        start=strata[0].start,
        stop=strata[-1].stop,
        rows=sum(s.total("stored") for s in strata),
        natural_rows=sum(s.represented for s in strata),
        **{side: _norms(moments[f"{name}/{side}"], medians[side]) for side in SIDES},
    )


def _norms(moments: Moments, median: float) -> NormSummary:
    return NormSummary(
        mean_squared_norm=moments.mean_squared_norm,
        norm_quantiles={str(share): moments.norm_quantile(share) for share in QUANTILES},
        mean_to_deviation=moments.mean_to_deviation,
        outlier_rows=round(moments.rows_above(OUTLIER_RATIO * median)),
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
