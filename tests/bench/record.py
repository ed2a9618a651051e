"""Figures with their origin: `docs/benchmarks.json`, and `docs/benchmarks.md`, which is generated from it.

    BENCH_SMOKE=FOLDER python -m tests.bench.NAME      shows within seconds that a bench runs; figures go to FOLDER

Sizes of a bench that are `sized` are then so small that its figures mean nothing.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).parents[2]
SMOKE = Path(os.environ["BENCH_SMOKE"]).absolute() if os.environ.get("BENCH_SMOKE") else None
"""Where figures go when benches only show that they run."""
FIGURES, PAGE = ((SMOKE or ROOT / "docs") / f"benchmarks.{kind}" for kind in ("json", "md"))
README, BEGIN, END = ROOT / "README.md", "<!-- default run -->", "<!-- /default run -->"
_DEFAULT_RUN = {
    "harvest": "`make harvest`",
    "train": "`make train`",
    "training rows stored": "rows to train on, stored",
    "held-out fvu": "held-out fvu",
    "held-out fvu of the best linear map": "... of the best linear map",
    "l0 by threshold": "active latents per row",
    "latents that never fire on the report rows": "dead latents",
}
"""Figures of the bench `pipeline` that the README shows."""
T = TypeVar("T")


def sized(full: T, smoke: T) -> T:
    """`full`, or `smoke` where a bench only shows that it runs."""
    return smoke if SMOKE else full


def named(doc: str | None, *choices: str) -> list[str]:
    """Return what the command line names, or all choices where it names none; any other word ends with the usage."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar=f"{{{','.join(choices)}}}")
    given: list[str] = parser.parse_args().names
    if unknown := set(given) - set(choices):
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(choices)}")
    return given or list(choices)


@dataclass(frozen=True)
class Finished:
    """A command that ended well."""

    out: str
    seconds: float
    cpu_seconds: float
    """Of the process and the children that it waited for."""
    peak_mib: float
    """Largest resident set of the process or one of its children: also pages of files, once for each map of them."""
    own_mib: float
    """Most memory of the process's own, without pages of files, by looks five times a second."""


def run(*command: object) -> Finished:
    """Run a command from the root of the repo, its stderr shown; raises `SystemExit` when it fails."""
    text = [str(part) for part in command]
    print("$ " + " ".join(text), file=sys.stderr, flush=True)
    began = time.monotonic()
    process = subprocess.Popen(text, stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None
    looks, ended = [0.0], threading.Event()
    looking = threading.Thread(target=_look, args=(process.pid, looks, ended), daemon=True)
    looking.start()
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    ended.set()
    looking.join()  # a process with another thread is not forked, and tests would start the next one from nothing
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(text)} failed with exit code {process.returncode}")
    seconds, cpu = time.monotonic() - began, usage.ru_utime + usage.ru_stime
    return Finished(out, seconds, cpu, usage.ru_maxrss / 1024, max(looks))


def _look(pid: int, found: list[float], ended: threading.Event) -> None:
    """Note the anonymous memory of a process, in MiB, until it has ended."""
    status = Path(f"/proc/{pid}/status")
    while not ended.is_set():
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended, or this system has no such file
            return
        found += [int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:")]
        ended.wait(0.2)


def machine() -> str:
    """Processor, cores and memory, without the machine's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def record(bench: str, command: str, figures: dict[str, tuple[float, str]], on: str | None = None) -> None:
    """Replace the figures of `bench` (name -> value, unit) and the page, and the README's if not `SMOKE`.

    `on`: what was measured, where that is not this machine's processor.
    """
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
    date = datetime.now(UTC).date().isoformat()
    origin = {"command": command, "machine": on or machine(), "date": date}
    fresh = [
        {"bench": bench, "name": name, "value": value, "unit": unit} | origin for name, (value, unit) in figures.items()
    ]
    kept = [figure for figure in known if figure["bench"] != bench]
    FIGURES.parent.mkdir(parents=True, exist_ok=True)
    FIGURES.write_text(json.dumps(kept + fresh, indent=1) + "\n")
    PAGE.write_text(page(kept + fresh))
    if not SMOKE:
        README.write_text(readme(README.read_text(), kept + fresh))


def readme(text: str, figures: list[dict[str, Any]]) -> str:
    """The README with the default run's figures between its marks."""
    known = {figure["name"]: figure for figure in figures if figure["bench"] == "pipeline"}
    rows = [
        f"| {label} | {show(known[name]['value'])} | {known[name]['unit']} |" for name, label in _DEFAULT_RUN.items()
    ]
    table = "\n".join(["| the default run | | |", "|---|---:|---|", *rows])
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def page(figures: list[dict[str, Any]]) -> str:
    """The figures as Markdown, one table per bench."""
    parts = ["# Benchmarks\n\nGenerated from `benchmarks.json`; every figure names the command that measured it.\n"]
    for bench in dict.fromkeys(figure["bench"] for figure in figures):
        rows = [figure for figure in figures if figure["bench"] == bench]
        first = rows[0]
        parts.append(f"## {bench}\n\n`{first['command']}` on {first['machine']}, {first['date']}\n")
        table = [f"| {row['name']} | {show(row['value'])} | {row['unit']} |" for row in rows]
        parts.append("\n".join(["| figure | value | unit |", "|---|---:|---|", *table]) + "\n")
    return "\n".join(parts)


def show(value: float) -> str:
    """Integers in full, other numbers with four significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
