"""Position strata: half-open ranges of positions in a window, and how many of their rows a block keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

QUANTUM = 256
"""A block keeps a multiple of this many rows of a stratum, or fewer than this many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """Positions `start <= position < stop`, counted from the window's first token."""

    start: int
    stop: int
    natural_rows: int
    """Rows per block that the model computed."""
    rows: int
    """Rows per block that are stored: the first `rows` of the keyed permutation of `natural_rows`."""

    @property
    def name(self) -> str:
        """The name of the stratum's group in the store, for example `004-016`."""
        return f"{self.start:03d}-{self.stop:03d}"

    @property
    def width(self) -> int:
        """Positions per window."""
        return self.stop - self.start


def make_strata(
    edges: Sequence[int], keep: Mapping[int, float], context_size: int, block_sequences: int
) -> tuple[Stratum, ...]:
    """The strata of a store. `edges` start with 0 and rise; those at or past `context_size` are left out.

    `keep` maps a stratum's first position to the share of its rows to store; a stratum that is not named keeps all.
    Raises `ValueError` on edges that do not rise from 0, an unknown key of `keep`, or a share outside (0, 1].
    """
    if not edges or edges[0] != 0 or any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"strata edges must start with 0 and rise, got {list(edges)}")
    if unknown := sorted(set(keep) - set(edges)):
        raise ValueError(f"keep names position {unknown[0]}, which starts no stratum; edges are {list(edges)}")
    starts = [edge for edge in edges if edge < context_size]
    strata = []
    for start, stop in pairwise([*starts, context_size]):
        natural = (stop - start) * block_sequences
        strata.append(
            Stratum(start=start, stop=stop, natural_rows=natural, rows=kept_rows(natural, keep.get(start, 1.0)))
        )
    return tuple(strata)


def kept_rows(natural_rows: int, share: float) -> int:
    """`share` of `natural_rows`: at least one row, and rounded down to a multiple of `QUANTUM` from there up."""
    if not 0 < share <= 1:
        raise ValueError(f"the share of a stratum to keep must be above 0 and at most 1, got {share}")
    rows = max(1, round(share * natural_rows))
    return rows if rows < QUANTUM else rows - rows % QUANTUM
