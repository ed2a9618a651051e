"""`python -m tests.faults.fuzz [--seconds 60] [TARGET ...]`: coverage-guided fuzzing of what reads stores and records.

Needs atheris (`pip install '.[fuzz]'`). Each target runs in a process of its own, from `corpus/TARGET/` and sound
files; with `--keep`, the inputs that reach most are kept there, minimised. An input that fails stays in
`corpus/TARGET/crash-*`, and the command exits 1. `test_corpus.py` replays the corpus without atheris.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"
LARGEST = 8192
INSTRUMENTED = [
    "shared",
    "harvest.text",
    "harvest.llm.model_files",
    "train.live",
    "train.report",
    "train.run.metrics",
    "train.samples.parquet",
]
"""Not what numba compiles: it takes no other bytecode."""
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**53 + 1, 10**30, -0.0, 1e308, "", "x", "\0", "../x", "/etc/passwd", "a" * 5000),
    *([], {}, [[]], {"": 0}, [0] * 2000),
)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Change one place of the JSON that follows the first byte; or bytes, where that is none or by a coin's toss."""
    import atheris

    draw = random.Random(seed)
    if draw.random() < 0.6:
        for start in (0, 1):
            try:
                value = json.loads(data[start:])
            except (ValueError, RecursionError):
                continue
            changed = data[:start] + json.dumps(_changed(value, draw)).encode()
            return changed[:most]
    return bytes(atheris.Mutate(data, most))


def _changed(value: Any, draw: random.Random) -> Any:
    """`value` with one place of it replaced, removed, doubled or renamed."""
    if draw.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return draw.choice(ODD)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, kind = draw.choice(keys), draw.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[draw.choice(["x", "", "../x", key + "x"])] = value.pop(key)
    elif kind < 0.2 and isinstance(value, list):
        value.append(value[key])
    elif isinstance(value[key], int) and kind < 0.4:
        value[key] += draw.choice([-1, 1, 255, 2**16, 2**32])
    else:
        value[key] = _changed(value[key], draw)
    return value


def worker(target: str, folder: Path, seconds: int) -> None:
    """Fuzz one target in this process; never returns."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.faults.targets import TARGETS

    options = [f"-max_total_time={seconds}", f"-max_len={LARGEST}", "-timeout=20", "-rss_limit_mb=4096"]
    options += [f"-artifact_prefix={folder}/", "-print_final_stats=1", str(folder)]
    atheris.Setup([sys.argv[0], *options], TARGETS[target], custom_mutator=mutate)
    atheris.Fuzz()


def minimise(target: str, found: Path) -> list[bytes]:
    """The smallest inputs of `found` that together reach every line of the packages that all of them reach."""
    code = "from tests.faults.fuzz import lines_reached; import sys; lines_reached(sys.argv[1], sys.argv[2])"
    line = [sys.executable, "-c", code, target, str(found)]
    reached = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    kept, covered = [], set[str]()
    for name in sorted(reached, key=lambda one: (-len(reached[one]), (found / one).stat().st_size)):
        if new := set(reached[name]) - covered:
            kept.append((found / name).read_bytes())
            covered |= new
    return kept


def lines_reached(target: str, folder: str) -> None:
    """Print, as JSON, the lines of the packages that each input of `folder` runs."""
    from tests.faults.targets import TARGETS, seeds

    list(seeds())  # what the targets start from is made before
    roots, reached = tuple(str(Path(__file__).parents[2] / name) for name in ("shared", "harvest", "train")), {}
    for path in Path(folder).iterdir():
        lines: set[str] = set()

        def trace(frame: Any, event: str, _: Any, lines: set[str] = lines) -> Any:
            if not frame.f_code.co_filename.startswith(roots):
                return None
            lines.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            return trace

        sys.settrace(trace)
        with suppress(Exception):  # a finding: what it reached counts
            TARGETS[target](path.read_bytes())
        sys.settrace(None)
        reached[path.name] = sorted(lines)
    print(json.dumps(reached))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--keep", action="store_true", help="replace the corpus by what was found, minimised")
    given = parser.parse_args()
    from tests.faults.targets import TARGETS, seeds

    sound, failed = list(seeds()), False
    names = given.targets or list(TARGETS)
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder, kept = Path(scratch), CORPUS / name
            for data in [*(d for t, d in sound if t == name), *(p.read_bytes() for p in kept.glob("*"))]:
                (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            code = "from tests.faults.fuzz import worker; from pathlib import Path; import sys; "
            code += "worker(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))"
            seconds = max(1, given.seconds // len(names))
            line = [sys.executable, "-c", code, name, str(folder), str(seconds)]
            done = subprocess.run(line, capture_output=True, text=True)
            coverage = [int(n) for n in re.findall(r"\bcov: (\d+)", done.stderr)] or [0]
            executions = re.search(r"number_of_executed_units: (\d+)", done.stderr)
            crashes = [path for path in folder.iterdir() if re.match(r"(crash|timeout|oom|leak)-", path.name)]
            print(
                f"{name}: {executions[1] if executions else '?'} executions, coverage {coverage[0]} -> {coverage[-1]}, "
                f"{len(list(folder.iterdir()))} inputs, {len(crashes)} findings",
                flush=True,
            )
            kept.mkdir(parents=True, exist_ok=True)
            if done.returncode:
                failed = True
                print(done.stderr[-3000:])
            for path in crashes:
                shutil.copy(path, kept / path.name)
                path.unlink()
            if given.keep:
                smallest = minimise(name, folder)
                for path in kept.glob("[0-9a-f]*"):
                    path.unlink()
                for data in smallest:
                    (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    sys.exit(failed)


if __name__ == "__main__":
    main()
