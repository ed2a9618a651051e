"""Train the runs of a sweep, follow them, and compare what they have become."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType

from shared.config import Config
from shared.console.panel import Pace, panel
from shared.console.progress import Progress
from shared.console.signals import leave
from shared.console.terminal import say
from shared.errors import DiskFull, ProjectError, Stopped, UserError, warn
from shared.files import durable
from shared.store.store import Local, Store
from train.commands import resume, train
from train.compare.arms import compare_runs
from train.live.run_files import CONFIG, LOCK
from train.run.process import OwnProcess
from train.run.settings import checkpoint_bytes
from train.sweeps.leaderboard import Leaderboard, Standing, table
from train.sweeps.plan import PlannedRun, lanes, plan, rounds
from train.sweeps.shared_process import train_side_by_side
from train.sweeps.wanted_runs import WantedRun, wanted_runs

RECORD = "sweep.json"
_SECONDS = 1.0
"""Between two looks at the runs."""


class SweepRecord(Config):
    """`sweep.json`, written when a sweep starts and whenever one of its runs ends."""

    schema_version: Literal[1] = 1
    file: str
    """Name of the file that says what the runs are."""
    runs: list[Standing]
    """Best first."""
    pages: list[str] = []
    """Comparisons beside it: one for each store that has two finished runs."""


def sweep(
    file: Path | str,
    *,
    stores: Sequence[Path | str] = (),
    runs: Path | str = "runs",
    local: Local | None = None,
    at_once: int | None = None,
    force: bool = False,
    compare: bool = True,
) -> SweepRecord:
    """Train all runs that the TOML `file` names, in `runs/<its name>`, and compare them. Returns `sweep.json` there.

    Runs are trained side by side in this process, as many as fit into memory: those with the same rows read them once.
    Each is bit for bit what `train` makes of its settings. Finished ones are left as they are and others go on from
    their newest checkpoint, so the same call continues a sweep. `stores`: in place of those that the file names.
    `local` as in `Store.open`. `at_once`: how many runs compute at a time, in place of as many as there are cores for.
    `force`: start although the checkpoints may not fit the disk. `compare`: write comparison pages at the end.

    Raises `UserError` before anything is written when the file is wrong or settings do not fit; at the end `Stopped`
    after a signal or on a full disk, and `ProjectError` when a run has failed or diverged: the others are trained.
    """
    wanted = wanted_runs(Path(file), [Path(store) for store in stores], Path(runs), local)
    return train_wanted(wanted, at_once=at_once, force=force, compare=compare)


def train_wanted(
    wanted: Sequence[WantedRun], *, at_once: int | None = None, force: bool = False, compare: bool = True
) -> SweepRecord:
    """Train the runs that the file of a sweep asks for; as `sweep`, which reads that file."""
    planned, folder = plan(wanted), wanted[0].path.parent
    board = Leaderboard(planned)
    work = _Sweep(wanted, board)
    to_train = _unfinished(planned, board)
    if not force:
        _require_space([one for one in to_train if not (one.path / CONFIG).is_file()], folder)
    durable.make_folder(folder)
    with durable.lock(folder / LOCK, f"sweep {folder}"):
        work.publish()
        for group in rounds(to_train, at_once):
            if work.train(group, lanes(group, at_once)):
                raise Stopped(f"stopped; the same command continues the sweep in {folder}")
        record = work.publish()
        if compare:
            record = work.publish(_compare(planned, record, again=bool(to_train)))
    return _require_success(record, folder)


class _Sweep:
    """A sweep while it is trained."""

    def __init__(self, wanted: Sequence[WantedRun], board: Leaderboard) -> None:
        self.folder, self.board, self._file = wanted[0].path.parent, board, wanted[0].origin
        self._full: list[DiskFull] = []
        self._publishing, self._mapping = threading.Lock(), threading.Lock()
        self._stores = {one.place: one.store for one in wanted}

    def train(self, group: Sequence[PlannedRun], at_once: int) -> bool:
        """Train runs side by side. Returns whether a signal has stopped them. Raises `DiskFull` if one has met it."""
        by_path = {one.path: one for one in group}

        def one_run(path: Path, process: OwnProcess) -> None:
            run = by_path[path]
            if (path / CONFIG).is_file():
                resume(path, store=self._store(run.store), process=process)
            else:
                train(self._store(run.store), run.settings, path, force=True, process=process)

        rows = {one.path: one.rows for one in group}
        orders = len(set(rows.values()))
        say(f"{len(rows):,} runs side by side, {at_once} at a time; orders of rows, each read once: {orders:,}")
        with _Shown(self.board, self.folder.name):
            try:
                stopped = train_side_by_side(rows, one_run, at_once, self._ended)
            except KeyboardInterrupt:
                leave(f"stopped at once; the same command continues the sweep in {self.folder}")
        if self._full:
            raise self._full[0]
        return stopped

    def _store(self, place: Path) -> Store:
        """Return the store of some runs: one, so that its rows are mapped, fetched and decoded once for all."""
        store = self._stores[place]
        with self._mapping:
            _ = store.strata  # before runs take views of it, which would map it each for itself
        return store

    def _ended(self, run: Path, raised: Exception | None) -> None:
        with self._publishing:
            if isinstance(raised, DiskFull):
                self._full.append(raised)
            if raised and not isinstance(raised, Stopped):
                said = str(raised) if isinstance(raised, ProjectError) else f"{type(raised).__name__}: {raised}"
                self.board.fail(run, said)
                warn(f"{run.name}: {said}; the other runs go on")
            self.publish()

    def publish(self, pages: Sequence[str] = ()) -> SweepRecord:
        """Write `sweep.json`; a full disk costs it and a warning."""
        record = SweepRecord(file=self._file.name, runs=self.board.standings(), pages=list(pages))
        try:
            durable.publish_json(self.folder / RECORD, record.model_dump(mode="json"))
        except (DiskFull, OSError) as error:
            warn(f"{error}; {RECORD} is not up to date")
        return record


class _Shown:
    """The leaderboard while runs are trained: a panel on a terminal, a line every few seconds elsewhere."""

    def __init__(self, board: Leaderboard, name: str) -> None:
        self._board, self._name, self._ended = board, name, threading.Event()
        self._standings = board.standings()
        steps = sum(one.steps for one in self._standings)
        self._progress = Progress(f"sweep {name}", steps, "steps", done=self._done, draw=self._draw)
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._progress.__enter__()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self._progress.__exit__(None, None, None)

    @property
    def _done(self) -> int:
        return sum(one.step for one in self._standings)

    def _follow(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        self._standings = self._board.standings()
        best, done = self._standings[0], sum(one.done for one in self._standings)
        leads = f"; best so far {best.name}: fvu {best.fvu:.4f}" if best.fvu is not None else ""
        self._progress.update(self._done, f"{done} of {len(self._standings)} runs finished{leads}")

    def _draw(self, pace: Pace) -> RenderableType:
        return Group(panel(f"sweep {self._name}", pace), table(self._standings, ""))


def _unfinished(runs: Sequence[PlannedRun], board: Leaderboard) -> list[PlannedRun]:
    done = {one.name for one in board.standings() if one.done}
    if done:
        say(f"{len(done)} of {len(runs)} runs are finished already")
    return [one for one in runs if one.name not in done]


def _require_space(runs: Sequence[PlannedRun], folder: Path) -> None:
    """Raise `UserError` when the checkpoints of new runs may not fit the disk."""
    most = 0
    for one in runs:
        settings = one.config.settings
        size = checkpoint_bytes(settings, one.config.d_in, one.config.d_out)
        most += settings.checkpoint.most(settings.steps, size)
    durable.require_space(folder.parent, most, f"checkpoints of {len(runs):,} runs (--force continues anyway)")


def _require_success(record: SweepRecord, folder: Path) -> SweepRecord:
    """Return the record. Raises `ProjectError` that names runs which have failed or diverged."""
    failed = [one.name for one in record.runs if one.state in ("failed", "diverged")]
    if failed:
        raise ProjectError(
            f"{len(failed)} of {len(record.runs)} runs have failed or diverged: {', '.join(failed)}; the others are in "
            f"{folder}; the same command tries again what is not finished"
        )
    return record


def _compare(runs: Sequence[PlannedRun], record: SweepRecord, *, again: bool) -> list[str]:
    """Write a comparison page for each store that has two finished runs; returns their names."""
    from train.report import comparison_page  # takes half a second to import

    finished = {one.name for one in record.runs if one.state == "finished"}
    groups: dict[tuple[Path, str], list[PlannedRun]] = {}
    for one in runs:
        if one.name in finished:
            groups.setdefault((one.store, one.config.settings.source), []).append(one)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    pages = []
    for (store, source), group in groups.items():
        parts = [store.name] * (len({key[0] for key in groups}) > 1) + [source] * (len({k[1] for k in groups}) > 1)
        path = group[0].path.parent / f"{'-'.join(['compare', *parts])}.html"
        pages.append(path.name)
        if path.is_file() and not again:
            continue
        ks = {one.config.settings.activation.expected_l0 for one in group}
        own = len(ks) > 1 or None in ks
        if own:
            say("the runs have no k in common: the page compares each at its own l0")
        try:
            found = compare_runs([one.path for one in group], store=store, own_l0=own)
            durable.publish_bytes(path, comparison_page.html(found))
        except UserError as error:
            warn(f"{path.name} was not made: {error}; compare some of the runs with: train compare RUN RUN ...")
            pages.pop()
    return pages
