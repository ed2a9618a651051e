"""Make a finished run of a transcoder that another library wrote, so that every command reads it as one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import build, sealed
from shared.console.progress import Progress
from shared.console.terminal import say
from shared.errors import UserError
from shared.files import durable
from shared.store.layout import UNEMBEDDING
from shared.store.store import Store
from shared.store.unembedding import Unembedding
from train.data.batches import Side
from train.duplicates.monitor import CorrelationMonitor
from train.evaluation.evaluate import Evaluation, calibrate, evaluate
from train.evaluation.held_out import held_out_active
from train.interchange.declared import Declared, declared
from train.interchange.plain_transcoder import PlainTranscoder
from train.interchange.read_transcoder import read_transcoder
from train.live.log_rows import Component, UsageRecord
from train.live.run_files import BLOCKS, CONFIG, USAGE
from train.model import checkpoint
from train.model.checkpoint import HeldOut
from train.model.sizes import source_width
from train.model.transcoder import Transcoder
from train.run.bindings import pinned
from train.run.determinism import arithmetic
from train.run.load_run import build_transcoder, check_shards, rows_of
from train.run.settings import Imported, RunConfig, Settings, checkpoint_bytes, resolve
from train.run.trainer import use_threads

_NORMALISED, _RESIDUAL, _NORM_INPUT = "ln2.hook_normalized", "hook_resid_mid", "ln2.hook_in"
_PARTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the user adds to what the files say."""

    source_hook: str | None = None
    """The hook that it reads, where the files do not say."""
    accept_mismatch: bool = False
    """Import it although its model or hooks are not the store's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """How a transcoder reads a store."""

    source: Side
    rms_eps: float | None
    source_hook: str | None
    mismatches: tuple[str, ...]


def import_transcoder(path: Path, store: Store, run: Path, options: ImportOptions) -> Evaluation:
    """Read the transcoder at `path`, and make the new run `run` of it on `store`. Returns held-out figures.

    Raises `UserError` when it is none that is known, or its widths, model or hooks are not the store's, and
    `CorruptData` when a file is damaged. Nothing is written then.
    """
    if run.exists() and any(run.iterdir()):
        raise UserError(f"{run} exists; choose another --name")
    library, plain = read_transcoder(path)
    told = declared(path, library)
    reading = _reading(path, library, told, store, options)
    _require_widths(path, plain, store, reading.source)
    imported = Imported(
        library=library,
        path=str(path.resolve()),
        files=told.digests(),
        model=told.model,
        source_hook=reading.source_hook,
        target_hook=told.target_hook,
        accepted=reading.mismatches,
        metadata=told.metadata,
    )
    config = resolve(store, _settings(plain, store, reading), None)
    blocks = pinned(store, config.training_blocks)
    config = config.model_copy(update={"imported": imported, "blocks": blocks.digest})
    check_shards(store, config.training_blocks, verify=False)
    _tell(path, imported, store, reading)
    size = checkpoint_bytes(config.settings, config.d_in, config.d_out) // 3
    with store.reading(), durable.publish_folder(run, size) as folder:
        durable.publish_json(folder / BLOCKS, blocks.model_dump(mode="json"))
        return _write(plain, store.excluding(config.exclusion), config, folder)


def as_stored(config: RunConfig, store: Store) -> Transcoder:
    """Build the transcoder of an imported run: rows stay in the LLM's own units."""
    model = build_transcoder(config, store)
    for mean, scale in ((model.source_mean, model.source_scale), (model.target_mean, model.target_scale)):
        mean.zero_()
        scale.fill_(1)
    return model


def _write(plain: PlainTranscoder, store: Store, config: RunConfig, run: Path) -> Evaluation:
    """Measure, and write all but `blocks.json` of the run."""
    settings, rows = config.settings, rows_of(config, store)
    use_threads(settings.threads)
    with Progress("import", _PARTS, "parts") as progress:
        model = as_stored(config, store)
        plain.copy_to(model)
        progress.update(1, "thresholds")
        threshold = calibrate(model, rows)
        progress.update(2, "held-out rows")
        found = evaluate(model, rows, threshold, settings.seed)
        progress.update(3, "correlated latents")
        active = held_out_active(model, rows, store.record.report_blocks, threshold)
        dead = model.b_enc.new_ones(model.d_sae).bool()
        dead[active.active.latents.unique().to(dead.device)] = False
        monitor = CorrelationMonitor(run, settings.monitor, model, {"": slice(0, 1)}, settings.steps)
        report = monitor.report_held_out(settings.steps, active, dead)
        written = config.model_dump(mode="json")
        weights = model.state_dict() | {"threshold": threshold}
        figures = HeldOut(fvu=found.fvu, l0=found.l0)
        arithmetic_ = arithmetic(settings.device)
        checkpoint.publish(run, settings.steps, weights, {"imported": threshold[:0]}, arithmetic_, figures, written)
        record = _usage(settings.steps, found.rows, len(report.pairs))
        durable.publish_json(run / USAGE, sealed(record.model_dump(mode="json")))
        durable.publish_json(run / CONFIG, written)
        progress.update(_PARTS)
    return found


def _usage(steps: int, rows: int, pairs: int) -> UsageRecord:
    """Tell what was done for the run: `train watch` takes it for finished by this."""
    done = {
        "monitor": (pairs, "pairs listed in reports"),
        "evaluation": (rows, "held-out rows"),
        "checkpoint": (1, "checkpoints published"),
    }
    parts = {name: Component(calls=1, effect=effect, effect_counts=what) for name, (effect, what) in done.items()}
    return UsageRecord(step=steps, components=parts, rows={}, notes=[])


def _settings(plain: PlainTranscoder, store: Store, reading: _Reading) -> Settings:
    """Return the settings of a run of one step that trained nothing: all that has to do with training is off."""
    kind: dict[str, Any] = {"kind": "jumprelu"} if plain.k is None else {"kind": "topk", "k": plain.k}
    record = store.record
    rows = len(record.training_blocks) * sum(stratum.rows for stratum in record.plan.stored_strata)
    values = {
        "steps": 1,
        "source": reading.source,
        "transcoder": {
            "d_sae": plain.d_sae,
            "prefixes": (plain.d_sae,),
            "decoder_norm": "free",
            "skip": plain.W_skip is not None,
            "source_rms_eps": reading.rms_eps,
        },
        "activation": kind,
        "rows": {"batch_rows": max(1, min(1024, rows))},
        "auxk": {"coefficient": 0},
        "quiet": {"weight": 0},
        "optimizer": {"warmup_share": 0},
    }
    return build(Settings, values, "the imported transcoder")


def _reading(path: Path, library: str, told: Declared, store: Store, options: ImportOptions) -> _Reading:
    """Decide which side it reads, and how, by its hooks. Raises `UserError` where they are not the store's."""
    request, hook = store.request, _source_hook(path, library, told, store, options)
    source: Side = "target" if told.is_autoencoder or hook == request.target_hook else "source"
    reads = request.target_hook if source == "target" else request.source_hook
    over_rms = source == "source" and hook == f"blocks.{request.layer}.{_NORMALISED}" and hook != reads
    wrong = []
    if told.model and _short(told.model) != _short(request.model.name):
        wrong.append(f"it was trained on {told.model}, the store is of {request.model.name}")
    if over_rms and request.source_hook != f"blocks.{request.layer}.{_RESIDUAL}":
        wrong.append(
            f"it reads {hook}, which follows from {_RESIDUAL}, and the store's source is {request.source_hook}"
        )
        over_rms = False
    elif hook and hook != reads and not over_rms and not _same(hook, reads):
        wrong.append(f"it reads {hook}, the store has {reads}")
    if told.target_hook and told.target_hook != request.target_hook:
        wrong.append(f"it predicts {told.target_hook}, the store's target is {request.target_hook}")
    if wrong and not options.accept_mismatch:
        raise UserError(
            f"{path}: {'; '.join(wrong)}; pass the --store of its model and hooks, or import it anyway with "
            "--accept-mismatch, which the run records"
        )
    eps = _norm_eps(store, path) if over_rms else None
    return _Reading(source=source, rms_eps=eps, source_hook=hook, mismatches=tuple(wrong))


def _source_hook(path: Path, library: str, told: Declared, store: Store, options: ImportOptions) -> str | None:
    """Return the hook that it reads, by its files or as the user says. Raises `UserError` where these disagree."""
    given = options.source_hook
    if given and not given.startswith("blocks."):
        given = f"blocks.{store.request.layer}.{given}"
    if told.source_hook and given and told.source_hook != given and not options.accept_mismatch:
        raise UserError(f"{path}: its files say that it reads {told.source_hook}, and --source-hook says {given}")
    if library.startswith("Gemma Scope") and not given:
        raise UserError(
            f"{path}: files of {library} do not say what they read; of its transcoders, pass "
            f"--source-hook {_NORMALISED}; of another one, the hook that its place names"
        )
    return given or told.source_hook


def _same(hook: str, other: str) -> bool:
    """Tell whether two hooks name the same rows: the norm before the MLP reads the residual stream there."""
    return hook.replace(_NORM_INPUT, _RESIDUAL) == other.replace(_NORM_INPUT, _RESIDUAL)


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def _norm_eps(store: Store, path: Path) -> float:
    """Return what the model's norms add to the mean square. Raises `UserError` where the store does not say."""
    if not store.request.unembedding:
        raise UserError(
            f"{path} reads {_NORMALISED}, which depends on the eps of the model's norm, and {store.path} does not "
            "record it; harvest with store.unembedding=true"
        )
    kind, eps = Unembedding(store.path / UNEMBEDDING).final_norm
    if kind != "rms":
        raise UserError(
            f"{path} reads {_NORMALISED}, and the norms of {store.request.model.name} take the mean away first: such "
            "rows are not computed here"
        )
    return eps


def _require_widths(path: Path, plain: PlainTranscoder, store: Store, source: Side) -> None:
    """Raise `UserError` with both pairs of widths when they differ."""
    theirs = (len(plain.W_enc), len(plain.b_dec))
    ours = (source_width(store.record, source), store.record.d_out)
    if theirs != ours:
        kind = " (an autoencoder of the targets)" if source == "target" else ""
        raise UserError(
            f"{path} reads rows of {theirs[0]} values and predicts {theirs[1]}, {store.path} has {ours[0]} and "
            f"{ours[1]}{kind}; pass the store of its model and hooks"
        )
    if plain.k is not None and plain.k > plain.d_sae:
        raise UserError(f"{path}: k = {plain.k} is more than its {plain.d_sae} latents")


def _tell(path: Path, imported: Imported, store: Store, reading: _Reading) -> None:
    """Say what it is, and what is assumed."""
    request = store.request
    what = "an autoencoder of the targets" if reading.source == "target" else "a transcoder"
    said: Sequence[str] = [f"{path}: {what} of {imported.library}"]
    if reading.rms_eps is not None:
        said = [*said, f"source rows are divided by sqrt(mean square + {reading.rms_eps:g}), as {_NORMALISED} is"]
    unknown = [name for name in ("model", "source_hook", "target_hook") if getattr(imported, name) is None]
    if unknown:
        said = [*said, f"its files do not say its {', '.join(unknown)}: taken to be the store's ({request.source_hook} "
                f"to {request.target_hook} of {request.model.name})"]  # fmt: skip
    said = [*said, *(f"accepted: {one}" for one in imported.accepted)]
    say("; ".join(said))
