"""What stands in the place of an MLP's output: a transcoder of a run or of another library, a mean, a linear map.

The only module of stage 1 that imports stage 2 (decisions/013).

Legend: N rows, D d_in, O d_out.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shared.config import json_digest
from shared.errors import UserError
from shared.splice_record import TRANSCODER
from shared.store.store import Store
from train.data.batches import Side
from train.evaluation.linear_baseline import linear_map
from train.interchange.plain_transcoder import PlainTranscoder
from train.interchange.read_transcoder import read_transcoder
from train.live.run_files import CONFIG
from train.model import checkpoint
from train.model.normalisation import normalisation
from train.model.transcoder import Transcoder
from train.report.latent_labels import names_of_latents
from train.report.prompt_page import prompt_page
from train.run.load_run import LoadedRun, load_run
from train.samples.strongest import Strongest, strongest
from train.samples.token_effects import decoder_directions, tokens_of, unembedding_of

__all__ = ["LoadedRun", "Replacement", "Strongest", "in_parts", "linear", "mean_target", "of_run", "open_run"]
__all__ += ["prompt_page", "read_replacement"]

Predict = Callable[[Tensor], dict[str, Tensor]]
_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """A transcoder for the hooks of a run."""

    library: str
    weights: str
    """SHA-256 of its files."""
    step: int | None
    source: Side
    """The side that it reads."""
    predict: Predict
    """From source rows [N, D], at most 1,024, to target rows [N, O] by name: the whole, and smaller prefixes."""
    encode: Callable[[Tensor], Tensor]
    """From source rows [N, D] to latents [N, F], 0 where a latent is not active."""
    directions: Callable[[list[int]], Tensor]
    """From latents to what an activation of 1 of each adds to the targets, [n, O], in the targets' units."""
    promoted: Callable[[list[int], int], list[list[int]]] | None = None
    """From latents, and how many, to the tokens whose logits each raises most; none: not known."""
    names: Callable[[], dict[int, str]] | None = None
    """What latents are called by people, `train explain` or `train probe`; none: it is no run's."""
    strongest: Callable[[list[int]], dict[int, Strongest]] | None = None
    """From latents to where in the run's samples they are strongest; none: it is no run's."""


def open_run(run: Path, step: int | None) -> LoadedRun:
    """Load a run with its checkpoint and its store. Raises `UserError` and `CorruptData` as `train.load_run`."""
    return load_run(run, step)


def of_run(loaded: LoadedRun) -> Replacement:
    """Return the transcoder of a loaded run."""
    found, transcoder = loaded.checkpoint, loaded.transcoder
    unembedding, tokens = unembedding_of(loaded.rows.store), tokens_of(loaded.rows.store)

    def promoted(latents: list[int], count: int) -> list[list[int]]:
        assert unembedding is not None
        return unembedding.effects(decoder_directions(transcoder)[latents], count, tokens).promoted.tolist()

    return Replacement(
        library="transcoder-cache",
        weights=_files_digest(found.path if found.state.shards else found.path / checkpoint.WEIGHTS),
        step=found.step,
        source=loaded.config.settings.source,
        predict=partial(_every_prefix, transcoder),
        encode=lambda x: transcoder.encode(x, dense=True),
        directions=lambda latents: torch.from_numpy(decoder_directions(transcoder)[latents]),
        promoted=promoted if unembedding else None,
        names=partial(names_of_latents, loaded.path, found.step, loaded.rows.store.request.digest),
        strongest=partial(strongest, loaded.path, found.step),
    )


def read_replacement(path: Path, store: Store) -> Replacement:
    """Read any transcoder: a run, a checkpoint, or what another library wrote.

    Raises `UserError` when it is none, or of other widths than the store's, and `CorruptData` when it is damaged.
    """
    if (path / CONFIG).is_file() or (path / checkpoint.STATE).is_file():
        run, found = checkpoint.of(path)
        loaded = load_run(run, found=found, store=store)
        return of_run(loaded)
    library, plain = read_transcoder(path)
    widths = (len(plain.W_enc), plain.W_dec.shape[1])
    if widths != (store.record.d_in, store.record.d_out):
        raise UserError(
            f"{path} has d_in {widths[0]} and d_out {widths[1]}, the hooks of {store.path} have "
            f"{store.record.d_in} and {store.record.d_out}; pass a transcoder of the same model and hooks"
        )
    return Replacement(
        library=library,
        weights=_files_digest(path),
        step=None,
        source="source",
        predict=partial(_plain, plain),
        encode=plain.encode,
        directions=lambda latents: plain.W_dec[latents],
    )


def mean_target(store: Store) -> Tensor:
    """Return the mean target row [O] over the training rows, at natural frequencies without position 0."""
    return normalisation(store, "source").target_mean


def linear(loaded: LoadedRun) -> Callable[[Tensor], Tensor]:
    """Fit the best linear map on the training rows; returns what predicts target rows [N, O] from source rows."""
    fit = linear_map(loaded.rows, torch.device("cpu")).float()
    return lambda x: x @ fit[:-1] + fit[-1]


def in_parts(predict: Predict, x: Tensor) -> dict[str, Tensor]:
    """Predict for any number of rows [N, D]."""
    parts = [predict(part) for part in x.split(_ROWS)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _every_prefix(transcoder: Transcoder, x: Tensor) -> dict[str, Tensor]:
    latents = transcoder.encode(x)
    smaller = {f"prefix {size}": transcoder.decode(latents, x, size) for size in transcoder.prefixes[:-1]}
    return {TRANSCODER: transcoder.decode(latents, x), **smaller}


def _plain(plain: PlainTranscoder, x: Tensor) -> dict[str, Tensor]:
    return {TRANSCODER: plain.decode(plain.encode(x), x)}


def _files_digest(path: Path) -> str:
    """Return one SHA-256 of a file, or of all files of a folder with their names."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    digests = {}
    for file in files:
        with file.open("rb") as opened:
            digests[file.name if path.is_file() else str(file.relative_to(path))] = hashlib.file_digest(
                opened, "sha256"
            )
    return json_digest({name: digest.hexdigest() for name, digest in digests.items()})
