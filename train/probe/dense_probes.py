"""Logistic probes on all dimensions of rows, one for each label.

Legend: R rows, n rows of a half, D dimensions, L labels.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from train.probe.probed_rows import ProbedRows
from train.probe.sparse_probes import best_cut, f1_above

Array = NDArray[Any]

_DECAY, _STEPS = 1e-5, 60


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
    shape = (x.shape[1] + 1, labels.shape[1])
    start = torch.zeros(shape)
    start[-1] = labels.mean(0).clamp(1e-6, 1 - 1e-6).logit().cpu()

    def loss(flat: Array) -> tuple[float, Array]:
        weights = torch.from_numpy(flat.reshape(shape)).to(x)
        scores = torch.addmm(weights[-1], x, weights[:-1])
        value = torch.logaddexp(scores, scores.new_zeros(())).sum() - (scores * labels).sum()
        slope = scores.sigmoid_().sub_(labels)
        gradient = torch.cat([x.T @ slope, slope.sum(0, keepdim=True)]) / len(x)
        gradient[:-1] += 2 * _DECAY * weights[:-1]
        total = float(value) / len(x) + _DECAY * float(weights[:-1].square().sum())
        return total, gradient.double().cpu().numpy().ravel()

    found = minimize(loss, start.double().numpy().ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    weights = torch.from_numpy(found.x.reshape(shape)).to(x)
    return weights[:-1], weights[-1]
