"""What a report shows of how latents stand to each other: the map of directions, and trees of refinements.

Legend: F latents.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from shared.store.store import Store
from train.report.latents import MAP_SHARE
from train.report.report_record import Branch, LatentMap, Refined, Refinements
from train.samples.token_text import pieces

_TREES, _CHILDREN, _DEPTH, _PEAKS = 12, 8, 3, 4
"""Trees that are shown, most children of each latent, levels below the first, and tokens that each is known by."""


def latent_map(table: pa.Table) -> LatentMap:
    """Return where every active latent lies on the map, and the root of the tree that it is in."""
    there = table["map_x"].is_valid().to_numpy()
    parents = [-1 if parent is None else parent for parent in table["refines"].to_pylist()]
    latents = np.flatnonzero(there)

    def places(name: str) -> list[float]:
        return [round(value, 4) for value in table[name].to_numpy(zero_copy_only=False)[there].tolist()]

    return LatentMap(
        share=float((table.schema.metadata or {}).get(MAP_SHARE, 0)),
        latents=latents.tolist(),
        x=places("map_x"),
        y=places("map_y"),
        density=[float(f"{value:.3g}") for value in table["density"].to_numpy()[there].tolist()],
        prefix=table["prefix"].to_numpy()[there].tolist(),
        root=[_root(f, parents) for f in latents.tolist()],
    )


def _root(latent: int, parents: Sequence[int]) -> int:
    """Return the first latent of the line of parents; each is of an earlier group, so it ends."""
    while parents[latent] >= 0:
        latent = parents[latent]
    return latent


def refinements(table: pa.Table, store: Store) -> Refinements:
    """Return how many latents of each group refine an earlier one, and the largest trees."""
    children: dict[int, list[int]] = defaultdict(list)
    parents, prefixes = table["refines"].to_pylist(), table["prefix"].to_numpy()
    live = table["max"].is_valid().to_numpy()
    for f, parent in enumerate(parents):
        if parent is not None:
            children[parent].append(f)
    sizes = {f: _descendants(f, children) for f in children if parents[f] is None}
    roots = sorted(sizes, key=lambda f: (-sizes[f], f))[:_TREES]
    trees = _Trees(table, children)
    branches = [trees.branch(f, _DEPTH) for f in roots]
    refining = np.array([parent is not None for parent in parents])
    groups = [
        Refined(prefix=int(size), live=int((live & of).sum()), refining=int((refining & of).sum()))
        for size in np.unique(prefixes)
        for of in [prefixes == size]
    ]
    return Refinements(groups=groups, trees=_with_text(branches, store))


def _descendants(latent: int, children: dict[int, list[int]]) -> int:
    return sum(1 + _descendants(one, children) for one in children.get(latent, []))


class _Trees:
    """Makes branches of a table's latents; their tokens are numbers still."""

    def __init__(self, table: pa.Table, children: dict[int, list[int]]) -> None:
        names = ("density", "refines_share", "label", "peaks")
        self._columns: dict[str, list[Any]] = {name: table[name].to_pylist() for name in names}
        self._children = children

    def branch(self, latent: int, depth: int) -> Branch:
        """Return a latent with its most frequent children."""
        of = {name: column[latent] for name, column in self._columns.items()}
        below = sorted(self._children.get(latent, []), key=lambda f: -self._columns["density"][f])
        shown = below[:_CHILDREN] if depth else []
        return Branch(
            latent=latent,
            density=of["density"],
            share=of["refines_share"],
            label=of["label"] or "",
            peaks=[str(token) for token in of["peaks"][:_PEAKS]],
            children=[self.branch(f, depth - 1) for f in shown],
            more=len(below) - len(shown),
        )


def _with_text(branches: Sequence[Branch], store: Store) -> list[Branch]:
    """Return branches with the text of their tokens; without a tokenizer, numbers as `#17`."""
    tokens = sorted({int(token) for one in branches for token in _tokens(one)})
    file = store.tokenizer / "tokenizer.json"
    texts = pieces(file, tokens) if file.is_file() and tokens else [f"#{token}" for token in tokens]
    known = dict(zip(tokens, texts, strict=True))

    def told(branch: Branch) -> Branch:
        peaks = [known[int(token)] for token in branch.peaks]
        return branch.model_copy(update={"peaks": peaks, "children": [told(one) for one in branch.children]})

    return [told(one) for one in branches]


def _tokens(branch: Branch) -> list[str]:
    return branch.peaks + [token for one in branch.children for token in _tokens(one)]
