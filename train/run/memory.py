"""What a run takes of a device's memory, and whether its training rows fit there, too."""

import torch

from shared.console.terminal import say
from shared.errors import UserError
from shared.store.reader import RowReader
from shared.store.store import Store
from train.data.resident import ResidentRows
from train.evaluation.evaluated_blocks import calibration_blocks
from train.run.settings import RunConfig, checkpoint_bytes
from train.run.step_graph import may_be_graph
from train.samples.encode import MOST_PAIRS

_PER_PARAMETER = 24
"""Bytes of a parameter: weight, gradient, two moments, and half as much again that a step makes of them."""
_PRE_ACTS = 16
"""Bytes of a row's pre-activation by one latent: itself, and what selecting among them makes."""
_RECONSTRUCTIONS = 24
"""Bytes of a number of a row's reconstruction by one prefix."""
_THREAD = 16 * 2**20
"""Bytes of a run that is trained beside others, for all that is not counted."""
_PER_CALIBRATED = 160
"""Bytes of an active latent on a calibration row: 40 each for four times as many values that may be the threshold."""
_PER_REPORTED = 120
"""Bytes of an active latent on a report row: pairs of 20 bytes, their copies without position 0, and products."""
_PER_SAMPLED = 24
"""Bytes of an active latent on a row that samples are taken from, once by row and once by latent."""
_UNKNOWN_L0 = 256
"""Active latents per row that are counted on where no setting says how many there will be."""
_MARGIN = 0.1
"""Of the device's memory: left free for what is not counted."""


def training_bytes(config: RunConfig) -> int:
    """Return how many bytes of the device a run takes beside resident rows, about: rather too many."""
    settings = config.settings
    sizes = settings.rows.batch_rows, settings.evaluation.chunk_rows
    rows = sum(sizes) if may_be_graph(settings) else max(sizes)  # a graph holds what its step makes
    return _of_parameters(config) + rows * _of_a_row(config)


def standing_bytes(config: RunConfig) -> int:
    """Return how many bytes a run on CPU holds from step to step, about."""
    settings = config.settings
    d_sae = config.settings.transcoder.d_sae
    assert isinstance(d_sae, int)
    sample = settings.monitor.state_bytes(settings.rows.batch_rows, settings.activation.most_active(d_sae), d_sae)
    return _of_parameters(config) + sample + _THREAD


def passing_bytes(config: RunConfig, store: Store) -> int:
    """Return how many bytes a run on CPU takes for a while beside those: in a step, an evaluation, or at its end.

    With a checkpoint that is being written.
    """
    settings, record = config.settings, store.record
    d_sae, stored = settings.transcoder.d_sae, sum(part.rows for part in record.plan.stored_strata)
    assert isinstance(d_sae, int)
    expected = settings.activation.expected_l0 or min(_UNKNOWN_L0, d_sae)
    to_report, to_calibrate = (stored * len(found) for found in (record.report_blocks, calibration_blocks(record)))
    parts = (
        _PER_CALIBRATED * to_calibrate * expected,
        _PER_REPORTED * to_report * expected if settings.monitor.every else 0,
        min(settings.samples.rows * expected, MOST_PAIRS) * _PER_SAMPLED,
    )
    step = max(settings.rows.batch_rows, settings.evaluation.chunk_rows) * _of_a_row(config)
    return int(step + max(parts) + checkpoint_bytes(settings, config.d_in, config.d_out))


def _of_parameters(config: RunConfig) -> int:
    shape = config.settings.transcoder
    assert isinstance(shape.d_sae, int)
    skip = config.d_in * config.d_out if shape.skip else 0
    return _PER_PARAMETER * (shape.d_sae * (config.d_in + config.d_out + 2) + skip)


def _of_a_row(config: RunConfig) -> int:
    shape = config.settings.transcoder
    assert isinstance(shape.d_sae, int) and shape.prefixes
    return _PRE_ACTS * shape.d_sae + _RECONSTRUCTIONS * (len(shape.prefixes) + 1) * (config.d_in + config.d_out)


def keeps_rows(config: RunConfig, store: Store, runs: int = 1) -> bool:
    """Tell whether training rows are kept on the device, by `resident_rows` and what is free there; says so.

    `runs`: that are trained side by side on these rows, each about as large as this one. `auto` keeps rows where they
    fit with a margin and the run reads each at least once: loading reads them all. Raises `UserError` where they are to
    be kept and do not fit.
    """
    settings, device = config.settings, torch.device(config.settings.device)
    if settings.resident_rows == "off" or device.type == "cpu":
        return False
    sides = ("source", "target") if settings.source == "source" else ("target",)
    reader = RowReader(store, config.training_blocks, settings.rows, settings.seed, sides)
    rows, (free, total) = ResidentRows(reader, device), torch.cuda.mem_get_info(device)
    training = runs * training_bytes(config)
    needed = rows.bytes + training + int(_MARGIN * total)
    sizes = (
        f"{_gb(rows.bytes)} of training rows, about {_gb(training)} of training and a margin of "
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
