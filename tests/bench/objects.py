"""Training from object storage whose every answer is 0.1 s late, beside training from the local store.

    python -m tests.bench.objects STORE      writes docs/benchmarks.{json,md}

The server is of this process and on this machine's cores: what it can answer is measured beside what it was asked, so
that the figures show whether it was the limit. With a bound, the folder has room for a part of the store, and
ranges of rows are fetched. A first training, of a few steps, is not counted: it compiles what is not compiled yet.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from shared.files.disk_usage import size_of
from shared.files.object_store import CONNECTIONS, Objects
from shared.store.layout import STORE
from tests.bench.record import SMOKE, record, run, sized
from tests.folder_server import FolderServer
from tests.object_server import SETTINGS
from tests.runs import SETS

_SHARE = 4
"""The folder of the last run has room for so much less than the store."""
_LATE = 0.1
_ADDRESS = "s3://bench/store"
Figures = dict[str, tuple[float, str]]


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.objects")
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=sized(200, 4))
    options = parser.parse_args()
    store = options.store.resolve()
    figures: Figures = {"store": (size_of(store) / 2**20, "MiB")}
    with tempfile.TemporaryDirectory() as folder:
        bucket = Path(folder) / "bucket"
        bucket.mkdir()
        (bucket / "store").symlink_to(store)
        with FolderServer(bucket) as server:
            os.environ |= {**SETTINGS, "AWS_ENDPOINT_URL": server.address}
            figures |= _alone()
            server.late = _LATE
            bound = size_of(store) // _SHARE
            if not SMOKE:
                _train(server, Path(folder), "warm-up", store, 4)
            figures |= _train(server, Path(folder), "local store", store, options.steps)
            figures |= _train(server, Path(folder), "room for all", _ADDRESS, options.steps)
            figures |= _train(server, Path(folder), "room for a fourth", _ADDRESS, options.steps, bound)
    record("objects: every answer 0.1 s late", f"python -m tests.bench.objects STORE --steps {options.steps}", figures)


def _alone() -> Figures:
    """What the server can answer, when nothing else is to be done."""
    objects, count = Objects(_ADDRESS), sized(2000, 50)
    began = time.monotonic()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda _: objects.get_range(STORE, 0, 64), range(count)))
    return {"the server alone, not late": (count / (time.monotonic() - began), "answers/s")}


def _train(
    server: FolderServer, folder: Path, name: str, store: Path | str, steps: int, bound: int | None = None
) -> Figures:
    """Train, and look at the folder meanwhile."""
    local = folder / name.replace(" ", "-")
    local.mkdir()
    line = ["--store", store, "--runs", folder / "runs", "--name", local.name, "--steps", steps, "--quiet"]
    line += sized([], SETS)
    away = ["--local-folder", local] if isinstance(store, str) else []
    bounded = ["--local-bytes", bound] if bound else []
    asked, sent = server.requests, server.sent
    with _Looking(local) as looking:
        done = run(sys.executable, "-m", "train", "run", *line, *away, *bounded)
    rows = [json.loads(one) for one in Path(folder, "runs", local.name, "timing.jsonl").read_text().splitlines()]
    figures: Figures = {
        "whole command": (done.seconds, "s"),
        "whole command: CPU": (done.cpu_seconds, "s"),
        "data_wait of rows of the log, median": (median(row["data_wait_share"] for row in rows), "share"),
        "data_wait after the first row of the log": (_after_first(rows), "share"),
    }
    if away:
        figures["answers"] = (server.requests - asked, "")
        figures["answers per second"] = ((server.requests - asked) / done.seconds, "answers/s")
        figures["sent"] = ((server.sent - sent) / 2**20, "MiB")
        figures |= looking.figures()
    if bound:
        figures["bound"] = (bound / 2**20, "MiB")
    return {f"{name}: {what}": figure for what, figure in figures.items()}


class _Looking:
    """Notes how much a folder holds, twice a second."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._sizes, self._ended = folder, [0], threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "_Looking":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(sized(0.5, 0.1)):
            self._sizes.append(size_of(self._folder))

    def figures(self) -> Figures:
        """The most that it held, and what it held on the way."""
        last = len(self._sizes) - 1
        points = {f"in the folder at {part} % of the time": self._sizes[last * part // 100] for part in (25, 50, 75)}
        found = points | {"most in the folder": max(self._sizes)}
        return {name: (size / 2**20, "MiB") for name, size in found.items()}


def _after_first(rows: list[dict[str, Any]]) -> float:
    """Return the share of the steps' time that waited for rows, once the first rows are there."""
    later = rows[1:] or rows
    seconds = later[-1]["seconds"] - (rows[0]["seconds"] if len(rows) > 1 else 0.0)
    return float(sum(row["data_wait"] for row in later) / seconds)


if __name__ == "__main__":
    main()
