"""What people call the latents of a run: `labels.json` in the run's folder, merged from files that the browser exports.

A file is JSON, as the browser writes it, or CSV with the columns `latent`, `label`, `note` and `star`, of which the
last two may be missing. Where people say nothing of a latent, a report takes the label that `train explain` found.
"""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from shared.bounds import Count
from shared.config import Config, build, read_record
from shared.errors import CorruptData, UserError, warn
from shared.files import durable
from shared.files.untrusted import read_file
from train.explain.explanation_record import Score, read_explanations
from train.probe.probe_record import EXPLAINED, probe_of

FILE = "labels.json"
"""In the run's folder."""
_MOST_BYTES = 2**26
_DIGITS = 12
_COLUMNS = ("latent", "label", "note", "star")


class LatentLabel(Config):
    """What people say of one latent."""

    latent: Count
    label: Annotated[str, Field(max_length=500)] = ""
    """A few words for what it stands for."""
    note: Annotated[str, Field(max_length=10_000)] = ""
    star: bool = False

    @property
    def says_something(self) -> bool:
        """Whether there is anything to keep."""
        return bool(self.label or self.note or self.star)


class LatentLabels(Config):
    """`labels.json`: what people say of a run's latents."""

    schema_version: Literal[1] = 1
    run: str = ""
    """Name of the run's folder when the file was written; empty: not known."""
    step: Count | None = None
    """Of the weights that the labels were given to; none: not known."""
    latents: list[LatentLabel] = Field(default_factory=list, max_length=2**22)
    """By rising number."""


def read_labels(run: Path) -> LatentLabels:
    """Read the labels of a run; without a file there are none. Raises `CorruptData`."""
    path = run / FILE
    if not path.exists():
        return LatentLabels()
    return read_record(LatentLabels, durable.read_json(path, _MOST_BYTES), path)


def merge_labels(run: Path, step: int, d_sae: int, file: Path) -> LatentLabels:
    """Put the labels of `file` over those of the run, write and return them; an empty one takes a latent's away.

    Raises `UserError` when the file cannot be read, or names a latent that the run does not have, and `DiskFull`.
    """
    given, known = _read_given(file), read_labels(run)
    if odd := [one.latent for one in given.latents if one.latent >= d_sae]:
        raise UserError(f"{file}: labels latent {odd[0]}, and {run} has {d_sae:,} latents, numbered from 0")
    name = run.resolve().name
    if given.run not in ("", name) or given.step not in (None, step):
        warn(
            f"{file}: its labels are of run {given.run or name}, step {given.step or '?'}; this is {name}, step {step}"
        )
    merged = {one.latent: one for one in (*known.latents, *given.latents)}
    kept = sorted((one for one in merged.values() if one.says_something), key=lambda one: one.latent)
    found = LatentLabels(run=name, step=step, latents=kept)
    durable.publish_json(run / FILE, found.model_dump(mode="json"))
    return found


def explained(run: Path, step: int, store: str) -> list[LatentLabel]:
    """Return the labels of `train explain`, with model and scores as a note; none of another checkpoint or store.

    `store` is the digest of the store's request. Raises `CorruptData`.
    """
    found = read_explanations(run)
    if not found or (found[0].step, found[0].store) != (step, store):
        return []
    model = found[0].model
    return [
        LatentLabel(
            latent=one.latent,
            label=one.label,
            note=f"by {model}: detection {_told(one.detection)}, fuzzing {_told(one.fuzzing)}",
        )
        for one in found[1].values()
    ]


def names_of_latents(run: Path, step: int, store: str) -> dict[int, str]:
    """Return what latents are called: by people, else by `train explain`, else by `train probe`.

    A label of `train probe` is a name where the latent tells it with an F1 of at least 0.5. `store` as in `explained`.
    Raises `CorruptData`.
    """
    found: dict[int, str] = {}
    if probed := probe_of(run, step, store):
        told = probed.latents
        for latent, label, f1 in zip(told.latent, told.label, told.f1, strict=True):
            if f1 >= EXPLAINED[0] and latent not in found:  # the best one comes first
                found[latent] = f"{probed.summary.labels[label].name} (F1 {f1:.2f})"
    named = (*explained(run, step, store), *read_labels(run).latents)
    return found | {one.latent: one.label for one in named if one.label}


def _told(score: Score) -> str:
    accuracy = score.balanced_accuracy
    return "not known" if accuracy is None else f"{accuracy:.0%}"


def _read_given(file: Path) -> LatentLabels:
    """Read a user's file. Raises `UserError`."""
    try:
        if file.suffix.lower() == ".csv":
            text = read_file(file, _MOST_BYTES, follow=True).decode("utf-8-sig")
            return build(LatentLabels, {"latents": _rows(csv.reader(io.StringIO(text)), file)}, str(file))
        return build(LatentLabels, durable.parse_json(read_file(file, _MOST_BYTES, follow=True)), str(file))
    except FileNotFoundError as error:
        raise UserError(f"no file of labels at {file}") from error
    except (OSError, ValueError, CorruptData, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as labels, JSON or CSV: {error}") from error


def _rows(lines: Iterable[list[str]], file: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV file by column."""
    head, *rows = [line for line in lines if line] or [[]]
    if not {"latent", "label"} <= set(head) <= set(_COLUMNS):
        raise UserError(f"{file}: its columns are {', '.join(head) or 'none'}; expected {', '.join(_COLUMNS)}")
    if uneven := [number for number, row in enumerate(rows, 1) if len(row) != len(head)]:
        raise UserError(f"{file}: row {uneven[0]} does not have the {len(head)} columns of the first line")
    found: list[dict[str, Any]] = [dict(zip(head, row, strict=True)) for row in rows]
    return [
        row
        | {
            "latent": int(text)
            if (text := row["latent"].strip()).isdecimal() and len(text) < _DIGITS
            else row["latent"]
        }
        | {"star": row.get("star", "").strip().lower() in ("1", "true", "yes")}
        for row in found
    ]
