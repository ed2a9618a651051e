"""Measure what redundant latents are worth: merge each group into one, or remove as many other latents.

Legend: R rows, F latents, O d_out, G groups.
"""

import torch
from torch import Tensor

from shared.keyed import key_bits
from train.data.batches import StoreRows
from train.evaluation.evaluate import evaluate_whole, weighted_rows
from train.model.sparse_latents import SparseLatents
from train.model.transcoder import Transcoder

Groups = list[list[int]]


def densest_of(
    groups: Groups,
    density: Tensor,  # [F]
) -> tuple[Tensor, Tensor]:
    """Return the densest latent of each group, and all others of the groups."""
    kept = [max(group, key=lambda latent: int(density[latent])) for group in groups]
    others = sorted({latent for group in groups for latent in group}.difference(kept))
    return torch.tensor(kept, dtype=torch.int64), torch.tensor(others, dtype=torch.int64)


@torch.no_grad()
def merge(
    transcoder: Transcoder,
    rows: StoreRows,
    kept: Tensor,  # [G]
    dropped: Tensor,  # [n]
    threshold: Tensor,  # [F]
) -> float:
    """Return fvu on the report rows when `dropped` are never active and `kept` have new decoder rows.

    The new rows are those of least squared error on the calibration rows, at natural frequencies. Leaves `transcoder`
    as it was.
    """
    silent, before = threshold.clone(), transcoder.W_dec.detach().clone()
    silent[dropped] = torch.inf
    transcoder.W_dec[kept] = _refitted(transcoder, rows, kept, silent)
    try:
        return without(transcoder, rows, dropped, threshold)
    finally:
        transcoder.W_dec.copy_(before)


def without(
    transcoder: Transcoder,
    rows: StoreRows,
    latents: Tensor,  # [n]
    threshold: Tensor,  # [F]
) -> float:
    """Return fvu on the report rows when `latents` are never active."""
    silent = threshold.clone()
    silent[latents] = torch.inf
    return evaluate_whole(transcoder, rows, silent).fvu


def alike(
    latents: Tensor,  # [n]
    others: Tensor,  # [n] which may be taken
    density: Tensor,  # [F]
    seed: int,
    choices: int = 8,
) -> Tensor:
    """Pick for each of `latents` one of `others`, at random from the `choices` nearest in density, none twice."""
    generator = torch.Generator().manual_seed(key_bits("latents removed at random", seed) % 2**63)
    free, found = others.clone(), []
    for latent in latents.tolist():
        if not len(free):
            break
        near = (density[free] - density[latent]).abs().argsort(stable=True)[:choices]
        place = int(near[torch.randint(len(near), (), generator=generator)])
        found.append(int(free[place]))
        free = torch.cat([free[:place], free[place + 1 :]])
    return torch.tensor(found, dtype=torch.int64)


def _refitted(transcoder: Transcoder, rows: StoreRows, kept: Tensor, threshold: Tensor) -> Tensor:  # [G, O]
    """Return decoder rows of `kept` of least squared error where all other latents are as they are."""
    device, count = transcoder.W_dec.device, len(kept)
    column = torch.full((transcoder.d_sae,), count, device=device)
    column[kept] = torch.arange(count, device=device)
    squares = torch.zeros(count, count, dtype=torch.float64, device=device)
    moments = torch.zeros(count, transcoder.W_dec.shape[1], dtype=torch.float64, device=device)
    for chunk, weight in weighted_rows(rows, device):
        x, y = transcoder.normalised(chunk.source, chunk.target)
        active = transcoder.select_above(transcoder.pre_acts(x), threshold)
        dense = _columns(active, column, count)
        residual = (y - transcoder.reconstruct_whole(active.values, active, x)).double()
        squares += weight * dense.T @ dense
        moments += weight * dense.T @ residual
    change = torch.linalg.pinv(squares, hermitian=True) @ moments  # none of a latent that is active on no row
    return (transcoder.W_dec[kept] + change).to(transcoder.W_dec.dtype)


def _columns(active: SparseLatents, column: Tensor, count: int) -> Tensor:  # [R, G] float64
    """Return the values of the latents that have a column."""
    room = torch.zeros(len(active.starts) - 1, count + 1, dtype=torch.float64, device=column.device)
    room[active.rows, column[active.latents]] = active.values.double()
    return room[:, :-1]
