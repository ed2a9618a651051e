"""Tables of evaluations, checkpoints and verdicts, for people."""

from collections.abc import Sequence

from rich.table import Table

from shared.console.terminal import PlainConsole
from shared.store.strata import positions
from train.evaluation.evaluate import Evaluation, Weight
from train.interchange.agreement import Agreement
from train.model.checkpoint import Listed
from train.probe.probe_record import Kind, ProbeSummary
from train.redundancy.redundancy_record import Redundancy
from train.report.report_record import STATES, Report

_GROUPS = 20
"""Groups of redundant latents that are shown."""
_LABELS = 25
"""Labels that are shown."""
_PROBED: dict[Kind, str] = {"latents": "latents", "random": "random", "residual": "dimensions"}


def print_evaluation(evaluation: Evaluation, title: str, linear_fvu: float | None, stderr: bool = False) -> None:
    """Print the headline, the prefixes and the strata."""
    console = PlainConsole(stderr=stderr)
    console.print(_headline(evaluation, title, linear_fvu))
    console.print(_prefixes(evaluation))
    console.print(_strata(evaluation))


def print_redundancy(found: Redundancy, stderr: bool = False) -> None:
    """Print how many latents are redundant, what merging them costs, and a row for each of the first groups."""
    console, merged = PlainConsole(stderr=stderr), found.merged
    table = Table("redundant latents, held out", "value")
    rows = {
        "redundant latents": f"{found.redundant:,}",
        "... of those that could be judged": f"{found.live - found.not_judged:,} of {found.live:,} live",
        "groups": f"{len(found.groups):,}",
        "fvu of merging every group": f"{merged.fvu_rise:+.5f}",
        "... at equal l0": f"{merged.fvu_rise_at_equal_l0:+.5f}",
        "l0 that it leaves": f"{merged.l0_after:.2f} of {merged.l0:.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    _right(table)
    console.print(table)
    pairs = Table("pairs that were found by", "looked at", "redundant")
    for name, one in found.candidates.items():
        pairs.add_row(name, f"{one.pairs:,}", f"{one.redundant:,}")
    _right(pairs)
    console.print(pairs)
    if not found.groups:
        return
    groups = Table("group", "best encoder", "fvu of merging", "of what they explain", "cosine")
    for group in found.groups[:_GROUPS]:
        best = "refitted" if group.best is None else f"{group.best}"
        figures = (f"{group.fvu_rise:+.2e}", f"{group.share:+.1%}", f"{group.cosine:.2f}")
        groups.add_row(" ".join(map(str, group.latents)), best, *figures)
    _right(groups)
    console.print(groups)


def print_agreements(found: Sequence[Agreement], runs: Sequence[str], kind: str) -> None:
    """Print a table per run: it and what was read back of its export, on the same held-out rows."""
    console = PlainConsole(stderr=True)
    for run, one in zip(runs, found, strict=True):
        table = Table("", "run", f"as {kind}", title=f"{run}, {one.rows:,} held-out rows", title_justify="left")
        for name, told, digits in (("fvu", "fvu", 4), ("l0", "active latents per row", 2)):
            table.add_row(told, *(f"{getattr(part, name):.{digits}f}" for part in (one.ours, one.exported)))
        table.add_row("active in one alone", "", f"{one.differing:.2%}")
        table.add_row("largest error of a row, same latents active", "", f"{one.largest_error:.1e}")
        console.print(table)


def print_checkpoints(found: Sequence[Listed], run: str) -> None:
    """Print a line per checkpoint."""
    console = PlainConsole()
    table = Table("step", "bytes", "held-out fvu", "l0", "valid", title=f"checkpoints of {run}", title_justify="left")
    for one in found:
        figures = (f"{one.held_out.fvu:.4f}", f"{one.held_out.l0:.2f}") if one.held_out else ("-", "-")
        table.add_row(f"{one.step:,}", f"{one.bytes:,}", *figures, "yes" if one.wrong is None else "no")
    for column in table.columns[:4]:
        column.justify = "right"
    console.print(table)
    for one in found:
        if one.wrong:
            console.print(f"step {one.step}: {one.wrong}", highlight=False, soft_wrap=True)


def print_verdict(report: Report) -> None:
    """Print what a report found good, worth a look, or failed, the worst first."""
    title = f"{report.run}, step {report.step:,} of {report.steps:,}"
    table = Table(title=title, title_justify="left", show_header=False)
    for check in report.worst_first:
        sign, word = STATES[check.state]
        table.add_row(f"{sign} {word}", check.name, check.said)
    PlainConsole(stderr=True).print(table)


def print_probe(found: ProbeSummary, run: str) -> None:
    """Print what latents mean: the headline, beside baselines, and a row per label."""
    console = PlainConsole(stderr=True)
    title = f"{run}, step {found.step}: {found.rows[1]:,} held-out rows, labels of {found.kind}"
    table = Table("", *_PROBED.values(), "dense", title=title, title_justify="left")
    for limit in found.explained["latents"]:
        cells = [f"{found.explained[kind][limit]:.1%}" if kind in found.explained else "-" for kind in _PROBED]
        table.add_row(f"explained: F1 of at least {limit}", *cells, "-")
    for k in found.mean_f1["latents"]:
        cells = [f"{found.mean_f1[kind][k]:.3f}" if k in found.mean_f1[kind] else "-" for kind in _PROBED]
        table.add_row(f"mean F1 of {k}", *cells, "-")
    table.add_row("mean F1 of all dimensions", *["-"] * len(_PROBED), f"{found.mean_dense_f1:.3f}")
    table.add_row("splits of a label", f"{found.mean_splits:.2f}", "-", "-", "-")
    for name, value in (("absorption rate", found.mean_absorption), ("... fraction", found.mean_absorption_fraction)):
        table.add_row(name, "-" if value is None else f"{value:.1%}", "-", "-", "-")
    _right(table)
    console.print(table)
    console.print(_labels(found))


def _labels(found: ProbeSummary) -> Table:
    labels = found.best_first
    shown = f"the {_LABELS} of {len(labels)} labels" if len(labels) > _LABELS else f"the {len(labels)} labels"
    table = Table("label", "rows", "F1", "5", "dense", "latent", "absorbed", title_justify="left",
                  title=f"{shown} that one latent tells best: F1 of 1, of 5, of all dimensions")  # fmt: skip
    for one in labels[:_LABELS]:
        table.add_row(
            one.name,
            f"{one.share:.2%}",
            *(f"{one.f1['latents'][k]:.3f}" if k in one.f1["latents"] else "-" for k in ("1", "5")),
            f"{one.dense_f1:.3f}",
            f"{one.latents[0]}",
            "-" if one.absorption is None else f"{one.absorption.rate:.1%}",
        )
    _right(table)
    return table


def _headline(e: Evaluation, title: str, linear_fvu: float | None) -> Table:
    table = Table("held out, natural frequencies, without position 0", "value", title=title, title_justify="left")
    rows = {
        "fvu": f"{e.fvu:.4f}",
        "fvu by training rule": f"{e.fvu_training_rule:.4f}",
        "explained variance, 1 - var(error) / var(target)": f"{e.explained_variance:.4f}",
        "l0 by threshold": f"{e.l0:.2f}",
        "l0 by training rule": f"{e.l0_training_rule:.2f}",
        "threshold (mean)": f"{e.threshold:.4f}",
        "never fires on these rows": f"{e.dead_share:.1%}",
        "rows": f"{e.rows:,}",
    }
    if e.fvu_of_skip is not None:
        rows["fvu of the skip connection alone"] = f"{e.fvu_of_skip:.4f}"
    if linear_fvu is not None:
        rows["fvu of the best linear map"] = f"{linear_fvu:.4f}"
    for name, value in rows.items():
        table.add_row(name, value)
    table.columns[1].justify = "right"
    return table


def _prefixes(e: Evaluation) -> Table:
    table = Table("prefix", "fvu", "explained variance", "l0")
    for size, part in e.prefixes.items():
        table.add_row(f"{size:,}", f"{part.fvu:.4f}", f"{part.explained_variance:.4f}", f"{part.l0:.2f}")
    _right(table)
    return table


def _strata(e: Evaluation) -> Table:
    heads = ("positions", "rows", "fvu", "l0", "l0 trained", "relative\nerror", "error share", "active share")
    table = Table(*heads)
    table.columns[0].no_wrap = table.columns[5].no_wrap = True
    for name, part in e.strata.items():
        drawn = "-" if part.l0_training_rule is None else f"{part.l0_training_rule:.2f}"
        fvu = "-" if part.fvu is None else f"{part.fvu:.4f}"
        table.add_row(positions(name), f"{part.rows:,.0f}", fvu, f"{part.l0:.2f}", drawn, *_weight(part))
    if e.outliers:
        table.add_row("outliers", f"{e.outliers.rows:,.0f}", "-", f"{e.outliers.l0:.2f}", "-", *_weight(e.outliers))
    _right(table)
    return table


def _weight(part: Weight) -> list[str]:
    """Return the cells of how much some rows weigh among all."""
    error = part.relative_error
    said = "-" if error is None else f"{error:,.0f}" if error >= 1000 else f"{error:.4g}"
    return [said, *("-" if share is None else f"{share:.2%}" for share in (part.error_share, part.active_share))]


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
