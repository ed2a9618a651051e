"""How many bytes a checkpoint takes. No torch here: it is asked before torch is imported."""

_MORE = 2**20
"""What is small, and the files' headers."""


def bytes_at_most(d_in: int, d_out: int, d_sae: int, skip: bool, monitor_state: int) -> int:
    """Return how many bytes one checkpoint takes at most.

    Three float32 numbers per parameter, the counters, the monitor's open sample (`monitor_state` bytes).
    """
    parameters = d_sae * (d_in + d_out + 2) + (d_in * d_out if skip else 0)
    return 12 * parameters + 32 * d_sae + monitor_state + _MORE
