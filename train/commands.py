"""What the commands do, for the command line and for Python: train, resume, evaluate, sample and report on a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shared.config import build, override
from shared.console.terminal import say
from shared.errors import DiskFull, Stopped, UserError, warn
from shared.files import durable
from shared.files.untrusted import refuse_links
from shared.store.store import Local, Store
from train.evaluation.evaluate import Evaluation, calibrate
from train.evaluation.evaluate import evaluate as evaluate_rows
from train.evaluation.linear_baseline import linear_map_fvu
from train.live.run_files import CONFIG, LOCK
from train.model import checkpoint
from train.model.checkpoint import Checkpoint, Listed
from train.run.load_run import load_run, open_store, samples_of
from train.run.saver import bring_home, require_own
from train.run.settings import RunConfig, Settings, checkpoint_bytes, read_config, resolve
from train.run.trainer import Trainer, use_threads
from train.samples.parquet import SamplesRecord
from train.samples.select import SamplesConfig
from train.wandb_sync.sync import FOLDER, REPORT, synced

if TYPE_CHECKING:
    from train.report.report_record import Report

_BEFORE_CONFIG = {LOCK, CONFIG + durable.TEMPORARY}
"""What a run that was killed before its configuration was written leaves; it is started again."""


def train(
    store: Store | Path | str,
    settings: Settings,
    run: Path | str,
    *,
    init_from: Path | str | None = None,
    force: bool = False,
    fallback: Path | str | None = None,
    project: str | None = None,
) -> Path:
    """Train from step 0 in the new folder `run`. Returns `run`.

    `init_from`: a run whose newest weights to start from. `force`: start although the checkpoints may not fit the disk.
    `fallback`: where checkpoints go when the disk of `run` is full. `project`: one of W&B that the run is sent to.
    Raises `UserError` when `run` exists, the settings do not fit the store, or the checkpoints do not fit the disk.
    """
    store, run = store if isinstance(store, Store) else Store.open(store), Path(run)
    init_from, fallback = _path(init_from), _path(fallback)
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
    say(left_out(store.excluding(config.exclusion), config.training_blocks))
    written = durable.json_bytes(config.model_dump(mode="json"))
    elsewhere = _fallback(run, fallback, written)
    with store.reading(), _resumable(run):
        new = Trainer(store, config, run, initial=source, fallback=elsewhere)  # raises before anything is written
        with durable.lock(run / LOCK, f"run {run}"):
            if (run / CONFIG).exists():  # of a run that was started meanwhile
                raise exists
            durable.publish_bytes(run / CONFIG, written)
            with synced(run, project):
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
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    fallback: Path | str | None = None,
    project: str | None = None,
    threads: int | None = None,
    inexact: bool = False,
) -> Path:
    """Continue `run` from its newest valid checkpoint, or from step 0 when it has none. Returns `run`.

    The result is that of an uninterrupted run, bit for bit, unless other `threads` are asked for, or `inexact` lets
    another processor or other versions of libraries do. Checkpoints that are in the `fallback` folder are brought home.
    With a W&B `project`, all of the run that is not synced yet is.
    """
    run, store, fallback = Path(run), _path(store), _path(fallback)
    config = read_config(run)
    elsewhere = _fallback(run, fallback, (run / CONFIG).read_bytes())
    for place in (run, elsewhere):
        _refuse_links(place)
    if threads and threads != config.settings.threads:
        inexact = True
        config = config.model_copy(update={"settings": config.settings.model_copy(update={"threads": threads})})
    opened = Store.open(store or config.store, local)
    if opened.request.digest != config.request:
        raise UserError(
            f"{run} was trained on request {config.request[:6]}, {opened.path} is {opened.request.digest[:6]}"
        )
    with opened.reading(), durable.lock(run / LOCK, f"run {run}"), _resumable(run):
        durable.sweep(run)
        found = _newest(run, elsewhere)
        source = find_initial(config.init_from, config) if config.init_from and not found else None
        continued = Trainer(opened, config, run, initial=source, resumed=found, fallback=elsewhere, inexact=inexact)
        with synced(run, project):
            continued.train()
    return run


def _refuse_links(run: Path | None) -> None:
    """Raise `CorruptData` when something in `run`, which is written to, leads out of it. W&B makes links of its own."""
    if run:
        refuse_links(run, but_in=(FOLDER,))


def _fallback(run: Path, folder: Path | None, config: bytes) -> Path | None:
    """Return the run's place in the fallback folder, which must be there. Raises `UserError`."""
    if not folder:
        return None
    if not folder.is_dir():
        raise UserError(f"--fallback-dir {folder}: no such folder; make it on a disk with room for a checkpoint")
    require_own(folder / run.resolve().name, config)
    return folder / run.resolve().name


def _newest(run: Path, fallback: Path | None) -> Checkpoint | None:
    """Return the newest valid checkpoint of `run`; none if it has none.

    Checkpoints are brought home from `fallback` where there is room.
    """
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
        warn(f"{warning}")
    return max(found, key=lambda one: one.step, default=None)


@contextmanager
def _resumable(run: Path) -> Iterator[None]:
    """Say how to go on after a second Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(f"stopped at once; continue with: python -m train resume {run}") from error


def list_checkpoints(run: Path | str) -> list[Listed]:
    """List all checkpoints of `run`, oldest first, each read and verified. Raises `UserError` when `run` is no run."""
    run = Path(run)
    read_config(run)
    return [checkpoint.listed(path) for path in checkpoint.steps(run)]


class Evaluated(NamedTuple):
    """What `evaluate` found."""

    step: int
    """Of the checkpoint."""
    evaluation: Evaluation
    linear_fvu: float | None
    """Fvu of the best linear map; none unless asked for."""


def evaluate(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    linear: bool = False,
) -> Evaluated:
    """Evaluate a checkpoint of `run`, the newest or that of `step`, with thresholds calibrated on the store.

    `linear`: also fit the best linear map on the training rows. Changes nothing. Raises `UserError` when there is no
    such run, checkpoint or store.
    """
    run, store = Path(run), _path(store)
    config, found = read_config(run), checkpoint.find(run, step)
    opened = open_store(run, config, store, local)
    with opened.reading():
        loaded = load_run(run, store=opened, found=found)
        threshold = calibrate(loaded.transcoder, loaded.rows)
        evaluation = evaluate_rows(loaded.transcoder, loaded.rows, threshold, config.settings.seed)
        return Evaluated(found.step, evaluation, linear_map_fvu(loaded.rows, threshold.device) if linear else None)


def sample(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    rows: int | None = None,
    changes: Mapping[str, object] | Sequence[str] = (),
) -> tuple[Path, SamplesRecord]:
    """Write samples of a checkpoint of `run`, as its settings say but for `rows` and `changes`.

    Returns the file of the contexts, and what it was made from. A run that makes none of its own gets as many as one
    that does. Raises `UserError` when an assignment is not of samples, and `DiskFull`.
    """
    run, store = Path(run), _path(store)
    config = read_config(run)
    _refuse_links(run)
    settings = _samples_config(config.settings.samples, rows, changes)
    found = checkpoint.find(run, step)
    opened = open_store(run, config, store, local)
    with opened.reading(), durable.lock(run / LOCK, f"run {run}"):
        durable.sweep(run)
        use_threads(config.settings.threads)
        samples = samples_of(load_run(run, store=opened, found=found), settings)
        return samples.publish(run), samples.record


def write_report(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    linear: bool = False,
    project: str | None = None,
) -> tuple[Path, "Report"]:
    """Write the report of a checkpoint of `run`, and sync its plots to a W&B `project` if there is one.

    Returns the page's path, and what it holds. Raises `DiskFull`, and `UserError` when the report of an unfinished run
    is to be synced: rows that come later would be of earlier steps.
    """
    from train.report.make_report import HTML, make_report, plots  # they take half a second to import

    run, store = Path(run), _path(store)
    config = read_config(run)
    _refuse_links(run)
    found = checkpoint.find(run, step)
    if project and found.step < (steps := config.settings.steps):
        raise UserError(
            f"--wandb syncs reports of finished runs, and this one is of step {found.step} of {steps} of {run}; "
            f"finish it with: python -m train resume {run} --wandb"
        )
    opened = open_store(run, config, store, local)
    with opened.reading(), durable.lock(run / LOCK, f"run {run}"):
        durable.sweep(run)
        use_threads(config.settings.threads)  # first, for the last bits of what follows
        made = make_report(load_run(run, store=opened, found=found), linear=linear)
        if project:
            durable.publish_json(run / FOLDER / REPORT, plots(made))
            with synced(run, project):
                pass  # the trainer has ended: what W&B lacks is sent
        return run / HTML, made


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _samples_config(
    given: SamplesConfig, rows: int | None, changes: Mapping[str, object] | Sequence[str]
) -> SamplesConfig:
    wanted = rows or given.rows or SamplesConfig().rows
    raw = override({"samples": given.model_dump() | {"rows": wanted}}, changes)
    if other := sorted(set(raw) - {"samples"}):
        raise UserError(f"--set {other[0]}: only settings of samples can be set here, such as samples.top=20")
    settings = build(SamplesConfig, raw["samples"], "--set samples")
    if not settings.rows:
        raise UserError("samples.rows is 0, and nothing would be sampled; leave it out, or ask for some with --rows")
    return settings


def find_initial(run: Path, config: RunConfig) -> Checkpoint:
    """Return the newest checkpoint of `run`, whose weights must fit `config`. Raises `UserError` with both shapes."""
    found = checkpoint.find(run)
    before = read_config(run)
    theirs, ours = _shape(before), _shape(config)
    if theirs != ours:
        wrong = next(key for key in ours if theirs[key] != ours[key])
        raise UserError(
            f"--init-from {run}: its {wrong} is {theirs[wrong]}, this run's is {ours[wrong]}; make them agree"
        )
    if [one.settings.transcoder.decoder_norm for one in (before, config)] == ["free", "unit"]:
        raise UserError(
            f"--init-from {run}: its decoder rows have free norms, and this run would set them to 1; use "
            "transcoder.decoder_norm=free"
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
        "use of learned thresholds": settings.activation.learns_thresholds,
    }
