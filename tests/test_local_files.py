"""Local files of every format and encoding give the same rows; bytes that are no text are named."""

import bz2
import csv
import errno
import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvest.settings import TextSettings
from harvest.text import dataset_rows
from harvest.text.corpus import open_corpus
from shared.errors import DiskFull, UserError
from shared.keyed import permutation
from tests.llms import texts, write_jsonl

TEXTS = [f"{text} é {i}" for i, text in enumerate(texts(20))]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=False) + "\n" for i, text in enumerate(TEXTS))


def read(*paths: Path, seed: int = 3, **more: Any) -> list[Any]:
    """Values in order; a refused row is an error, as it is where it is encoded."""
    found = list(open_corpus(TextSettings(name=tuple(map(str, paths)), **more), None, seed).read())
    if refused := next((one for one in found if one.refusal), None):
        raise UserError(f"{refused.place}: {refused.refusal}")
    return [one.value for one in found]


def is_read(*paths: Path, column: str | None = None) -> None:
    """Both orders give the documents of `TEXTS`."""
    assert read(*paths, streaming=True, column=column) == TEXTS
    assert read(*paths, column=column) == [TEXTS[i] for i in permutation(len(TEXTS), "documents", 3)]


def zstd(data: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(data)
    return bytes(out.getvalue())


@pytest.mark.fault(50)
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_unicode_encoding_is_decoded(tmp_path: Path, encoding: str, name: str) -> None:
    text = LINES if name == "a.jsonl" else "".join(f"{one}\n" for one in TEXTS)
    (tmp_path / name).write_bytes(text.encode(encoding))
    is_read(tmp_path / name)


@pytest.mark.parametrize("bom", ["\ufeff", ""])
def test_big_endian_marks_are_known(tmp_path: Path, bom: str) -> None:
    for encoding in ("utf-16-be", "utf-32-be"):
        (tmp_path / "a.txt").write_bytes((bom + "\n".join(TEXTS)).encode(encoding))
        is_read(tmp_path / "a.txt")


@pytest.mark.fault(50)
@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("gzip data", gzip.compress(LINES.encode())),
        ("zstd data", zstd(LINES.encode())),
        ("bzip2 data", bz2.compress(LINES.encode())),
        ("zip data", b"PK\x03\x04" + bytes(100)),
        ("Parquet data", b"PAR1" + bytes(100)),
        ("Arrow data", b"ARROW1\0\0" + bytes(100)),
        ("PDF data", b"%PDF-1.7\n"),
        ("NUL bytes", os.urandom(2000) + bytes(2000)),
        ("NUL bytes", "Привет, мир\n".encode("utf-16-le")),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_bytes_that_are_no_text_are_one_line_with_the_file(tmp_path: Path, name: str, what: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name}: holds {what}"):
        read(tmp_path / name)


@pytest.mark.fault(50)
@pytest.mark.parametrize("indent", [1, 4, "\t"])
def test_one_object_over_several_lines_is_told_how_its_rows_are_taken_out(tmp_path: Path, indent: int | str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": [{"text": "one"}]}, indent=indent))
    with pytest.raises(UserError, match=r"a\.json: one JSON object over several lines.*jq -c '\.data\[\]' a\.json"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert sorted(read(tmp_path / "a.json")) == ["one", "two"]


def test_a_text_may_start_like_a_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("PAR1 is how they start")
    assert read(tmp_path / "a.txt") == ["PAR1 is how they start"]


@pytest.mark.fault(50)
def test_a_nul_in_one_row_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a word\n" * 5000 + b"a\0b\n")
    with pytest.raises(UserError, match=r"a\.txt, line 5001: holds a NUL byte"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_bytes(b"id,text\n" + b"1,a word\n" * 5000 + b"2,a\0b\n")
    with pytest.raises(UserError, match=r"a\.csv, row 5001: holds a NUL byte"):
        read(tmp_path / "a.csv")


@pytest.mark.fault(50)
def test_replaced_characters_are_counted_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("fa\ufffdçade\n".encode() + "façade é\n".encode("latin-1"))
    found = list(open_corpus(TextSettings(name=(str(tmp_path / "a.txt"),), streaming=True), None, 0).read())
    assert [(one.value, one.replaced) for one in found] == [("fa\ufffdçade", 0), ("fa\ufffdade \ufffd", 2)]


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), (".GZ", gzip.compress)]
)
def test_compressed_lines_are_read(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    half = len(LINES) // 2
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(LINES[:half].encode()) + compress(LINES[half:].encode()))  # two frames, as pzstd writes
    is_read(path)
    path.write_bytes(compress(LINES.encode())[:-20])
    for streaming in (True, False):
        with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: not readable as \w+ data of jsonl"):
            read(path, streaming=streaming)
    path.write_bytes(LINES.encode())
    with pytest.raises(UserError, match=rf"a\.jsonl\{suffix}: not readable as"):
        read(path)
    path.write_bytes(compress("\ufeff".encode("utf-16-le") + LINES.encode("utf-16-le")))
    is_read(path)


def test_json_csv_and_tables_are_read(tmp_path: Path) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_text(LINES)
    (tmp_path / "a.JSONL").write_text(LINES)
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=mark).writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    table = pa.table({"id": range(20), "text": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    with pa.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    with pa.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=7)
    for path in sorted(tmp_path.iterdir()):
        is_read(path, column="text")


def test_text_with_line_ends_and_long_fields_stays_whole_in_csv(tmp_path: Path) -> None:
    value = 'a\nb "c",\n' + "d" * 200_000
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], [value]])
    assert read(tmp_path / "a.csv") == [value]
    (tmp_path / "a.csv").write_text("id,text\n1,a\n2\n")
    with pytest.raises(UserError, match=r"a\.csv, row 2: expected 2 fields"):
        read(tmp_path / "a.csv")


def test_data_sets_on_disk_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    saved = Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved/cache-1.arrow").write_bytes(b"a result of map, and no part of it")
    is_read(tmp_path / "saved")
    assert open_corpus(TextSettings(name=(str(tmp_path / "saved"),)), None, 0).identity.name.count(".arrow") == 3
    DatasetDict({"train": saved, "test": saved.select([0, 1])}).save_to_disk(tmp_path / "splits")
    is_read(tmp_path / "splits")
    assert read(tmp_path / "splits", split="test", streaming=True) == TEXTS[:2]
    with pytest.raises(UserError, match="no split 'valid'; its splits: test, train"):
        read(tmp_path / "splits", split="valid")
    (tmp_path / "saved/state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(UserError, match="names a file outside of the folder"):
        read(tmp_path / "saved")


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for i in (2, 0, 1, 10):
        (tmp_path / "data/sub").mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / f"data/sub/part-{i:02d}.jsonl", [{"text": f"{i} {j}"} for j in range(3)])
    (tmp_path / "data/README.md").write_text("no rows")
    (tmp_path / "data/dataset_info.json").write_text("{}")
    (tmp_path / "data/.hidden.txt").write_text("no rows")
    files = sorted((tmp_path / "data/sub").iterdir())
    assert read(tmp_path / "data", streaming=True) == [f"{i} {j}" for i in (0, 1, 2, 10) for j in range(3)]
    by_folder, by_files = (
        open_corpus(TextSettings(name=tuple(map(str, names))), None, 0) for names in ([tmp_path / "data"], files)
    )
    assert by_folder.identity == by_files.identity
    (tmp_path / "data/a.txt").write_text("text")
    with pytest.raises(UserError, match="a folder of text files of several kinds, jsonl, txt"):
        read(tmp_path / "data")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="a folder without text files"):
        read(tmp_path / "none")


@pytest.mark.parametrize("streaming", [True, False])
def test_files_with_other_columns_are_read_in_any_order(tmp_path: Path, streaming: bool) -> None:
    """Only the column that is needed is read: what else a file has does not matter, nor one of nulls before."""
    tables = [
        pa.table({"text": pa.nulls(3)}),
        pa.table({"text": ["a", "b"]}),
        pa.table({"url": [{"x": 1}], "text": ["c"], "day": [b"\xff"]}),
    ]
    paths = [tmp_path / f"{i}.parquet" for i in range(3)]
    for path, table in zip(paths, tables, strict=True):
        pq.write_table(table, path)
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        found = read(*(paths[i] for i in order), streaming=streaming)
        assert sorted(filter(None, found)) == ["a", "b", "c"] and len(found) == 6


@pytest.mark.parametrize("streaming", [True, False])
def test_a_local_fault_names_the_file_and_never_the_hub(tmp_path: Path, streaming: bool) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and no more")
    for name, words in (("b.parquet", "no column 'text'; its columns: body"), ("c.parquet", "not readable as parquet")):
        for paths in ([tmp_path / "a.parquet", tmp_path / name], [tmp_path / name, tmp_path / "a.parquet"]):
            with pytest.raises(UserError, match=rf"{name}: {words}") as caught:
                read(*paths, streaming=streaming, column="text")
            assert "hub" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "~/no-such-text", "x.jsonl.gz"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=r"text file") as caught:
        open_corpus(TextSettings(name=(name,)), None, 0)
    assert "hub" not in str(caught.value)


def test_a_full_disk_for_the_copy_names_the_place_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dataset_rows, "TemporaryFile", Full)
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(DiskFull, match=r"no room for the rows of .*a\.parquet, .*TMPDIR .*text\.streaming=true"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", streaming=True) == TEXTS


def test_many_files_need_few_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_rows, "_OPEN_FILES", 2)
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": text}]) for i, text in enumerate(TEXTS)]
    is_read(*paths)


@pytest.mark.fault(50)
@pytest.mark.parametrize("column", [None, "text"])
def test_values_that_python_has_not_cost_no_row(tmp_path: Path, column: str | None) -> None:
    """Of columns that nothing reads; text in Latin-1 is replaced by character, as it is in lines."""
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xe9")]
    )
    others = {
        "year": pa.array([2**62], pa.timestamp("us")),
        "zone": pa.array([1], pa.timestamp("us", tz="Moon/Base")),
        "day": pa.array([2**30], pa.date32()),
        "span": pa.array([2**62], pa.duration("s")),
        "bytes": pa.array([b"\xff"]),
    }
    pq.write_table(pa.table({**others, "text": bad}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column=column, streaming=True) == ["a\udce9"]
    pq.write_table(pa.table({"text": pa.array(["é".encode()])}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", column=column) == ["é"]
    pq.write_table(pa.table({"text": pa.array([b"\x89PNG\0\0"])}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="column 'text' holds no text, chat messages or token ids, but an object"):
        read(tmp_path / "c.parquet", column=column)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    for name in ("a.csv", "a.parquet"):
        for streaming in (True, False):
            with pytest.raises(UserError, match=f"{name}: 2 columns are called 'text'; rename all but one"):
                read(tmp_path / name, streaming=streaming)


def test_damaged_pages_of_parquet_are_found_where_they_have_checksums(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True, compression=None, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[data.index(TEXTS[3].encode()) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet: not readable as parquet .*checksum"):
        read(path, streaming=True)


UNUSABLE: dict[str, tuple[str, str]] = {
    "archive": ("a.tar.gz", r"a\.tar\.gz: not a kind of text that is read, .*; unpack it"),
    "other": ("a.pdf", r"a\.pdf: not a kind of text that is read, .*; convert or rename it"),
    "pipe": ("a.jsonl", r"a\.jsonl is not a regular file, and a text is read more than once; save it as a file"),
    "device": ("/dev/null", "/dev/null is not a regular file"),
    "address": ("https://example.org/a.jsonl", r"https://example\.org/a\.jsonl is an address; download it"),
    "pointer": ("a.parquet", r"a\.parquet is a pointer of Git LFS, not the file itself; download it: git lfs pull"),
    "link": ("a.txt", r"no text file at .*a\.txt; it is a link, and what it leads to is not there"),
    "lines": ("a\nb.txt", "a store records the names of its text files, and this one is not plain"),
}


@pytest.mark.fault(50)
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_text_that_is_no_file_of_text_is_named_with_what_to_do(tmp_path: Path, case: str) -> None:
    name, message = UNUSABLE[case]
    path = name if "//" in name else tmp_path / name
    if case == "pipe":
        os.mkfifo(path)
    elif case == "link":
        Path(path).symlink_to("gone")
    elif case not in ("device", "address"):
        Path(path).write_bytes(b"version https://git-lfs.github.com/spec/v1\n" if case == "pointer" else b"text\n")
    with pytest.raises(UserError, match=message):
        open_corpus(TextSettings(name=(str(path),)), None, 0)
    if case in ("pipe", "link"):  # nor is it passed over in a folder
        with pytest.raises(UserError, match=message):
            open_corpus(TextSettings(name=(str(tmp_path),)), None, 0)


def test_files_that_are_the_same_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    assert len(read(tmp_path / "a.txt", tmp_path / "b.txt")) == 4
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/b.txt holds the same as {tmp_path}/a.txt; its documents can be held out and trained on\n"
    )
