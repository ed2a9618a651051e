"""Everything that is promised of a GPU, on the one that is here, in under eight minutes and without a network.

    python -m tests.bench.gpu [kernels] [step] [dense] [run] [harvest] [peers] [profile] [--seconds 460] [--work FOLDER]
    python -m tests.bench.gpu --take LOG       enters into docs/benchmarks.json what a run printed on another machine

`kernels` checks every kernel and the whole step against float64. `step` measures the device's two ceilings, a copy
and a product in bfloat16, and the step of Gemma 2 2B's width beside them. `dense` measures a dense compiled trainer
with the same mathematics, `peers` other trainers whose packages are installed. `run` and `harvest` measure the real
commands, on a store and a model made on the spot, of 12 and 15 GB in FOLDER. `profile` prints which kernels take a
step's time. Each part is a process of its own, so that no error, and no fault of the device, stops the others; what is
left when the time is up is said and left out.

Figures are printed as they are measured, and entered into docs/benchmarks.json after each part. The last line of the
output has all of them as JSON, for `--take`.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.record import ROOT, SMOKE, record, sized

if TYPE_CHECKING:
    from shared.store.store import Store
    from tests.bench.gpu_setup import Shape, Timed

LINE = "python -m tests.bench.gpu"
Figures = dict[str, tuple[float, str]]
FORMS = ("triton", "matmul", "plain")
"""Kinds of kernels that a GPU is measured with; `triton` with its step as a CUDA graph, and without."""


class Report:
    """The figures of one part: each is a line of the table at once, and a line of a file for the process above."""

    def __init__(self, part: str, file: Path) -> None:
        self._part, self._file = part, file
        self.failed: list[str] = []
        """What went wrong; the part then ends with an error."""

    @contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Print and note what goes wrong inside, and go on: one shape that does not fit leaves the others."""
        try:
            yield
        except Exception:  # whatever a compiler, a driver or another library raises
            if SMOKE:  # nothing goes wrong where a bench shows that it runs
                raise
            print(f"FAILED: {what}", flush=True)
            traceback.print_exc(file=sys.stdout)
            self.failed.append(what)

    def add(self, name: str, value: float, unit: str) -> None:
        """Show and keep a figure."""
        print(f"{self._part:8} {name:76} {value:12,.4g} {unit}", flush=True)
        with self._file.open("a") as file:
            file.write(json.dumps([self._part, name, value, unit]) + "\n")

    def add_all(self, figures: Figures) -> None:
        """Show and keep several."""
        for name, (value, unit) in figures.items():
            self.add(name, value, unit)


class Part(NamedTuple):
    """What is run in a process of its own."""

    run: Callable[[Report, Path, str], None]
    least: float
    """Seconds that must be left for it to begin"""
    most: float
    """Seconds after which it is ended"""


def kernels(report: Report, folder: Path, device: str) -> None:
    """Check all, and end with an error if one does not hold."""
    from tests.bench.gpu_checks import groups, show
    from tests.bench.gpu_setup import small_store

    failed, worst = [], dict[str, float]()
    for where, checks in groups(small_store(folder), device):
        failed.append(where)
        with report.going_on(where):
            for check in checks():
                print(show(where, check), flush=True)
                if not check.holds:
                    failed.append(f"{where}: {check.name}")
                if check.limit:
                    kind = f"{where.split(', width')[0]}: largest relative error of {check.of}"
                    worst[kind] = max(worst.get(kind, 0.0), check.error)
            failed.remove(where)
    report.add_all({kind: (error, "") for kind, error in worst.items()})
    report.add("checks that do not hold", len(failed), "checks")
    if failed:
        sys.exit(f"{len(failed)} checks do not hold:\n" + "\n".join(failed))


def step(report: Report, folder: Path, device: str) -> None:
    """Ceilings, then the step that a run takes in every shape, then the other forms in two of them."""
    import torch

    from tests.bench.gpu_setup import MAIN, SHAPES, small_store

    bandwidth, flops = ceilings(report, device)
    store = small_store(folder)
    wide = next(shape for shape in reversed(SHAPES) if shape.rows == MAIN.rows)
    graphless = ["step_graph=off"]
    forms = sized([["kernels=triton", *graphless], *([f"kernels={form}"] for form in FORMS)], [["kernels=dense"]])
    others = [(shape, changes) for shape in (MAIN, wide) for changes in forms]
    for shape, changes in [*((shape, list[str]()) for shape in SHAPES), *others]:
        with report.going_on(f"{shape} {' '.join(changes)}"):
            one_step(report, store, shape, changes, device, (bandwidth, flops))
        torch.cuda.empty_cache()


def one_step(
    report: Report, store: "Store", shape: "Shape", changes: Sequence[str], device: str, rates: tuple[float, float]
) -> None:
    """A step of one shape, with settings changed or none."""
    from tests.bench.gpu_setup import make_step, peak_gib, timed

    peak_gib(device)
    made = make_step(store, shape, device, changes)
    name = ", ".join([str(shape), *changes])
    print(f"{name}: kernels {made.model.kernels}, product {made.config.settings.product_dtype}", flush=True)
    report.add_all(beside_ceilings(name, shape, timed(made, sized(20, 2)), *rates))
    print(f"{name}: steps that were launched as a CUDA graph: {made.graph.replayed}", flush=True)
    report.add(f"{name}: peak memory", peak_gib(device), "GiB")


def beside_ceilings(name: str, shape: "Shape", taken: "Timed", bandwidth: float, flops: float) -> Figures:
    """What a step took, and what share of the ceilings that is."""
    seconds, moved = taken.device / 1e3, sum(shape.necessary_bytes.values())
    return {
        f"{name}: step": (taken.device, "ms"),
        f"{name}: host's part of a step": (taken.host, "ms"),
        f"{name}: rows": (shape.rows / seconds, "rows/s"),
        f"{name}: necessary bytes, of a copy's bandwidth": (100 * moved / seconds / bandwidth, "%"),
        f"{name}: product, of bfloat16's rate": (100 * shape.product_flops / seconds / flops, "%"),
        f"{name}: step over the floor of both": (seconds / shape.floor(bandwidth, flops), "times"),
    }


def ceilings(report: Report, device: str) -> tuple[float, float]:
    """A copy on the device, bytes read and written, and a product in bfloat16 of random numbers; both per second."""
    import torch

    from tests.bench.gpu_setup import timed

    size = sized(2**31, 2**16)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2e3 * size / timed(lambda _: target.copy_(source), sized(20, 2)).device
    n = sized(8192, 64)
    left, right = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    flops = 2e3 * n**3 / timed(lambda _: left @ right, sized(30, 2)).device
    report.add("copy on the device", bandwidth / 1e9, "GB/s")
    report.add(f"product of {n:,} x {n:,} in bfloat16", flops / 1e12, "TFLOP/s")
    return bandwidth, flops


def dense(report: Report, folder: Path, device: str) -> None:
    """The dense trainer in every shape, the narrowest and the widest first."""
    import torch

    from tests.bench.gpu_setup import SHAPES, WIDTHS, small_store

    store = small_store(folder)
    for shape in sorted(SHAPES, key=lambda one: (WIDTHS[0], WIDTHS[-1], *WIDTHS).index(one.d_sae)):
        with report.going_on(f"{shape}"):
            dense_step(report, store, shape, device)
        torch.compiler.reset()
        torch.cuda.empty_cache()


def dense_step(report: Report, store: "Store", shape: "Shape", device: str) -> None:
    """A dense step, and its loss beside ours on the same weights and rows."""
    import torch

    from tests.bench.gpu_dense import DenseTrainer
    from tests.bench.gpu_setup import K, make_step, peak_gib, timed

    ours = make_step(store, shape, device)
    x, y = ours.model.normalised(*ours.batches[0])
    expected = float(ours.model.step(*ours.batches[0], ours.dead, ours.auxk, 0).loss.detach())
    compiled = sized(lambda one: torch.compile(one, fullgraph=True, dynamic=False), lambda one: one)
    trainer, dead = DenseTrainer(ours.model, K, ours.auxk, compiled), ours.dead
    del ours
    torch.cuda.empty_cache()
    peak_gib(device)
    found = float(trainer.loss(x, y, dead).detach())
    taken = timed(lambda _: trainer.step(x, y, dead), sized(20, 2))
    report.add_all({
        f"{shape}: step": (taken.device, "ms"),
        f"{shape}: host's part of a step": (taken.host, "ms"),
        f"{shape}: peak memory": (peak_gib(device), "GiB"),
        f"{shape}: loss beside ours, relative difference": (abs(found - expected) / expected, ""),
    })  # fmt: skip


def run(report: Report, folder: Path, device: str) -> None:
    """`train run`."""
    from tests.bench import gpu_commands

    report.add_all(gpu_commands.run(folder, device))


def harvest(report: Report, folder: Path, device: str) -> None:
    """`harvest run`."""
    from tests.bench import gpu_commands

    report.add_all(gpu_commands.harvest(folder, device))


def peers(report: Report, folder: Path, device: str) -> None:
    """Other trainers, where this Python has their packages."""
    from tests.bench.gpu_setup import MAIN, D, K
    from tests.bench.peer_worker import STAND_IN, STEPS

    for name in sized([one for one in STEPS if one not in ("ours", STAND_IN)], [STAND_IN]):
        package = {"SAELens": "sae_lens"}.get(name.split()[0], name.split()[0])
        if name != STAND_IN and importlib.util.find_spec(package) is None:
            print(f"left out: {name}, since the package {package} is not installed", flush=True)
            continue
        with report.going_on(name):
            worker = ROOT / "tests/bench/peer_worker.py"
            line = [sys.executable, "-P", worker, name, D, MAIN.d_sae, K, MAIN.rows, sized(device, "cpu")]
            rounds = sized(12, 3)
            done = subprocess.run(
                [str(part) for part in line], input="\n" * rounds, stdout=subprocess.PIPE, text=True, check=True,
                cwd=folder, timeout=60,
            )  # fmt: skip
            found = [line.split() for line in done.stdout.splitlines()[-rounds:]]
            seconds = sorted(float(one) for one, _ in found[2:])
            report.add(f"{name}, {MAIN}: step", 1e3 * seconds[len(seconds) // 2], "ms")
            report.add(f"{name}, {MAIN}: peak memory", float(found[-1][1]) / 1024, "GiB")


def profile(report: Report, folder: Path, device: str) -> None:
    """Print where the time of a step of the main shape goes."""
    import torch
    from torch.profiler import ProfilerActivity

    from tests.bench.gpu_setup import MAIN, make_step, small_store

    made, steps = make_step(small_store(folder), MAIN, device), 5
    for number in range(3):
        made(number)
    kinds = [ProfilerActivity.CPU, *sized([ProfilerActivity.CUDA], [])]
    with torch.profiler.profile(activities=kinds) as found:
        for number in range(steps):
            made(number)
        torch.cuda.synchronize()
    order = sized("self_device_time_total", "self_cpu_time_total")
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60), flush=True)
    report.add("operations of a step, by the profiler", sum(one.count for one in found.key_averages()) / steps, "")


PARTS = {
    "kernels": Part(kernels, 20, 100),
    "step": Part(step, 20, 110),
    "run": Part(run, 60, 150),
    "harvest": Part(harvest, 60, 150),
    "dense": Part(dense, 30, 150),
    "peers": Part(peers, 20, 60),
    "profile": Part(profile, 15, 40),
}


def main() -> None:
    """Run the parts that are named, or all, within the time, and record."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar=f"{{{','.join(PARTS)}}}")
    parser.add_argument("--seconds", type=float, default=460, help="when they are up, what is left is left out")
    parser.add_argument(
        "--work", type=Path, help="where stores and models go; the system's temporary folder if not given"
    )
    parser.add_argument("--take", type=Path, metavar="LOG", help="enter the figures of a run on another machine")
    parser.add_argument("--inside", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(PARTS)}")
    if options.inside:
        inside(options.parts[0], options.inside, options.work)
    elif options.take:
        enter(json.loads(options.take.read_text().splitlines()[-1]))
    else:
        sys.exit(outside(options.parts or list(PARTS), began + options.seconds, options.work))


def outside(parts: Sequence[str], end: float, work: Path | None) -> int:
    """Run each part in a process of its own; returns how many went wrong."""
    card = device_name()
    for line in about(card):
        print(line, flush=True)
    wrong: list[str] = []
    if work:
        work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "figures"
        file.touch()
        for name in parts:
            left = end - time.monotonic()
            if left < PARTS[name].least:
                print(f"left out for want of time: {name} ({left:.0f} s left)", flush=True)
                continue
            print(f"== {name} ({left:.0f} s left)", flush=True)
            if not one_part(name, file, Path(folder), min(left, PARTS[name].most)):
                wrong.append(name)
            taken = {"on": card, "parts": by_part(file)}
            enter(taken)
        print(f"parts that went wrong: {', '.join(wrong) or 'none'}")
        print(json.dumps(taken, separators=(",", ":")), flush=True)
    return len(wrong)


def one_part(name: str, file: Path, work: Path, seconds: float) -> bool:
    """Run a part; returns whether it ended well."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        line = [sys.executable, "-m", "tests.bench.gpu", name, "--inside", str(file), "--work", folder]
        process = subprocess.Popen(line, cwd=ROOT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            print(f"ended after {seconds:.0f} s: {name}", flush=True)
            return False
        finally:  # with all that it has started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        print(f"went wrong, exit code {code}: {name}", flush=True)
    return code == 0


def inside(name: str, file: Path, folder: Path) -> None:
    """Run one part here; to show that it runs, on a fake device."""
    with ExitStack() as stack:
        if SMOKE:
            from tests.gpu.fake_device import fake_cuda

            stack.enter_context(fake_cuda())
        report = Report(name, file)
        PARTS[name].run(report, folder, "cuda")
    if report.failed:
        sys.exit(f"went wrong in {name}: {', '.join(report.failed)}")


def by_part(file: Path) -> dict[str, Figures]:
    """Read the figures so far, with what follows from those of several parts."""
    found: dict[str, Figures] = {}
    for line in file.read_text().splitlines():
        part, name, value, unit = json.loads(line)
        found.setdefault(part, {})[name] = value, unit
    if summary := dict(compared(found)):
        found["summary"] = summary
    return found


def compared(found: dict[str, Figures]) -> Iterator[tuple[str, tuple[float, str]]]:
    """Compare parts with each other: our step with the dense one, a run with its steps."""
    ours, theirs = found.get("step", {}), found.get("dense", {})
    for name in theirs:
        if name.endswith(": step") and name in ours:
            yield f"{name} of the dense trainer over ours", (theirs[name][0] / ours[name][0], "times as fast")
    steps = [value for name, (value, _) in ours.items() if name.endswith(": step")]
    loop = found.get("run", {}).get("training loop, with all that happens between two steps")
    if steps and loop:
        count = sized(4882, 8)
        yield f"{count:,} steps' own time", (count * steps[0] / 1e3, "s")
        yield "training loop over the steps' own time", (loop[0] / (count * steps[0] / 1e3), "times")


def enter(taken: dict[str, Any]) -> None:
    """Put figures into docs/benchmarks.json, each part of each card under its own heading."""
    for part, figures in taken["parts"].items():
        named = {name: (value, unit) for name, (value, unit) in figures.items()}
        record(f"gpu {part}, {taken['on']}", LINE, named, on=taken["on"])


def device_name() -> str:
    """The first GPU by its driver's name."""
    if SMOKE:
        return "no GPU"
    line = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("nvidia-smi names no GPU; BENCH_SMOKE=FOLDER shows without one that the bench runs")


def about(card: str) -> Iterator[str]:
    """Versions and driver, a line each."""
    yield card
    if not SMOKE:
        query = "--query-gpu=driver_version,memory.total,memory.used,clocks.max.sm,clocks.max.memory,power.limit"
        yield subprocess.run(["nvidia-smi", query, "--format=csv"], stdout=subprocess.PIPE, text=True).stdout.strip()
    yield f"Python {sys.version.split()[0]}"
    for package in ("torch", "triton", "numpy", "numba", "transformers", "transformer-lens", "safetensors"):
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            yield f"{package} is not installed"


if __name__ == "__main__":
    main()
