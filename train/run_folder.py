"""The folder that a new run is made in."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from shared.errors import UserError
from shared.files import durable
from train.live.run_files import BLOCKS, CONFIG, LOCK

_BEFORE_CONFIG = {LOCK, BLOCKS, *(name + durable.TEMPORARY for name in (BLOCKS, CONFIG))}
"""What a run that was killed before its configuration was written leaves; it is started again."""


def exists(run: Path) -> UserError:
    """Return what is said of a run that is there already."""
    return UserError(f"{run} exists; continue it with: python -m train resume {run}, or choose another --name")


def require_new(run: Path) -> None:
    """Raise `UserError` when something is in the folder of a run that is to be started."""
    if run.is_file():
        raise UserError(f"{run} is a file, and a run is a folder; choose another --name")
    if run.exists() and {path.name for path in run.iterdir()} - _BEFORE_CONFIG:
        raise exists(run)


def check_name(runs: Path, name: str | None) -> None:
    """Raise `UserError` when a new run cannot have that name in `runs`; without a name it gets a free one."""
    if name is not None:
        require_new(runs / _one_folder(name))


@contextmanager
def new_run_folder(runs: Path, name: str | None, stem: str) -> Iterator[Path]:
    """Yield the folder for a run of that name in `runs`, or without a name the first free `<stem>-<number>`.

    The free one is made, so that no other run takes it; where it stays empty, it is removed again. Raises `UserError`
    when the name leads out of `runs` or cannot be shown, and when `runs` cannot be written to.
    """
    if name is not None:
        yield runs / _one_folder(name)
        return
    existed, stem = runs.is_dir(), _one_folder(stem)
    try:
        durable.make_folder(runs)
        path = _make_first(runs / f"{stem}-{number:03d}" for number in count(1))
    except OSError as error:
        raise UserError(f"cannot write to {runs}: {error.strerror}; choose another folder with --runs") from error
    try:
        yield path
    finally:
        with suppress(OSError):  # there is a run in it
            path.rmdir()
            if not existed:
                runs.rmdir()


def _one_folder(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise UserError(
            f"--name {name!r}: expected the name of one folder in --runs, without / and control characters; say with "
            "--runs where that folder lies"
        )
    return name


def _make_first(paths: Iterator[Path]) -> Path:
    """Make the first folder that is not there, and return it."""
    for path in paths:
        with suppress(FileExistsError):
            path.mkdir()
            return path
    raise AssertionError("there is always another number")
