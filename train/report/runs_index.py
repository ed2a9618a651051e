"""`train report RUNS --index`: one page of all runs of a folder, with links to their reports. Needs no store."""

from pathlib import Path
from typing import Any, NamedTuple

from shared.errors import CorruptData, UserError, warn
from shared.files import durable
from train.live.run_files import CONFIG, METRICS
from train.report import gather
from train.report.make_report import HTML, JSON
from train.report.page import asset, duration, environment
from train.report.report_record import Report
from train.run.metrics import Log
from train.run.settings import read_config

FILE = "index.html"


class IndexedRun(NamedTuple):
    """What the page says of a run; none: not known."""

    name: str
    state: str
    """How far it is, or what its verdict counts."""
    settings: dict[str, Any]
    """`k`, `d_sae`, `lr` and `seed`."""
    fvu: float | None
    """Held out."""
    l0: float | None
    dead_share: float | None
    ce_recovered: float | None
    tokens: int | None
    seconds: float | None
    store: str
    report: bool
    """Whether it has one."""


def write_index(runs: Path) -> tuple[Path, list[IndexedRun]]:
    """Write `index.html` into the folder `runs`; returns its path, and what it says.

    Runs that cannot be read are left out with a warning. Raises `UserError` when there is no run, and `DiskFull`.
    """
    if (runs / CONFIG).is_file():
        raise UserError(f"{runs} is a run: --index takes the folder of runs, such as {runs.resolve().parent}")
    found = []
    for path in sorted(path.parent for path in runs.glob(f"*/{CONFIG}")):
        try:
            found.append(_indexed(path))
        except CorruptData as error:
            warn(f"{error}; the run is left out")
    if not found:
        raise UserError(f"no runs in {runs}; --index takes the folder that train run --runs writes to")
    found.sort(key=lambda one: (one.fvu is None, one.fvu, one.name))
    template = environment().get_template("index.html")
    page = template.render(folder=runs.resolve().name, runs=found, duration=duration, style=asset("style.css"),
                           theme=asset("theme.js"))  # fmt: skip
    durable.publish_bytes(runs / FILE, page.encode())
    return runs / FILE, found


def _indexed(run: Path) -> IndexedRun:
    config, report = read_config(run), _report(run)
    settings, last = config.settings, _last_evaluation(run)
    rows, seconds = gather.trained(run, 2**53) or (None, None)
    recovered = report.splice.headline.ce_recovered if report and report.splice else None
    if report:
        counts = report.counts
        state = f"step {report.step:,} of {report.steps:,}; {counts['good']} good, {counts['look']} worth a look, "
        state += f"{counts['bad']} failed"
        last = report.held_out.model_dump()
    else:
        state = f"step {last.get('step', 0):,} of {settings.steps:,}; no report"
    return IndexedRun(
        name=run.name,
        state=state,
        settings={
            "k": settings.activation.expected_l0,
            "d_sae": settings.transcoder.d_sae,
            "lr": settings.optimizer.lr,
            "seed": settings.seed,
        },
        fvu=last.get("fvu"),
        l0=last.get("l0"),
        dead_share=last.get("dead_share"),
        ce_recovered=recovered.value if recovered else None,
        tokens=rows,
        seconds=seconds,
        store=report.store.name if report else Path(config.store).name,
        report=(run / HTML).is_file(),
    )


def _report(run: Path) -> Report | None:
    """Read `report.json`; one of another version counts as none."""
    try:
        return Report.model_validate(durable.read_json(run / JSON))
    except (OSError, ValueError):
        return None


def _last_evaluation(run: Path) -> dict[str, Any]:
    """Return the figures of the last evaluation with the step of the last row; empty before the first row."""
    found: dict[str, Any] = {}
    for row in Log(run / METRICS).rows():
        found |= row.get("held_out", {}) | {"step": row["step"]}
    return found
