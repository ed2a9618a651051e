"""Measures a run's transcoder in the place of its LLM's MLP, on held-out windows. A kill costs one batch.

Every batch leaves its sums in the run's folder, `splice/<digest>/batch-000000.json`. They hold float64 as JSON has it,
exactly, so that a measurement that was stopped and started again ends with the same record, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harvest.commands.repair import own_model
from harvest.llm.model import load_model
from harvest.splice import figures
from harvest.splice.figures import BatchSums
from harvest.splice.forward import Splicer, losses
from harvest.splice.replacements import LoadedRun, Replacement, linear, mean_target, of_run, open_run, read_replacement
from harvest.text.packing import Windows, model_positions
from harvest.writer.target import Target, read_block
from shared.config import json_digest, read_record
from shared.console.progress import Progress
from shared.console.terminal import say
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.object_store import require_folder
from shared.splice_record import FILE, SplicePart, SpliceRecord, publish_splice, read_splice
from shared.store.store import Store

_LOGITS = 2**26
"""Of one forward pass, at most; a single window may have more."""
_MOST_WINDOWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SpliceOptions:
    """What to measure."""

    step: int | None = None
    """Of the checkpoint; none: the newest."""
    transcoder: Path | None = None
    """Another transcoder for the run's hooks, of any library; none: the run's own."""
    tokens: int = 65_536
    """Held-out tokens, rounded up to whole windows."""
    linear: bool = False
    """Also put the best linear map there: it is fitted on all training rows first."""
    model: str | None = None
    """Where the store's model is, if not where the store says."""


def splice(run: Path, options: SpliceOptions) -> SpliceRecord:
    """Measure, continue or find the measurement of `run`; publishes it in the run's folder and returns it.

    Raises `UserError` without such a run, model or transcoder, `CorruptData` when one is damaged, and `DiskFull`.
    """
    loaded = open_run(run, options.step)
    store = loaded.rows.store
    replacement = read_replacement(options.transcoder, store) if options.transcoder else of_run(loaded)
    windows = _windows(store, options.tokens)
    files = own_model(store.request, options.model)
    batch = _batch(store, len(windows.tokens), files.folder)
    asked = json_digest(_asked(store, replacement, windows, batch, options.linear))
    path = run / (f"splice-{replacement.weights[:12]}.json" if options.transcoder else FILE)
    if (known := read_splice(path)) and known.asked == asked:
        say(f"{path} has this measurement")
        return known
    folder = run / "splice" / asked[:16]
    durable.make_folder(folder)
    with store.reading(), durable.lock(run / "splice" / "lock", f"the splice of {run}"):
        splicer = (
            None if _whole(folder, windows, batch) else _splicer(loaded, replacement, files.folder, options.linear)
        )
        sums = _measured(splicer, store, windows, folder, batch)
        record = _record(store, replacement, asked, sums, len(windows.tokens))
        publish_splice(path, record)
        durable.remove_folder(folder)
    return record


def _windows(store: Store, tokens: int) -> Windows:
    """Return held-out windows on which figures are reported, evenly spaced: no run trains or calibrates on them."""
    record = store.record
    require_folder(store.place, "splice")
    parts = [read_block(_target(store), block) for block in record.report_blocks]
    if not parts:
        raise UserError(f"{store.path} has no held-out blocks, so there is no text to measure on; harvest with some")
    every = Windows(*(np.concatenate(side) for side in zip(*parts, strict=True)))
    total = len(every.tokens)
    count = min(total, -(-tokens // store.request.context_size))
    return Windows(*(side[np.arange(count) * total // count] for side in every))


def _target(store: Store) -> Target:
    return Target(path=store.path, request=store.request, plan=store.record.plan)


def _batch(store: Store, windows: int, folder: Path) -> int:
    """Return the windows of a forward pass."""
    from harvest.llm.model_files import read_shape

    logits = store.request.context_size * read_shape(folder).vocabulary
    return max(1, min(_MOST_WINDOWS, windows, _LOGITS // logits))


def _asked(store: Store, replacement: Replacement, windows: Windows, batch: int, with_linear: bool) -> dict[str, Any]:
    return {
        "store": store.request.digest,
        "weights": replacement.weights,
        "windows": len(windows.tokens),
        "batch": batch,
        "linear": with_linear and store.record.blocks,
        "exclusion": store.exclusion and store.exclusion.model_dump(mode="json"),
    }


def _splicer(loaded: LoadedRun, replacement: Replacement, folder: Path, with_linear: bool) -> Splicer:
    store = loaded.rows.store
    request = store.request
    if replacement.source == "target" and with_linear:
        raise UserError("the best linear map of the targets to themselves changes nothing; leave --linear out")
    hooks = [request.source_hook, request.target_hook]
    return Splicer(
        model=load_model(folder, request.model.dtype, request.model.device, hooks, whole=True),
        source_hook=request.source_hook,
        target_hook=request.target_hook,
        replacement=replacement,
        mean=mean_target(store),
        linear=linear(loaded) if with_linear else None,
        exclusion=store.exclusion,
    )


def _batch_path(folder: Path, number: int) -> Path:
    return folder / f"batch-{number:06d}.json"


def _whole(folder: Path, windows: Windows, batch: int) -> bool:
    return all(_batch_path(folder, i).is_file() for i in range(-(-len(windows.tokens) // batch)))


def _measured(splicer: Splicer | None, store: Store, windows: Windows, folder: Path, batch: int) -> list[BatchSums]:
    """Return the sums of every batch; those that an earlier start left are read."""
    starts = range(0, len(windows.tokens), batch)
    positions = model_positions(windows, store.request.documents)
    strata = _stratum_of(store, positions)
    known = sum(_batch_path(folder, number).is_file() for number in range(len(starts)))
    found = []
    with Progress("splice", len(starts), "batches", done=known) as bar:
        for number, start in enumerate(starts):
            path, part = _batch_path(folder, number), slice(start, start + batch)
            if not path.is_file():
                assert splicer is not None
                ids, places = (torch.from_numpy(array[part].astype(np.int64)) for array in (windows.tokens, positions))
                device = store.request.model.device
                one = losses(splicer, ids.to(device), places.to(device))
                sums = figures.batch_sums(one, windows.documents[part], strata[part])
                durable.publish_json(path, sums.model_dump(mode="json"))
            found.append(_read(path))
            bar.update(max(known, number + 1))
    return found


def _read(path: Path) -> BatchSums:
    try:
        return read_record(BatchSums, durable.read_json(path), path)
    except CorruptData as error:
        raise CorruptData(f"{error}; remove the file, and start again") from error


def _stratum_of(store: Store, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each position's stratum among those of the store."""
    starts = [s.start for s in store.record.plan.stored_strata]
    return np.maximum(np.searchsorted(starts, positions, side="right") - 1, 0)


def _record(store: Store, replacement: Replacement, asked: str, sums: list[BatchSums], windows: int) -> SpliceRecord:
    strata = store.record.plan.stored_strata
    counted = [i for i, s in enumerate(strata) if not s.is_position_0] or [0]
    parts = {s.name: figures.part_of(sums, [i]) for i, s in enumerate(strata)}
    whole: SplicePart | None = figures.part_of(sums, counted)
    if whole is None:
        raise UserError(f"{store.path}: its held-out windows have no token to predict after position 0")
    return SpliceRecord(
        asked=asked,
        store=store.request.digest,
        library=replacement.library,
        weights=replacement.weights,
        step=replacement.step,
        windows=windows,
        rows=sum(one.rows for one in sums),
        rows_left=sum(one.left for one in sums),
        whole=whole,
        strata={name: part for name, part in parts.items() if part},
    )
