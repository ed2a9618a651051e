"""Compile the loops of training once, before tests start: else every process that finds none compiles them, at once.

python -m tests.compile_loops
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.llms import ROOT
from tests.runs import SMALL
from tests.stores import make_store


def main() -> None:
    """Train and report a run of a few steps, which needs most loops; what is compiled is kept beside them."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store").path
        line = ["run", "--store", store, "--runs", folder, "--name", "run", "--steps", 8, *SMALL, "--quiet"]
        for arguments in (line, ["report", Path(folder) / "run", "--quiet"]):
            command = [sys.executable, "-m", "train", *map(str, arguments)]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # the other core is type checking
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=one_thread)


if __name__ == "__main__":
    main()
