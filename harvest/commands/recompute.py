"""Stored rows beside those that the model gives now."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from harvest.commands.repair import own_model
from harvest.llm.model import load_model
from harvest.run.capture import Capture, open_capture
from harvest.run.ranks import Ranks
from harvest.text.packing import Windows, model_positions
from shared.console.progress import Progress
from shared.keyed import hash_integers
from shared.store.checks import read_ledger
from shared.store.mapped_array import RowArray
from shared.store.row_arrays import SIDES, captured_as
from shared.store.statistics import decode
from shared.store.store import Local, Store

ROUNDING = 0.02
"""The relative difference of a row that rounding explains: five units in the last place of bfloat16."""


Rows = dict[tuple[str, int], NDArray[Any]]
"""Rows of one array by stratum and number."""


class Place(NamedTuple):
    """A stored row."""

    stratum: str
    row: int
    sequence: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows of a store beside the model's own."""

    rows: int
    equal: int
    """Rows whose source and target are equal bit for bit."""
    largest: float
    """The largest relative difference of a row, |stored - recomputed| / |recomputed|."""
    wrong: tuple[str, ...]
    """Rows that differ by more than `ROUNDING`."""

    def text(self) -> str:
        """Return one line, and one more for each row that is wrong."""
        line = f"{self.rows:,} rows recomputed: {self.equal:,} equal bit for bit, largest difference {self.largest:.2g}"
        return "\n".join([line, *self.wrong])


def against_model(path: Path, count: int, model: str | None, seed: int, local: Local | None) -> Comparison:
    """Recompute `count` random rows of the store at `path`, in passes of the shape that they were made with.

    `path` is a folder or an address of objects; `local` as `Store.open` takes it.
    Software and processor of another kind may round differently; more than that is an error in the store.
    """
    store = Store.open(path, local)
    request, files = store.request, own_model(store.request, model)
    batch = read_ledger(store.path, 0).batch_sequences
    by_pass: dict[int, list[Place]] = defaultdict(list)
    places = random_places(store, count, seed)
    stored = {side: _rows(store, places, side) for side in SIDES}
    for place in places:
        block, sequence = divmod(place.sequence, request.block_sequences)
        by_pass[block * request.block_sequences + sequence // batch * batch].append(place)
    hooks, identity = [request.source_hook, request.target_hook], request.model
    network = load_model(files.folder, identity.dtype, identity.device, hooks, attention=identity.attention)
    differences: dict[Place, float] = {}
    captured = captured_as(request.storage)
    with (
        open_capture(network, Ranks().cores, request.model.device, captured, request.documents) as capture,
        Progress("recompute", len(by_pass), "passes") as bar,
    ):
        for done, (first, places) in enumerate(sorted(by_pass.items()), 1):
            differences |= _compare(store, capture, _windows(store, first, batch), first, places, stored)
            bar.update(done)
    wrong = tuple(
        f"strata/{p.stratum} row {p.row} (sequence {p.sequence}, offset {p.offset}): differs by {value:.2g}"
        for p, value in differences.items()
        if not value <= ROUNDING
    )
    values = list(differences.values())
    return Comparison(rows=len(values), equal=values.count(0.0), largest=max(values), wrong=wrong)


def random_places(store: Store, count: int, seed: int) -> list[Place]:
    """Choose `count` different rows of the store, or all of them; every row is as likely."""
    strata = list(store.strata.values())
    edges = np.cumsum([0, *(s.source.rows for s in strata)])
    order = hash_integers(np.arange(8 * count), "rows to recompute", seed) % np.uint64(edges[-1])
    chosen = np.arange(edges[-1]) if count >= edges[-1] else np.array(list(dict.fromkeys(order.tolist()))[:count])
    numbers = chosen.astype(np.int64)
    at = np.searchsorted(edges, numbers, side="right") - 1
    rows = [(strata[i].stratum.name, row) for i, row in zip(at.tolist(), (numbers - edges[at]).tolist(), strict=True)]
    sequences, offsets = _rows(store, rows, "sequence"), _rows(store, rows, "offset")
    return [Place(*at, int(sequences[at]), int(offsets[at])) for at in rows]


def _rows(store: Store, places: Sequence[tuple[Any, ...]], name: str) -> Rows:
    """Read the rows of places from an array of their strata, together: one by one takes minutes in object storage."""
    by_stratum: dict[str, list[int]] = defaultdict(list)
    for stratum, row, *_ in places:
        by_stratum[stratum].append(row)
    found: Rows = {}
    for stratum, rows in by_stratum.items():
        array: RowArray = getattr(store.strata[stratum], name)
        out = array.room(len(rows))
        array.gather([(row, row + 1) for row in sorted(rows)], out)
        found |= {(stratum, row): values for row, values in zip(sorted(rows), out, strict=True)}
    return found


def _windows(store: Store, first: int, batch: int) -> Windows:
    """Return the windows of the pass that starts with sequence `first`; a block's last pass may be shorter."""
    size = store.request.block_sequences
    stop = min(first + batch, (first // size + 1) * size)
    found = []
    for array in (store.tokens, store.documents):
        found.append(array.room(stop - first))
        array.read(first, stop, found[-1])
    return Windows(*found)


def _compare(
    store: Store, capture: Capture, windows: Windows, first: int, places: list[Place], stored: dict[str, Rows]
) -> dict[Place, float]:
    request = store.request
    found = capture.rows(windows, model_positions(windows, request.documents))
    differences = {}
    for place in places:
        row = (place.sequence - first) * request.context_size + place.offset
        rows = store.strata[place.stratum]
        differences[place] = max(
            _difference(stored[side][place[:2]], array.as_stored(place.row, found[hook][row]))
            for side, array, hook in (
                ("source", rows.source, request.source_hook),
                ("target", rows.target, request.target_hook),
            )
        )
    return differences


def _difference(stored: NDArray[Any], recomputed: NDArray[Any]) -> float:
    """Return 0 when equal bit for bit, else the relative difference, above 0."""
    if stored.tobytes() == recomputed.tobytes():
        return 0.0
    theirs, ours = (decode(rows).astype(np.float64) for rows in (stored, recomputed))
    return max(float(np.linalg.norm(theirs - ours)) / max(float(np.linalg.norm(ours)), 1e-30), 1e-30)
