"""Feature splitting and absorption by SAEBench's definitions (Karvonen et al. 2025, arXiv 2503.09532).

Chanin et al. 2024 (arXiv 2409.14507) describe both on first letters of words. What differs here: labels are those of
tokens in running text; the cut of every probe is that of the largest F1, not 0; the probe is fitted on the transcoder's
targets, which decoder rows add to, as latents do not reconstruct what they read; latents are chosen among 5, not 10.

Legend: R rows, F latents, O d_out, L labels, K most columns of a probe.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from train.probe import score_loops
from train.probe.dense_probes import DenseProbes
from train.probe.probed_rows import ByLatent, ProbedRows

Array = NDArray[Any]

_JUMP = 0.03
"""Of F1, by which another latent must raise it to be a main one."""
_LEAST_F1 = 0.6
"""Of a dense probe that finds the label."""
_LEAST_COSINE, _LEAST_COSINE_OF_PART, _LEAST_SHARE = 0.025, 0.1, 0.4
"""Of an absorbing latent with the probe; of one in the fraction; and how much of the target's part along it adds."""


class Absorbed(NamedTuple):
    """Of one label."""

    tokens: int
    whole: float
    """Tokens that are fully absorbed."""
    parts: float
    """Sum of the tokens' absorption fractions."""


def main_latents(f1: Array) -> int:
    """Return how many latents are main ones: as long as each of k = 1, 2, ... raises `f1` [K] by more than 0.03."""
    for k in range(1, len(f1)):
        if f1[k] <= f1[k - 1] + _JUMP:
            return k
    return len(f1)


def absorptions(
    pairs: ByLatent,
    rows: ProbedRows,
    main: list[Array],
    target: Tensor,
    W_dec: Tensor,
    probes: DenseProbes,
) -> list[Absorbed | None]:
    """Count the absorption of every label on the second half; none where no dense probe finds the label.

    `main` are each label's main latents, `target` [R, O] the rows that `probes` read, and `W_dec` [F, O] what latents
    add to them.
    """
    order = np.argsort(pairs.rows, kind="stable")
    latents = np.repeat(np.arange(len(pairs.starts) - 1), np.diff(pairs.starts))[order]
    starts = np.searchsorted(pairs.rows[order], np.arange(len(rows.scored) + 1))
    values = pairs.values[order].astype(np.float64)
    directions = probes.weights / probes.weights.norm(dim=0).clamp_min(1e-30)
    projections = (W_dec @ directions).double().numpy()
    cosines = projections / W_dec.norm(dim=1).clamp_min(1e-30).double().numpy()[:, None]
    wanted = (target @ directions).double().numpy()
    found: list[Absorbed | None] = []
    for label, mine in enumerate(main):
        if probes.f1[label] < _LEAST_F1:
            found.append(None)
            continue
        is_main = np.zeros(len(projections), bool)
        is_main[mine] = True
        tokens = np.flatnonzero(rows.masks[label] & probes.found[label] & rows.scored)
        whole, parts = score_loops.absorbed(
            tokens, starts, latents, values, is_main, projections[:, label].copy(), cosines[:, label].copy(),
            wanted[:, label].copy(), (_LEAST_COSINE, _LEAST_COSINE_OF_PART, _LEAST_SHARE),
        )  # fmt: skip
        found.append(Absorbed(len(tokens), whole, parts))
    return found
