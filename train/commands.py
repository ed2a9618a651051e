"""What the commands do, for the command line and for Python: train, resume, evaluate, sample, report, export."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shared.config import build, changes_of, override
from shared.console.terminal import say
from shared.errors import DiskFull, Stopped, UserError, warn
from shared.files import durable
from shared.store.store import Local, Store
from train.evaluation.evaluate import Evaluation, calibrate
from train.evaluation.evaluate import evaluate as evaluate_rows
from train.evaluation.linear_baseline import linear_map_fvu
from train.interchange.initial import describe_start, find_initial, warn_of_k
from train.live.run_files import BLOCKS, CONFIG, EXPORTS, HELD_OUT, LOCK, REPORTS
from train.locked_run import locked_run, refuse_links_in
from train.model import checkpoint
from train.model.checkpoint import Checkpoint, Listed
from train.redundancy.measure_redundancy import measure_redundancy
from train.redundancy.redundancy_record import Redundancy
from train.run.bindings import pinned, require_own_config, require_own_store
from train.run.follower import lead
from train.run.load_run import check_shards, load_run, open_store, place_of_store, remember_store, samples_of
from train.run.process import OwnProcess
from train.run.saver import bring_home, require_own
from train.run.settings import Extension, RunConfig, Settings, checkpoint_bytes, read_config, resolve
from train.run.trainer import Trainer
from train.run_folder import exists, require_new
from train.samples.parquet import SamplesRecord
from train.samples.select import SamplesConfig
from train.wandb_sync.sync import FOLDER, REPORT, synced

if TYPE_CHECKING:
    from train.interchange import Format
    from train.interchange.export import Exported
    from train.probe.probe_record import ProbeRecord
    from train.report.report_record import Report


def train(
    store: Store | Path | str,
    settings: Settings,
    run: Path | str,
    *,
    note: str = "",
    init_from: Path | str | None = None,
    force: bool = False,
    fallback: Path | str | None = None,
    project: str | None = None,
    verify: bool = False,
    process: OwnProcess | None = None,
) -> Path:
    """Train from step 0 in the new folder `run`. Returns `run`.

    `note`: what to say first, once the settings are found to fit. `init_from`: a run whose newest weights to start
    from, or another library's transcoder. `force`: start although the checkpoints may not fit the disk.
    `fallback`: where checkpoints go when the disk of `run` is full. `project`: one of W&B that the run is sent to.
    `verify`: read all of the store's shard files first, and not only some. `process`: that of several runs (`sweep`).

    Raises `UserError` when `run` exists, the settings do not fit the store, or the checkpoints do not fit the disk, and
    `CorruptData` when the store is damaged.
    """
    store, run = store if isinstance(store, Store) else Store.open(store), Path(run)
    init_from, fallback = _path(init_from), _path(fallback)
    config = resolve(store, settings, init_from)
    check_shards(store, config.training_blocks, verify=verify)
    require_new(run)
    blocks = pinned(store, config.training_blocks)
    config = config.model_copy(update={"blocks": blocks.digest})
    source = find_initial(init_from, config) if init_from else None
    if source:
        config = config.model_copy(update={"initial": source.weights})
        say(describe_start(source, config))
        warn_of_k(source, config)
    if not force:
        size = checkpoint_bytes(config.settings, config.d_in, config.d_out)
        most = config.settings.checkpoint.most(settings.steps, size)
        durable.require_space(run.parent, most, "checkpoints (--force continues anyway)")
    if note:
        say(note)
    say(left_out(store.excluding(config.exclusion), config.training_blocks))
    written = durable.json_bytes(config.model_dump(mode="json"))
    elsewhere = _fallback(run, fallback, written)
    with store.reading(), _resumable(run):
        load = source.load if source else None
        ranks = lead(config, run, store, None, has_initial=load is not None)
        # raises before anything is written
        new = Trainer(store, config, run, initial=load, fallback=elsewhere, ranks=ranks, process=process)
        with durable.lock(run / LOCK, f"run {run}"):
            if (run / CONFIG).exists():  # of a run that was started meanwhile
                raise exists(run)
            durable.publish_json(run / BLOCKS, blocks.model_dump(mode="json"))
            durable.publish_bytes(run / CONFIG, written)
            with synced(run, project):
                new.train()
    ranks.leave()
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
    at_0 = "left out (rows.position_0=train would keep them)" if exclusion.position_0 else "trained on"
    limits = " or ".join(f"{side} norm above {limit:.4g}" for side, limit in exclusion.limits.items() if limit)
    outliers = f"{odd:,} outliers ({limits})" if limits else "no row counts as an outlier (rows.outlier_ratio=0)"
    fate = "left out (rows.outliers=train would keep them)" if exclusion.training else "trained on"
    said = f"the store has {rows:,} training rows; {outliers}{f': {fate}' if odd else ''}"
    return f"{said}; {zero:,} rows at position 0: {at_0}" if zero else said


def resume(
    run: Path | str,
    *,
    store: Store | Path | str | None = None,
    local: Local | None = None,
    fallback: Path | str | None = None,
    project: str | None = None,
    threads: int | None = None,
    inexact: bool = False,
    steps: int | None = None,
    verify: bool = False,
    process: OwnProcess | None = None,
) -> Path:
    """Continue `run` from its newest valid checkpoint, or from step 0 when it has none. Returns `run`.

    `steps`: make it longer first, see `make_longer`.

    The result is that of an uninterrupted run, bit for bit, unless other `threads` are asked for, or `inexact` lets
    another processor or other versions of libraries do. Checkpoints that are in the `fallback` folder are brought home.
    With a W&B `project`, all of the run that is not synced yet is. `verify`: read all of the store's shard files first,
    and not only some. `process` as in `train`. Raises `UserError` when the store has other rows, or `config.json` other
    settings, than the run was trained with.
    """
    run, fallback = Path(run), _path(fallback)
    config = read_config(run)
    if config.imported:
        raise UserError(
            f"{run} was imported, and has nothing to continue; train from it with: train run --init-from {run}"
        )
    elsewhere = _fallback(run, fallback, (run / CONFIG).read_bytes())
    for place in filter(None, (run, elsewhere)):
        refuse_links_in(place)
    opened = store if isinstance(store, Store) else Store.open(place_of_store(run, config, _path(store)), local)
    require_own_store(run, config, opened)
    remember_store(run, config, opened)
    check_shards(opened, config.training_blocks, verify=verify)
    with opened.reading(), durable.lock(run / LOCK, f"run {run}"), _resumable(run):
        durable.sweep(run)
        found = _newest(run, elsewhere)
        if found:
            require_own_config(run, config, found)
        config = make_longer(run, config, found.step if found else 0, steps, elsewhere) if steps else config
        if threads and threads != config.settings.threads:
            if config.settings.parallel.shards > 1:
                raise UserError(f"--threads {threads}: a run with parallel.shards has one thread per process")
            inexact = True
            config = config.model_copy(update={"settings": config.settings.model_copy(update={"threads": threads})})
        source = find_initial(config.init_from, config) if config.init_from and not found else None
        load = source.load if source else None
        ranks = lead(config, run, opened, found, has_initial=load is not None, inexact=inexact)
        continued = Trainer(
            opened,
            config,
            run,
            initial=load,
            resumed=found,
            fallback=elsewhere,
            inexact=inexact,
            ranks=ranks,
            process=process,
        )
        with synced(run, project):
            continued.train()
    ranks.leave()
    return run


def make_longer(run: Path, config: RunConfig, done: int, steps: int, fallback: Path | None = None) -> RunConfig:
    """Make a run of which `done` steps are done one of `steps`. Returns its `config.json`, which records that.

    From step `done` on the learning rate is that of a run of `steps`. All that was a share of the run when it started
    (warm-ups, when a latent is dead, the monitor's cadence) stays as long as it was. A run that has as many steps
    already is left as it is. Raises `UserError` when it has more.
    """
    before = config.settings
    if steps <= before.steps:
        if steps == before.steps:
            return config
        raise UserError(f"--steps {steps:,}: {run} has {before.steps:,} steps already, and is only ever made longer")
    settings = build(Settings, before.model_dump() | {"steps": steps}, "--steps")
    extension = Extension(step=done, steps_before=before.steps)
    longer = config.model_copy(update={"settings": settings, "extensions": (*config.extensions, extension)})
    (run / REPORTS / HELD_OUT).unlink(missing_ok=True)  # of the step that was the last one
    written = durable.json_bytes(longer.model_dump(mode="json"))
    places = [place for place in (fallback, run) if place and (place / CONFIG).is_file()]
    durable.publish_files({place / CONFIG: written for place in places})
    rates = [before.optimizer.lr_at(min(done, length - 1), length) for length in longer.lengths[-2:]]
    say(
        f"{run} had {before.steps:,} steps and now has {steps:,}; from step {done + 1:,} on the learning rate is that "
        f"of a run of {steps:,}: {rates[1]:.3g}, it was {rates[0]:.3g}"
    )
    return longer


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
    places = [run]
    if fallback:
        try:
            bring_home(run, fallback)
        except DiskFull as error:
            warn(f"{error}; what has no room stays in {fallback}")
            places.append(fallback)
    found = [checkpoint.find(place) for place in places if checkpoint.steps(place)]
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
    redundancy: Redundancy | None = None
    """Latents that are there twice by what they do; none unless asked for."""


def evaluate(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    linear: bool = False,
    redundancy: bool = False,
    verify: bool = False,
) -> Evaluated:
    """Evaluate a checkpoint of `run`, the newest or that of `step`, with thresholds calibrated on the store.

    `linear`: also fit the best linear map on the training rows. `redundancy`: also find latents that are there twice by
    what they do. `verify`: read all of the store's shard files first, and not only some. Changes nothing. Raises
    `UserError` when there is no such run, checkpoint or store, and `CorruptData` when the store is damaged.
    """
    run, store = Path(run), _path(store)
    config, found = read_config(run), checkpoint.find(run, step)
    opened = open_store(run, config, store, local, verify=verify)
    with opened.reading():
        loaded = load_run(run, store=opened, found=found)
        threshold = calibrate(loaded.transcoder, loaded.rows)
        evaluation = evaluate_rows(loaded.transcoder, loaded.rows, threshold, config.settings.seed)
        twice = measure_redundancy(loaded.transcoder, loaded.rows, threshold) if redundancy else None
        fvu = linear_map_fvu(loaded.rows, threshold.device) if linear else None
        return Evaluated(found.step, evaluation, fvu, twice)


def sample(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    rows: int | None = None,
    changes: Mapping[str, object] | Sequence[str] = (),
    verify: bool = False,
) -> tuple[Path, SamplesRecord]:
    """Write samples of a checkpoint of `run`, as its settings say but for `rows` and `changes`.

    Returns the file of the contexts, and what it was made from. A run that makes none of its own gets as many as one
    that does. `verify` as in `evaluate`. Raises `UserError` when an assignment is not of samples, and `DiskFull`.
    """
    run = Path(run)
    settings = _samples_config(read_config(run).settings.samples, rows, changes)
    with locked_run(run, store=_path(store), local=local, step=step, verify=verify) as loaded:
        samples = samples_of(loaded, settings)
        return samples.publish(run), samples.record


def write_report(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    linear: bool = False,
    labels: Path | str | None = None,
    project: str | None = None,
    verify: bool = False,
) -> tuple[Path, "Report"]:
    """Write the report of a checkpoint of `run`, and sync its plots to a W&B `project` if there is one.

    `labels` is a file of what people call latents, merged into the run's `labels.json`. `verify` as in `evaluate`.
    Returns the page's path, and what it holds. Raises `DiskFull`, and `UserError` when the file is wrong, or the
    report of an unfinished run is to be synced: rows that come later would be of earlier steps.
    """
    from train.report.make_report import HTML, make_report, plots  # they take half a second to import

    run = Path(run)
    with locked_run(run, store=_path(store), local=local, step=step, verify=verify) as loaded:
        if project and loaded.step < (steps := loaded.config.settings.steps):
            raise UserError(
                f"--wandb syncs reports of finished runs, and this one is of step {loaded.step} of {steps} of {run}; "
                f"finish it with: python -m train resume {run} --wandb"
            )
        made = make_report(loaded, linear=linear, labels=Path(labels) if labels else None)
        if project:
            durable.publish_json(run / FOLDER / REPORT, plots(made))
            with synced(run, project):
                pass  # the trainer has ended: what W&B lacks is sent
        return run / HTML, made


def probe(
    run: Path | str,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    labels: str = "auto",
    rows: int | None = None,
    verify: bool = False,
) -> "ProbeRecord":
    """Measure what the latents of a checkpoint of `run` mean, by labels of held-out tokens; writes `probe.json`.

    `labels`: `auto`, `python`, `english`, or a Parquet file of (sequence, offset, label). `rows`: that are probed, at
    most. `verify` as in `evaluate`. Raises `UserError` when labels do not fit the store, and `DiskFull`.
    """
    from train.probe.measure import ROWS, measure_probe
    from train.probe.probe_record import publish_probe

    run = Path(run)
    with locked_run(run, store=_path(store), local=local, step=step, verify=verify) as loaded:
        record = measure_probe(loaded, labels, rows or ROWS)
        publish_probe(run, record)
        return record


def export(
    runs: Sequence[Path | str] | Path | str,
    kind: "Format",
    path: Path | str | None = None,
    *,
    store: Path | str | None = None,
    local: Local | None = None,
    step: int | None = None,
    prefix: int | None = None,
    layers: int | None = None,
    licence: str | None = None,
) -> "Exported":
    """Write the transcoder of a run in another library's format, read it back and compare; returns where, and how far.

    `kind`: `saelens`, `hf` (the same, for the Hugging Face hub), `sparsify`, or `circuit-tracer`, which takes a run for
    each of some layers and the number of the model's `layers`; `neuronpedia` and `delphi` hold what latents do, so that
    there is nothing to compare. `path`: a new folder, in the first run's `exports` if not given. `step`: that of a
    checkpoint, else the newest; `prefix`: the first so many latents alone; `licence`: the hub's name of one, for the
    card. Raises `UserError` when there is no such run, checkpoint or store, or no place for such a transcoder in the
    format, and `DiskFull`.
    """
    from train.interchange.export import export as export_loaded

    paths = [Path(run) for run in ([runs] if isinstance(runs, Path | str) else runs)]
    name = kind if prefix is None else f"{kind}-{prefix}"
    with ExitStack() as reading:
        loaded = []
        for run in paths:
            opened = open_store(run, read_config(run), _path(store), local)
            reading.enter_context(opened.reading())
            loaded.append(load_run(run, step, store=opened))
        out = _path(path) or paths[0] / EXPORTS / name
        return export_loaded(loaded, kind, out, prefix=prefix, layers=layers, licence=licence)


def import_transcoder(
    path: Path | str,
    store: Store | Path | str,
    run: Path | str,
    *,
    source_hook: str | None = None,
    accept_mismatch: bool = False,
) -> Evaluation:
    """Make the finished run `run` of a transcoder at `path` that another library wrote. Returns held-out figures.

    Every command that reads a finished run takes it. `source_hook`: what it reads, where its files do not say.
    `accept_mismatch`: although its model or hooks are not the store's. Raises `UserError` when `run` exists, when it is
    nothing that `read_transcoder` reads, or its widths, model or hooks are not the store's, and `CorruptData`.
    """
    from train.interchange.import_run import ImportOptions
    from train.interchange.import_run import import_transcoder as import_from

    opened = store if isinstance(store, Store) else Store.open(store)
    options = ImportOptions(source_hook=source_hook, accept_mismatch=accept_mismatch)
    return import_from(Path(path), opened, Path(run), options)


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)


def _samples_config(
    given: SamplesConfig, rows: int | None, changes: Mapping[str, object] | Sequence[str]
) -> SamplesConfig:
    wanted = rows or given.rows or SamplesConfig().rows
    made = changes_of(changes)
    if other := [one for one in made if not one.name.startswith("samples.")]:
        raise UserError(f"{other[0].said}: only settings of samples can be set here, such as samples.top=20")
    raw = override({"samples": given.model_dump() | {"rows": wanted}}, made)
    inside = [one._replace(name=one.name.removeprefix("samples.")) for one in made]
    settings = build(SamplesConfig, raw["samples"], "samples", inside)
    if not settings.rows:
        raise UserError("samples.rows is 0, and nothing would be sampled; leave it out, or ask for some with --rows")
    return settings
