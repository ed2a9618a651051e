"""Training from object storage whose every answer is 0.1 s late, beside training from the local store.

    python -m tests.bench.objects STORE      writes docs/benchmarks.{json,md}

The server of the tests and its proxy take part of this machine's time: waits are rather too long than
too short. With a bound, the folder has room for a part of the store, and ranges of rows are fetched.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from typing import Any

from shared.files.disk_usage import size_of
from tests.bench.record import record, run, sized
from tests.object_server import SETTINGS, Bucket, Proxy, make_bucket, serving

_SHARE = 4
"""The folder of the second run has room for so much less than the store."""


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.objects")
    parser.add_argument("store", type=Path)
    parser.add_argument("--steps", type=int, default=sized(200, 4))
    options = parser.parse_args()
    figures: dict[str, tuple[float, str]] = {"store": (size_of(options.store) / 2**20, "MiB")}
    with tempfile.TemporaryDirectory() as folder, serving() as endpoint, Proxy(endpoint) as proxy:
        make_bucket(endpoint, "bench")
        os.environ |= {**SETTINGS, "AWS_ENDPOINT_URL": proxy.address}
        address = Bucket("s3://bench", proxy).upload(options.store, "store")
        proxy.late = 0.1
        proxy.strike("late")
        bound = size_of(options.store) // _SHARE
        figures |= _train(options, Path(folder), "local store", options.store)
        figures |= _train(options, Path(folder), "room for all", address)
        figures |= _train(options, Path(folder), "room for a fourth", address, bound)
    record("objects: every answer 0.1 s late", f"python -m tests.bench.objects STORE --steps {options.steps}", figures)


def _train(options: Any, folder: Path, name: str, store: Path | str, bound: int | None = None) -> dict[str, Any]:
    """Train, and look at the folder meanwhile."""
    sizes, ended, local = [0], threading.Event(), folder / name.replace(" ", "-")
    local.mkdir()

    def look() -> None:
        while not ended.wait(0.1):
            sizes.append(size_of(local))

    looking = threading.Thread(target=look)
    looking.start()
    line = ["--store", store, "--runs", folder / "runs", "--name", local.name, "--steps", options.steps, "--quiet"]
    away = ["--local-folder", local] if isinstance(store, str) else []
    done = run(sys.executable, "-m", "train", "run", *line, *away, *(["--local-bytes", bound] if bound else []))
    ended.set()
    looking.join()
    rows = [json.loads(one) for one in Path(folder, "runs", local.name, "timing.jsonl").read_text().splitlines()]
    figures = {
        f"{name}: whole command": (done.seconds, "s"),
        f"{name}: data_wait of rows of the log, median": (median(row["data_wait_share"] for row in rows), "share"),
        f"{name}: data_wait after the first row of the log": (_after_first(rows), "share"),
    }
    if away:
        figures[f"{name}: most in the folder"] = (max(sizes) / 2**20, "MiB")
    return figures | ({f"{name}: bound": (bound / 2**20, "MiB")} if bound else {})


def _after_first(rows: list[dict[str, Any]]) -> float:
    """Return the share of the steps' time that waited for rows, once the first rows are there."""
    later = rows[1:] or rows
    seconds = later[-1]["seconds"] - (rows[0]["seconds"] if len(rows) > 1 else 0.0)
    return float(sum(row["data_wait"] for row in later) / seconds)


if __name__ == "__main__":
    main()
