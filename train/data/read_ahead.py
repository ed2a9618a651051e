"""Neighbouring rows of a store on their way to a device: read ahead, and checked there without a wait for each part."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.errors import CorruptData
from shared.store.mapped_array import RowArray
from shared.store.store import Store
from train.data.staging import Stage, staging, to_float

_STAGES = 3
_OBJECT_CHUNKS = 32
"""Chunks whose rows object storage is asked for at once."""
_NEVER = 2**62
"""No part."""


class Extent(NamedTuple):
    """Rows `low:high` of a stratum."""

    stratum: str
    low: int
    high: int


def read_ahead(
    store: Store, sides: Sequence[str], extents: Sequence[Extent], device: torch.device
) -> Iterator[list[Tensor]]:
    """Yield the rows of each of `extents` on the device, float32 [n, d] of each side.

    For CUDA, threads read the next ones into pinned memory meanwhile. Raises what reading them raises.
    """
    if not extents:
        return
    first = store.strata[extents[0].stratum]
    most = max(high - low for _, low, high in extents)
    ahead = _STAGES if device.type == "cuda" else 1
    stages = [Stage([staging(most, getattr(first, side), device) for side in sides], device) for _ in range(ahead)]

    def fill(number: int) -> Stage:
        for later in extents[number : number + _OBJECT_CHUNKS] if store.objects else ():
            for side in sides:
                getattr(store.strata[later.stratum], side).will_need([(later.low, later.high)])
        stage, (stratum, low, high) = stages[number % ahead], extents[number]
        after = extents[number + 1] if number + 1 < len(extents) and extents[number + 1].stratum == stratum else None
        for side, rows in zip(sides, stage.to_fill(), strict=True):
            array: RowArray = getattr(store.strata[stratum], side)
            if not store.objects:  # which were asked for these very rows already
                array.will_need([(low, after.high if after else high)])
            array.read(low, high, rows)
        return stage

    for extent, stage in zip(extents, _filled(fill, len(extents), ahead), strict=True):
        rows = stage.on_device(extent.high - extent.low)
        yield [to_float(side, device) for side in rows]


def _filled(fill: Callable[[int], Stage], count: int, ahead: int) -> Iterator[Stage]:
    """Yield what `fill` returns for 0, 1, ... in order; with several stages `ahead`, threads fill the next ones."""
    if ahead == 1:
        yield from map(fill, range(count))
        return
    with ThreadPoolExecutor(min(ahead, os.cpu_count() or 1), thread_name_prefix="chunks") as pool:
        filling = deque(pool.submit(fill, number) for number in range(min(ahead, count)))
        for number in range(count):
            yield filling.popleft().result()
            if number + ahead < count:  # its place was used up when this one was asked for
                filling.append(pool.submit(fill, number + ahead))


class RowChecks:
    """Looks for rows that the store's statistics rule out, as `Store.check_norms`.

    On CPU such a row is an error at once; on CUDA, which is not waited for, when `settle` is called.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._seen = store, list[tuple[Extent, str]]()
        self._first_bad = torch.full((), _NEVER, device=device)

    def add(self, extent: Extent, side: str, rows: Tensor) -> None:
        """Look at the stored `rows` [n, d] of an extent. Raises `CorruptData`, on CPU."""
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        if norms.device.type == "cpu":
            self._store.check_norms(extent.stratum, side, np.arange(extent.low, extent.high), norms.numpy())
            return
        good = (norms <= self._longest(extent, side, norms.device)).all()  # false for a NaN
        self._first_bad = torch.where(good, self._first_bad, self._first_bad.clamp_max(len(self._seen)))
        self._seen.append((extent, side))

    def settle(self) -> None:
        """Raise `CorruptData` where a row was bad. Waits for the device."""
        number = int(self._first_bad)
        if number == _NEVER:
            return
        extent, side = self._seen[number]
        cpu = torch.device("cpu")
        for rows in read_ahead(self._store, [side], [extent], cpu):
            RowChecks(self._store, cpu).add(extent, side, rows[0])
        raise CorruptData(
            f"rows {extent.low}:{extent.high} of {extent.stratum}/{side} of {self._store.path} were damaged on the "
            "device, and are sound in the store; run the command again, and test the device's memory if it recurs"
        )

    def _longest(self, extent: Extent, side: str, device: torch.device) -> Tensor:
        """Return the norm that no row of an extent is above, [n] float64, without a copy from the host."""
        stratum, low, high = extent
        rows, parts = self._store.strata[stratum].stratum.rows, []
        for block in range(low // rows, -(-high // rows)):
            count = min(high, (block + 1) * rows) - max(low, block * rows)
            longest = self._store.longest_norm(block, stratum, side)
            parts.append(torch.full((count,), longest, dtype=torch.float64, device=device))
        return torch.cat(parts)
