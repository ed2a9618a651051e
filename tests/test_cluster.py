"""The scripts for SLURM do what docs/cluster.md says: run here as a scheduler runs them, with its commands replaced."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from functools import partial
from pathlib import Path

import click
import pytest

import harvest.cli
import train.cli
from tests.llms import ROOT
from tests.stores import make_store

FOLDER = ROOT / "docs" / "cluster"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
STUBS = {
    "python": """\
printf "%s\\n" "$@" > said
trap "exit 3" USR1 TERM
echo > ready
[ -z "$WAIT" ] || { sleep 60 > /dev/null 2>&1 & wait; }
exit $CODE""",
    "srun": 'exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo first; echo second; else echo "$@" > requeued; fi',
}
"""What is called in place of SLURM's commands and of the interpreter, in the job's folder."""
ARGUMENTS = {
    "train": ["STORE", "wide", "--set", "seed=1"],
    "train-array": ["STORE", "runs.txt"],
    "harvest": ["tiny", "--tokens", "1000"],
    "harvest-torchrun": ["tiny", "--tokens", "1000"],
}


def begin(script: Path, folder: Path, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a script in `folder` as the second task of job 4711."""
    for name, body in STUBS.items():
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "runs.txt").write_text("narrow\nwide --set seed=1\n")
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
    }
    path = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CODE": "0", "WAIT": ""}
    line = [script, *(arguments or ARGUMENTS[script.stem])]
    return subprocess.Popen(
        [str(part) for part in line], cwd=folder, env={**os.environ, **job, **path, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def warn_of_time_limit(job: subprocess.Popen[str], folder: Path) -> None:
    """Send what SLURM sends ahead of the time limit, once the command has begun and the script catches the signal."""
    status = Path(f"/proc/{job.pid}/status")
    while not (folder / "ready").exists() or not caught(status) >> (signal.SIGUSR1 - 1) & 1:
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)


def caught(status: Path) -> int:
    return int(re.findall(r"^SigCgt:\t(\w+)$", status.read_text(), re.M)[0], 16)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_calls_a_command_that_is_there_and_is_queued_again_when_it_stopped(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no name is that of a store in the cache
    assert begin(script, tmp_path).wait(60) == 0
    said = (tmp_path / "said").read_text().splitlines()
    if script.stem == "harvest-torchrun":
        assert {"--nnodes=2", "--rdzv-endpoint=first:24711", "--nproc-per-node=1"} <= set(said)
        said = said[said.index("--rdzv-endpoint=first:24711") + 1 :]
    stage, name, *rest = said[1:]
    groups: dict[str, click.Group] = {"harvest": harvest.cli.group, "train": train.cli.main}
    groups[stage].commands[name].make_context(name, [*rest])  # parses the options, or raises
    expected = ["--name", "wide", "--set", "seed=1"] if stage == "train" else ["tiny", "--tokens", "1000"]
    assert rest[-len(expected) :] == expected
    assert not (tmp_path / "requeued").exists()
    for code in (1, 2):
        assert begin(script, tmp_path, CODE=str(code)).wait(60) == code
        assert not (tmp_path / "requeued").exists()
    (tmp_path / "ready").unlink()
    job = begin(script, tmp_path, WAIT="1")
    warn_of_time_limit(job, tmp_path)
    assert job.wait(60) == 3
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    ("restarts", "limit", "requeued"), [("19", None, True), ("20", None, False), ("2", "2", False)]
)
def test_a_job_that_stops_again_and_again_leaves_the_queue(
    script: Path, tmp_path: Path, restarts: str, limit: str | None, requeued: bool
) -> None:
    """Code 3 is also that of a disk that stays full."""
    bounded = {} if limit is None else {"RESTARTS": limit}
    job = begin(script, tmp_path, WAIT="1", SLURM_RESTART_COUNT=restarts, **bounded)
    warn_of_time_limit(job, tmp_path)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 3 and (tmp_path / "requeued").exists() == requeued
    said = f"error: not requeued after {restarts} restarts (RESTARTS={limit or 20}): mend what stopped it"
    assert (said in out) == (not requeued), out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_lacks_is_said(script: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    job = begin(script, tmp_path, *(["STORE", "empty"] if script.stem == "train-array" else [""]))
    out, _ = job.communicate(timeout=60)
    assert job.returncode != 0 and re.search("STORE|NAME|PRESET|empty has no line 2", out), out
    assert not (tmp_path / "said").exists()


@pytest.mark.slow
def test_a_training_that_is_stopped_goes_on_as_the_same_job(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store").path
    sizes = ("transcoder.d_sae=64", "activation.k=4", "activation.k_start=4", "rows.batch_rows=64", "samples.rows=0")
    options = [part for size in (*sizes, "steps=400") for part in ("--set", size)]
    again = partial(
        begin, FOLDER / "train.sbatch", tmp_path, store, "run", *options, PYTHON=sys.executable, PYTHONPATH=str(ROOT)
    )
    job = again()
    run = tmp_path / "runs" / "run"
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert job.poll() is None, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 3 and (tmp_path / "requeued").exists(), out
    (tmp_path / "requeued").unlink()
    job = again()
    out, _ = job.communicate(timeout=200)
    assert job.returncode == 0 and not (tmp_path / "requeued").exists(), out
    assert (run / "checkpoints" / "step-000400" / "state.json").exists()


def test_the_image_takes_what_the_project_has() -> None:
    text = (FOLDER / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (extras,) = re.findall(r"/project\[([\w,]+)\]", text)
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])
    copied = {name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]}
    assert {"shared", "harvest", "train", "pyproject.toml", project["project"]["readme"], "LICENSE"} <= copied
