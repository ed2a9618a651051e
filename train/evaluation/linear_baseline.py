"""The best affine map from source to target: what a transcoder has to beat."""

import torch
from torch import Tensor

from train.data.batches import StoreRows
from train.evaluation.evaluate import natural_weights, ratio
from train.model.sizes import source_width


@torch.no_grad()
def linear_map_fvu(rows: StoreRows, device: torch.device) -> float:
    """Return fvu on the report blocks of the least-squares map of the training blocks, on the rows of the headline."""
    moments = _moments(rows, rows.store.record.training_blocks, device)
    held_out = _moments(rows, rows.store.record.report_blocks, device)
    fit = _least_squares(moments)
    error = (
        held_out.target_squares
        - 2 * (fit * held_out.source_target).sum()
        + (fit * (held_out.source_source @ fit)).sum()
    )
    count = held_out.source_source[-1, -1]
    total = held_out.target_squares - held_out.source_target[-1].square().sum() / count
    return ratio(float(error), float(total), float(held_out.target_squares))


@torch.no_grad()
def linear_map(rows: StoreRows, device: torch.device) -> Tensor:
    """Return the same map, float64 [d_in + 1, d_out]; its last row is the bias."""
    return _least_squares(_moments(rows, rows.store.record.training_blocks, device))


def _least_squares(moments: "_Moments") -> Tensor:
    # Minimum norm on CPU: directions without variance, and fewer rows than dimensions, are no error.
    device = moments.source_source.device
    found = torch.linalg.lstsq(moments.source_source.cpu(), moments.source_target.cpu(), driver="gelsd")
    return found.solution.to(device)


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


def _moments(rows: StoreRows, blocks: range, device: torch.device) -> _Moments:
    weights = natural_weights(rows.store)
    moments = _Moments(source_width(rows.store.record, rows.source), rows.store.record.d_out, device)
    for chunk in rows.chunks(blocks, device):
        if weights[chunk.stratum]:
            moments.add(chunk.ordinary.source, chunk.ordinary.target, weights[chunk.stratum])
    return moments
