"""Blocks of random windows, for tests of what a harvest captures."""

import numpy as np

from harvest.text.packing import Windows
from harvest.writer.blocks import BlockLayout

CONTEXT = 16


def windows(sequences: int) -> Windows:
    """Return so many windows of 16 random tokens, of one document each."""
    tokens = np.random.default_rng(0).integers(4, 300, (sequences, CONTEXT), dtype=np.int32)
    return Windows(tokens, np.zeros_like(tokens))


def shuffled(sequences: int) -> BlockLayout:
    """Return all rows of so many windows, in some order."""
    rows = np.random.default_rng(1).permutation(sequences * CONTEXT)
    positions = np.broadcast_to(np.arange(CONTEXT), (sequences, CONTEXT))
    return BlockLayout(rows=rows, places={}, positions=positions, order=np.argsort(rows))
