"""Fuzz targets of a run's files, as `targets.py` has them of a store's: logs, records and samples."""

import atexit
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console

from shared.console.terminal import Verbosity, with_verbosity
from shared.errors import ProjectError
from shared.store.strata import positions
from train.compare.measure import cost_per_step
from train.live.run_files import CONFIG, METRICS, REPORTS, TIMING, USAGE, Lines
from train.live.status import Status
from train.live.training_panel import RunPanel
from train.live.watch import Watched
from train.model import checkpoint
from train.report import gather
from train.report.browser import cut
from train.report.latents import peaks
from train.run.metrics import Log, evaluation_of
from train.run.settings import load_settings, read_config
from train.run.usage import usage_of
from train.samples.parquet import RECORD, SamplesRecord, parquet, paths, read_contexts, read_latents
from train.samples.select import SamplesConfig

FIXTURE = Path(__file__).parent / "fixtures/run-format-3"
EVERY_STEP = 2**53


def metrics(data: bytes) -> None:
    """metrics.jsonl: shown by `watch`, and the curves of a report; a row is right, or left out."""
    path, status = _write(METRICS, data), Status(_run(), 100, 48)
    for row in Lines(path).read():
        status.add(row)
        _shown(status)
    rows = Log(path).rows()
    gather.training_curves(rows, EVERY_STEP).model_dump_json()
    if found := evaluation_of(rows, path):
        " ".join(positions(name) for name in found[1].strata)  # as a report's verdict and tables name them
    Log(path).cut(50)


def timing(data: bytes) -> None:
    """timing.jsonl: the same, and what `compare` makes of it."""
    path, status = _write(TIMING, data), Status(_run(), 100, 48)
    for row in Lines(path).read():
        status.update(row, {})
        _shown(status)
    gather.timing_curves(_run(), EVERY_STEP).model_dump_json()
    cost_per_step(_run(), load_settings("tiny", ["evaluation.every=2000", "checkpoint.every=500"]))


def usage(data: bytes) -> None:
    """usage.json: shown, or left out."""
    _write(USAGE, data)
    status = Status(_run(), 100, 48)
    if found := usage_of(_run()):
        status.update({}, found.model_dump(mode="json"))
    _shown(status)


def correlation(data: bytes) -> None:
    """A report of the correlation monitor: curves and pairs, or one error."""
    path = _write(f"{REPORTS}/correlation-000010.json", data)
    with suppress(ProjectError):
        gather.monitor_curves(_run(), EVERY_STEP).model_dump_json()
        gather.duplicates(_run(), EVERY_STEP, 64)
    path.unlink()


def state(data: bytes) -> None:
    """state.json of a checkpoint: what there is to say of it, or one error."""
    folder = checkpoint.folder(_run(), 20)
    _write(str((folder / checkpoint.STATE).relative_to(_run())), data)
    assert checkpoint.listed(folder).model_dump_json()
    with suppress(ProjectError):
        checkpoint.find(_run())


def config(data: bytes) -> None:
    """config.json: settings for `resume` and for `watch`, or one error."""
    _write(CONFIG, data)
    with suppress(ProjectError):
        read_config(_run())
    with suppress(ProjectError):
        watched = Watched(_run())
        for _ in watched.look():
            pass
        watched.line(), watched.sentence(), json.dumps(watched.as_json(), allow_nan=False)
        _printed(watched.panel())


def samples(data: bytes) -> None:
    """Both files of samples: what a report takes of them, or one error."""
    contexts, latents = paths(_run(), 20)
    kind = (data[:1] or b"\0")[0] % 2
    path = _write(str((latents if kind else contexts).relative_to(_run())), data[1:])
    with suppress(ProjectError):
        if kind:
            gather.density(read_latents(path))
        else:
            table = read_contexts(path)
            size = SamplesRecord.model_validate_json(table.schema.metadata[RECORD]).d_sae
            if size < 1000:
                peaks(table, size)
                cut(table, size)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (metrics, timing, usage, correlation, state, config, samples)
}


def seeds() -> Iterator[tuple[str, bytes]]:
    """(target, input) of sound files."""
    row = (FIXTURE / METRICS).read_bytes().splitlines(keepends=True)[0]
    yield "metrics", row
    yield (
        "metrics",
        row.replace(b'"strata": {', b'"strata": {"outliers": {"rows": 2, "fvu": 1.5, "l0_training_rule": 3.0}, ', 1),
    )
    clocks = {"from_step": 0, "seconds": 2.5, "cpu_seconds": 2.0, "data_wait": 0.1, "data_wait_share": 0.04}
    lines = [{"step": step, "rows": 48 * step, **clocks, "seconds": 0.25 * step} for step in (10, 20, 30)]
    yield "timing", "".join(json.dumps(line) + "\n" for line in lines).encode()
    component = {"calls": 3, "effect": 1.5, "effect_counts": "held-out rows"}
    counts = {"step": 20, "components": {"evaluation": component}, "rows": {"004-016": 48}, "notes": []}
    yield "usage", json.dumps(counts).encode()
    yield "correlation", json.dumps(_correlation()).encode()
    yield "state", (checkpoint.folder(FIXTURE, 20) / checkpoint.STATE).read_bytes()
    yield "config", (FIXTURE / CONFIG).read_bytes()
    contexts, latents = _tables()
    yield "samples", b"\0" + parquet(contexts)
    yield "samples", b"\1" + parquet(latents)


def _shown(status: Status) -> None:
    """All that is shown of a status."""
    with with_verbosity(Verbosity.VERBOSE):
        status.pace.line(), status.note(), status.detail()
        _printed(RunPanel(status).draw(status.pace, "running"))
    json.dumps(status.as_json(), allow_nan=False)


def _printed(shown: object) -> None:
    Console(file=io.StringIO(), width=110).print(shown)


def _correlation() -> dict[str, object]:
    over = {"rows": 480, "largest": 0.9, "pairs_above": {"0.5": 2, "0.8": 1}}
    directions = {
        "step": 10, "live": 60, "share_with_neighbour_above": {"0.7": 0.1, "0.8": 0.1},
        "share_within_segment_above": {"0.7": 0.1},
        "largest": 0.8, "effective_number": 55.0, "effective_rank": 4.0,
    }  # fmt: skip
    pair = {
        "latents": [{"latent": i, "prefix": 16, "rows": 20, "strata": {"004-016": 0.1}} for i in (1, 2)],
        "cosine": 0.7, "correlation": 0.9, "correlation_with_position_0": 0.9, "jaccard": 0.6, "rows_together": 18,
        "within_segment": True, "reports": 1,
    }  # fmt: skip
    sample = {"rows_of": "training steps", "first_step": 1, "last_step": 10, "strata": {"004-016": 480}}
    return {
        "step": 10, "sample": sample, "least_together": 10, "without_position_0": over, "with_position_0": over,
        "strata": None, "directions": directions, "pairs": [pair], "clusters": [[1, 2]], "persisting_pairs": 0,
        "change": None,
    }  # fmt: skip


def _tables() -> tuple[pa.Table, pa.Table]:
    """Samples of two latents, with the columns that a report reads."""
    record = SamplesRecord(
        request="0" * 64, step=20, source="source", d_sae=2, first_sequence=0, sequences=2, rows={"004-016": 24},
        latents=2, contexts=2, seed=0, settings=SamplesConfig(),
    )  # fmt: skip
    kind = pa.array(["top", "top"]).dictionary_encode()
    small = {"latent": pa.array([0, 1], pa.int32()), "rank": pa.array([0, 0], pa.int16())}
    contexts = small | {
        "kind": kind,
        "activation": pa.array([1.5, 0.5], pa.float32()),
        "position": pa.array([5, 6], pa.int32()),
        "peak": pa.array([1, 0], pa.int32()),
        "tokens": pa.array([[3, 4], [5, 6]], pa.list_(pa.int32())),
        "text": pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string())),
        "activations": pa.array([[None, 1.5], [0.5, 0.0]], pa.list_(pa.float32())),
    }
    ones = pa.array(np.ones(2))
    latents = {
        "latent": small["latent"], "prefix": pa.array([1, 2], pa.int32()), "contexts": pa.array([1, 1], pa.int32()),
        "density": ones, "max": ones, "mean": ones, "bin_edges": pa.array([[1.0], None], pa.list_(pa.float32())),
        "density_004-016": ones,
    }  # fmt: skip
    metadata = {RECORD: record.model_dump_json()}
    return pa.table(contexts).replace_schema_metadata(metadata), pa.table(latents).replace_schema_metadata(metadata)


def _write(name: str, data: bytes) -> Path:
    """Put a file into the run."""
    path = _run() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@cache
def _run() -> Path:
    """A run's folder, with sound files but for the one that is replaced."""
    folder = Path(tempfile.mkdtemp(prefix="transcoder-cache-fuzz-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(shutil.copytree(FIXTURE, folder / "run"))
