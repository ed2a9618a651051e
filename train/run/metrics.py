"""What a run writes down while it trains: `metrics.jsonl` (bitwise repeatable) and `timing.jsonl` (wall clock).

Sums are gathered on the device and fetched once per row of metrics.jsonl.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import read_record
from shared.errors import CorruptData, ProjectError, warn
from shared.files import durable
from shared.store.strata import POSITION_0
from train.evaluation.evaluate import CONSTANT_SHARE, Evaluation, ratio
from train.live.log_rows import OUTLIERS, checked_row
from train.live.run_files import Row, model_of
from train.model.saved_tensors import fitting
from train.model.step_output import StepOutput

_ROUNDING = 2e-8
"""Times the rows that one float32 sum is over: what such a sum of one row repeated makes of its variance, at most a
fourth of that, as a share of its square."""
_NAMED = 5
_MOST_TERMS = 16
"""Terms of the loss that there is room for; there are eight."""
DIVERGED = 10.0
"""Fvu above which training has diverged; the mean of the targets leaves 1."""
LOWER_LR = "lower optimizer.lr"
"""What to do then."""


class Window:
    """Sums over the steps since the last row of metrics, by stratum (S, those with rows) and prefix (P).

    Where training takes outliers in, they are a stratum of their own, and left out of that of their position.
    """

    def __init__(
        self,
        strata: dict[str, slice],
        prefixes: tuple[int, ...],
        d_out: int,
        weights: Tensor,  # [B] how often each row of a batch counts at natural frequencies
        *,
        outliers: bool = False,
    ) -> None:
        self._strata, self._prefixes, device = strata, prefixes, weights.device
        self._names = [*strata, *([OUTLIERS] if outliers else [])]
        self._weights = torch.tensor([float(weights[part.start]) for part in strata.values()] + [0.0] * outliers,
                                     dtype=torch.float64)  # fmt: skip
        s, rows = len(self._names), max(part.stop for part in strata.values())
        self._member = torch.zeros(s, rows, device=device)
        """[S, B] which stratum a row of a batch is of"""
        for i, part in enumerate(strata.values()):
            self._member[i, part] = 1
        p = len(prefixes)
        sizes = {"target": s * d_out, "errors": s * p, "active": s, "squares": s, "steps": 1, "grad_norm": 1}
        self._all = torch.zeros(sum(sizes.values()) + _MOST_TERMS, dtype=torch.float64, device=device)
        """All that a step adds to, side by side, as `triton_counts.add_batch` knows it"""
        parts = dict(zip(sizes, self._all.split([*sizes.values(), _MOST_TERMS]), strict=False))
        self._sums = {
            "steps": parts["steps"].squeeze(0),
            "errors": parts["errors"].view(s, p),
            "target": parts["target"].view(s, d_out),
            "squares": parts["squares"],
            "active": parts["active"],
            **({"rows": torch.zeros(s, dtype=torch.float64, device=device)} if outliers else {}),
            "grad_norm": parts["grad_norm"].squeeze(0),
        }
        self._terms: dict[str, Tensor] = {}
        """The last part of them, as far as there are terms"""
        self._no_term = torch.zeros((), device=device)
        self._open: set[str] = set()
        """Terms of the steps in the window; those of steps before keep their place, which a recorded step adds to."""

    def add(
        self,
        step: StepOutput,
        grad_norm: Tensor,
        outliers: Tensor | None = None,
        bad: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Add one step; `outliers` [B] bool, if there can be some.

        `bad`: on the device, the first step whose loss was not finite, and the number of this one. A step whose terms
        are joined needs it, and notes there whether its own is.
        """
        member = self._member
        if outliers is not None:
            out = outliers.to(member)
            member = member * (1 - out)
            member[-1] = out
            self._sums["rows"] += member.sum(1)
        for name in step.terms:
            if name not in self._terms:
                self._terms[name] = self._new_term()
        self.note(step)
        if step.joined:
            from train.model.kernels import triton_counts  # not there without CUDA

            assert bad is not None
            terms = [step.terms.get(name, self._no_term) for name in self._terms]
            sums = member @ step.target, member @ step.joined.figures  # in float32 within a batch
            triton_counts.add_batch(self._all, *sums, grad_norm, terms, *bad)
            return
        active = (step.active.values > 0).to(torch.float32)
        counts = torch.zeros_like(self._member[0]).index_add_(0, step.active.rows, active)
        for name, rows in (
            ("errors", step.errors),
            ("target", step.target),
            ("squares", torch.linalg.vector_norm(step.target, dim=1).square()),
            ("active", counts),
        ):
            self._sums[name] += member @ rows  # in float32 within a batch
        self._sums["steps"] += 1
        self._sums["grad_norm"] += grad_norm
        for name, term in step.terms.items():
            self._terms[name] += term

    def _new_term(self) -> Tensor:
        """Return the place of a term more, which holds 0."""
        return self._all[len(self._all) - _MOST_TERMS + len(self._terms)]

    def note(self, step: StepOutput) -> None:
        """Note which terms a step has that was added on the device, without the host."""
        self._open.update(step.terms)

    def row(self) -> dict[str, Any]:
        """Return the window's figures; then it starts over.

        Overall figures leave position 0 out, and are over the rows as drawn, but for `fvu_natural`.
        """
        steps = float(self._sums["steps"])
        sums = {name: value.cpu() for name, value in self._sums.items()}
        sizes = sums.get("rows", torch.tensor([float(s.stop - s.start) for s in self._strata.values()]) * steps)
        left_out = {OUTLIERS, *([POSITION_0] if len(self._strata) > 1 else [])}
        counted = torch.tensor([name not in left_out for name in self._names])
        overall, natural = _fvu(sums, sizes, counted.double()), _fvu(sums, sizes, counted * self._weights)
        terms = {name: float(value) / steps for name, value in sorted(self._open_terms().items())}
        row = {
            "steps": int(steps),
            "loss": sum(terms.values()),
            "terms": terms,
            "grad_norm": float(sums["grad_norm"]) / steps,
            "fvu": overall[-1],
            "fvu_natural": natural[-1],
            "explained_variance": 1 - overall[-1],
            "l0_training_rule": float(sums["active"][counted].sum() / sizes[counted].sum()),
            "prefixes": {str(size): {"fvu": value} for size, value in zip(self._prefixes, overall, strict=True)},
            "strata": {
                name: {
                    "rows": int(sizes[i]),
                    "fvu": self._fvu_of_stratum(sums, sizes, i),
                    "relative_error": _share(sums["errors"][i, -1], sums["squares"][i]),
                    "error_share": _share(sums["errors"][i, -1], sums["errors"][:, -1].sum()),
                    "active_share": _share(sums["active"][i], sums["active"].sum()),
                    "l0_training_rule": _share(sums["active"][i], sizes[i]),
                }
                for i, name in enumerate(self._names)
            },
        }
        for value in (*self._sums.values(), *self._terms.values()):
            value.zero_()
        self._open = set()
        return row

    def _fvu_of_stratum(self, sums: dict[str, Tensor], sizes: Tensor, i: int) -> float | None:
        """Return the fvu of the stratum with index `i`; none where its target is constant, but for rounding."""
        weights = (torch.arange(len(sizes)) == i).double()
        total, squares = _variance(sums, sizes, weights)
        batch_rows = float(self._member[i].sum()) or self._member.shape[1]  # outliers are anywhere
        constant = total <= max(CONSTANT_SHARE, _ROUNDING * batch_rows) * squares
        return None if constant else _fvu(sums, sizes, weights)[-1]

    def state(self) -> dict[str, Tensor]:
        """Return the open window, for a checkpoint."""
        return {f"window.{k}": v for k, v in self._sums.items()} | {
            f"window.terms.{k}": v for k, v in self._open_terms().items()
        }

    def _open_terms(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._terms.items() if name in self._open}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over an open window."""
        for name in self._sums:
            self._sums[name].copy_(fitting(tensors, f"window.{name}", self._sums[name]))
        start, steps = "window.terms.", self._sums["steps"]
        self._all[len(self._all) - _MOST_TERMS :] = 0
        self._terms = {}
        for name in tensors:
            if name.startswith(start):
                place = self._new_term()
                self._terms[name.removeprefix(start)] = place.copy_(fitting(tensors, name, steps))
        self._open = set(self._terms)


def _fvu(sums: dict[str, Tensor], sizes: Tensor, weights: Tensor) -> list[float]:
    """Return fvu per prefix; rows of each stratum count by `weights` [S], which are importance weights."""
    total, squares = _variance(sums, sizes, weights)
    total = total if total > CONSTANT_SHARE * squares else 0.0  # one row repeated has no variance
    return [ratio(float(error), total, squares) for error in weights @ sums["errors"]]


def _variance(sums: dict[str, Tensor], sizes: Tensor, weights: Tensor) -> tuple[float, float]:
    """Return the target's squared distance from its mean, and from 0, as sums over rows."""
    squares = float(weights @ sums["squares"])
    mean = float((weights @ sums["target"]).square().sum()) / max(float(weights @ sizes.double()), 1e-300)
    return squares - mean, squares


def _share(part: Tensor, whole: Tensor) -> float:
    """Return `part` over `whole`; 0 where there is nothing."""
    return float(part) / float(whole) if float(whole) else 0.0


class Log:
    """Appends rows to a file of JSON lines. A full disk, or a link there, costs rows and one warning, never the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost_rows = 0

    def append(self, row: dict[str, Any]) -> None:
        """Append one row, whole or not at all."""
        try:
            durable.append_line(self.path, (json.dumps(row, allow_nan=False) + "\n").encode())
        except (ProjectError, OSError) as error:
            if not self.lost_rows:
                warn(f"{self.path}: {error}; training goes on, rows are lost")
            self.lost_rows += 1

    def rows(self, *, tell: bool = True) -> list[dict[str, Any]]:
        """Return all rows, a torn last one left out; none where there is no file.

        What is no row is left out, with one warning, unless `tell` is false.
        """
        wrong: list[str] = []
        found = [row for _, row in self._lines(wrong)]
        if wrong and tell:
            more = f", and {len(wrong) - 1} more lines are none" if len(wrong) > 1 else ""
            warn(f"{wrong[0]}{more}; such rows are left out")
        return found

    def cut(self, step: int) -> None:
        """Drop rows past `step`, and a torn last line: a resumed run writes them again. That takes no room."""
        if self.path.is_file():
            ends = [end for end, row in self._lines([]) if row["step"] <= step]
            if (size := max(ends, default=0)) < self.path.stat().st_size:
                durable.truncate(self.path, size)

    def _lines(self, wrong: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield where each row ends in the file, and the row; add to `wrong` what is wrong with other whole lines."""
        end = 0
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        for number, line in enumerate(lines, 1):
            end += len(line)
            if not line.endswith(b"\n"):
                continue
            try:
                row = checked_row(line, model_of(self.path), self.path)
            except CorruptData as error:
                wrong.append(f"{error}, in line {number}")
            else:
                yield end, row


def diverged(fvu: float) -> bool:
    """Tell whether an fvu is so far above 1, what the mean of the targets leaves, that training has diverged."""
    return not fvu <= DIVERGED


def evaluation_of(rows: Sequence[Row], log: Path, step: int | None = None) -> tuple[int, Evaluation] | None:
    """Return the newest evaluation in rows of `log`, or that of `step`, with its step; none: there is none.

    One that is not whole is left out, with a warning.
    """
    for row in reversed(rows):
        if "held_out" in row and step in (None, row["step"]):
            try:
                return row["step"], read_record(Evaluation, row["held_out"], log)
            except CorruptData as error:
                warn(f"{error}, in held_out of step {row['step']}; it is left out")
    return None


def logged_steps(log_every: int, evaluation_every: int, steps: int, done: int) -> list[int]:
    """List the steps up to `done` that have a row in each log, of a run of `steps` steps."""
    found = {step for every in (log_every, evaluation_every) for step in range(every, done + 1, every)}
    return sorted(found | ({steps} if done >= steps else set()))


def describe_missing(steps: Sequence[int]) -> str:
    """Name steps that rows are missing of, the first few."""
    more = f" and {len(steps) - _NAMED} more" if len(steps) > _NAMED else ""
    rows = "row is missing, of step" if len(steps) == 1 else "rows are missing, of steps"
    return f"{len(steps):,} {rows} {', '.join(map(str, steps[:_NAMED]))}{more}"
