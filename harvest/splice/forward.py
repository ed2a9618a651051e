"""Forward passes of the LLM with something else in place of an MLP's output, and the losses that they leave.

Legend: S windows, T context, V vocabulary, N rows = S * T, D d_in, O d_out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from harvest.llm.model import Model
from harvest.splice.replacements import Replacement, in_parts
from shared.splice_record import TRANSCODER
from shared.store.outliers import Exclusion

CLEAN = "clean"
EVERYWHERE = " everywhere"
"""End of the names of arms that also replace the rows that training leaves out."""
_VALUES = 2**24
"""Logits that are computed in float64 at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splicer:
    """A whole model, its hooks, and what may stand at the target hook."""

    model: Model
    source_hook: str
    target_hook: str
    replacement: Replacement
    mean: Tensor
    """[O]"""
    linear: Callable[[Tensor], Tensor] | None
    """From source rows to target rows; none: not asked for."""
    exclusion: Exclusion | None
    """Rows that training leaves out, where the MLP's own output stays."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Of the predictions of every window's tokens but the first, at the positions before them."""

    ce: dict[str, Tensor]
    """By arm, [S, T - 1] float64, nats; `clean` is the unchanged model."""
    kl: dict[str, Tensor]
    """By arm but `clean`, [S, T - 1] float64, nats."""
    left: int
    """Rows where the MLP's own output stayed."""


@torch.inference_mode()
def losses(splicer: Splicer, ids: Tensor, positions: Tensor) -> Losses:
    """Run windows `ids` [S, T] unchanged, and once per arm; `positions` [S, T] as the model counts them."""
    source, target, clean = _unchanged(splicer, ids, positions)
    kept = left_out(splicer.exclusion, source, target, positions)
    ce, kl = {CLEAN: _cross_entropy(clean, ids)}, {}
    for name, rows in _rows(splicer, source if splicer.replacement.source == "source" else target, source).items():
        for arm, keep in _arms(name, kept, splicer.exclusion):
            put = torch.where(keep.unsqueeze(-1), target, rows.to(target).reshape(target.shape))
            logits = splicer.model.logits(ids, positions, {splicer.target_hook: partial(_put, put)})
            ce[arm], kl[arm] = _cross_entropy(logits, ids), _divergence(clean, logits)
    return Losses(ce, kl, int(kept.sum()))


def _put(rows: Tensor, _own: Tensor) -> Tensor:
    return rows


def _unchanged(splicer: Splicer, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return source [S, T, D], target [S, T, O] and logits [S, T, V] of the model as it is."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def look(values: Tensor) -> Tensor:
            found[name] = values.clone()
            return values

        return look

    logits = splicer.model.logits(
        ids, positions, {name: keep(name) for name in (splicer.source_hook, splicer.target_hook)}
    )
    return found[splicer.source_hook], found[splicer.target_hook], logits


def left_out(exclusion: Exclusion | None, source: Tensor, target: Tensor, positions: Tensor) -> Tensor:
    """Tell which rows training leaves out, of source [..., D] and target [..., O]: bool of the shape of `positions`."""
    left = torch.zeros_like(positions, dtype=torch.bool)
    if exclusion and exclusion.position_0:
        left |= positions == 0
    if exclusion and exclusion.training:
        for rows, limit in ((source, exclusion.source_norm), (target, exclusion.target_norm)):
            if limit is not None:
                left |= torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64) > limit
    return left


def _rows(splicer: Splicer, x: Tensor, source: Tensor) -> Mapping[str, Tensor]:
    """Return the target rows [N, O] of every arm."""
    found = in_parts(splicer.replacement.predict, x.flatten(0, 1).float())
    whole = found[TRANSCODER]
    found |= {"zero": torch.zeros_like(whole), "mean": splicer.mean.to(whole).expand_as(whole)}
    if splicer.linear:
        found["linear"] = splicer.linear(source.flatten(0, 1).float())
    return found


def _arms(name: str, kept: Tensor, exclusion: Exclusion | None) -> list[tuple[str, Tensor]]:
    """List the names of a kind of rows' arms, and the rows [S, T] where the MLP's own output stays in each."""
    arms = [(name, kept)]
    if name in (TRANSCODER, "zero") and exclusion and (exclusion.position_0 or exclusion.training):
        arms.append((name + EVERYWHERE, torch.zeros_like(kept)))
    return arms


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the loss of each next token, [S, T - 1] float64."""
    given, wanted = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    parts = zip(given.split(_at_once(logits)), wanted.split(_at_once(logits)), strict=True)
    found = [torch.nn.functional.cross_entropy(part.double(), token, reduction="none") for part, token in parts]
    return torch.cat(found).reshape(len(ids), -1)


def _divergence(clean: Tensor, logits: Tensor) -> Tensor:
    """Return KL(clean || changed) of each next token's distribution, [S, T - 1] float64."""
    size = _at_once(logits)
    pairs = zip(clean[:, :-1].flatten(0, 1).split(size), logits[:, :-1].flatten(0, 1).split(size), strict=True)
    found = []
    for before, after in pairs:
        p, q = before.double().log_softmax(1), after.double().log_softmax(1)
        found.append((p.exp() * (p - q)).sum(1))
    return torch.cat(found).reshape(len(logits), -1)


def _at_once(logits: Tensor) -> int:
    return max(1, _VALUES // logits.shape[-1])
