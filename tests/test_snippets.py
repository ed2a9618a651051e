"""The Python in README and docs/ runs as it stands, in a folder with a store and a run of the names that it uses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import notebook

ROOT = Path(__file__).parents[1]
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in page.read_text()
]


def python(*arguments: object, cwd: Path) -> str:
    """Run the Python of the tests in a folder; fails with what it said."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "harvest").symlink_to(ROOT / "harvest")
    small = ("--set", "windows.context_size=64", "--set", "store.block_sequences=16", "--set", "store.edges=[0,1,4,16]")
    made = python("-m", "harvest", "run", "tiny", "--cache", folder / "made", "--tokens", 4096, *small, cwd=folder)
    (folder / "cache").mkdir()
    Path(made.splitlines()[-1]).rename(folder / "cache" / "tiny-L8-4656e6")
    sets = ("transcoder.d_sae=64", "activation.k=6", "rows.batch_rows=48", "threads=1", "samples.rows=500")
    options = [part for one in sets for part in ("--set", one)]
    line = ("run", "tiny", "--store", "cache/tiny-L8-4656e6", "--name", "tiny-001", "--steps", 20, *options)
    python("-m", "train", *line, cwd=folder)
    samples = folder / "runs" / "tiny-001" / "samples"
    for path in list(samples.iterdir()):
        path.rename(samples / path.name.replace("000020", "007000"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, folder: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert blocks and python("-c", "\n".join(blocks), cwd=folder)


@pytest.mark.slow
def test_the_notebook_runs(folder: Path) -> None:
    """With fewer steps, on the small store of the other pages."""
    cells = "\n".join(notebook.code(json.loads(notebook.PATH.read_text())))
    assert '"steps": 400' in cells
    said = python("-c", cells.replace('"steps": 400', '"steps": 30'), cwd=folder)
    assert "its strongest contexts are about regular expressions" in said and "pairs_correlated_above_0_8" in said


def test_the_notebook_shows_what_its_cells_printed() -> None:
    cells = [cell for cell in json.loads(notebook.PATH.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(bool(cell["outputs"]) == ("print(" in "".join(cell["source"])) for cell in cells)
