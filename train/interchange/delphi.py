"""delphi's cache of latents, for its `LatentDataset` (checked with 0.1.3).

`latents/HOOKPOINT/START_END.safetensors`, the latents START to END, both included: `locations` [n, 3] of sequence,
position and latent - START, `activations` [n] float16, and in the first file `tokens` [sequences, context]. A
`config.json` beside them. Tokens whose rows are not stored have no activations.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shared.console.progress import Progress
from shared.errors import UserError
from shared.files import durable
from train.interchange.origin import origin_of
from train.interchange.sampled import activations_of
from train.model.checkpoint import save_tensors
from train.run.load_run import LoadedRun
from train.samples.encode import Activations

Array = NDArray[Any]

FOLDER, CONFIG = "latents", "config.json"
LEAST = 1e-5
"""delphi drops what is not above it."""
_SPLITS = 5
"""Files, as many as delphi writes by default."""
_MOST = float(np.finfo(np.float16).max)


class _Part(NamedTuple):
    """Latents from `start` to `end`, both included."""

    start: int
    end: int


def write(loaded: LoadedRun, folder: Path) -> str:
    """Write the cache into `folder`, and return what it holds. Raises `UserError` when float16 cannot hold a value."""
    found, origin = activations_of(loaded), origin_of(loaded)
    if not (found.values > LEAST).any():
        raise UserError(f"{loaded.path}: no latent is active on any row that was looked at; train for longer")
    if (largest := float(found.values.max())) > _MOST:
        raise UserError(
            f"{loaded.path}: an activation is {largest:.6g}, and delphi's float16 holds {_MOST:,.0f} at most"
        )
    place = folder / FOLDER / f"layers.{origin.layer}.mlp"
    durable.make_folder(place)
    parts = _parts(found)
    with Progress("delphi", len(parts), "files") as progress:
        for number, part in enumerate(parts):
            tensors = _tensors(found, part)
            if not number:
                tensors["tokens"] = torch.from_numpy(found.tokens)
            save_tensors(place / f"{part.start}_{part.end}.safetensors", tensors)
            progress.update(number + 1)
    request, size = loaded.rows.store.request, found.tokens.shape
    config = {
        "dataset_repo": request.corpus.name,
        "dataset_split": request.corpus.split or "",
        "dataset_name": request.corpus.subset or "",
        "dataset_column": request.corpus.column or "text",
        "batch_size": 32,
        "cache_ctx_len": size[1],
        "ctx_len": size[1],
        "n_tokens": size[0] * size[1],
        "n_splits": len(parts),
        "model_name": origin.model,
        "run": origin.run,
        "stored_rows": int(found.rows.sum()),
    }
    durable.publish_json(place / CONFIG, config)
    return (
        f"{int((found.values > LEAST).sum()):,} activations of {found.d_sae:,} latents on {int(found.rows.sum()):,} "
        f"stored rows of {size[0]:,} sequences"
    )


def _parts(found: Activations) -> list[_Part]:
    """Cut the latents into ranges that follow each other and hold about as many activations, each at least one."""
    ends = np.concatenate([[0], np.cumsum(found.values > LEAST)])[found.starts[1:]]
    cuts = np.unique(np.searchsorted(ends, np.arange(1, _SPLITS) * ends[-1] / _SPLITS) + 1)
    bounds = [0, *(int(cut) for cut in cuts if cut < found.d_sae and 0 < ends[cut - 1] < ends[-1]), found.d_sae]
    return [_Part(low, high - 1) for low, high in pairwise(bounds)]


def _tensors(found: Activations, part: _Part) -> dict[str, torch.Tensor]:
    """Return locations, sorted by latent, sequence and position, and activations."""
    low, high = found.starts[part.start], found.starts[part.end + 1]
    latents = np.repeat(np.arange(part.end - part.start + 1), np.diff(found.starts[part.start : part.end + 2]))
    kept = found.values[low:high] > LEAST
    sequence, position = np.divmod(found.places[low:high][kept].astype(np.int64), found.tokens.shape[1])
    locations = np.stack([sequence, position, latents[kept]], axis=1)
    kind = np.uint16 if locations.max() < 2**16 else np.uint32
    return {
        "locations": torch.from_numpy(locations.astype(kind)),
        "activations": torch.from_numpy(found.values[low:high][kept].astype(np.float16)),
    }
