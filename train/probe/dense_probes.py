"""Logistic probes on all dimensions of rows, one for each label.

Legend: R rows, n rows of a half, D dimensions, L labels.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from train.probe.probed_rows import ProbedRows
from train.probe.sparse_probes import best_cut, f1_above

Array = NDArray[Any]

_DECAY, _STEPS = 1e-5, 100


class DenseProbes(NamedTuple):
    """The probes of every label."""

    f1: Array
    """[L] on the second half"""
    weights: Tensor
    """[D, L]"""
    found: Array
    """[L, R] bool: rows that the probe takes to have the label"""


def dense_probes(x: Tensor, rows: ProbedRows) -> DenseProbes:
    """Fit logistic regressions on the rows `x` [R, D] of the first half; F1 is of the second.

    All at once, by L-BFGS, on dimensions over their deviation. The cut is that of the largest F1 on the first half.
    """
    first = torch.from_numpy(~rows.scored).to(x.device)
    masks = torch.from_numpy(rows.masks).to(x.device)
    scale, mean = x[first].std(0).clamp_min(1e-6), x[first].mean(0)
    x = (x - mean) / scale
    weights, bias = _fit(x[first], masks[:, first].T.float())
    scores = (x @ weights + bias).double().cpu().numpy()
    ones, f1, found = np.ones(len(scores)), [], []
    for mask, score in zip(rows.masks, scores.T, strict=True):
        half = ~rows.scored
        cut = best_cut(score[half], mask[half].astype(float), ones[half])
        found.append(score > cut)
        f1.append(f1_above(score[~half], cut, mask[~half].astype(float), ones[~half]))
    return DenseProbes(np.array(f1), (weights / scale[:, None]).cpu(), np.stack(found))


def _fit(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [D, L] and biases [L] for rows `x` [n, D] and `labels` [n, L]."""
    share = labels.mean(0).clamp(1e-6, 1 - 1e-6)
    weights = torch.zeros(x.shape[1], labels.shape[1], device=x.device, requires_grad=True)
    bias = share.logit().requires_grad_()
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        found = binary_cross_entropy_with_logits(x @ weights + bias, labels) * labels.shape[1]
        found = found + _DECAY * weights.square().sum()
        found.backward()
        return found

    optimiser.step(loss)
    return weights.detach(), bias.detach()
