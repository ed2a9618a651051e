"""What the correlation monitor and the terms of the diversity loss cost, on one thread.

python -m tests.bench.duplicates report [F ...]          a report's time and memory; widths 4096, 18432 and 131072
python -m tests.bench.duplicates terms [S] [M] [L]       every component as a share of a step of `tests.bench.step`
python -m tests.bench.duplicates samples RUN ...         pairs that correlate in one sample and in many rows of training
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from shared.store.strata import POSITION_0
from tests.bench.record import record, run, sized
from tests.bench.step import AUXK, SHAPES, B, Setup, one_thread, setup
from train.data.batches import BatchReader
from train.duplicates.co_activation import correlated_pairs, measure
from train.duplicates.directions import Pairs
from train.duplicates.diversity import Diversity, DiversityConfig
from train.duplicates.monitor import CorrelationMonitor, MonitorConfig
from train.duplicates.monitor_limits import MOST_TRACKED_PAIRS
from train.duplicates.tracked import TrackedPairs
from train.model.activations import BatchTopK
from train.model.blas import faster_here
from train.model.sparse_latents import SparseLatents
from train.model.step_output import StepOutput
from train.model.transcoder import Normalisation, Transcoder, TranscoderConfig
from train.run.load_run import load_run

REPORTS = sized({4096: (32, 128, 1), 18432: (48, 2304, 1), 131072: (64, 4096, 8)}, {128: (4, 16, 1)})
"""By d_sae: active latents per row, d_out, and of which part of the latents all decoder rows are scanned: one in n."""
REPEATS = sized({"S": 21, "M": 11, "L": 7}, {"S": 2})
BOS = 4
"""Rows of a batch at position 0."""
STRATA = {POSITION_0: slice(0, BOS), "001-256": slice(BOS, B)}
GROUP, CENTRE = 8, 0.8
"""Decoder rows lie in groups of 8 around centres, whose cosines are about 0.4: some thousand pairs above the margin."""
TINY = 1e-6
"""Weight of the terms that are measured: latents stay where they are."""
MONITORED, EVERY = sized(8192, 512), 100
"""Rows of a report's sample, and steps between reports."""
TERMS = ("orthogonality", "mined", "co_activation", "position")
EXACT = "MALLOC_MMAP_THRESHOLD_=65536"
"""Freed memory goes back at once, so that a peak is what was needed, and not what was there."""
SAMPLES = sized(16, 2)
"""Of `MONITORED` training rows each, which together are the many rows."""
SEED = 123
"""Of the order in which rows are read: no run's."""
RARE = 4
"""Rows in common that a sample needs to list a pair: pairs that are rarer than that in the mean are rare."""
LINE = "python -m tests.bench.duplicates"


def main() -> None:
    """Measure what the command line names, and record."""
    match sys.argv[1:]:
        case ["child", d_sae]:
            one_thread()
            print(json.dumps(report_costs(int(d_sae))))
        case ["report", *widths]:
            for width in map(int, widths or REPORTS):
                k, d_out, part = REPORTS[width]
                done = run("env", EXACT, sys.executable, "-m", "tests.bench.duplicates", "child", width)
                figures = {name: (value, unit) for name, (value, unit) in json.loads(done.out).items()}
                of = f", of every {part}th decoder row" if part > 1 else ""
                title = f"report: d_sae {width:,}, k {k}, d_out {d_out:,}, {MONITORED:,} rows{of}, one thread"
                show(title, figures)
                record(title, f"{LINE} report {width}", figures)
        case ["terms", *shapes]:
            one_thread()
            for shape in shapes or SHAPES:
                d, width, k = SHAPES[shape]
                title = f"diversity {shape}: d {d}, d_sae {width}, k {k}, B {B}, one thread"
                figures = term_costs(shape)
                show(title, figures)
                record(title, f"{LINE} terms {shape}", figures)
        case ["samples", first, *others]:
            one_thread()
            for path in map(Path, (first, *others)):
                figures = of_samples(path)
                title = f"samples of a run: {path.name}, {SAMPLES * MONITORED:,} rows"
                show(title, figures)
                record(title, f"{LINE} samples {path.name}", figures)
        case _:
            sys.exit(__doc__)


def show(title: str, figures: dict[str, tuple[float, str]]) -> None:
    """Print a table."""
    print(title)
    for name, (value, unit) in figures.items():
        print(f"  {name:58}{value:12.4g} {unit}")


def report_costs(d_sae: int) -> dict[str, tuple[float, str]]:
    """CPU time and memory of a report; with all latents dead there are no decoder rows, and it counts alone."""
    k, d_out, part = REPORTS[d_sae]
    torch.manual_seed(0)
    activation = BatchTopK(k=k)
    still = Normalisation(torch.zeros(1), 1.0, torch.zeros(d_out), 1.0)
    model = Transcoder(1, d_out, TranscoderConfig(d_sae=d_sae).resolve(1, activation), activation, still)
    model.blas = faster_here()
    group_decoder_rows(model)
    config, rng = MonitorConfig(every=EVERY, rows=MONITORED), np.random.default_rng(0)
    steps = [step_of(sample(rng, d_sae, k), model) for _ in range(-(-config.rows // B))]
    all_dead, some_dead = torch.ones(d_sae, dtype=torch.bool), torch.arange(d_sae) % part > 0
    figures: dict[str, tuple[float, str]] = {}
    taken = {}
    for name, dead, repeats in (("counting", all_dead, 3), ("report", some_dead, max(1, 8192 // d_sae))):
        seconds = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                monitor = CorrelationMonitor(Path(folder), config, model, STRATA, EVERY)
                for i, step in enumerate(steps):
                    monitor.add(step, EVERY - len(steps) + 1 + i)
                start = forget_peak()
                began = time.process_time()
                found = monitor.report(EVERY, dead)
                seconds.append(time.process_time() - began)
        taken[name] = statistics.median(seconds)
        figures[f"{name}: peak beyond the start"] = (memory("VmHWM") - start, "MiB")
    figures["counting"] = (taken["counting"], "CPU-s")
    figures["scan of decoder rows"] = (taken["report"] - taken["counting"], "CPU-s")
    figures["decoder rows scanned"] = (found.directions.live, "latents")
    figures["the decoder itself"] = (model.W_dec.numel() * 4 / 2**20, "MiB")
    return figures


def forget_peak() -> float:
    """Resident MiB now, from which the peak is measured again."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> float:
    """A figure of this process, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def sample(rng: np.random.Generator, d_sae: int, k: int) -> SparseLatents:
    """A batch's pairs: k latents of every row, the latent of rank r as often as (r + 10)^-0.8."""
    share = (np.arange(d_sae) + 10.0) ** -0.8
    edges = np.cumsum(share / share.sum())
    drawn = np.minimum(np.searchsorted(edges, rng.random((B, 4 * k))), d_sae - 1)
    latents = np.array([np.sort(list(dict.fromkeys(row.tolist()))[:k]) for row in drawn])
    latents[:BOS] = latents[0]
    values = rng.lognormal(0, 0.5, latents.shape).astype(np.float32)
    rows = torch.arange(B).repeat_interleave(k)
    shape = torch.Size((B, d_sae))
    return SparseLatents.of(rows, torch.from_numpy(latents.ravel()), torch.from_numpy(values.ravel()), shape)


def step_of(active: SparseLatents, model: Transcoder) -> StepOutput:
    """What the monitor reads of a step."""
    nothing = torch.zeros(())
    return StepOutput(
        terms={},
        errors=nothing,
        target=nothing,
        active=active,
        values=active.values,
        threshold=nothing,
        pre_acts=nothing,
    )


@torch.no_grad()
def of_samples(path: Path) -> dict[str, tuple[float, str]]:
    """Pairs above 0.8 and 0.6 on many rows of training, and what samples of them list; all at the last weights."""
    run = load_run(path)
    settings = run.config.settings
    reader = BatchReader(run.rows.store, run.training_blocks, settings.rows, SEED, torch.device("cpu"))
    at_0 = reader.slices().get(POSITION_0, slice(0, 0))
    rest, samples = torch.arange(settings.rows.batch_rows) >= at_0.stop, []
    each = max(1, MONITORED // settings.rows.batch_rows)
    for i in range(SAMPLES):
        batches = [reader.batch(step) for step in range(i * each, (i + 1) * each)]
        inputs = [run.transcoder.normalised(batch.source, batch.target)[0] for batch in batches]
        active = [run.transcoder.select_above(run.transcoder.pre_acts(x), run.threshold) for x in inputs]
        samples.append(SparseLatents.joined([one.positive().of_rows(rest) for one in active]))
    whole, figures = SparseLatents.joined(samples), dict[str, tuple[float, str]]()
    for level in (0.8, 0.6):
        truly, listed = above(whole, level), [above(sample, level) for sample in samples]
        rare = {pair for pair, together in truly.items() if together < RARE * SAMPLES}
        counts = {
            "on all rows": len(truly),
            "on all rows, rare": len(rare),
            "listed by one sample": statistics.mean(map(len, listed)),
            "listed by one sample, and so on all rows": statistics.mean(len(truly.keys() & one) for one in listed),
            "rare, and listed by one sample": statistics.mean(len(rare & one.keys()) for one in listed),
        }
        figures |= {f"pairs above {level}: {name}": (float(count), "pairs") for name, count in counts.items()}
    return figures


def above(active: SparseLatents, level: float) -> dict[tuple[int, int], int]:
    """Pairs that correlate above a level, and on how many rows both are active."""
    found, _ = correlated_pairs(active, RARE, 64)
    pairs = found.pairs.kept(found.correlation > level)
    return dict(
        zip(zip(*(side.tolist() for side in pairs), strict=True), measure(active, pairs).rows.tolist(), strict=True)
    )


@torch.no_grad()
def group_decoder_rows(model: Transcoder) -> None:
    """Give the decoder neighbours: neighbouring latents share a centre."""
    d_sae, d_out = model.W_dec.shape
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(-(-d_sae // GROUP), d_out, generator=generator)
    model.W_dec.copy_(torch.randn(d_sae, d_out, generator=generator))
    model.W_dec.add_(centres.repeat_interleave(GROUP, 0)[:d_sae], alpha=CENTRE)
    model.normalise_decoder()


def diversity(made: Setup, **weights: float) -> Diversity:
    """The terms of `weights`, with pairs that a scan found, and as many correlated ones as there may be."""
    config = DiversityConfig.model_validate({name: {"weight": weights.get(name, 0)} for name in TERMS})
    found = Diversity(made.model, config, torch.ones(B), STRATA[POSITION_0], 0)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(made.model.d_sae, (2, config.co_activation.pairs), generator=generator)
    full = DiversityConfig.model_validate({name: {"weight": float(name == "mined")} for name in TERMS})
    scanned = Diversity(made.model, full, torch.ones(B), STRATA[POSITION_0], 0)
    scanned.direction_terms(made.dead, 0)
    mined = {f"diversity.mined.{side}": latents for side, latents in scanned.mined._asdict().items()}
    correlated = {"diversity.correlated.first": pairs.min(0).values, "diversity.correlated.second": pairs.max(0).values}
    correlated["diversity.strength"] = torch.ones(pairs.shape[1])
    found.load(found.state() | mined | correlated)
    made.model.zero_grad(set_to_none=True)
    return found


def term_costs(shape: str) -> dict[str, tuple[float, str]]:
    """Every component's CPU time over that of a step without any, at its default cadence."""
    made = setup(shape)
    group_decoder_rows(made.model)

    def step(terms: Diversity, number: int) -> Callable[[], None]:
        def call() -> None:
            output = made.model.step(made.source, made.target, made.dead, AUXK, number)
            whole, apart = terms.value_terms(output), terms.direction_terms(made.dead, number)
            first, *others = output.losses
            made.optimizer.step([first + sum(whole.values()), *others, *apart.values()], number)

        return call

    on = {name: diversity(made, **{name: TINY}) for name in TERMS}
    scans, every = on["mined"].scan_every, DiversityConfig().orthogonality.every
    pairs = len(on["mined"].mined.first)
    off = step(diversity(made), 1)
    parts: dict[str, Callable[[], object]] = {name: step(on[name], 1) for name in TERMS if name != "orthogonality"}
    parts |= {"chunk": step(on["orthogonality"], 0), "scan": step(on["mined"], 0)}
    parts["all"] = step(diversity(made, **dict.fromkeys(TERMS, TINY)), 1)
    taken = beside(off, parts, REPEATS[shape])
    whole, extra = taken["off"], taken
    config = MonitorConfig(every=EVERY, rows=MONITORED)
    watching = monitor_costs(made, config)
    looks = -(-config.rows // B)
    figures: dict[str, tuple[float, str]] = {"step without": (whole * 1e3, "CPU-ms")}
    figures |= {f"{name}: one step beside one without": (extra[name] * 1e3, "CPU-ms") for name in parts}
    figures |= {f"monitor: {name}": (seconds * 1e3, "CPU-ms") for name, seconds in watching.items()}
    figures["pairs mined"], figures["steps between scans"] = (pairs, "pairs"), (scans, "steps")
    scan_steps = max(scans, EVERY)
    share = {
        "orthogonality": extra["chunk"] / every,
        "mined": extra["mined"] + max(extra["scan"] - extra["mined"], 0) / scans,
        "co_activation": extra["co_activation"],
        "position": extra["position"],
        "monitor": (looks * watching["batch of the sample"] + watching["counting"]) / EVERY
        + watching["scan"] / scan_steps
        + watching["a step of as many tracked pairs as there may be"],
    }
    figures |= {f"share of a step: {name}": (100 * seconds / whole, "%") for name, seconds in share.items()}
    figures["share of a step: all together"] = (100 * sum(share.values()) / whole, "%")
    return figures


def monitor_costs(made: Setup, config: MonitorConfig) -> dict[str, float]:
    """CPU seconds of keeping a batch, of counting, and of a scan."""
    output = made.model.step(made.source, made.target, made.dead, AUXK, 1)
    rng, k = np.random.default_rng(0), len(output.active.rows) // B
    steps = [step_of(sample(rng, made.model.d_sae, k), made.model) for _ in range(-(-config.rows // B))]
    taken: dict[str, list[float]] = {"batch of the sample": [], "counting": [], "report": []}

    def timed(name: str, part: Callable[[], object]) -> None:
        began = time.process_time()
        part()
        taken[name].append(time.process_time() - began)

    for _ in range(5):
        for name, dead in (("counting", torch.ones_like(made.dead)), ("report", made.dead)):
            with tempfile.TemporaryDirectory() as folder:
                monitor = CorrelationMonitor(Path(folder), config, made.model, STRATA, EVERY)
                for i, one in enumerate(steps):
                    timed("batch of the sample", partial(monitor.add, one, EVERY - len(steps) + 1 + i))
                timed(name, partial(monitor.report, EVERY, dead))
    tracking, tracked = TrackedPairs(made.model.d_sae, 0.0), "a step of as many tracked pairs as there may be"
    first = torch.randint(made.model.d_sae - 1, (MOST_TRACKED_PAIRS,), generator=torch.Generator().manual_seed(0))
    tracking.propose(Pairs(first, first + 1), torch.ones(MOST_TRACKED_PAIRS))
    taken[tracked] = []
    for one in steps * 3:
        timed(tracked, partial(tracking.add, one.active))
    found = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {name: found[name] for name in ("batch of the sample", "counting", tracked)} | {
        "scan": found["report"] - found["counting"]
    }


def beside(off: Callable[[], object], parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of `off`, and by how much each part takes longer than the `off` just before it."""
    plain: list[float] = []
    extra: dict[str, list[float]] = {name: [] for name in parts}

    def timed(part: Callable[[], object]) -> float:
        began = time.process_time()
        part()
        return time.process_time() - began

    for repeat in range(repeats + 1):
        for name, part in parts.items():
            before = timed(off)
            taken = timed(part)
            if repeat:  # the first round warms up
                plain.append(before)
                extra[name].append(taken - before)
    return {"off": statistics.median(plain)} | {name: statistics.median(more) for name, more in extra.items()}


if __name__ == "__main__":
    main()
