"""How far two seeds find the same latents. Pure.

Legend: A, B latents of two runs, O d_out.
"""

from scipy.optimize import linear_sum_assignment
from torch import Tensor


def matched_cosine(
    first: Tensor,  # [A, O] unit rows
    second: Tensor,  # [B, O] unit rows
) -> float:
    """Return the mean cosine of two decoders' rows, each row of the smaller matched with one of its own in the larger.

    The matching is the one with the largest sum (Hungarian): the pairwise mean correlation coefficient of dictionaries
    (PW-MCC; Song et al. 2025, arXiv 2505.20254), by cosine with its sign, as a latent's direction has one. 0 for none.
    """
    cosines = (first @ second.T).double().cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean()) if len(rows) else 0.0


def densest(
    latents: Tensor,  # [n]
    density: Tensor,  # [F]
    most: int,
) -> Tensor:
    """Return the `most` densest of `latents`: the matching's time rises with the cube of their number."""
    return latents[density[latents].argsort(descending=True, stable=True)[:most]]
