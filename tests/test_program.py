"""`transcoder-cache`: both stages under one name, also in a folder whose own files are called as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import SMALL
from tests.stores import make_store

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; sys.argv[0] = 'transcoder-cache'; from shared.program import main; main()"


def program(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it as its script does: without the current folder on its path."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-P", "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)


def test_it_tells_its_stages_and_the_nearest_of_a_mistyped_one(tmp_path: Path) -> None:
    for done in (program(cwd=tmp_path), program("--help", cwd=tmp_path)):
        assert done.returncode == 0 and "harvest" in done.stdout and "train" in done.stdout
    done = program("trian", "run", cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr == "error: no stage 'trian'; stages: harvest, train; did you mean 'train'?\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["harvest", "train"])
def test_a_stage_has_its_commands_and_exit_codes(stage: str, tmp_path: Path) -> None:
    done = program(stage, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Commands:" in done.stdout
    done = program(stage, "nonsense", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nonsense" in done.stderr


@pytest.mark.slow
def test_files_of_the_same_names_in_the_folder_are_not_run(tmp_path: Path) -> None:
    for name in ("train.py", "shared/__init__.py", "harvest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('a stranger ran')")
    store = make_store(tmp_path / "store")
    done = program("train", "run", "--store", store.path, "--steps", 5, *SMALL, "--wandb", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / done.stdout.splitlines()[-1]
    assert (run / "checkpoints" / "step-000005").is_dir()
    assert "a stranger ran" not in done.stderr + (run / "wandb" / "sync.log").read_text(errors="replace")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("transcoder-cache tr", ["train"]),
        ("transcoder-cache train wa", ["watch"]),
        ("transcoder-cache train run --store wh", ["whole"]),
        ("transcoder-cache train report runs/b", ["runs/base-001"]),
        ("transcoder-cache harvest run --to", ["--tokens"]),
    ],
)
def test_a_shell_completes_stages_commands_options_and_stores(tmp_path: Path, words: str, expected: list[str]) -> None:
    for name in ("whole/request.json", "runs/base-001/config.json", "runs/tiny-001/config.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    asked = {"_TRANSCODER_CACHE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": f"{words.count(' ')}"}
    done = subprocess.run(
        [sys.executable, "-c", "from shared.program import main; main()"],
        env=os.environ | asked | {"TRANSCODER_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == expected, done.stderr
