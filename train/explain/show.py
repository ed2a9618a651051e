"""The table of labels on a terminal."""

from rich.table import Table

from shared.console.terminal import PlainConsole, say
from train.explain.explain_latents import Labelled
from train.explain.explanation_record import best_first, summary

_SHOWN = 20


def show(found: Labelled) -> None:
    """Print the best labels with their scores, and the means over all."""
    table = Table("latent", "label", "detection", "fuzzing")
    for one in best_first(found.explanations)[:_SHOWN]:
        table.add_row(str(one.latent), one.label, *(_percent(value) for value in one.scores().values()))
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
        column.no_wrap = True
    console = PlainConsole()
    console.print(table)
    whole = summary(found.explanations)
    console.print(
        f"{whole['labels']:,} labels, {whole['tokens']:,} tokens; balanced accuracy of detection "
        f"{_percent(whole['detection_accuracy'])}, of fuzzing {_percent(whole['fuzzing_accuracy'])} (chance: 50 %)"
    )
    if found.unread:
        say(f"no label was found in the answers for {len(found.unread):,} latents: {found.unread[:10]}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"
