"""What a run takes of a device's memory, and whether its training rows fit there, too."""

import torch

from shared.console.terminal import say
from shared.errors import UserError
from shared.store.reader import RowReader
from shared.store.store import Store
from train.data.resident import ResidentRows
from train.run.settings import RunConfig
from train.run.step_graph import may_be_graph

_PER_PARAMETER = 24
"""Bytes of a parameter: weight, gradient, two moments, and half as much again that a step makes of them."""
_PRE_ACTS = 16
"""Bytes of a row's pre-activation by one latent: itself, and what selecting among them makes."""
_RECONSTRUCTIONS = 24
"""Bytes of a number of a row's reconstruction by one prefix."""
_MARGIN = 0.1
"""Of the device's memory: left free for what is not counted."""


def training_bytes(config: RunConfig) -> int:
    """Return how many bytes of the device a run takes beside resident rows, about: rather too many."""
    settings, shape = config.settings, config.settings.transcoder
    assert isinstance(shape.d_sae, int) and shape.prefixes
    sizes = settings.rows.batch_rows, settings.evaluation.chunk_rows
    rows = sum(sizes) if may_be_graph(settings) else max(sizes)  # a graph holds what its step makes
    parameters = shape.d_sae * (config.d_in + config.d_out + 2) + (config.d_in * config.d_out if shape.skip else 0)
    per_row = _PRE_ACTS * shape.d_sae + _RECONSTRUCTIONS * (len(shape.prefixes) + 1) * (config.d_in + config.d_out)
    return _PER_PARAMETER * parameters + rows * per_row


def keeps_rows(config: RunConfig, store: Store) -> bool:
    """Tell whether training rows are kept on the device, by `resident_rows` and what is free there; says so.

    `auto` keeps them where they fit with a margin and the run reads each at least once: loading reads them all. Raises
    `UserError` where they are to be kept and do not fit.
    """
    settings, device = config.settings, torch.device(config.settings.device)
    if settings.resident_rows == "off" or device.type == "cpu":
        return False
    sides = ("source", "target") if settings.source == "source" else ("target",)
    reader = RowReader(store, config.training_blocks, settings.rows, settings.seed, sides)
    rows, (free, total) = ResidentRows(reader, device), torch.cuda.mem_get_info(device)
    needed = rows.bytes + training_bytes(config) + int(_MARGIN * total)
    sizes = (
        f"{_gb(rows.bytes)} of training rows, about {_gb(training_bytes(config))} of training and a margin of "
        f"{_gb(_MARGIN * total)}; {settings.device} has {_gb(free)} free"
    )
    if settings.resident_rows == "on" and needed > free:
        raise UserError(f"resident_rows = on, and the rows do not fit: {sizes}; use --set resident_rows=auto")
    often = settings.steps * settings.rows.batch_rows >= rows.rows
    kept = needed <= free and (often or settings.resident_rows == "on")
    why = "" if kept or needed > free else "; the run is too short to read each row once"
    say(f"rows are {'kept on' if kept else 'read from the store, not kept on'} {settings.device}: {sizes}{why}")
    return kept


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
