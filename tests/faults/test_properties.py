"""Every parser, given anything: what it promises, or one error of ours. Never another exception, never a hang."""

import json
import string
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from harvest.settings import Settings
from shared.config import build, load_preset, override
from shared.errors import CorruptData, ProjectError, UserError
from shared.files.durable import json_bytes, read_json
from shared.store.checks import read_vectors
from shared.store.packed import pack_shard, unpack_chunk, unpack_shard
from shared.store.strata import stratum_ranges
from tests.faults import targets
from tests.faults.targets import MODELS, RECORDS, SPEC, WIDTHS, seeds

pytestmark = [pytest.mark.fault(21), pytest.mark.timeout(120)]


def examples(count: int) -> Any:
    """The same examples every time, so that a failure repeats."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53 + 1, 2**64, -(2**63), 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from(["../x", "/etc/passwd", "a\0b", "\x1b[2J", "source", "x" * 5000, "bfloat16", "1"]),
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
SOUND: dict[str, list[bytes]] = {name: [data for target, data in seeds() if target == name] for name in targets.TARGETS}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON text with up to two places replaced, removed or renamed."""
    value = {"": json.loads(data)}
    for _ in range(draw(st.integers(1, 2))):
        place: tuple[Any, ...] = draw(st.sampled_from(list(places(value[""]))))
        *parents, last = ("", *place)
        table: Any = value
        for key in parents:
            table = table[key]
        change = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if change == "replace" or not parents:
            table[last] = draw(JSON)
        elif change == "remove":
            del table[last]
        elif isinstance(table, dict):
            table[draw(st.text(max_size=8))] = table.pop(last)
    return json_bytes(value[""])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("properties") / "file"


@examples(40)
@given(JSON)
def test_json_that_is_written_is_read_back(path: Path, value: Any) -> None:
    path.write_bytes(json_bytes(value))
    assert json_bytes(read_json(path)) == json_bytes(value)


@examples(40)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:0123456789eE+-.\\u tfn', max_size=60).map(str.encode))
def test_json_of_any_bytes_is_what_the_library_reads_or_an_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = read_json(path)
    except CorruptData as error:
        assert str(error).startswith(f"{path}: not valid JSON (") and "\n" not in str(error)
    else:
        assert found == json.loads(data)


@pytest.mark.parametrize("kind", range(len(MODELS)), ids=lambda kind: MODELS[kind].__name__)
def test_a_changed_record_is_valid_or_one_error(kind: int) -> None:
    data = SOUND["records"][kind]
    assert data[0] == kind

    @examples(50)
    @given(mutated(data[1:]))
    def check(changed: bytes) -> None:
        targets.records(bytes([kind]) + changed)

    check()


@pytest.mark.parametrize("kind", range(7), ids=lambda kind: RECORDS[kind])
def test_a_store_with_a_changed_record_opens_or_is_one_error(kind: int) -> None:
    data = SOUND["store"][kind]
    assert data[0] == kind

    @examples(15)
    @given(mutated(data[1:]))
    def check(changed: bytes) -> None:
        targets.store(bytes([kind]) + changed)

    check()


@examples(30)
@given(st.data())
def test_a_packed_store_with_a_changed_record_opens_or_is_one_error(data: st.DataObject) -> None:
    targets.packed_store(b"\7" + data.draw(mutated(SOUND["packed_store"][0][1:])))


ROWS = np.arange(SPEC.rows_per_block * 4, dtype=np.uint16).reshape(-1, 4)
RAW = b"".join(bytes(part) for part in SPEC.shard_buffers(ROWS)[0])
PACKED = pack_shard(SPEC, RAW)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with some changed, and perhaps cut or longer."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        found[draw(st.integers(0, len(found) - 1))] = draw(st.integers(0, 255))
    return bytes(
        found[: draw(st.integers(0, len(found)))] if draw(st.booleans()) else found + draw(st.binary(max_size=9))
    )


@examples(120)
@given(damaged(PACKED) | st.binary(max_size=200))
def test_a_damaged_packed_shard_is_never_of_another_size(data: bytes) -> None:
    try:
        assert len(unpack_shard(SPEC, data, Path("shard"))) == SPEC.shard_bytes
    except CorruptData as error:
        assert str(error).startswith("shard: ")


@examples(120)
@given(damaged(PACKED[:144]) | st.binary(max_size=200))
def test_a_damaged_chunk_is_never_of_another_size(data: bytes) -> None:
    try:
        assert len(unpack_chunk(SPEC, data, Path("shard"))) == ROWS.nbytes
    except CorruptData as error:
        assert str(error).startswith("shard: ")


@examples(40)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=64, max_size=64))
def test_any_rows_come_back_from_packing(values: list[int]) -> None:
    data = np.array(values, np.uint16).tobytes() + RAW[len(values) * 2 :]
    assert unpack_shard(SPEC, pack_shard(SPEC, data), Path("shard")) == data


VECTORS = save({name: np.arange(width, dtype=np.float64) for name, width in WIDTHS.items()})


@examples(40)
@given(damaged(VECTORS) | st.binary(max_size=100))
def test_statistics_of_any_bytes_are_finite_vectors_or_an_error(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    try:
        found = read_vectors(path, WIDTHS)
    except CorruptData as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert {name: values.shape for name, values in found.items()} == {name: (d,) for name, d in WIDTHS.items()}
        assert all(np.isfinite(values).all() for values in found.values())


@examples(60)
@given(damaged(SOUND["unembedding"][0]) | st.binary(max_size=100))
def test_an_unembedding_of_any_bytes_gives_effects_or_an_error(data: bytes) -> None:
    targets.unembedding(data)


WORDS = st.sampled_from(
    ["store", "windows", "text", "seed", "tokens", "edges", "keep", "kind", "name", "a", "", " ", '"']
)
NAMES = st.lists(WORDS, max_size=5).map(".".join)
VALUES = st.one_of(
    JSON.map(json.dumps),
    st.text(alphabet=string.printable, max_size=30),
    st.sampled_from(["{a=1}", "[", "{", '"', "1979-05-27"]),
)


@examples(120)
@given(st.lists(st.tuples(NAMES, st.sampled_from(["=", " = ", ""]), VALUES).map("".join), max_size=4))
def test_assignments_make_settings_or_one_line(assignments: list[str]) -> None:
    try:
        raw = override({"label": "x", "tokens": 10, "store": {"edges": [0, 1]}}, assignments, variants=("text",))
        found = build(Settings, raw, "x")
    except UserError as error:
        assert len(str(error)) < 2000
    else:
        assert found.tokens >= 1 and found.store.edges[0] == 0


@examples(40)
@given(
    st.text(alphabet=string.printable, max_size=80) | st.binary(max_size=60).map(lambda data: data.decode("latin-1"))
)
def test_a_preset_of_any_text_is_settings_or_one_error(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    try:
        assert isinstance(load_preset(path.parent, "x", path), dict)
    except UserError as error:
        assert str(error).startswith(f"{path}: cannot be read as TOML: ")


@examples(40)
@given(
    st.lists(st.integers(-5, 70), max_size=8) | st.sets(st.integers(1, 70), max_size=8).map(lambda s: [0, *sorted(s)]),
    st.integers(1, 64),
)
def test_strata_cover_every_position_once_or_are_refused(edges: list[int], context_size: int) -> None:
    rising = bool(edges) and edges[0] == 0 and all(a < b for a, b in pairwise(edges))
    try:
        ranges = stratum_ranges(edges, context_size)
    except ValueError:
        assert not rising
    else:
        assert rising and [p for start, stop in ranges for p in range(start, stop)] == list(range(context_size))


ROW = st.builds(
    lambda step, more: {"step": step} | more,
    st.integers(1, 9),
    st.dictionaries(st.sampled_from(["loss", "a"]), st.integers(0, 9) | st.floats(-1e99, 1e99)),
)


@examples(60)
@given(st.lists(ROW, max_size=5), st.integers(0, 100), st.binary(max_size=20))
def test_rows_of_metrics_survive_a_torn_last_line(
    path: Path, rows: list[dict[str, Any]], cut: int, noise: bytes
) -> None:
    from train.run.metrics import Log

    whole = "".join(
        json.dumps(row, allow_nan=False) + "\n" for row in rows if all(abs(v) < 1e300 for v in row.values())
    )
    kept = [json.loads(line) for line in whole.splitlines()]
    last = (whole.splitlines()[-1:] or [""])[0].encode()
    torn = last[: cut % max(1, len(last))].rstrip(b"}")
    path.write_bytes(whole.encode() + torn)
    assert Log(path).rows() == kept
    path.write_bytes(whole.encode() + noise)
    assert Log(path).rows()[: len(kept)] == kept


@examples(40)
@given(st.binary(max_size=200))
def test_no_bytes_hurt_the_store_opener(data: bytes) -> None:
    try:
        targets.store(data)
    except ProjectError:  # the target lets none through
        raise AssertionError from None
