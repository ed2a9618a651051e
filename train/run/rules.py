"""How the settings of a run go together, and with its store: the rules that need no torch.

The command line asks them before it imports torch, which takes seconds, and `train.run.settings.resolve` once the
device is known. Settings are tables within each other, with all defaults.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.check_settings import Unfit
from shared.config import Changes
from shared.errors import UserError
from shared.store.layout import StoreRecord
from shared.store.reader import RowsConfig, rows_per_stratum, training_strata
from shared.store.store import Store
from train.duplicates.monitor_limits import state_bytes
from train.evaluation.evaluated_blocks import evaluated_rows
from train.model.schedule import warmup_steps
from train.model.sizes import check_decoder_norm, check_k, check_prefixes, k_at_start, multiple, source_width
from train.parallel.required import mine, required
from train.read_settings import read_settings, settings_with_defaults
from train.run.cadences import Cadences, merge_steps, resolved
from train.run.checkpoint_bytes import bytes_at_most
from train.run.device_rules import check_on_device

Tables = Mapping[str, Any]
_GOALS = {"max_share_above_0_7": ("orthogonality", "mined"), "max_pairs_above_0_8": ("co_activation",)}
"""Goals of the controller, and the terms whose weights it moves toward them."""
NEED_UNIT_DECODER = ("relu",)
"""Kinds of activation whose class says `needs_unit_decoder`."""
_FEW_STEPS = 10
"""From so many on, two merges of the preset `tiny` are after steps of their own."""
_OF_K = ("k", "k_start", "k_warmup_steps", "k_warmup_share")


def read_and_check(preset: str, changes: Changes, file: Path | None, store: Store) -> None:
    """Read the settings of a run on `store` as `read_settings` does, and check how they go together and with it.

    Raises `UserError` that names the setting, and `Unfit` where several do not go together.
    """
    check_before_torch(settings_with_defaults(read_settings(preset, changes, file)), store)


def check_before_torch(settings: Tables, store: Store) -> None:
    """Check `settings` for a run on `store` where only torch could tell which device `auto` is.

    Raises `Unfit` on what is wrong on every device, with both reasons where they differ in more than numbers; what is
    wrong on one kind alone is left to `check_run`.
    """
    device = settings["device"]
    check_device_name(device)
    d_sae = _check_on_any_device(settings, store)
    errors = [_wrong_on(one, settings, store, d_sae) for one in (("cpu", "cuda") if device == "auto" else (device,))]
    if not (on_cpu := errors[0]) or not (on_cuda := errors[-1]):
        return
    if len({re.sub(r"[0-9,]+", "0", str(one)) for one in (on_cpu, on_cuda)}) == 1:
        raise on_cpu
    raise Unfit(f"on the CPU: {on_cpu}; on CUDA: {on_cuda}", *dict.fromkeys([*on_cpu.names, *on_cuda.names]))


def check_run(settings: Tables, store: Store, device: str) -> None:
    """Check `settings` for a run on `store` and a `device` that is there. Raises `Unfit` at the first broken rule."""
    d_sae = _check_on_any_device(settings, store)
    if error := _wrong_on(device, settings, store, d_sae):
        raise error


def _check_on_any_device(settings: Tables, store: Store) -> int:
    """Return d_sae. Raises `Unfit`."""
    check_warmups(settings)
    d_sae = check_shape(settings, source_width(store.record, settings["source"]))
    if settings["source"] == "target" and settings["transcoder"]["skip"]:
        raise Unfit(
            "transcoder.skip is on and source = target: a linear map from the targets to themselves copies them, and "
            "nothing is left for the latents; use --set transcoder.skip=false",
            "transcoder.skip",
            "source",
        )
    _check_rows(settings, store)
    _check_goals(settings["diversity"])
    _check_merges(settings["diversity"]["merge"]["at"], settings["steps"])
    mine(settings["parallel"]["shards"], 0, int(os.environ.get("WORLD_SIZE", 1)))
    return d_sae


def _wrong_on(device: str, settings: Tables, store: Store, d_sae: int) -> Unfit | None:
    """Return what is wrong with settings on a kind of device; none where nothing is."""
    d_in = source_width(store.record, settings["source"])
    every, delay = resolved(settings, device, d_in, d_sae, evaluated_rows(store.record))
    try:
        fixed = required(settings["parallel"]["shards"], settings, settings["activation"]["kind"], d_sae, device)
        check_on_device({**settings, **fixed}, device)
        _check_size(settings, store.record, d_sae, every.monitor, delay)
        _check_kept(settings, every)
        _check_reports(settings, every.monitor, delay)
    except Unfit as error:
        return error
    return None


def check_device_name(wanted: str) -> None:
    """Raise `Unfit` on what is no device."""
    if wanted != "auto" and not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", wanted):
        raise Unfit(f"device must be auto, cpu, cuda, or cuda:NUMBER, got {wanted}", "device")


def check_warmups(settings: Tables) -> None:
    """Raise `Unfit` when a warm-up is as long as the run, or leads from nothing."""
    steps, activation, optimizer = settings["steps"], settings["activation"], settings["optimizer"]
    if "k" in activation:
        _k_at_start(settings)
    else:
        given = activation["penalty_warmup_steps"], activation["penalty_warmup_share"]
        warmup_steps("activation.penalty_warmup", *given, steps)
    warmup_steps("optimizer.warmup", optimizer["warmup_steps"], optimizer["warmup_share"], steps)


def check_shape(settings: Tables, d_in: int) -> int:
    """Return d_sae. Raises `Unfit` when it is no number, or prefixes or k do not go with it."""
    shape, activation = settings["transcoder"], settings["activation"]
    d_sae = multiple("transcoder.d_sae", shape["d_sae"], d_in, "8x")
    if shape["prefixes"] is not None:
        check_prefixes(shape["prefixes"], d_sae)
    kind = activation["kind"]
    check_decoder_norm(shape["decoder_norm"], kind, needs_unit=kind in NEED_UNIT_DECODER)
    if "k" in activation:
        check_k(activation["k"], _k_at_start(settings), d_sae)
    return d_sae


def _k_at_start(settings: Tables) -> int | None:
    return k_at_start(**{name: settings["activation"][name] for name in _OF_K}, steps=settings["steps"])[0]


def _check_size(settings: Tables, store: StoreRecord, d_sae: int, every: int, delay: int) -> None:
    """Raise `Unfit` when not even one checkpoint may be kept. `every`, `delay`: of the monitor."""
    bound, activation, per_row = settings["checkpoint"]["max_bytes"], settings["activation"], d_sae
    if "k" in activation:
        per_row = max(activation["k"], _k_at_start(settings) or 0)
    state = state_bytes(every, delay, settings["monitor"]["rows"], settings["rows"]["batch_rows"], per_row, d_sae)
    widths = source_width(store, settings["source"]), store.d_out
    size = bytes_at_most(*widths, d_sae, settings["transcoder"]["skip"], state)
    if bound and bound < size:
        said = f"checkpoint.max_bytes = {bound:,} is less than one checkpoint, about {size:,} bytes"
        raise Unfit(f"{said}; raise it, or set it to 0 for no bound", "checkpoint.max_bytes", "transcoder.d_sae")


def _check_rows(settings: Tables, store: Store) -> None:
    """Raise `Unfit` when the store does not have the rows that are asked for."""
    if not store.record.report_blocks:
        raise UserError(
            f"{store.path} holds no held-out blocks to evaluate on; harvest with store.held_out_blocks >= 2"
        )
    rows = RowsConfig.model_validate(settings["rows"])
    blocks = rows.training_blocks(store)
    there = len(blocks) * sum(s.rows for s in store.record.plan.stored_strata)
    if rows.batch_rows > there:
        raise Unfit(
            f"rows.batch_rows = {rows.batch_rows:,} is more than the store's {there:,} training rows; lower it",
            "rows.batch_rows",
            "rows.blocks",
        )
    view = store.excluding(rows.exclusion(store, figures=True))  # of training, where figures make no difference
    strata = training_strata(view, blocks)
    counts = rows_per_stratum(strata, rows)
    at_0 = [n for s, n in zip(strata, counts, strict=True) if s.is_position_0]
    if settings["diversity"]["position"]["weight"] and not any(at_0):
        raise Unfit(
            "diversity.position needs rows of position 0, and a batch has none: the store keeps none, training leaves "
            "them out (rows.position_0 = train takes them in), or "
            f"rows.max_position_0_batch_share = {rows.max_position_0_batch_share:.4g} of "
            f"{rows.batch_rows} rows is less than one",
            "diversity.position.weight",
            "rows.position_0",
            "rows.max_position_0_batch_share",
            "rows.batch_rows",
        )


def _check_goals(diversity: Tables) -> None:
    """Raise `Unfit` when the controller has a goal and no weight to move toward it."""
    for name, terms in _GOALS.items():
        if diversity["controller"][name] is not None and not any(diversity[term]["weight"] for term in terms):
            weights = [f"diversity.{term}.weight" for term in terms]
            raise Unfit(
                f"diversity.controller.{name} has no weight to move: set {' or '.join(weights)} above 0",
                f"diversity.controller.{name}",
                *weights,
            )


def _check_merges(at: Sequence[float], steps: int) -> None:
    """Raise `Unfit` when two merges are after one step, or one is after the last: its new latents would not be trained.

    A run of a few steps, which only tries things out, may have them.
    """
    found = merge_steps(at, steps)
    if steps >= _FEW_STEPS and found and (len({*found}) < len(found) or max(found) >= steps):
        after = f"step{'s' * (len(found) > 1)} " + " and ".join(f"{step:,}" for step in sorted(found))
        raise Unfit(
            f"diversity.merge.at = {list(at)} merges after {after} of {steps:,}; each merge needs a step of its own, "
            "before the last one; raise steps, choose other shares, or use --set diversity.merge.at=[]",
            "diversity.merge.at",
            "steps",
        )


def _check_kept(settings: Tables, every: Cadences) -> None:
    """Raise `Unfit` when a rule that keeps checkpoints could never keep one."""
    steps, saving = settings["steps"], settings["checkpoint"]
    for name, cadence in (("keep_every", saving["keep_every"]), ("keep_best", every.evaluation)):
        first = math.lcm(every.checkpoint, cadence) if cadence else steps
        if saving[name] and first >= steps:
            of_best = name == "keep_best"
            evaluated = f"evaluation.every = {every.evaluation}, " if of_best else ""
            raise Unfit(
                f"checkpoint.{name} = {saving[name]} would keep none but the last: checkpoint.every = "
                f"{every.checkpoint}, {evaluated}steps = {steps}; make the cadences meet earlier",
                f"checkpoint.{name}",
                "checkpoint.every",
                "steps",
                *(["evaluation.every"] if of_best else []),
            )


def _check_reports(settings: Tables, every: int, delay: int) -> None:
    """Raise `Unfit` when what acts on the monitor's reports would get none, or one that could list no pair."""
    steps, monitor, diversity = settings["steps"], settings["monitor"], settings["diversity"]
    goals = [name for name in _GOALS if diversity["controller"][name] is not None]
    complete = every and every + delay
    if (diversity["co_activation"]["weight"] or goals) and not 0 < complete < max(steps, 2):
        name = "controller acts" if goals else "co_activation takes its pairs"
        late = f", monitor.delay = {delay}" if delay else ""
        off = "" if goals else ", or diversity.co_activation.weight = 0"
        raise Unfit(
            f"diversity.{name} after the monitor's reports, and none would come before the last step: monitor.every = "
            f"{every}, steps = {steps}{late}; set monitor.every above 0 and below steps{off}",
            "monitor.every",
            "monitor.delay",
            "steps",
            *(f"diversity.controller.{name}" for name in goals),
            *([] if goals else ["diversity.co_activation.weight"]),
        )
    if delay >= max(every, 1):
        raise Unfit(
            f"monitor.delay = {delay} is not below monitor.every = {every}: a report must be complete "
            "before the next begins; use --set monitor.delay=auto",
            "monitor.delay",
            "monitor.every",
        )
    sampled = max(monitor["rows"], settings["rows"]["batch_rows"])
    if every and monitor["least_together"] > sampled:
        raise Unfit(
            f"monitor.least_together = {monitor['least_together']} is more than the {sampled:,} rows of a sample "
            "(monitor.rows), so no pair could be listed; lower it",
            "monitor.least_together",
            "monitor.rows",
        )
