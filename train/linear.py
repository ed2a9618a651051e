"""The best affine map from source to target: what a transcoder has to beat."""

import torch
from torch import Tensor

from shared.store import Store
from train.evaluate import natural_weights, ratio
from train.rows import Side, held_out_rows, source_width


@torch.no_grad()
def linear_map_fvu(store: Store, chunk_rows: int, device: torch.device, source: Side = "source") -> float:
    """Return fvu on the report blocks of the least-squares map of the training blocks, on the rows of the headline."""
    moments = _moments(store, store.record.training_blocks, chunk_rows, device, source)
    held_out = _moments(store, store.record.report_blocks, chunk_rows, device, source)
    # Minimum norm on CPU: directions without variance, and fewer rows than dimensions, are no error.
    fit = torch.linalg.lstsq(moments.source_source.cpu(), moments.source_target.cpu(), driver="gelsd").solution.to(
        device
    )
    error = (
        held_out.target_squares
        - 2 * (fit * held_out.source_target).sum()
        + (fit * (held_out.source_source @ fit)).sum()
    )
    rows = held_out.source_source[-1, -1]
    total = held_out.target_squares - held_out.source_target[-1].square().sum() / rows
    return ratio(float(error), float(total), float(held_out.target_squares))


class _Moments:
    """Weighted second moments of [source, 1] and target, float64."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.source_source = torch.zeros(d_in + 1, d_in + 1, dtype=torch.float64, device=device)
        self.source_target = torch.zeros(d_in + 1, d_out, dtype=torch.float64, device=device)
        self.target_squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, source: Tensor, target: Tensor, weight: float) -> None:
        x = torch.cat([source, source.new_ones(len(source), 1)], dim=1).double()
        y = target.double()
        self.source_source += weight * (x.T @ x)
        self.source_target += weight * (x.T @ y)
        self.target_squares += weight * y.square().sum()


def _moments(store: Store, blocks: range, chunk_rows: int, device: torch.device, source: Side) -> _Moments:
    weights = natural_weights(store)
    moments = _Moments(source_width(store, source), store.record.d_out, device)
    for chunk in held_out_rows(store, blocks, chunk_rows, device, source):
        if weights[chunk.stratum]:
            moments.add(chunk.ordinary.source, chunk.ordinary.target, weights[chunk.stratum])
    return moments
