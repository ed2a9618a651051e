"""Pairs of latents followed over all rows of training, where a sample of rows has proposed them.

Of what some thousand rows show above a correlation, half is chance, and pairs that meet on one row of ten thousand are
missing (docs/decisions/007-duplicates.md). So a sample only proposes a pair; the rows after it decide.
Legend: C pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shared.console.terminal import say
from train.duplicates import pair_loops
from train.duplicates.co_activation import Correlated, Measures, correlated_pairs, measure
from train.duplicates.correlation_report import Correlations
from train.duplicates.directions import Pairs
from train.duplicates.monitor_limits import MOST_TRACKED_PAIRS
from train.model.saved_tensors import fitting, numbers
from train.model.sparse_latents import SparseLatents

_HALF_LIFE = 131_072
"""Rows after which a row counts half: latents change."""
_TRIAL = 65_536
"""Rows over which a pair is tracked before it can be dropped: one that meets on 1 of 20,000 has met on three."""
_LEAST_MET = 0.5
"""Rows in common, faded ones by what they count, below which latents of a pair no longer meet."""
_SUMS = 9
"""Of each pair, as `pair_loops.add_to_sums` has them."""
NO_ROWS = slice(0, 0)


class Tracked(NamedTuple):
    """Pairs by falling correlation, over the rows that each was tracked on."""

    correlated: Correlated
    measures: Measures
    """Counts of rows are whole numbers: older rows count less"""
    rows: Tensor
    """[C] int64, how many each was tracked on, counted in the same way"""
    without_room: int
    """How many that the last sample proposed are not tracked, since so many others are"""

    def figures(self, levels: tuple[float, ...]) -> Correlations:
        """Return how many pairs are above each level."""
        r = self.correlated.correlation
        return Correlations(
            rows=int(self.rows.max()) if len(r) else 0,
            largest=float(r[:1].sum()),
            pairs_above={f"{level}": int((r > level).sum()) for level in levels},
        )


class TrackedPairs:
    """Tracks the pairs that were proposed. What it holds is state that a resumed run continues from."""

    def __init__(self, d_sae: int, level: float) -> None:
        """Track pairs of `d_sae` latents for as long as their correlation is above `level`."""
        self._d_sae, self.level = d_sae, level
        nothing = torch.zeros(0, dtype=torch.int64)
        self.pairs = Pairs(nothing, nothing)
        self._sums = torch.zeros(0, _SUMS, dtype=torch.float64)
        self._begun = False

    def add(self, active: SparseLatents, left_out: slice = NO_ROWS) -> None:
        """Count the rows of a batch, all on CPU, but those `left_out`."""
        if not len(self.pairs.first):
            return
        total = len(active.starts) - 1 - (left_out.stop - left_out.start)
        sides = (t.numpy() for t in (*self.pairs, active.rows, active.values, *active.by_latent))
        fade = 0.5 ** (total / _HALF_LIFE)
        pair_loops.add_to_sums(*sides, left_out.start, left_out.stop, total, fade, self._sums.numpy())

    def found(self, least_together: float) -> Tracked:
        """Return the pairs with at least `least_together` rows in common and a correlation above 0."""
        rows, together, products, *moments = self._sums.T
        one, other = moments[:3], moments[3:]
        seen = rows.clamp_min(1.0)
        (mean, variance), (other_mean, other_variance) = _moments(one, seen), _moments(other, seen)
        scale = (variance * other_variance).sqrt()
        r = torch.where(scale > 0, (products / seen - mean * other_mean) / scale, 0.0)
        jaccard = together / (one[0] + other[0] - together).clamp_min(torch.finfo(torch.float64).tiny)
        listed = ((together >= least_together) & (r > 0)).nonzero().squeeze(1)
        listed = listed[r[listed].argsort(descending=True, stable=True)]
        return Tracked(
            Correlated(self.pairs.kept(listed), r[listed], scale[listed]),
            Measures(together[listed].round().long(), r[listed], jaccard[listed]),
            rows[listed].round().long(),
            0,
        )

    def follow(self, sample: SparseLatents, least_together: int, partners: int, *, new: bool) -> Tracked | None:
        """Return what rows say of the pairs that are tracked, none where no sample was seen before, and track new ones.

        New ones are those of a `sample` without position 0 above the level, of each latent the `partners` largest; one
        row in common will do. The rows of a `new` sample are counted first; of another, they were counted step by step.
        """
        if new:
            self.add(sample)
        found = self.found(least_together) if self._begun else None
        self._begun = True
        proposed, _ = correlated_pairs(sample, 1, partners, ())
        pairs = proposed.pairs.kept(proposed.correlation > self.level)
        without_room = self.propose(pairs, measure(sample, pairs).rows)
        return found and found._replace(without_room=without_room)

    def propose(self, pairs: Pairs, together: Tensor) -> int:
        """Drop the pairs that rows have decided against, and track `pairs` from here on, where there is room.

        Those of `pairs` that met on more rows of the sample, `together` [C], come first; else those before others.
        Returns how many found no room.
        """
        found = self.found(_LEAST_MET).correlated
        alike = self._keys(found.pairs.kept(found.correlation > self.level))
        known = self._keys(self.pairs)
        kept = (self._sums[:, 0] < _TRIAL) | torch.isin(known, alike)
        fresh = ~torch.isin(self._keys(pairs), known)
        room = MOST_TRACKED_PAIRS - int(kept.sum())
        chosen = fresh.nonzero().squeeze(1)
        without_room = max(len(chosen) - room, 0)
        chosen = chosen[together[chosen].argsort(descending=True, stable=True)][:room]
        self.pairs = self.pairs.kept(kept).joined(pairs.kept(chosen))
        self._sums = torch.cat([self._sums[kept], self._sums.new_zeros(len(chosen), _SUMS)])
        return without_room

    def start_anew(self, latents: Tensor) -> None:
        """Drop the pairs of `latents` [n] int64, which have become others."""
        kept = self.pairs.free_of(latents.cpu())
        self.pairs, self._sums = self.pairs.kept(kept), self._sums[kept]

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint."""
        return {f"tracked.{side}": latents for side, latents in self.pairs._asdict().items()} | {
            "tracked.sums": self._sums.clone()
        }

    def load(self, tensors: dict[str, Tensor], *, begun: bool) -> None:
        """Take over a saved state; `begun`: after a first sample.

        A checkpoint from before pairs were tracked has none, which is said.
        """
        if "tracked.sums" not in tensors:
            say("the checkpoint is from before correlated pairs were tracked: tracking starts at the next report")
            return
        self._begun = begun
        first = numbers(tensors, "tracked.first", self._d_sae)
        self.pairs = Pairs(first, numbers(tensors, "tracked.second", self._d_sae, len(first)))
        self._sums = fitting(tensors, "tracked.sums", torch.empty(len(first), _SUMS, dtype=torch.float64)).clone()

    def _keys(self, pairs: Pairs) -> Tensor:  # [C] int64
        return pairs.first * self._d_sae + pairs.second


def _moments(sums: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:  # [C] each
    """Return mean and variance of each pair's latent, by its count, values and squares [C]."""
    mean, square = sums[1] / rows, sums[2] / rows
    variance = square - mean.square()
    return mean, torch.where(variance > 1e-12 * square, variance, 0.0)  # less is rounding
