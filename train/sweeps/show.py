"""What a sweep would train: a table of its runs, and the same as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from shared.console.panel import size
from shared.console.terminal import PlainConsole
from train.sweeps.plan import PlannedRun, group_bytes, lanes, rounds
from train.sweeps.shared_process import rows_digest


def plan_as_json(runs: Sequence[PlannedRun], at_once: int | None) -> list[dict[str, Any]]:
    """Return what is planned for each run: `round` counts the groups that are trained side by side, from 1."""
    return [
        {
            "name": one.name,
            "store": str(one.store),
            "differs": one.differs,
            "steps": one.config.settings.steps,
            "threads": one.config.settings.threads,
            "rows": one.rows[:8],
            "memory_bytes": one.memory,
            "round": number,
            "round_memory_bytes": group_bytes(group, at_once),
            "at_once": lanes(group, at_once),
        }
        for number, group in enumerate(rounds(runs, at_once), start=1)
        for one in group
    ]


def print_plan(runs: Sequence[PlannedRun], at_once: int | None) -> None:
    """Print a row for each run, and what could be shared and is not."""
    names = list(dict.fromkeys(name for one in runs for name in one.differs))
    found = Table("run", *names, "steps", "threads", "rows", "memory", "round")
    planned, letters = plan_as_json(runs, at_once), dict[str, int]()
    for one in planned:
        number = letters.setdefault(one["rows"], len(letters) + 1)
        differs = [str(one["differs"].get(name, "")) for name in names]
        found.add_row(one["name"], *differs, f"{one['steps']:,}", str(one["threads"]), str(number),
                      size(one["memory_bytes"]), str(one["round"]))  # fmt: skip
    found.title_justify = "left"
    most = max(one["round_memory_bytes"] for one in planned)
    found.title = (
        f"{len(runs):,} runs in {runs[0].path.parent}, {planned[0]['at_once']} at a time; those with the same number "
        f"under rows are trained on the same batches, which are read once; about {size(most)} of memory"
    )
    console = PlainConsole()
    console.print(found)
    if len({_but_for_the_order(one) for one in runs}) < len(letters):
        console.print("runs of other seeds read other rows; to share them, write into the file's [set]: rows.seed = 0")


def _but_for_the_order(run: PlannedRun) -> str:
    """Return what is the same for runs that would have the same rows, if they had one `rows.seed`."""
    settings = run.config.settings
    ordered = settings.model_copy(update={"rows": settings.rows.model_copy(update={"seed": 0})})
    return rows_digest(run.config.model_copy(update={"settings": ordered}), run.store)
