"""One latent in the place of several: its weights in closed form, and what it costs. Pure.

A group's latents have values A and decoder rows D, and the rows' residual is r: without the group r + A D is left of a
row. A single latent of value s and decoder row a D leaves r + A D - s a D. Its encoder is that of one of them, or the
sum of theirs that predicts best what they add; its decoder row is the sum of theirs of least squared error. It is
active on no more rows than the group, so that l0 does not rise.

Legend: g latents of a group, U rows on which one of them or the single latent is active, R rows, O d_out.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.redundancy.held_rows import Array, HeldRows


class Group(NamedTuple):
    """Some latents of a transcoder."""

    latents: list[int]
    W_dec: Tensor
    """[g, O] float32, their decoder rows"""
    threshold: Array
    """[g] above which each is active"""

    @property
    def products(self) -> Array:
        """[g, g] float64, of decoder rows with each other."""
        rows = self.W_dec.double().numpy()
        return rows @ rows.T


class Single(NamedTuple):
    """A latent that stands for a group."""

    encoder: Array
    """[g] weights of the group's encoder columns and biases"""
    bias: float
    """That is added to it."""
    threshold: float
    decoder: Array
    """[g] weights of the group's decoder rows"""
    refitted: bool
    """Whether its encoder is none of the group's."""


class _Part(NamedTuple):
    """The rows that a group decides."""

    values: Array
    """[U, g]"""
    along: Array
    """[U, g] the residual's products with the group's decoder rows"""
    weight: Array
    """[U]"""
    rows: Array
    """[U] rising"""


class Cost(NamedTuple):
    """The best single latent for a group, and what it costs."""

    single: Single
    rise: float
    """Of the squared error on the report rows, at natural frequencies."""
    deviation: float
    """Standard error of that: rows are a sample."""
    freed: float
    """Active latents that are saved there, at natural frequencies."""


def best_single(
    group: Group,
    fit: HeldRows,
    report: HeldRows,
    pre_acts: tuple[Array, Array] | None,
) -> Cost:
    """Choose among single latents by the squared error on `fit`, and measure it on `report`.

    `pre_acts` [R, g] of all rows of both; without them encoders are not refitted.
    """
    products, on_fit = group.products, _part(group, fit)
    found: list[tuple[float, int, Single]] = []
    for single, values in _with_values(group, fit, on_fit, pre_acts[0] if pre_acts else None):
        part = on_fit if values is None else _part(group, fit, np.flatnonzero(values))
        s = part.values @ single.encoder if values is None else values[part.rows]
        fitted = single._replace(decoder=_decoder(part, s, products))
        found.append((float(_rises(part, s, fitted.decoder, products).sum()), len(found), fitted))
    single = min(found)[2]
    if single.refitted and pre_acts:
        values = _active(single, pre_acts[1])
        part = _part(group, report, np.flatnonzero(values))
        s = values[part.rows]
    else:
        part = _part(group, report)
        s = part.values @ single.encoder
    were, are = ((part.values > 0).sum(1) * part.weight).sum(), ((s > 0) * part.weight).sum()
    rises = _rises(part, s, single.decoder, products)
    return Cost(single, float(rises.sum()), float(np.sqrt(rises @ rises)), float(were - are))


def lost_by_one(squares: Array, products: Array) -> Array:  # [C]
    """Return what the best single values and direction lose of pairs' sums, for any encoder, the residual aside.

    `squares` [C, 2, 2] are products of both latents' values summed over rows, `products` [C, 2, 2] of their decoder
    rows: the second largest eigenvalue of one times the other.
    """
    both = squares @ products
    trace = np.trace(both, axis1=1, axis2=2)
    determinant = np.linalg.det(squares) * np.linalg.det(products)
    root = np.sqrt(np.maximum(trace**2 / 4 - determinant, 0))
    return determinant.clip(0) / np.maximum(trace / 2 + root, 1e-300)  # less rounding than the difference


def _with_values(
    group: Group, fit: HeldRows, part: _Part, pre_acts: Array | None
) -> Iterator[tuple[Single, Array | None]]:
    """Yield single latents without a decoder row, and the refitted one's values [R]."""
    nothing = np.zeros(len(group.latents))
    for i, own in enumerate(np.eye(len(group.latents))):
        yield Single(own, 0.0, float(group.threshold[i]), nothing, refitted=False), None
    if pre_acts is not None:
        single = _refitted(group, fit, part, pre_acts)
        yield single, _active(single, pre_acts)


def _refitted(group: Group, fit: HeldRows, part: _Part, pre_acts: Array) -> Single:
    """Fit what the group adds by its pre-activations, on its rows, and choose the threshold by how many rows it has."""
    added = part.values @ group.W_dec.double().norm(dim=1).numpy()
    known = np.column_stack([pre_acts[part.rows].astype(np.float64), np.ones(len(added))])
    root = np.sqrt(part.weight)
    weights = np.linalg.lstsq(known * root[:, None], added * root, rcond=None)[0]
    encoder, bias = weights[:-1], float(weights[-1])
    single = Single(encoder, bias, 0.0, np.zeros(len(encoder)), refitted=True)
    values = _active(single, pre_acts)
    there = np.flatnonzero(values)
    falling = there[np.argsort(-values[there], kind="stable")]
    over = np.flatnonzero(fit.weight[falling].cumsum() > part.weight.sum() * (1 + 1e-9))
    return single._replace(threshold=float(values[falling[over[0]]])) if len(over) else single


def _active(single: Single, pre_acts: Array) -> Array:  # [R] float64
    """Return the values of a single latent on all rows, 0 where it is not active."""
    values = pre_acts @ single.encoder + single.bias
    return np.where(values > single.threshold, values, 0.0)


def _part(group: Group, held: HeldRows, more: Sequence[int] | Array = ()) -> _Part:
    """Return the rows on which a latent of the group is active, and `more`."""
    found = [held.of_latent(latent) for latent in group.latents]
    rows = np.unique(np.concatenate([np.asarray(more, np.int64), *(at for at, _ in found)]))
    values = np.zeros((len(rows), len(found)))
    for i, (at, there) in enumerate(found):
        values[np.searchsorted(rows, at), i] = there
    along = (held.residual[torch.from_numpy(rows)] @ group.W_dec.T).double().numpy()
    return _Part(values, along, held.weight[rows], rows)


def _decoder(part: _Part, s: Array, products: Array) -> Array:  # [g]
    """Return the weights of the decoder rows whose sum, `s` [U] times, is nearest to what is left without the group."""
    weighted = part.weight * s
    wanted = weighted @ part.along + (weighted @ part.values) @ products
    return np.linalg.pinv(products, hermitian=True) @ wanted / max(float(weighted @ s), 1e-300)


def _rises(part: _Part, s: Array, decoder: Array, products: Array) -> Array:  # [U]
    """Return by how much each row's squared error rises when the latent of values `s` [U] stands for the group."""
    less = part.values - np.outer(s, decoder)
    return part.weight * (2 * (part.along * less).sum(1) + ((less @ products) * less).sum(1))
