"""Position strata: half-open ranges of positions in a document or window, and how many of their rows a block keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

QUANTUM = 256
"""A block keeps a multiple of this many rows of a stratum, or fewer than this many."""
POSITION_0 = "000-001"
"""The name of the stratum of position 0 alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """Positions `start <= position < stop`, as the model counts them."""

    start: int
    stop: int
    rows: int
    """Rows per block that are stored."""
    natural_rows: float
    """Rows per training block that stored rows stand for, on average: those computed, less those excluded."""

    @property
    def name(self) -> str:
        """The name of the stratum's group in the store, for example `004-016`."""
        return stratum_name(self.start, self.stop)

    @property
    def is_position_0(self) -> bool:
        """Whether it is position 0 alone."""
        return (self.start, self.stop) == (0, 1)


def stratum_name(start: int, stop: int) -> str:
    """Return the name of the group of positions `start` to `stop`."""
    return f"{start:03d}-{stop:03d}"


def positions(name: str) -> str:
    """Return the positions of the stratum that is called so, as people count them: `4-15` for `004-016`."""
    start, stop = map(int, name.split("-"))
    return str(start) if stop - start == 1 else f"{start}-{stop - 1}"


def stratum_ranges(edges: Sequence[int], context_size: int) -> list[tuple[int, int]]:
    """Return the strata's (start, stop).

    `edges` start with 0 and rise; those at or past `context_size` are left out.
    Raises `ValueError` on edges that do not.
    """
    if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"strata edges must start with 0 and rise, got {list(edges)}")
    return list(pairwise([*(edge for edge in edges if edge < context_size), context_size]))


def quota(candidates: int, share: float, cap: int | None) -> int:
    """Return how many rows of a stratum every block stores, when each has at least `candidates` to choose from.

    It is 0 where there are no candidates. Else it is `share` of them and at most `cap`: at least one row, and rounded
    down to a multiple of `QUANTUM` from there up.
    """
    if not candidates:
        return 0
    rows = max(1, round(share * candidates))
    rows = rows if cap is None else min(rows, cap)
    return rows if rows < QUANTUM else rows - rows % QUANTUM


def check_strata(edges: Sequence[int], keep: Mapping[int, float], cap: Mapping[int, int], context_size: int) -> None:
    """Raise `ValueError` on edges, shares or caps that cannot be."""
    stratum_ranges(edges, context_size)
    for name, given in (("keep", keep), ("cap", cap)):
        if unknown := sorted(set(given) - set(edges)):
            raise ValueError(f"{name} names position {unknown[0]}, which starts no stratum; edges are {list(edges)}")
    if wrong := [share for share in keep.values() if not 0 < share <= 1]:
        raise ValueError(f"the share of a stratum to keep must be above 0 and at most 1, got {wrong[0]}")
    if few := [rows for rows in cap.values() if rows < 1]:
        raise ValueError(f"the most rows of a stratum to keep in a block must be at least 1, got {few[0]}")
