"""Digests of large files are remembered, and never for a file that changed."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from harvest import digests


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SMALLEST", 10)
    monkeypatch.setattr(digests, "_SETTLED", 0.05)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"0123456789" * 10)
    time.sleep(0.1)
    return path


def expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digests.file_sha256(file) == expected(file)
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_hash", lambda _: pytest.fail("read again"))
        assert digests.file_sha256(file) == expected(file)
    stamps = file.stat()
    file.write_bytes(b"9876543210" * 10)
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # the time of its last change is not so easily set
    assert digests.file_sha256(file) == expected(file)


def test_a_file_just_written_and_a_small_one_are_not_remembered(file: Path, tmp_path: Path) -> None:
    file.write_bytes(b"x" * 100)
    small = tmp_path / "config.json"
    small.write_bytes(b"{}")
    assert (digests.file_sha256(file), digests.file_sha256(small)) == (expected(file), expected(small))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": NaN}'])
def test_a_damaged_memory_is_no_memory(file: Path, tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "cache/transcoder-cache/digests.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    assert digests.file_sha256(file) == expected(file)
    assert list(durable_json(place)) == [str(file)]


def durable_json(path: Path) -> dict:
    from shared.files.durable import read_json

    return read_json(path)


def test_no_place_to_remember_is_no_error(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where a folder should be")
    assert digests.file_sha256(file) == expected(file)


def test_where_a_model_lies_is_remembered_until_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    for digest, folder in (("a" * 64, one), ("b" * 64, other)):
        folder.mkdir()
        digests.remember_folder(digest, folder)
    assert digests.known_folder("a" * 64) == one.resolve() and digests.known_folder("c" * 64) is None
    one.rename(tmp_path / "moved")
    assert digests.known_folder("a" * 64) is None
    digests.remember_folder("b" * 64, tmp_path / "moved")
    assert durable_json(tmp_path / "cache/transcoder-cache/model_folders.json") == {"b" * 64: str(tmp_path / "moved")}
