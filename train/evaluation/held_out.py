"""Which latents are active on held-out rows, for counts over all of them at once.

Legend: R rows, F latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.store.strata import POSITION_0
from train.data.batches import StoreRows
from train.evaluation.evaluate import natural_weights
from train.model.sparse_latents import SparseLatents, countable
from train.model.transcoder import Transcoder

MOST_MEETINGS = 2**31
"""Of two latents on a row, each pair of them twice: some seconds of counting on one core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutActive:
    """Active pairs of rows that are at natural frequencies, but for those of position 0."""

    active: SparseLatents
    """On CPU"""
    stratum: Tensor
    """[R] int64, of each row, in the order of `strata`"""
    strata: tuple[str, ...]
    weight_of_position_0: float
    """How often each row of position 0 counts at natural frequencies, where all others count once."""

    @property
    def at_position_0(self) -> Tensor:
        """[R] bool, none where there is no other stratum."""
        alone = len(self.strata) == 1 or POSITION_0 not in self.strata
        return self.stratum == (-1 if alone else self.strata.index(POSITION_0))

    @property
    def without_position_0(self) -> SparseLatents:
        """The pairs of the other rows."""
        return self.active.of_rows(~self.at_position_0)


@torch.no_grad()
def held_out_active(
    transcoder: Transcoder,
    rows: StoreRows,
    blocks: range,
    threshold: Tensor,  # [F]
) -> HeldOutActive:
    """Return active pairs under `threshold` on all rows of `blocks` but outliers, thinned to natural frequencies.

    Of a stratum that counts less than another, each block's first rows are taken: they are a random part of it. Rows of
    position 0 are taken as they are. Where so many latents are active that counting pairs of them would take more than
    `MOST_MEETINGS`, every n-th row is.
    """
    weights, strata = natural_weights(rows.store), rows.store.strata
    most = max(weights.values())
    taken = {
        name: max(1, round(s.stratum.rows * weights[name] / most)) if weights[name] else s.stratum.rows
        for name, s in strata.items()
    }
    count = len(blocks) * sum(taken.values())
    parts, stratum, seen, names = [], [], dict.fromkeys(strata, 0), tuple(strata)
    for chunk in rows.chunks(blocks, transcoder.W_enc.device):
        number = torch.arange(seen[chunk.stratum], seen[chunk.stratum] + len(chunk.source))
        seen[chunk.stratum] += len(chunk.source)
        wanted = number % strata[chunk.stratum].stratum.rows < taken[chunk.stratum]
        ordinary = chunk.part(wanted & ~chunk.outliers)
        x, _ = transcoder.normalised(ordinary.source, ordinary.target)
        active = transcoder.select_above(transcoder.pre_acts(x), threshold).cpu()
        kept = countable(active, count / max(len(x), 1), MOST_MEETINGS)
        parts.append(active if kept.all() else active.of_rows(kept))
        stratum.append(torch.full((int(kept.sum()),), names.index(chunk.stratum)))
    first = next(iter(strata.values())).stratum
    return HeldOutActive(
        active=SparseLatents.joined(parts),
        stratum=torch.cat(stratum),
        strata=names,
        weight_of_position_0=first.natural_rows / first.rows / most,
    )
