"""What the command line does: start, resume, evaluate, sample and report on a run."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from shared import durable
from shared.config import build, override
from shared.errors import DiskFull, Stopped, UserError
from shared.store import Local, Store
from shared.terminal import say
from train import checkpoint
from train.checkpoint import CONFIG, Checkpoint, Listed
from train.evaluate import Evaluation, calibrate, evaluate
from train.linear import linear_map_fvu
from train.loop import Run, build_transcoder, load_weights, use_threads
from train.mirror.process import FOLDER, REPORT, mirrored
from train.rows import source_width
from train.samples.make import make_samples
from train.samples.select import SamplesConfig
from train.samples.table import SamplesRecord
from train.saver import bring_home, require_own
from train.settings import RunConfig, Settings, checkpoint_bytes, read_config, resolve, resolve_exclusion

if TYPE_CHECKING:
    from train.report.record import Report

_BEFORE_CONFIG = {".lock", CONFIG + durable.TEMPORARY}
"""What a run that was killed before its configuration was written leaves; it is started again."""


def start(
    store: Store,
    settings: Settings,
    run: Path,
    init_from: Path | None,
    *,
    force: bool,
    fallback: Path | None = None,
    project: str | None = None,
) -> Path:
    """Train from step 0 in the new folder `run`, mirrored to a W&B `project` if there is one. Returns `run`.

    `fallback`: where checkpoints go when the disk of `run` is full. Raises `UserError` when `run` exists, the settings
    do not fit the store, or the checkpoints do not fit the disk.
    """
    config = resolve(store, settings, init_from)
    exists = UserError(f"{run} exists; continue it with: python -m train resume {run}, or choose another --name")
    if run.exists() and {path.name for path in run.iterdir()} - _BEFORE_CONFIG:
        raise exists
    source = find_initial(init_from, config) if init_from else None
    if not force:
        size = checkpoint_bytes(config.settings, config.d_in, config.d_out)
        durable.require_space(
            run.parent, settings.checkpoint.most(settings.steps, size), "checkpoints (--force to go on all the same)"
        )
    say(left_out(store.excluding(config.exclusion), range(config.first_block, config.last_block)))
    written = durable.json_bytes(config.model_dump(mode="json"))
    elsewhere = _fallback(run, fallback, written)
    with store.reading(), _resumable(run):
        new = Run(store, config, run, initial=source, fallback=elsewhere)  # raises before anything is written
        with durable.lock(run / ".lock", f"run {run}"):
            if (run / CONFIG).exists():  # of a run that was started meanwhile
                raise exists
            durable.publish_bytes(run / CONFIG, written)
            with mirrored(run, project):
                new.train()
    return run


def left_out(store: Store, blocks: range) -> str:
    """Tell which rows of the training blocks are left out, and why."""
    exclusion, strata = store.exclusion, store.strata.values()
    assert exclusion
    first, last = blocks.start, blocks.stop
    rows = len(blocks) * sum(part.stratum.rows for part in strata)
    zero = len(blocks) * sum(part.stratum.rows for part in strata if part.stratum.is_position_0)
    odd = sum(
        len(numbers[(numbers >= first * part.stratum.rows) & (numbers < last * part.stratum.rows)])
        for numbers, part in zip(store.outliers.values(), strata, strict=True)
    )
    at_0 = "left out (rows.position_0=train takes it in)" if exclusion.position_0 else "trained on"
    limits = " or ".join(f"{side} norm above {limit:.4g}" for side, limit in exclusion.limits.items() if limit)
    outliers = f"{odd:,} outliers ({limits})" if limits else "no row counts as an outlier (rows.outlier_ratio=0)"
    fate = "left out (rows.outliers=train takes them in)" if exclusion.training else "trained on"
    said = f"of {rows:,} stored training rows, {outliers}{f': {fate}' if odd else ''}"
    return f"{said}; position 0, {zero:,} rows: {at_0}" if zero else said


def resume(
    run: Path,
    store_path: Path | None,
    local: Local | None,
    *,
    fallback: Path | None = None,
    project: str | None = None,
    threads: int | None = None,
    inexact: bool = False,
) -> Path:
    """Continue `run` from its newest valid checkpoint, or from step 0 when it has none. Returns `run`.

    The result is that of an uninterrupted run, bit for bit, unless other `threads` are asked for, or `inexact` lets
    another processor or other versions of libraries do. Checkpoints that are in the `fallback` folder are brought home.
    With a W&B `project`, all of the run that is not mirrored yet is.
    """
    config = read_config(run)
    if threads and threads != config.settings.threads:
        inexact = True
        config = config.model_copy(update={"settings": config.settings.model_copy(update={"threads": threads})})
    store = Store.open(store_path or config.store, local)
    if store.request.digest != config.request:
        raise UserError(
            f"{run} was trained on request {config.request[:6]}, {store.path} is {store.request.digest[:6]}"
        )
    elsewhere = _fallback(run, fallback, (run / CONFIG).read_bytes())
    with store.reading(), durable.lock(run / ".lock", f"run {run}"), _resumable(run):
        durable.sweep(run)
        found = _newest(run, elsewhere)
        source = find_initial(config.init_from, config) if config.init_from and not found else None
        continued = Run(store, config, run, initial=source, resumed=found, fallback=elsewhere, inexact=inexact)
        with mirrored(run, project):
            continued.train()
    return run


def _fallback(run: Path, folder: Path | None, config: bytes) -> Path | None:
    """The run's place in the fallback folder, which must be there. Raises `UserError`."""
    if not folder:
        return None
    if not folder.is_dir():
        raise UserError(f"--fallback-dir {folder}: no such folder; make it on a disk with room for a checkpoint")
    require_own(folder / run.resolve().name, config)
    return folder / run.resolve().name


def _newest(run: Path, fallback: Path | None) -> Checkpoint | None:
    """The newest valid checkpoint of `run`, brought home from `fallback` where there is room; none if it has none."""
    warnings: list[str] = []
    places = [run]
    if fallback:
        try:
            bring_home(run, fallback)
        except DiskFull as error:
            warnings.append(f"{error}; what has no room stays in {fallback}")
            places.append(fallback)
    found = [checkpoint.find(place, warn=warnings) for place in places if checkpoint.steps(place)]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return max(found, key=lambda one: one.step, default=None)


@contextmanager
def _resumable(run: Path) -> Iterator[None]:
    """A second Ctrl-C says how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped at once; continue with: python -m train resume {run}") from error


def list_checkpoints(run: Path) -> list[Listed]:
    """All checkpoints of `run`, oldest first, each read and verified. Raises `UserError` when `run` is no run."""
    read_config(run)
    return [checkpoint.listed(path) for path in checkpoint.steps(run)]


def evaluate_run(
    run: Path, store_path: Path | None, local: Local | None, step: int | None, linear: bool
) -> tuple[Checkpoint, Evaluation, float | None]:
    """Evaluate a checkpoint of `run` with thresholds calibrated on the store, and the best linear map if asked for."""
    config = read_config(run)
    found = checkpoint.find(run, step)
    store, source = _open_for(run, config, store_path, local), config.settings.source
    with store.reading():
        transcoder = build_transcoder(config, store)
        load_weights(transcoder, found.path)
        chunk = config.settings.evaluation.chunk_rows
        threshold = calibrate(transcoder, store, chunk, source)
        evaluation = evaluate(transcoder, store, threshold, chunk, config.settings.seed, source)
        return found, evaluation, linear_map_fvu(store, chunk, threshold.device, source) if linear else None


def sample_run(
    run: Path,
    store_path: Path | None,
    local: Local | None,
    step: int | None,
    rows: int | None,
    assignments: Sequence[str],
) -> tuple[Path, SamplesRecord]:
    """Write samples of a checkpoint of `run`, as its settings say but for `rows` and `assignments`.

    Returns the file of the contexts, and what it was made from. A run that makes none of its own gets as many as one
    that does. Raises `UserError` when an assignment is not of samples, and `DiskFull`.
    """
    config = read_config(run)
    settings = _samples_config(config.settings.samples, rows, assignments)
    found = checkpoint.find(run, step)
    store = _open_for(run, config, store_path, local)
    with store.reading(), durable.lock(run / ".lock", f"run {run}"):
        durable.sweep(run)
        use_threads(config.settings.threads)
        transcoder = build_transcoder(config, store)
        threshold = load_weights(transcoder, found.path)
        samples = make_samples(transcoder, store, threshold, config, settings, found.step)
        return samples.publish(run), samples.record


def report_run(
    run: Path, store_path: Path | None, local: Local | None, step: int | None, linear: bool, project: str | None
) -> tuple[Path, "Report"]:
    """Write the report of a checkpoint of `run`, and mirror its plots to a W&B `project` if there is one.

    Returns the page's path, and what it holds. Raises `DiskFull`, and `UserError` when the report of an unfinished run
    is to be mirrored: rows that come later would be of earlier steps.
    """
    from train.report.make import HTML, make_report, plots  # they take half a second to import

    config = read_config(run)
    found = checkpoint.find(run, step)
    if project and found.step < (steps := config.settings.steps):
        raise UserError(
            f"--wandb mirrors reports of finished runs, and this one is of step {found.step} of {steps} of {run}; "
            f"finish it with: python -m train resume {run} --wandb"
        )
    store = _open_for(run, config, store_path, local)
    with store.reading(), durable.lock(run / ".lock", f"run {run}"):
        durable.sweep(run)
        report = make_report(run, config, found, store, linear=linear)
        if project:
            durable.publish_json(run / FOLDER / REPORT, plots(report))
            with mirrored(run, project):
                pass  # the trainer has ended: the mirror takes what it lacks
        return run / HTML, report


def _samples_config(given: SamplesConfig, rows: int | None, assignments: Sequence[str]) -> SamplesConfig:
    wanted = rows or given.rows or SamplesConfig().rows
    raw = override({"samples": given.model_dump() | {"rows": wanted}}, assignments)
    if other := sorted(set(raw) - {"samples"}):
        raise UserError(f"--set {other[0]}: only settings of samples can be set here, such as samples.top=20")
    settings = build(SamplesConfig, raw["samples"], "--set samples")
    if not settings.rows:
        raise UserError("samples.rows is 0, and nothing would be sampled; leave it out, or ask for some with --rows")
    return settings


def _open_for(run: Path, config: RunConfig, store_path: Path | None, local: Local | None) -> Store:
    """The store of `run`, or another one of the same widths. Raises `UserError`."""
    store = Store.open(store_path or config.store, local)
    d_in, d_out = source_width(store, config.settings.source), store.record.d_out
    if (d_in, d_out) != (config.d_in, config.d_out):
        raise UserError(
            f"{store.path} has d_in {d_in} and d_out {d_out}, "
            f"{run} was trained with {config.d_in} and {config.d_out}; pass the --store of the same model and hooks"
        )
    same = store.request.digest == config.request
    anew = config.exclusion and resolve_exclusion(store, config.settings)
    return store.excluding(config.exclusion if same else anew)


def find_initial(run: Path, config: RunConfig) -> Checkpoint:
    """The newest checkpoint of `run`, whose weights must fit `config`. Raises `UserError` with both shapes."""
    found = checkpoint.find(run)
    theirs, ours = _shape(read_config(run)), _shape(config)
    if theirs != ours:
        wrong = next(key for key in ours if theirs[key] != ours[key])
        raise UserError(
            f"--init-from {run}: its {wrong} is {theirs[wrong]}, this run's is {ours[wrong]}; make them agree"
        )
    return found


def _shape(config: RunConfig) -> dict[str, object]:
    settings = config.settings
    return {
        "source": config.settings.source,
        "d_in": config.d_in,
        "d_out": config.d_out,
        "transcoder.d_sae": settings.transcoder.d_sae,
        "transcoder.skip": settings.transcoder.skip,
        "use of learned thresholds": settings.activation.kind == "jumprelu",
    }
