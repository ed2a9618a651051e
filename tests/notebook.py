"""Runs docs/walkthrough.ipynb from the root of the repo, and writes what its cells print into it.

python -m tests.notebook      needs the store of `make harvest`; minutes on two cores
"""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"


def code(notebook: dict[str, Any]) -> list[str]:
    """The source of every cell of code."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what its cells print when they run one after the other; what goes to stderr is left out."""
    names: dict[str, Any] = {}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
                exec("".join(cell["source"]), names)
            lines = printed.getvalue().splitlines(keepends=True)
            output = {"output_type": "stream", "name": "stdout", "text": lines}
            cell = cell | {"execution_count": count, "outputs": [output] if lines else []}
        cells.append(cell)
    return notebook | {"cells": cells}


if __name__ == "__main__":
    PATH.write_text(json.dumps(executed(json.loads(PATH.read_text())), indent=1, ensure_ascii=False) + "\n")
