"""Transcoders in other libraries' formats."""

from typing import Literal

Format = Literal["saelens", "circuit-tracer", "sparsify"]
"""What `train export` writes."""
