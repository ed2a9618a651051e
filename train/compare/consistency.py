"""How far two seeds find the same latents. Pure.

Legend: A, B latents of two runs, O d_out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SAME = 0.7
"""Cosine from which matched latents are the same (Paulo and Belrose 2025, arXiv 2501.16615)."""


class Consistency(NamedTuple):
    """How far runs that differ in their seed have the same latents."""

    pw_mcc: list[float]
    """Of each pair of runs, the mean cosine of matched decoder rows."""
    in_all: list[float]
    """Of each run, the share of its latents that have a match with a cosine of at least `SAME` in every other."""


def consistency(
    decoders: Sequence[Tensor],  # [n, O] unit rows of each run
) -> Consistency:
    """Match the latents of each pair of runs, each of the run with fewer with one of its own in the other.

    The matching is the one with the largest sum of cosines (Hungarian): their mean is the pairwise mean correlation
    coefficient of dictionaries (PW-MCC; Song et al. 2025, arXiv 2505.20254), with its sign, as a latent's direction has
    one. 0 for none.
    """
    pw_mcc, found = [], [np.ones(len(rows), bool) for rows in decoders]
    for i, first in enumerate(decoders):
        for j in range(i + 1, len(decoders)):
            rows, columns, cosines = _matched(first, decoders[j])
            pw_mcc.append(float(cosines.mean()) if len(cosines) else 0.0)
            for run, matched in ((i, rows), (j, columns)):
                same = np.zeros(len(found[run]), bool)
                same[matched[cosines >= SAME]] = True
                found[run] &= same
    return Consistency(pw_mcc, [float(one.mean()) if len(one) else 0.0 for one in found])


def _matched(first: Tensor, second: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return which rows are matched with which, and the cosines."""
    cosines = (first @ second.T).double().cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return rows, columns, cosines[rows, columns]


def densest(
    latents: Tensor,  # [n]
    density: Tensor,  # [F]
    most: int,
) -> Tensor:
    """Return the `most` densest of `latents`: the matching's time rises with the cube of their number."""
    return latents[density[latents].argsort(descending=True, stable=True)[:most]]
