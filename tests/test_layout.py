import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from pydantic import BaseModel, ValidationError
from zarr.core.metadata import ArrayV3Metadata

from shared.files import durable
from shared.store import arrays, layout
from shared.store.arrays import ArraySpec
from shared.store.layout import FileRecord, StoreRequest
from tests.stores import decode, encode, make_request, make_store, stock_array


def spec(rows: int, width: int | None = 8, dtype: str = "uint16") -> ArraySpec:
    names = ("row",) if width is None else ("row", "column")
    return ArraySpec(path="strata/000-001/x", dtype=dtype, width=width, rows_per_block=rows, dimension_names=names)


# Geometry


@pytest.mark.parametrize("limit", [4096, 100_000, 2**20])
def test_shards_against_brute_force(monkeypatch, limit):
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", limit)
    for rows in [1, 5, 255, 256, 512, 768, 1024, 1280, 256 * 12, 256 * 17, 256 * 60]:
        for width, dtype in [(None, "uint16"), (None, "uint32"), (3, "uint16"), (64, "uint16"), (700, "float32")]:
            array = spec(rows, width, dtype)
            inner = min(256, rows)
            row = np.dtype(dtype).itemsize * (width or 1)
            fitting = [n for n in range(inner, rows + 1, inner) if rows % n == 0 and n * row <= limit]
            expected = max(fitting, default=inner)  # one inner chunk is the least a shard can be
            assert array.rows_per_shard == expected, (rows, width, dtype)
            assert array.shards_per_block * array.rows_per_shard == rows
            assert array.payload_bytes == expected * row
            assert array.shard_bytes == expected * row + 16 * (expected // inner) + 4


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "rows_per_shard"),
    [
        (256 * 64, 2304, "uint16", 16_384),  # 72 MiB: one shard
        (256 * 512, 2304, "uint16", 16_384),  # 576 MiB; 28,672 rows would fit and do not divide
        (256 * 192, 4608, "float32", 6144),
        (256 * 97, 2304, "uint16", 24_832),  # 109 MiB
        (256 * 127, 2304, "uint16", 256),  # a prime number of chunks that is too large: one chunk per file
    ],
)
def test_shards_of_real_sizes_stay_within_128_mib(rows, width, dtype, rows_per_shard):
    array = spec(rows, width, dtype)
    assert array.rows_per_shard == rows_per_shard
    assert array.payload_bytes <= 128 * 2**20


def test_blocks_follow_each_other_without_gaps(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", 8192)
    array = spec(1536, 8)
    assert (array.rows_per_shard, array.shards_per_block) == (512, 3)
    assert [n for block in range(4) for n in array.block_shards(block)] == list(range(12))
    assert array.shard_path(7) == "strata/000-001/x/c/7/0"
    assert spec(1536, None).shard_path(7) == "strata/000-001/x/c/7"


@pytest.mark.parametrize("rows", [0, -1, 257, 300, 511, 1000])
def test_a_block_that_is_not_whole_chunks_is_refused(rows):
    with pytest.raises(ValueError, match=f"got {rows}"):
        spec(rows)


def test_the_footer_is_offsets_sizes_and_crc():
    array = spec(1024, 8)
    assert array.rows_per_shard == 1024
    *index, crc = struct.unpack("<8QI", array.footer())
    chunk = 256 * 8 * 2
    assert index == [0, chunk, chunk, chunk, 2 * chunk, chunk, 3 * chunk, chunk]
    assert crc == google_crc32c.value(struct.pack("<8Q", *index))


def test_crc32c_is_castagnoli():
    assert google_crc32c.value(b"123456789") == 0xE3069283


def test_shard_files_are_the_rows_in_order_then_the_footer(monkeypatch):
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", 8192)
    array = spec(1536, 8)
    rows = np.arange(1536 * 8).astype(np.uint16).reshape(1536, 8)
    files = [b"".join(bytes(part) for part in buffers) for buffers in array.shard_buffers(rows)]
    assert len(files) == 3
    assert all(len(file) == array.shard_bytes for file in files)
    assert all(file.endswith(array.footer()) for file in files)
    assert b"".join(file[: array.payload_bytes] for file in files) == rows.tobytes()


def test_strided_rows_are_written_in_c_order():
    array = spec(512, 8)
    rows = np.asfortranarray(np.arange(512 * 8).astype(np.uint16).reshape(512, 8))
    assert bytes(array.shard_buffers(rows)[0][0]) == rows.tobytes()


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((511, 8), np.uint16),
        np.zeros((512, 7), np.uint16),
        np.zeros(512, np.uint16),
        np.zeros((512, 8), np.int16),
        np.zeros((512, 8), np.float16),
        np.zeros((512, 8), ">u2"),
    ],
)
def test_rows_that_are_not_one_block_are_refused(rows):
    with pytest.raises(ValueError, match=r"strata/000-001/x: a block is uint16 \(512, 8\), got"):
        spec(512, 8).shard_buffers(rows)


# The request and its digest


def test_the_digest_is_pinned():
    """Stores are found by it: a change makes every store on disk unknown."""
    request = make_request()
    assert request.digest == "5cccc5a576c6cf3089fbceaad5dfbb404d0913b04e346e8f5a908003d7aa02d7"
    assert request.folder == "synthetic-L3-5cccc5"


def leaves(value: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name in type(value).model_fields:
        field = getattr(value, name)
        found += leaves(field, (*path, name)) if isinstance(field, BaseModel) else [(*path, name)]
    return found


OTHER: dict[str, Any] = {
    "weights": "00" * 32,
    "tokenizer": "00" * 32,
    "digest": "00" * 32,
    "dtype": "bfloat16",
    "device": "cuda",
    "attention": "sdpa",
    "kind": "messages",
    "order": "as_read",
    "storage": "float16",
    "edges": [0, 1, 4],
    "keep": {0: 0.5},
    "context_size": 31,
    "block_sequences": 32,
    "bos": False,
    "documents": "apart",
    "cap": {0: 5},
    "exclude_special": True,
    "max_norm_quantile": 0.5,
    "unembedding": True,
    "imported": {
        "format": "npy",
        "files": [{"name": "source.npy", "bytes": 1, "sha256": "ab" * 32}],
        "source": "source",
        "target": "target",
        "tokens": None,
        "positions": True,
    },
}


@pytest.mark.parametrize("path", leaves(make_request()), ids=".".join)
def test_every_field_changes_the_digest(path):
    request = make_request()
    data = request.model_dump()
    table = data
    for name in path[:-1]:
        table = table[name]
    old = table.get(path[-1])  # `imported` is not there
    new = OTHER.get(path[-1], old + 1 if isinstance(old, int) else f"{old}x")
    assert new != old
    table[path[-1]] = new
    assert StoreRequest.model_validate(data).digest != request.digest


def test_the_digest_survives_json(tmp_path):
    request = make_request(keep={0: 0.1, 16: 1 / 3})
    durable.publish_json(tmp_path / "request.json", request.model_dump(mode="json"))
    read = StoreRequest.model_validate(durable.read_json(tmp_path / "request.json"))
    assert read == request
    assert read.digest == request.digest


def test_the_order_of_keep_does_not_matter():
    assert make_request(keep={0: 0.5, 4: 0.25}).digest == make_request(keep={4: 0.25, 0: 0.5}).digest


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"edges": (1, 4)}, "must start with 0 and rise"),
        ({"keep": {2: 0.5}}, "keep names position 2"),
        ({"keep": {0: 0.0}}, "above 0 and at most 1"),
        ({"block_sequences": 300}, "multiple of 256 or less, got 300"),
        ({"block_sequences": 0}, "greater than or equal to 1"),
        ({"context_size": 0}, "greater than or equal to 1"),
        ({"context_size": 65_537}, "less than or equal to 65536"),
    ],
)
def test_a_request_that_no_store_can_hold_is_refused(option, message):
    with pytest.raises(ValidationError, match=message):
        make_request(**option)


@pytest.mark.fault(22)
@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "a//b", "", ".", "a/./b", "a\0b", ".."])
def test_a_record_names_nothing_outside_its_store(name):
    file = FileRecord(bytes=0, crc32c="00000000")
    with pytest.raises(ValidationError, match="not the path of a file below the store"):
        layout.LedgerRecord(block=0, batch_sequences=1, d_in=1, d_out=1, files={name: file}, tokens={}, moments=file)


def test_block_bytes_are_what_lies_on_disk(tmp_path):
    made = make_store(tmp_path / "s", training_blocks=1, held_out_blocks=0, keep={0: 0.5, 4: 0.3})
    files = [path for path in (made.path / layout.ARRAYS).rglob("*") if path.is_file() and path.name != "zarr.json"]
    assert layout.block_bytes(layout.store_specs(made.record.request, made.record.plan.stored_strata, 16, 24)) == sum(
        path.stat().st_size for path in files
    )


def test_record_paths():
    assert layout.record_path(12) == "ledger/000012.json"
    assert layout.moments_path(12) == "ledger/000012.moments.safetensors"


# Stock zarr reads what we write


SHAPES: dict[str, dict[str, Any]] = {
    "rows below a chunk": {"context_size": 8, "edges": (0, 1, 4), "block_sequences": 5},
    "several chunks per shard": {"context_size": 6, "edges": (0, 1, 4), "block_sequences": 256},
    "one stratum": {"context_size": 4, "edges": (0,), "block_sequences": 64},
    "part of a stratum": {"context_size": 7, "edges": (0, 1), "block_sequences": 256, "keep": {0: 0.3, 1: 0.5}},
}


ONE_SHARD, SEVERAL_SHARDS = arrays.MAX_SHARD_BYTES, 2**13


@pytest.mark.parametrize(
    ("storage", "shape", "limit"),
    [
        *(("bfloat16", shape, limit) for shape in SHAPES for limit in (ONE_SHARD, SEVERAL_SHARDS)),
        ("float16", "several chunks per shard", SEVERAL_SHARDS),
        ("float32", "several chunks per shard", SEVERAL_SHARDS),
        ("float32", "rows below a chunk", ONE_SHARD),
    ],
)
def test_stock_zarr_reads_every_array_exactly(tmp_path, monkeypatch, storage, shape, limit):
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", limit)
    made = make_store(tmp_path / "s", storage=storage, training_blocks=2, held_out_blocks=1, **SHAPES[shape])
    group = zarr.open_group(made.path / layout.ARRAYS, mode="r")
    found = {name: array for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}
    assert sorted(found) == sorted(made.arrays)
    for name, expected in made.arrays.items():
        array = found[name]
        assert array.shape == expected.shape
        assert array.dtype == expected.dtype
        got = np.asarray(array[:])
        assert got.tobytes() == expected.tobytes(), name
        for start, stop in [(0, 1), (len(expected) // 3, len(expected) // 3 + 2), (len(expected) - 1, len(expected))]:
            assert np.asarray(array[start:stop]).tobytes() == expected[start:stop].tobytes()


def test_several_shards_per_block_really_occur(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_SHARD_BYTES", 2**15)
    made = make_store(tmp_path / "s", training_blocks=2, held_out_blocks=1, context_size=20, block_sequences=256)
    files = list((made.path / layout.ARRAYS / "strata/004-016/source/c").glob("*/0"))
    assert len(files) == 3 * 3  # 3,072 rows of 32 bytes per block, 1,024 per file


def test_names_and_attributes_reach_zarr(tmp_path):
    made = make_store(tmp_path / "s", storage="bfloat16")
    source, target, position, tokens = (
        stock_array(made.path, name)
        for name in (*(f"strata/004-016/{side}" for side in ("source", "target", "position")), "tokens")
    )
    assert dict(source.attrs) == {"torch_dtype": "bfloat16", "hook_name": "blocks.3.hook_resid_mid"}
    assert dict(target.attrs)["hook_name"] == "blocks.3.hook_mlp_out"
    wanted = (("row", "source_dimension"), ("sequence", "offset"), ("row",))
    for array, names in zip((source, tokens, position), wanted, strict=True):
        assert isinstance(array.metadata, ArrayV3Metadata) and array.metadata.dimension_names == names


def test_bfloat16_bits_are_the_upper_half_of_fp32():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=4096) * 10.0 ** rng.integers(-30, 30, 4096)).astype(np.float32).reshape(64, 64)
    expected = torch.from_numpy(rows).to(torch.bfloat16)
    bits = encode(rows, "bfloat16")
    assert (bits == expected.view(torch.uint16).numpy()).all()
    assert (decode(bits, "bfloat16") == expected.float().numpy()).all()


def test_zarr_notices_a_damaged_index(tmp_path):
    made = make_store(tmp_path / "s")
    name = "strata/004-016/source"
    shard = made.path / layout.ARRAYS / name / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[-10] ^= 1
    shard.write_bytes(data)
    array = stock_array(made.path, name)
    rows = made.record.plan.stored_strata[2].rows
    assert np.asarray(array[:rows]).tobytes() == made.arrays[name][:rows].tobytes()
    with pytest.raises(Exception, match=r"(?i)checksum|crc32c"):
        array[rows : rows + 1]


def test_zarr_notices_a_truncated_shard(tmp_path):
    made = make_store(tmp_path / "s")
    shard = made.path / layout.ARRAYS / "tokens" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(Exception, match=r"(?i)checksum|crc32c"):
        stock_array(made.path, "tokens")[0:1]


def test_a_grown_shape_is_all_that_changes_between_blocks():
    array = spec(512, 8)
    one, two = array.metadata(1), array.metadata(2)
    assert (one.pop("shape"), two.pop("shape")) == ([512, 8], [1024, 8])
    assert one == two


def test_group_metadata_is_a_zarr_group(tmp_path: Path):
    durable.publish_json(tmp_path / "zarr.json", arrays.group_metadata())
    assert list(zarr.open_group(tmp_path, mode="r").members()) == []
