"""Transcoders in other libraries' formats."""

from typing import Literal

Format = Literal["saelens", "circuit-tracer", "sparsify", "hf", "neuronpedia", "delphi"]
"""What `train export` writes."""
