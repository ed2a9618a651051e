"""A comparison as a table: a column for every arm, with the spread over its seeds and the change against the first."""

from rich.table import Table

from shared.console.terminal import PlainConsole
from shared.store.strata import positions
from train.compare.arms import Comparison, Spread

_COUNT = "count"
"""The format of a count: whole where it is of one run, with a digit more where it is a mean over seeds."""
_ROWS = {
    "fvu": ("fvu", ".4f"),
    "l0": ("l0", ".2f"),
    "live": ("live latents", ",.0f"),
    "dead_share": ("dead latents", ".2%"),
    "effective_number": ("effective number", ",.0f"),
    "nearest.median": ("nearest cosine, median", ".3f"),
    "nearest.p99": ("nearest cosine, p99", ".3f"),
    "nearest.largest": ("nearest cosine, largest", ".3f"),
    "nearest_of_random.p99": ("... p99 of random rows", ".3f"),
    "share_above_0_7": ("share with a neighbour > 0.7", ".2%"),
    "share_within_segment_above_0_7": ("... of its Matryoshka group", ".2%"),
    "pairs_cosine_above_0_9": ("pairs with a cosine > 0.9", _COUNT),
    "pairs_correlated_above_0_5": ("pairs correlated > 0.5", _COUNT),
    "pairs_correlated_above_0_8": ("pairs correlated > 0.8", _COUNT),
    "pairs_correlated_above_0_8_with_position_0": ("... position 0 included", _COUNT),
    "largest_correlation": ("largest correlation", ".3f"),
    "clusters": ("clusters", _COUNT),
    "latents_in_clusters": ("latents in clusters", _COUNT),
    "merged.removed": ("latents that merging removes", _COUNT),
    "merged.fvu_rise": ("... fvu of merging", "+.5f"),
    "merged.fvu_rise_random": ("... of removing as many others", "+.5f"),
    "redundant": ("redundant latents", _COUNT),
    "redundant_fvu_rise": ("... fvu of merging them, at equal l0", "+.5f"),
    "position_0_share_of_top": ("position 0 among top activations", ".2%"),
    "latents_at_position_0": ("latents of position 0 alone", _COUNT),
    "ce_recovered": ("CE recovered", ".2%"),
    "kl": ("KL, nats per token", ".4f"),
    "explained_share": ("latents that a label explains", ".2%"),
    "probe_f1": ("F1 of the best latent of a label", ".3f"),
    "probe_f1_of_5": ("... of probes of 5 latents", ".3f"),
    "cpu_ms_per_step": ("CPU ms per step", ",.1f"),
    "ms_per_step": ("ms per step", ",.1f"),
}

_MEASURED_APART = ("ce_recovered", "kl", "explained_share", "probe_f1", "probe_f1_of_5")
"""Rows that are there when a run has them."""


def print_comparison(comparison: Comparison, stderr: bool = False) -> None:
    """Print the table."""
    seeds = "seed" if all(len(arm.runs) == 1 for arm in comparison.arms) else "seeds"
    table = Table(
        "",
        *(f"{arm.name}\n{len(arm.runs)} {seeds}" for arm in comparison.arms),
        title=f"{comparison.report_rows:,} held-out rows at {_l0(comparison)}; mean ± deviation over seeds; in "
        "brackets: against the first",
        title_justify="left",
    )
    for label, cells in rows(comparison):
        table.add_row(label, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    console = PlainConsole(stderr=stderr)
    if not console.is_terminal:  # a file or a pipe has room
        console = PlainConsole(stderr=stderr, width=40 + 32 * len(comparison.arms))
    console.print(table)
    for arm in comparison.arms:
        if arm.differs:
            differs = ", ".join(f"{key}={value}" for key, value in arm.differs.items())
            console.print(f"{arm.name}: {differs}")


def rows(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """List the name of every figure, and what each arm has of it."""
    arms, first = comparison.arms, comparison.arms[0]
    found = [
        (label, [_cell(arm.spread.get(name), first.spread.get(name), form, arm is first) for arm in arms])
        for name, (label, form) in _ROWS.items()
        if name not in _MEASURED_APART or any(name in arm.spread for arm in arms)
    ]
    return [
        *found,
        *_strata(comparison),
        ("PW-MCC between seeds", [_cell(arm.pw_mcc, first.pw_mcc, ".3f", arm is first) for arm in arms]),
        (
            "latents that all seeds have",
            [_cell(arm.in_all_seeds, first.in_all_seeds, ".2%", arm is first) for arm in arms],
        ),
    ]


def _strata(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """List fvu by position, for the strata that the first arm has."""
    first = comparison.arms[0]
    names = [name for name in first.spread if name.startswith("strata.") and name.endswith(".fvu")]
    return [
        (
            f"fvu at positions {positions(name.split('.')[1])}",
            [_cell(arm.spread.get(name), first.spread[name], ".4f", arm is first) for arm in comparison.arms],
        )
        for name in names
    ]


def _l0(comparison: Comparison) -> str:
    return "each run's own l0" if comparison.l0 is None else f"l0 {comparison.l0:g}"


def _cell(found: Spread | None, first: Spread | None, form: str, is_first: bool) -> str:
    if not found:
        return "-"
    is_rise = form.startswith("+")
    if form == _COUNT:
        form = ",.0f" if found.deviation is None else ",.1f"
    text = format(found.mean, form)
    if found.deviation is not None:
        text += f" ± {format(found.deviation, form).lstrip('+')}"
    if not is_first and first and first.mean and not is_rise:
        text += f" ({found.mean / first.mean - 1:+.1%})"
    return text
