"""What a command says when the system refuses it something, and names of runs."""

import errno
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch

import shared.command_line
from shared.config import load_preset
from shared.errors import DiskFull, UserError
from shared.files import durable
from tests.llms import ROOT
from tests.runs import SMALL, Outcome
from tests.stores import SyntheticStore
from train.run_folder import new_run_folder

Command = Callable[..., Outcome]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't start new thread"), "error: the system refuses another thread; raise the limit on proc"),
        (MemoryError(), "error: out of memory; "),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "error: out of memory; ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "error: out of memory; "),
        (
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            "error: the system: Cannot allocate memory; free some memory",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "run/exports"),
            "error: run/exports: Read-only file system; name a folder that can be written, such as --out FOLDER",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            "error: runs: Permission denied; change its permissions, or name another folder",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "error: the system: Too many open files; raise the limit on op"),
        (OSError(errno.ENOENT, "No such file", "x"), "error: x: No such file\n"),
    ],
)
def test_what_the_system_refuses_is_one_line_with_a_remedy(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["train", "fails"])
    with pytest.raises(SystemExit) as stop:
        shared.command_line.run(click.Group("train", {"fails": fails}))
    found = capsys.readouterr().err
    assert stop.value.code == 1 and found.startswith(said) and len(found.splitlines()) == 1


def test_other_errors_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise RuntimeError("a mistake in the code")

    monkeypatch.setattr(sys, "argv", ["train", "fails"])
    with pytest.raises(RuntimeError, match="a mistake"):
        shared.command_line.run(click.Group("train", {"fails": fails}))


@pytest.mark.parametrize("stage", ["harvest", "train"])
def test_the_version_is_that_of_the_package(stage: str) -> None:
    said = subprocess.run([sys.executable, "-m", stage, "--version"], cwd=ROOT, capture_output=True, text=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert said.stdout == f"transcoder-cache {version}\n", said.stderr


def test_a_current_folder_that_was_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); sys.argv = ['harvest', 'ls']\n"
        "import shared.command_line; from harvest.cli import group; shared.command_line.run(group)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the current folder was removed; change to one that is there: cd FOLDER\n"


def test_a_limit_on_the_size_of_files_names_its_remedy(tmp_path: Path) -> None:
    found = durable.explain(OSError(errno.EFBIG, "File too large", "x"), tmp_path / "x", 5)
    assert isinstance(found, DiskFull) and "raise the limit on the size of files (ulimit -f)" in str(found)
    assert "free some space" in str(durable.explain(OSError(errno.ENOSPC, "No space", "x"), tmp_path / "x", 5))


def test_a_byte_order_mark_before_toml(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes("\ufeffsteps = 5\n".encode())
    assert load_preset(tmp_path, "a", path) == {"steps": 5}


def test_two_runs_without_a_name_get_two(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with new_run_folder(runs, None, "tiny") as first, new_run_folder(runs, None, "tiny") as second:
        assert [first.name, second.name] == ["tiny-001", "tiny-002"]
        (first / "config.json").write_text("{}")
    assert [path.name for path in runs.iterdir()] == ["tiny-001"]
    with new_run_folder(runs, None, "own") as own:
        assert own.name == "own-001"
    with pytest.raises(UserError, match="cannot write to"), new_run_folder(runs / "tiny-001/config.json", None, "tiny"):
        pass


def test_a_run_without_a_name_that_fails_leaves_nothing(
    command: Command, pristine: SyntheticStore, tmp_path: Path
) -> None:
    given = ["run", "--store", pristine.path, "--runs", tmp_path / "runs", "--steps", 2, *SMALL]
    done = command(*given, "--set", "activation.k=100000")
    assert done.code == 2 and list(tmp_path.iterdir()) == []
    assert [command(*given, "-q").path.name for _ in range(2)] == ["tiny-001", "tiny-002"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--store", "", "--steps", "1"], "error: the argument after --store is empty; if it was to come from"),
        (["report", ""], "error: the argument after report is empty"),
        (["run", "--store="], "error: --store= has no value; if it was to come from a variable, that is not set"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(command: Command, arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert done.code == 2 and done.err.startswith(said) and len(done.err.splitlines()) == 1
