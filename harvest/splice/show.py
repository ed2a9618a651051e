"""A measurement as tables in the terminal."""

from rich.table import Table

from shared.console.terminal import PlainConsole, show_text
from shared.splice_record import TRANSCODER, ArmFigures, Interval, SplicePart, SpliceRecord


def show(record: SpliceRecord) -> None:
    """Print the figures of all arms, and those of the transcoder by position stratum."""
    what = record.library if record.step is None else f"checkpoint of step {record.step:,}"
    show_text(
        f"{what} in the MLP's place: {record.whole.tokens:,} predictions of {record.whole.documents:,} held-out "
        f"documents, position 0 apart; cross entropy {record.whole.clean_ce:.4f} nats per token without it"
    )
    show_text(f"{record.rows_left:,} of {record.rows:,} rows, which training leaves out, keep the MLP's own output")
    console = PlainConsole()
    console.print(_arms(record.whole))
    console.print(_strata(record))


def _arms(part: SplicePart) -> Table:
    table = Table("in the MLP's place", *("CE", "KL", "CE recovered", "against mean ablation"))
    for name, arm in sorted(part.arms.items(), key=_place):
        recovered = (_percent(arm.ce_recovered), _percent(arm.ce_recovered_of_mean))
        table.add_row(name, f"{arm.ce:.4f}", _nats(arm.kl), *recovered)
    return _right(table)


def _place(arm: tuple[str, ArmFigures]) -> tuple[bool, float, str]:
    """Order the transcoder first, then its prefixes from the largest down, then what it is held against."""
    name = arm[0]
    size = int(name.removeprefix("prefix ")) if name.startswith("prefix ") else 0
    return not name.startswith((TRANSCODER, "prefix")), -size if size else -float("inf"), name


def _strata(record: SpliceRecord) -> Table:
    table = Table("positions", "predictions", "CE clean", "CE spliced", "KL", "CE recovered")
    for name, part in record.strata.items():
        arm = part.arms[TRANSCODER]
        losses = (f"{part.clean_ce:.4f}", f"{arm.ce:.4f}", _nats(arm.kl))
        table.add_row(name, f"{part.tokens:,}", *losses, _percent(arm.ce_recovered))
    return _right(table)


def _right(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _nats(found: Interval) -> str:
    return f"{found.value:.4f}{_spread(found, 1, '.4f')}"


def _percent(found: Interval | None) -> str:
    return "-" if found is None else f"{found.value:.2%}{_spread(found, 100, '.2f')}"


def _spread(found: Interval, times: float, form: str) -> str:
    return "" if found.high is None else f" ± {format((found.high - found.value) * times, form)}"
