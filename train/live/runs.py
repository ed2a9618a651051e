"""`python -m train ls` and `rm`: the runs of a folder, as their files tell. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from shared.console.panel import size
from shared.console.terminal import PlainConsole
from shared.errors import ProjectError, UserError
from shared.files import durable
from shared.files.disk_usage import size_of
from train.live.run_files import CONFIG, LOCK, config_file, runs_in
from train.live.watch import Watched


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """A run in a folder of runs."""

    name: str
    store: str
    """Name of the folder that its store was in when it started; empty for a damaged run."""
    state: str
    """`starting`, `running`, `finished`, `stopped`, or `damaged: ...`."""
    step: int
    """Done, as far as the metrics and the newest checkpoint tell."""
    steps: int
    fvu: float | None
    """Held out, of the last evaluation; none: there was none yet."""
    l0: float | None
    """Likewise: active latents per row, by threshold."""
    dead_share: float | None
    """Likewise: share of latents that are active on no held-out row."""
    bytes: int
    """On disk, all files."""


def list_runs(runs: Path) -> list[ListedRun]:
    """List the runs in the folder `runs`, by name. Raises `UserError` when it is a run itself, or no folder."""
    if (runs / CONFIG).is_file():
        raise UserError(f"{runs} is a run; pass the folder that it is in: --runs {runs.parent}")
    if runs.exists() and not runs.is_dir():
        raise UserError(f"{runs} is a file, and runs lie in a folder; pass that with --runs")
    return [_listed(runs / name) for name in runs_in(runs)]


def _listed(path: Path) -> ListedRun:
    taken = size_of(path)
    try:
        watched = Watched(path)
        for _ in watched.look():
            pass
    except ProjectError as error:
        return ListedRun(name=path.name, store="", state=f"damaged: {error}", step=0, steps=0, fvu=None, l0=None,
                         dead_share=None, bytes=taken)  # fmt: skip
    status, held_out = watched.status, watched.status.held_out
    return ListedRun(
        name=path.name,
        store=watched.store,
        state=watched.state,
        step=max(status.step, watched.newest_checkpoint),
        steps=status.steps,
        fvu=held_out.get("fvu"),
        l0=held_out.get("l0"),
        dead_share=held_out.get("dead_share"),
        bytes=taken,
    )


def print_runs(found: Sequence[ListedRun], runs: Path) -> None:
    """Print a table that fits 80 columns: words are broken where there is no room for them, numbers never."""
    console = PlainConsole()
    if not found:
        console.print(f"no runs in {runs}", highlight=False)
        return
    # Names come last, as in `ls -l`, where a long one has room.
    table = Table("step", "fvu", "l0", "dead", "size", "run", box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in table.columns[:-1]:
        column.no_wrap, column.justify = True, "right"
    table.columns[-1].overflow = "fold"
    for one in found:
        step = f"{one.step:,}" if one.step == one.steps else f"{one.step:,}/{one.steps:,}"
        figures = (_text(one.fvu, ".4f"), _text(one.l0, ".1f"), _text(one.dead_share, ".1%"))
        told = f"{one.store}: {one.state}" if one.store else one.state
        table.add_row(step, *figures, size(one.bytes), f"{one.name}\n  {told}")
    console.print(table)
    total = size(sum(one.bytes for one in found))
    console.print(
        f"{len(found)} {'run' if len(found) == 1 else 'runs'}, {total}; fvu, l0 and dead are held out",
        highlight=False,
    )


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def check_removable_run(run: Path) -> int:
    """Return the size of `run` in bytes. Raises `UserError` when it is none, a link, or is trained or written."""
    config_file(run)
    if run.is_symlink():
        raise UserError(f"{run} is a symbolic link to {run.resolve()}; remove that, or the link with rm")
    if who := durable.holders(run / LOCK):
        raise UserError(f"{run} is in use by {', '.join(who)}; stop that first")
    return size_of(run)


def remove_run(run: Path) -> None:
    """Remove `run`; a kill on the way leaves all of it, or a folder `<run>.tmp`. Raises `UserError` when it is used."""
    check_removable_run(run)
    with durable.lock(run / LOCK, f"run {run}"):
        durable.remove_folder(run)
