"""Whether sampling does what it is for, on planted latents."""

import numpy as np

from train.samples.encode import Activations
from train.samples.select import SamplesConfig, select
from train.sparsity import Active


def sampled_rightly(
    active: Active, at_0: int, everywhere: int, only_at_0: tuple[int, ...], config: SamplesConfig, seed: int
) -> bool:
    """Sample a batch whose first `at_0` rows are of position 0, of one token, each followed by others of its sequence.

    Samples of the latent that is active `everywhere` must be of different sequences, each the largest of its own, and
    the top the largest of these; latents that are active `only_at_0` must have one.
    """
    context = (len(active.starts) - 1) // at_0
    order, starts = (part.numpy() for part in active.by_latent)
    rows, latents, values = (part.numpy()[order] for part in (active.rows, active.latents, active.values))
    later, after = np.divmod(rows - at_0, context - 1)
    places = np.where(rows < at_0, rows * context, later * context + after + 1)
    rising = np.lexsort((places, latents))
    windows = np.zeros((at_0, context), np.int32)
    planted = Activations(
        first=0,
        tokens=windows,
        documents=windows,
        apart=False,
        strata=("at 0", "later"),
        stratum=np.tile(np.minimum(np.arange(context), 1).astype(np.uint8), at_0),
        starts=starts,
        places=places[rising].astype(np.int32),
        values=values[rising],
    )
    chosen = select(planted, config.model_copy(update={"max_stratum_share": 1.0}), seed)
    mine = slice(starts[everywhere], starts[everywhere + 1])
    dense = np.zeros((at_0, context), np.float32)
    dense.ravel()[planted.places[mine]] = planted.values[mine]
    dense[1:, 0] = 0  # the same row as the first
    largest = dense.max(1)
    pairs = chosen.pairs[chosen.latents == everywhere]
    sequences, top = planted.places[pairs] // context, np.sort(largest)[::-1][: config.top]
    return (
        len(np.unique(sequences)) == len(sequences)
        and np.array_equal(planted.values[pairs], largest[sequences])
        and np.array_equal(planted.values[pairs][: len(top)], top)
        and all(np.count_nonzero(chosen.latents == latent) == 1 for latent in only_at_0)
    )
