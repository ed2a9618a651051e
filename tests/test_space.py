"""Bytes that folders take, and when they are measured."""

import time
from pathlib import Path

import pytest

from shared.files.disk_usage import Measured, size_of


def test_figures_that_cost_something_are_measured_at_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now, found = [0.0], [5]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def measure() -> int:
        if not found:
            raise OSError
        return found[0]

    measured = Measured(measure, seconds=10)
    seen = [measured.value()]
    for at, value in ((9.0, [6]), (10.0, [6]), (21.0, [])):
        now[0], found[:] = at, value
        seen.append(measured.value())
    assert seen == [5, 5, 6, 6]


def test_files_with_two_names_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(bytes(100))
    (tmp_path / "two").hardlink_to(tmp_path / "a" / "one")
    (tmp_path / "three").write_bytes(bytes(7))
    assert size_of(tmp_path) == size_of(tmp_path / "a", tmp_path) == 107
    assert size_of(tmp_path / "none") == 0
