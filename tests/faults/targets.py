"""What is fuzzed: each target takes any bytes, and raises only where that is a fault of this project.

The first byte of an input says which file it stands for, where a target has several.
"""

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from harvest.commands.archive import pack
from shared.config import Config, load_preset, override, read_record
from shared.errors import CorruptData, ProjectError
from shared.files.durable import read_json
from shared.store import packed
from shared.store.arrays import ArraySpec
from shared.store.checks import read_vectors
from shared.store.layout import ARRAYS, LedgerRecord, StorePlan, StoreRecord, StoreRequest, moments_path, record_path
from shared.store.store import Local, Store
from shared.store.unembedding import Unembedding
from tests.faults import targets_of_inputs as inputs
from tests.faults import targets_of_runs as runs
from tests.stores import make_store

MODELS: tuple[type[Config], ...] = (StoreRecord, StoreRequest, StorePlan, LedgerRecord, packed.PackedRecord)
RECORDS = (
    "store.json",
    "request.json",
    "plan.json",
    record_path(1),
    f"{ARRAYS}/zarr.json",
    f"{ARRAYS}/tokens/zarr.json",
    f"{ARRAYS}/strata/000-008/source/zarr.json",
    moments_path(1),
    "statistics-000002.safetensors",
    f"{ARRAYS}/strata/000-008/position/c/1",
)
SPEC = ArraySpec(path="strata/000-008/source", dtype="uint16", width=4, rows_per_block=16, dimension_names=("row", "x"))
WIDTHS = {"overall/source/mean": 4, "overall/source/variance": 4}


def json_file(data: bytes) -> None:
    """`read_json`: a value, or `CorruptData`."""
    with suppress(CorruptData):
        read_json(_scratch(data))


def records(data: bytes) -> None:
    """Every record model: an object that reads back as it is, or `CorruptData`."""
    path, model = _scratch(data[1:]), MODELS[(data[:1] or b"\0")[0] % len(MODELS)]
    with suppress(CorruptData):
        record = read_record(model, read_json(path), path)
        assert read_record(model, record.model_dump(mode="json"), path) == record


def store(data: bytes) -> None:
    """A store one of whose files was replaced: opened, verified and read, or one error."""
    _opened(_raw(), RECORDS, data)


def packed_store(data: bytes) -> None:
    """The same of a packed store."""
    _opened(_packed(), (*RECORDS[:7], "packed.json", f"{ARRAYS}/strata/000-008/source/c/1/0"), data)


def shard(data: bytes) -> None:
    """A packed shard file: rows of the right size, or `CorruptData`."""
    with suppress(CorruptData):
        assert len(packed.unpack_shard(SPEC, data, Path("shard"))) == SPEC.shard_bytes


def chunk(data: bytes) -> None:
    """One packed chunk, without the index that would be damaged first."""
    with suppress(CorruptData):
        assert len(packed.unpack_chunk(SPEC, data, Path("shard"))) == SPEC.inner_rows * SPEC.row_bytes


def vectors(data: bytes) -> None:
    """Statistics: finite vectors as wide as asked for, or `CorruptData`."""
    with suppress(CorruptData):
        found = read_vectors(_scratch(data), WIDTHS)
        assert all(values.shape == (4,) and np.isfinite(values).all() for values in found.values())


def unembedding(data: bytes) -> None:
    """An unembedding: effects of directions, or one error."""
    with suppress(ProjectError):
        read = Unembedding(_scratch(data))
        width = read._weight.shape[1]
        assert read.effects(np.ones((1, width), np.float32), 2).promoted.shape[0] == 1


def settings(data: bytes) -> None:
    """A preset file, and `--set`: settings, or `UserError`."""
    path = _scratch(data)
    with suppress(ProjectError):
        load_preset(path.parent, "x", path)
    with suppress(ProjectError):
        override({"a": {"b": 1}}, data.decode(errors="replace").split("\n"), variants=("a",))


TARGETS: dict[str, Callable[[bytes], None]] = (
    {
        target.__name__: target
        for target in (json_file, records, store, packed_store, shard, chunk, vectors, unembedding, settings)
    }
    | runs.TARGETS
    | inputs.TARGETS
)


def seeds() -> Iterator[tuple[str, bytes]]:
    """(target, input) of sound files: what mutation starts from."""
    for i, name in enumerate(RECORDS):
        yield "store", bytes([i]) + (_raw() / name).read_bytes()
    for i, name in enumerate(("store.json", "request.json", "plan.json", record_path(1))):
        yield "records", bytes([i]) + (_raw() / name).read_bytes()
    yield "records", b"\4" + (_packed() / "packed.json").read_bytes()
    yield "packed_store", b"\7" + (_packed() / "packed.json").read_bytes()
    source = (_packed() / ARRAYS / "strata/000-008/source/c/1/0").read_bytes()
    yield "packed_store", b"\x08" + source
    yield "shard", source
    yield "chunk", source[: -packed.footer_bytes(SPEC)]
    yield "json_file", b'{"a": [1, -2.5e3, null, true, "\\u00e9\\ud83d\\ude00"], "b": {"c": {}}}'
    yield "settings", b'seed = 1\n[a]\nb = [1, 2]\nc = { d = "x" }\n'
    yield "vectors", save({name: np.ones(width) for name, width in WIDTHS.items()})
    parts = {"W_U": np.ones((5, 4), np.float32), "final_norm.gain": np.ones(4, np.float32)}
    yield "unembedding", save(parts)
    yield from runs.seeds()
    yield from inputs.seeds()


def _opened(path: Path, names: tuple[str, ...], data: bytes) -> None:
    name = names[(data[:1] or b"\0")[0] % len(names)]
    with _replaced(path / name, data[1:]), suppress(ProjectError):
        found = Store.open(path, Local(folder=_folder() / "local") if path == _packed() else None)
        for rows in found.strata.values():
            for array in (rows.source, rows.target, rows.position):
                out = np.zeros((array.rows, *([array.spec.width] if array.spec.width else [])), array.spec.dtype)
                array.read(0, array.rows, out)
        assert all(wrong is None or isinstance(wrong, str) for _, wrong in found.verify())


@contextmanager
def _replaced(path: Path, data: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def _scratch(data: bytes) -> Path:
    path = _folder() / "scratch"
    path.write_bytes(data)
    return path


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="transcoder-cache-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _raw() -> Path:
    return make_store(
        _folder() / "raw",
        d_in=4,
        d_out=4,
        training_blocks=1,
        context_size=8,
        edges=(0,),
        block_sequences=2,
        held_out_blocks=1,
    ).path


@cache
def _packed() -> Path:
    pack(_raw(), _folder() / "packed")
    return _folder() / "packed"
