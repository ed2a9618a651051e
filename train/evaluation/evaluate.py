"""Held-out evaluation: calibrated thresholds, and fvu, explained variance and l0 by stratum and by prefix.

Changes nothing: no counter, no threshold, no batch of the training stream. The headline is at natural frequencies,
without position 0: strata are weighted by the rows that the model computed, and the position-0 stratum is left out.

    fvu                 sum (y - y_hat)^2 / sum (y - mean_rows(y))^2, the mean per output dimension
    explained variance  1 - var(y - y_hat) / var(y), per dimension and summed: a constant error costs nothing
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.bounds import Every, Positions
from shared.config import Config
from shared.errors import ProjectError
from shared.store.reader import RowsConfig
from shared.store.store import Store
from train.data.batches import BatchReader, RowChunk, StoreRows
from train.data.staging import sent
from train.evaluation.evaluated_blocks import calibration_blocks
from train.model.kernels.plain import decode_prefixes
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder

CONSTANT_SHARE = 1e-6
"""Rows whose target varies by no more than this share of its squared distance from the mean of all are constant: what
bfloat16 rounds is as much."""


class EvaluationConfig(Config):
    """When a run is evaluated on held-out rows."""

    every: Every = "auto"
    """Steps between evaluations; the last step is always evaluated. `auto`: 2,000; on CUDA more, so that evaluations
    read about a tenth of the rows that training reads."""
    chunk_rows: int = Field(1024, ge=1)
    """Rows per forward pass."""
    calibration_rows: int = Field(4096, ge=1)
    """Rows that calibrate the thresholds of intermediate checkpoints; the last one, and evaluations, use all."""
    outliers: Literal["apart", "with_others"] = "apart"
    """Whether outliers (rows.outlier_ratio) are left out of means, scales, thresholds and headline figures, and get
    figures of their own. SAEDashboard leaves them out; SAELens and dictionary_learning evaluate with them."""

    @property
    def leaves_outliers_out(self) -> bool:
        """Whether outliers are apart."""
        return self.outliers == "apart"


class Part(Config):
    """Figures over some rows, under some prefix."""

    rows: float
    """Rows, at natural frequencies where strata are put together."""
    fvu: float
    explained_variance: float
    l0: float
    """Active latents per row by threshold."""


class PartOfStratum(Config):
    """Figures over the rows of one stratum, under some prefix."""

    rows: float
    fvu: float | None
    """None where the target is constant, as it is at position 0 where every window starts with BOS."""
    explained_variance: float | None
    """None for such rows as well."""
    l0: float
    """Active latents per row by threshold."""


class Weight(Config):
    """How much some rows weigh among all held-out rows, at natural frequencies."""

    relative_error: float | None = None
    """Squared error over the target's squared distance from the mean of all: defined for constant rows as well. None in
    evaluations of earlier versions, as the two below."""
    error_share: float | None = None
    """Of the squared error of all rows, outliers and position 0 included."""
    active_share: float | None = None
    """Of the active latents of all rows."""


class StratumPart(PartOfStratum, Weight):
    """One stratum, its outliers left out."""

    l0_training_rule: float | None
    """Active latents per row by the training rule, on batches of the natural mixture; none: no rows drawn."""
    prefixes: dict[int, PartOfStratum]


class Outliers(Weight):
    """The rows that are left out of the headline for their norm."""

    rows: float
    """Rows, at natural frequencies."""
    l0: float
    """Active latents per row by threshold."""


class Evaluation(Config):
    """What `evaluate` found; the headline figures are those of the whole transcoder."""

    fvu: float
    explained_variance: float
    l0: float
    """By threshold: what inference uses."""
    l0_training_rule: float
    """By the training rule."""
    fvu_training_rule: float
    threshold: float
    """Mean over latents, in units of the pre-activations."""
    dead_share: float
    """Latents that fire on none of these rows by threshold; outliers, and position 0 where training leaves it out, do
    not count."""
    rows: int
    prefixes: dict[int, Part]
    strata: dict[Positions, StratumPart]
    outliers: Outliers | None = None
    """None: no row is one."""
    fvu_of_skip: float | None = None
    """Of the skip connection alone, with no latent active; none: there is no skip connection."""


@dataclass
class Sums:
    """Sums over rows that give fvu and explained variance; [P] and [P, O] by prefix."""

    rows: float
    errors: Tensor
    """[P] squared error"""
    residual: Tensor
    """[P, O] summed y - y_hat"""
    target: Tensor
    """[O] summed y"""
    squares: Tensor
    """summed squared norm of y, a scalar"""
    active: Tensor
    """[P] active latents below each prefix's end"""

    @classmethod
    def of(cls, target: Tensor, reconstructions: Tensor, active: Tensor) -> "Sums":
        """Compute the sums of rows y [B, O], their reconstructions [B, P, O] and counts of active latents [P]."""
        residual = target.unsqueeze(1) - reconstructions
        return cls(
            rows=float(len(target)),
            errors=residual.square().sum(dim=(0, 2), dtype=torch.float64),
            residual=residual.sum(dim=0, dtype=torch.float64),
            target=target.sum(dim=0, dtype=torch.float64),
            squares=target.double().square().sum(),
            active=active.double(),
        )

    def plus(self, other: "Sums", weight: float = 1.0) -> "Sums":
        """Return the sums over both; the other's rows count `weight` times."""
        return Sums(*(a + b * weight for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def cpu(self) -> "Sums":
        """Return the same on CPU: they are fetched once, and not number by number."""
        tensors = (self.errors, self.residual, self.target, self.squares, self.active)
        return Sums(self.rows, *(one.cpu() for one in tensors))

    def part(self, prefix: int) -> Part:
        """Return the figures of the prefix with index `prefix`. No variance: fvu 0 without error, else 1."""
        n, total, squares = max(self.rows, 1.0), self._variance, float(self.squares)
        errors = float(self.errors[prefix])
        unexplained = errors - float(self.residual[prefix].square().sum()) / n
        return Part(
            rows=self.rows,
            fvu=ratio(errors, total, squares),
            explained_variance=1 - ratio(unexplained, total, squares),
            l0=float(self.active[prefix]) / n,
        )

    @property
    def _variance(self) -> float:
        """The target's squared distance from its mean, summed over rows."""
        return float(self.squares) - float(self.target.square().sum()) / max(self.rows, 1.0)

    def part_of_stratum(self, prefix: int) -> PartOfStratum:
        """Return the same for the rows of one stratum: without fvu where the target is constant."""
        found = self.part(prefix).model_dump()
        constant = self._variance <= CONSTANT_SHARE * float(self.squares)
        return PartOfStratum(**found | (dict.fromkeys(("fvu", "explained_variance")) if constant else {}))


def ratio(error: float, total: float, scale: float) -> float:
    """Return error / total, defined when `total` is rounding noise beside `scale`: 0 without error, else 1.

    Raises `ProjectError` when one of them is not finite.
    """
    if not all(map(math.isfinite, (error, total, scale))):
        raise ProjectError(
            f"a figure is not finite (squared error {error:.4g} of {total:.4g}): the transcoder's outputs overflow, or "
            "rows of the store are damaged; lower optimizer.lr, or check the store with: python -m harvest verify"
        )
    if total > 1e-12 * scale:
        return error / total
    return 0.0 if error <= 1e-12 * scale else 1.0


@torch.no_grad()
def evaluate(transcoder: Transcoder, rows: StoreRows, threshold: Tensor, seed: int) -> Evaluation:
    """Compute figures on the store's report blocks under `threshold` [F] of `calibrate`."""
    store = rows.store
    strata, outliers, skip, fired = _by_threshold(transcoder, rows, threshold)
    drawn = _by_training_rule(transcoder, rows, seed)
    whole, drawn_whole = natural_sums(strata, store), natural_sums(drawn, store)
    last = len(transcoder.prefixes) - 1
    head, weigh = whole.part(last), _weigher(strata, outliers, store, last)
    out = _summed([(sums, _times(store, name)) for name, sums in outliers.items()])
    return Evaluation(
        fvu=head.fvu,
        explained_variance=head.explained_variance,
        l0=head.l0,
        l0_training_rule=drawn_whole.part(last).l0,
        fvu_training_rule=drawn_whole.part(last).fvu,
        threshold=float(threshold.mean()),
        dead_share=1 - float(fired.float().mean()),
        rows=int(sum(sums.rows for sums in [*strata.values(), *outliers.values()])),
        prefixes=_parts(whole, transcoder.prefixes),
        strata={
            name: StratumPart(
                **sums.part_of_stratum(last).model_dump(),
                **weigh(sums, _times(store, name)).model_dump(),
                l0_training_rule=drawn[name].part(last).l0 if name in drawn else None,
                prefixes={size: sums.part_of_stratum(i) for i, size in enumerate(transcoder.prefixes)},
            )
            for name, sums in strata.items()
        },
        outliers=Outliers(**weigh(out, 1.0).model_dump(), rows=out.rows, l0=out.part(last).l0) if out else None,
        fvu_of_skip=natural_sums(skip, store).part(0).fvu if skip else None,
    )


def _weigher(
    strata: dict[str, Sums], outliers: dict[str, Sums], store: Store, last: int
) -> Callable[[Sums, float], Weight]:
    """Return what gives the weight of some rows, each of which counts so many times, among all."""
    every = [(sums, _times(store, name)) for part in (strata, outliers) for name, sums in part.items()]
    errors, active = (
        sum(float(getattr(sums, kind)[last]) * times for sums, times in every) for kind in ("errors", "active")
    )

    def weigh(sums: Sums, times: float) -> Weight:
        return Weight(
            relative_error=ratio(float(sums.errors[last]), float(sums.squares), float(sums.squares)),
            error_share=float(sums.errors[last]) * times / max(errors, 1e-300),
            active_share=float(sums.active[last]) * times / max(active, 1e-300),
        )

    return weigh


@torch.no_grad()
def evaluate_whole(transcoder: Transcoder, rows: StoreRows, threshold: Tensor) -> Part:
    """Compute the headline figures alone, as `evaluate` has them, for a fraction of the time."""
    return evaluate_strata(transcoder, rows, threshold)[0]


@torch.no_grad()
def evaluate_strata(
    transcoder: Transcoder, rows: StoreRows, threshold: Tensor
) -> tuple[Part, dict[str, PartOfStratum]]:
    """Compute the headline figures, and those of each stratum that is in them."""
    store, strata = rows.store, dict[str, Sums]()
    for whole in rows.chunks(store.record.report_blocks, transcoder.W_enc.device):
        if natural_weights(store)[whole.stratum]:
            chunk = whole.ordinary
            x, y = transcoder.normalised(chunk.source, chunk.target)
            active = transcoder.select_above(transcoder.pre_acts(x), threshold)
            reconstructions = transcoder.reconstruct_whole(active.values, active, x).unsqueeze(1)
            count = torch.full((1,), len(active.rows), device=y.device)
            add_sums(strata, chunk.stratum, Sums.of(y, reconstructions, count))
    strata = _fetched(strata)
    return natural_sums(strata, store).part(0), {name: sums.part_of_stratum(0) for name, sums in strata.items()}


@torch.no_grad()
def calibrate(
    transcoder: Transcoder, rows: StoreRows, most: int | None = None, blocks: range | None = None
) -> Tensor:  # [F] float32
    """Return the thresholds of inference, by all calibration rows or by about as many as `most`.

    With `blocks`, by the rows of those in the place of the calibration blocks.

    For a fixed k: the one value at which the calibration blocks' natural-frequency rows, without position 0, have k
    active latents each. A JumpReLU has its own; a ReLU has 0.
    """
    k = transcoder.activation.expected_l0
    return transcoder.thresholds().detach() if k is None else threshold_at(transcoder, rows, k, most, blocks)


@torch.no_grad()
def threshold_at(
    transcoder: Transcoder, rows: StoreRows, l0: float, most: int | None = None, blocks: range | None = None
) -> Tensor:  # [F] float32
    """Return thresholds at which rows have `l0` active latents each, as in `calibrate`, whatever the activation.

    One for all latents; those of a JumpReLU, moved by one number. Each chunk gives its values above the smallest that
    one before it gave, and not too many; when one above the result could have been hidden, all give more.
    """
    learned = transcoder.thresholds()
    slack = 4
    while True:
        values, weights, total = [], [], 0.0
        hidden = learned.new_full((), -torch.inf)
        for chunk, weight in weighted_rows(rows, transcoder.W_enc.device, most, blocks):
            x, _ = transcoder.normalised(chunk.source, chunk.target)
            found, room = transcoder.pre_acts(x), math.ceil(slack * l0 * len(x))
            if transcoder.activation.learns_thresholds:
                top, hidden = _largest(torch.where(found > 0, found - learned, -torch.inf), hidden, hidden, room)
            else:
                top, hidden = _largest(found, hidden.clamp_min(0), hidden, room)
            values.append(top)
            weights.append(torch.full_like(top, weight, dtype=torch.float64))
            total += weight * len(x)
        cut = _weighted_cut(values, weights, l0 * total)
        if cut >= float(hidden):
            return (learned + cut).clamp_min(0)
        slack *= 2


def _largest(found: Tensor, floor: Tensor, hidden: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Return values above `floor`, the `room` largest where there are more, and what those left out are not above.

    That is `hidden` where none is. Off the CPU there are `room` values, -inf beside those above `floor`: how many these
    are would have to be waited for.
    """
    if found.device.type == "cpu":
        top = found[found > floor]
        if len(top) <= room:
            return top, hidden
    else:
        top = found.flatten().where(found.flatten() > floor, -torch.inf)
    top = top.topk(min(room, len(top)), sorted=False).values
    return top, torch.maximum(hidden, top.min()) if len(top) else hidden


def _weighted_cut(values: list[Tensor], weights: list[Tensor], total: float) -> float:
    """Return the threshold above which values weigh `total`; -inf when all weigh less. Takes both to pieces."""
    joined, weight = torch.cat(values), torch.cat(weights)
    values.clear()
    weights.clear()
    joined, order = joined.sort(descending=True)
    running = weight[order].cpu()
    del weight, order
    running.cumsum_(0)  # on CPU: CUDA's running sum of floats is not the same each time
    index = int(torch.searchsorted(running, total, right=True))
    return float(joined[index]) if index < len(joined) else -torch.inf


def weighted_rows(
    rows: StoreRows, device: torch.device, most: int | None = None, blocks: range | None = None
) -> Iterator[tuple[RowChunk, float]]:
    """Yield rows without position 0 and outliers, and how often each counts at natural frequencies.

    They are those of `blocks`, or of the calibration blocks. Of more than `most` rows, the same share of every stratum
    is taken, its first: rows are permuted within their block.
    """
    natural = natural_weights(rows.store)
    blocks = calibration_blocks(rows.store.record) if blocks is None else blocks
    counts = {name: len(blocks) * part.stratum.rows for name, part in rows.store.strata.items() if natural[name]}
    share = min(1.0, most / sum(counts.values())) if most else 1.0
    taken = {name: math.ceil(share * count) for name, count in counts.items()}
    for chunk in rows.chunks(blocks, device, taken):
        yield chunk.ordinary, natural[chunk.stratum] * counts[chunk.stratum] / taken[chunk.stratum]


def natural_weights(store: Store) -> dict[str, float]:
    """Return how often a stored row of each stratum counts at natural frequencies; 0 for position 0, unless alone."""
    strata = store.record.plan.stored_strata
    return {s.name: 0.0 if s.is_position_0 and len(strata) > 1 else s.natural_rows / s.rows for s in strata}


def _times(store: Store, name: str) -> float:
    """Return how often a stored row of a stratum counts at natural frequencies, position 0 included."""
    stratum = store.strata[name].stratum
    return stratum.natural_rows / stratum.rows


def _by_threshold(
    transcoder: Transcoder, rows: StoreRows, threshold: Tensor
) -> tuple[dict[str, Sums], dict[str, Sums], dict[str, Sums], Tensor]:
    """Return sums by stratum over report rows that are no outliers, and over those that are; and which latents fired.

    The third sums are of the skip connection alone, over the first rows; none without one. The last result is [F].
    """
    strata, outliers, skip = dict[str, Sums](), dict[str, Sums](), dict[str, Sums]()
    store, device = rows.store, transcoder.W_enc.device
    fired = torch.zeros(transcoder.d_sae, dtype=torch.bool, device=device)
    for chunk in rows.chunks(store.record.report_blocks, device):
        for found, part in ((strata, chunk.ordinary), (outliers, chunk.part(chunk.outliers))):
            if found is outliers and not len(part.source):
                continue
            x, y = transcoder.normalised(part.source, part.target)
            active = transcoder.select_above(transcoder.pre_acts(x), threshold)
            if found is strata and counts_as_firing(store, chunk.stratum):
                fired[active.latents] = True
            add_sums(found, chunk.stratum, _sums(transcoder, x, y, active))
            if found is strata and transcoder.W_skip is not None:
                none = torch.zeros(1, device=device)
                add_sums(skip, chunk.stratum, Sums.of(y, transcoder.linear_part(x).unsqueeze(1), none))
    return _fetched(strata), _fetched(outliers), _fetched(skip), fired


def _fetched(sums: dict[str, Sums]) -> dict[str, Sums]:
    return {name: one.cpu() for name, one in sums.items()}


def add_sums(found: dict[str, Sums], stratum: str, sums: Sums) -> None:
    """Add the sums of some rows to those of their stratum."""
    found[stratum] = found[stratum].plus(sums) if stratum in found else sums


def counts_as_firing(store: Store, stratum: str) -> bool:
    """Tell whether a latent that fires on one stratum alone is alive: not at a position 0 that training leaves out."""
    left_out = store.exclusion is not None and store.exclusion.position_0
    return not (left_out and store.strata[stratum].stratum.is_position_0)


def _by_training_rule(transcoder: Transcoder, rows: StoreRows, seed: int) -> dict[str, Sums]:
    """Return sums by stratum over batches of the natural mixture, as many as cover the report rows once."""
    store, device, P = rows.store, transcoder.W_enc.device, len(transcoder.prefixes)
    blocks = store.record.report_blocks
    batch_rows = min(rows.chunk_rows, len(blocks) * store.request.block_sequences * store.request.context_size)
    steps = -(-len(blocks) * sum(s.rows for s in store.record.plan.stored_strata) // batch_rows)
    config = RowsConfig(batch_rows=batch_rows)
    reader = BatchReader(store, blocks, config, seed, device, rows.source, stop=steps)
    apart = reader.has_outliers and store.exclusion is not None and store.exclusion.figures
    strata, slices, ordinary = dict[str, Sums](), reader.slices(), torch.ones(batch_rows, dtype=torch.bool)
    sizes = torch.tensor([at.stop - at.start for at in slices.values()])
    of_row = torch.arange(len(slices)).repeat_interleave(sizes)  # [B] the number of its stratum
    with reader:
        for step in range(steps):
            batch = reader.batch(step)
            x, y = transcoder.normalised(batch.source, batch.target)
            active = transcoder.select_final(transcoder.pre_acts(x))
            decoded = decode_prefixes(active.values, transcoder.W_dec, active, transcoder.group, P)
            if apart:
                ordinary = torch.from_numpy(~reader.outliers(step))
            counted_for = sent(of_row.where(ordinary, len(slices)), device)  # outliers: past the last stratum
            groups = counted_for[active.rows] * P + transcoder.group[active.latents]
            counts = counted(groups, (len(slices) + 1) * P).view(-1, P).cumsum(1)
            for number, (name, at) in enumerate(slices.items()):
                kept = at if ordinary[at].all() else sent(ordinary[at].nonzero().squeeze(1) + at.start, device)
                reconstructions = decoded[kept] + transcoder.linear_part(x[kept]).unsqueeze(1)
                add_sums(strata, name, Sums.of(y[kept], reconstructions, counts[number]))
    return _fetched(strata)


def counted(numbers: Tensor, size: int) -> Tensor:
    """Count how often each number below `size` is among `numbers` [N], [size] int64; no device is waited for."""
    if numbers.device.type == "cpu":
        return torch.bincount(numbers, minlength=size)
    return numbers.new_zeros(size).index_add_(0, numbers, torch.ones_like(numbers))


def _sums(transcoder: Transcoder, x: Tensor, y: Tensor, active: SparseLatents) -> Sums:
    counts = counted(transcoder.group[active.latents], len(transcoder.prefixes)).cumsum(0)
    return Sums.of(y, transcoder.reconstruct(active.values, active, x), counts)


def natural_sums(strata: dict[str, Sums], store: Store) -> Sums:
    """Return the sums over all strata, each weighted by its natural frequency; position 0 is left out."""
    weights = natural_weights(store)
    found = _summed([(sums, weights[name]) for name, sums in strata.items() if weights[name]])
    assert found
    return found


def _summed(parts: Sequence[tuple[Sums, float]]) -> Sums | None:
    """Return the sums over all parts, rows of each counted so many times; none of none."""
    total: Sums | None = None
    for sums, weight in parts:
        total = total.plus(sums, weight) if total else sums.plus(sums, weight - 1)
    return total


def _parts(sums: Sums, prefixes: Iterable[int]) -> dict[int, Part]:
    return {size: sums.part(i) for i, size in enumerate(prefixes)}
