"""`explanations.jsonl`: labels of latents from a language model, a line each, after a line of what was asked."""

from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from shared.bounds import Count, Digest, Name
from shared.config import Config, read_record
from shared.errors import CorruptData, UserError
from shared.files import durable
from shared.files.untrusted import read_file

FILE = "explanations.jsonl"
_MOST_BYTES = 2**30


class Asked(Config):
    """What all labels of a file have in common: the first line."""

    schema_version: Literal[1] = 1
    store: Digest
    """Digest of the store's request."""
    step: Count
    """Of the checkpoint."""
    model: Name
    """The server's name of it."""
    temperature: float = Field(ge=0)
    seed: Count
    """Of windows and of the order of questions."""


class Score(Config):
    """Decisions of a model about excerpts, half of which should be taken."""

    asked: Count
    """Excerpts with an answer; those of an answer that could not be read are left out."""
    hits: Count
    """Rightly taken."""
    active: Count
    """Those that should be, of `asked`."""
    false_alarms: Count
    """Wrongly taken."""

    @property
    def balanced_accuracy(self) -> float | None:
        """Mean of the shares of right decisions on either kind; none when a kind has no answer."""
        silent = self.asked - self.active
        if not (self.active and silent):
            return None
        return (self.hits / self.active + 1 - self.false_alarms / silent) / 2


class Explanation(Config):
    """One latent: a line."""

    latent: Count
    label: str = Field(min_length=1, max_length=200)
    detection: Score
    fuzzing: Score
    tokens: Count
    """Of all questions and answers about it, as the server counts."""

    def scores(self) -> dict[str, float | None]:
        """Return the balanced accuracies."""
        return {
            "detection_accuracy": self.detection.balanced_accuracy,
            "fuzzing_accuracy": self.fuzzing.balanced_accuracy,
        }


def read_explanations(run: Path) -> tuple[Asked, dict[int, Explanation]] | None:
    """Return what was asked and the labels by latent; none when nothing was, or only half a line is there.

    A torn last line is left out. Raises `CorruptData` when another line is not what was written.
    """
    path = run / FILE
    if not path.is_file():
        return None
    whole = [line for line in read_file(path, _MOST_BYTES).splitlines(keepends=True) if line.endswith(b"\n")]
    if not whole:
        return None
    asked = read_record(Asked, _parsed(whole[0], path, 1), path)
    found = [read_record(Explanation, _parsed(line, path, n), path) for n, line in enumerate(whole[1:], 2)]
    return asked, {one.latent: one for one in found}


def summary(found: dict[int, Explanation]) -> dict[str, Any]:
    """Return what `--json` prints: every label with its scores, the best first, and the means."""
    rows = [one.model_dump() | one.scores() for one in best_first(found)]
    means = {name: _mean([row[name] for row in rows]) for name in ("detection_accuracy", "fuzzing_accuracy")}
    return {"labels": len(rows), "tokens": sum(row["tokens"] for row in rows), **means, "latents": rows}


def best_first(found: dict[int, Explanation]) -> list[Explanation]:
    """Return the labels by falling balanced accuracy of detection; those without one come last."""
    return sorted(found.values(), key=lambda one: (-(one.detection.balanced_accuracy or 0), one.latent))


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _parsed(line: bytes, path: Path, number: int) -> object:
    try:
        return durable.parse_json(line)
    except ValueError as error:
        raise CorruptData(f"{path}: line {number} is not JSON; remove the file, and ask again") from error


def earlier(run: Path, asked: Asked) -> dict[int, Explanation]:
    """Return the labels that are there already.

    Raises `UserError` when the file holds labels by another model, or of another checkpoint.
    """
    path, before = run / FILE, read_explanations(run)
    if before and before[0] != asked:
        theirs, ours = before[0].model_dump(), asked.model_dump()
        told = ", ".join(
            f"{name} {theirs[name]} there, {ours[name]} now" for name in ours if theirs[name] != ours[name]
        )
        raise UserError(f"{path} holds labels made with other settings ({told}); remove or rename it to start again")
    return before[1] if before else {}


def begin(run: Path, asked: Asked) -> dict[int, Explanation]:
    """Return the labels that are there already; makes the file where there is none, and cuts off a torn last line.

    Raises what `earlier` raises, and `DiskFull`.
    """
    path, done = run / FILE, earlier(run, asked)
    data = read_file(path, _MOST_BYTES) if path.is_file() else b""
    if not (whole := data.rfind(b"\n") + 1):
        durable.publish_bytes(path, asked.model_dump_json().encode() + b"\n")
    elif whole < len(data):
        durable.truncate(path, whole)
    return done


def append(run: Path, found: Explanation) -> None:
    """Add a line. Raises `DiskFull`, and then leaves the file as it was."""
    durable.append_line(run / FILE, found.model_dump_json().encode() + b"\n")
