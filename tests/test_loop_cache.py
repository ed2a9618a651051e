"""A place for compiled loops where neither the package nor the home folder can be written."""

import os
import tempfile
from pathlib import Path

import pytest

from shared.files.loop_cache import VARIABLE, place_compiled_loops


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A package that cannot be written, and no home folder; temporary files go to `tmp_path`."""
    monkeypatch.setenv(VARIABLE, "x")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "no" / "package"


def test_loops_stay_beside_a_package_that_can_be_written(nowhere: Path, tmp_path: Path) -> None:
    place_compiled_loops(tmp_path)
    assert VARIABLE not in os.environ and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_loops_go_into_the_home_folder(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    place_compiled_loops(nowhere)
    assert VARIABLE not in os.environ
    assert (tmp_path / "home" / (".cache/numba" if variable == "HOME" else "numba")).is_dir()


def test_a_place_that_the_user_named_stays(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/named")
    place_compiled_loops(nowhere)
    assert os.environ[VARIABLE] == "/named"


def test_where_neither_can_be_written_a_folder_of_the_users_own_is_kept(nowhere: Path, tmp_path: Path) -> None:
    place_compiled_loops(nowhere)
    first = Path(os.environ.pop(VARIABLE))
    place_compiled_loops(nowhere)
    assert Path(os.environ[VARIABLE]) == first and first.parent == tmp_path
    assert first.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file"])
def test_a_folder_that_others_may_write_is_not_used(nowhere: Path, tmp_path: Path, kind: str) -> None:
    place_compiled_loops(nowhere)
    theirs = Path(os.environ.pop(VARIABLE))
    if kind == "open to others":
        theirs.chmod(0o777)
    else:
        theirs.rmdir()
        if kind == "a link":
            theirs.symlink_to(tmp_path)
        else:
            theirs.touch()
    place_compiled_loops(nowhere)
    ours = Path(os.environ[VARIABLE])
    assert ours != theirs and ours.is_dir() and not ours.is_symlink() and ours.stat().st_mode & 0o077 == 0
