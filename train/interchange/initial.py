"""The weights that a run starts from: those of another run, of an imported one, or of another library's file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from shared.errors import UserError, warn
from shared.store.checks import file_crc32c
from train.interchange.declared import declared
from train.interchange.plain_transcoder import PlainTranscoder
from train.interchange.read_transcoder import read_transcoder
from train.live.run_files import CONFIG
from train.model import checkpoint
from train.model.activations.base import FixedK
from train.model.transcoder import Transcoder
from train.run.bindings import require_own_config
from train.run.settings import InitialWeights, RunConfig, read_config


class Initial(NamedTuple):
    """Weights to start from."""

    path: Path
    """Of the checkpoint or the file."""
    weights: InitialWeights
    """What `config.json` records of them."""
    d_sae: int
    """Latents that it has."""
    load: Callable[[Transcoder], object]
    """Gives them to a transcoder."""


def find_initial(path: Path, config: RunConfig) -> Initial:
    """Return the weights of a run's newest checkpoint, or of another library's transcoder, at `path`.

    Where `config` started already, those that it started from. They must fit `config`; but weights of a run start a
    wider one, too, whose other latents start at random. Raises `UserError` with both shapes, or when what it started
    from is gone, or is other weights; and `CorruptData`.
    """
    found = _of_run(path, config) if (path / CONFIG).is_file() or not path.exists() else None
    found = found or _of_library(path, config)
    if config.initial and found.weights != config.initial:
        raise UserError(
            f"{found.path} is not {'the file' if found.weights.library else 'the checkpoint'} that this run started "
            "from: other weights of the same name; start the run again under another name"
        )
    return found


def _of_run(run: Path, config: RunConfig) -> Initial:
    found = checkpoint.find(run, config.initial.step if config.initial else None)
    before = read_config(run)
    require_own_config(run, before, found)
    theirs, ours = _shape(before), _shape(config)
    narrower = _d_sae(before) < _d_sae(config) and before.imported is None
    if narrower:
        theirs["transcoder.d_sae"] = ours["transcoder.d_sae"]
    _require_same(run, theirs, ours)
    if [one.settings.transcoder.decoder_norm for one in (before, config)] == ["free", "unit"]:
        raise _free_norms(run)
    weights = InitialWeights(step=found.step, crc32c=found.state.weights_crc32c)
    if narrower:
        seed = config.settings.seed
        return Initial(
            found.path, weights, _d_sae(before), lambda model: widen(Transcoder.load(found.path), model, seed)
        )
    if before.imported is None:
        return Initial(found.path, weights, _d_sae(before), lambda model: model.load_checkpoint(found))
    imported = Transcoder.load(run, found.step)  # in the LLM's own units; the new run shifts and scales rows
    plain = PlainTranscoder.of(imported, imported.inference_threshold)
    return Initial(found.path, weights, _d_sae(before), plain.copy_to)


@torch.no_grad()
def widen(narrow: Transcoder, wide: Transcoder, seed: int) -> None:
    """Give `wide` the latents of `narrow` as its first ones; the others are those of a new run, by `seed`.

    Shift, scale, skip connection and thresholds are taken over as well.
    """
    wide.initialise(seed)
    n = narrow.d_sae
    theirs, ours = narrow.state_dict(), wide.state_dict()
    for name, tensor in ours.items():
        part = tensor[..., :n] if name == "W_enc" else tensor[:n] if tensor.shape != theirs[name].shape else tensor
        part.copy_(theirs[name])


def describe_start(source: Initial, config: RunConfig) -> str:
    """Say what a run takes over from the weights that it starts from, and what starts anew."""
    activation, rate = config.settings.activation, config.settings.optimizer.lr
    step = f" of step {source.weights.step:,}" if source.weights.step else ""
    more = f" of {source.d_sae:,} latents; the other {_d_sae(config) - source.d_sae:,} start at random"
    widened = more if source.d_sae < _d_sae(config) else ""
    k = f", k from {activation.k_at(0)} to {activation.k}" if isinstance(activation, FixedK) else ""
    return (
        f"starting from the weights{step} of {source.path}{widened}; anew start the optimizer's moments, the learning "
        f"rate ({rate} after its warm-up), the counts of dead latents{k}, and the order of rows"
    )


def warn_of_k(source: Initial, config: RunConfig) -> None:
    """Warn where a run starts from trained weights with more active latents than it is to have: they become dense."""
    activation = config.settings.activation
    if isinstance(activation, FixedK) and activation.k_at(0) > activation.k:
        warn(
            f"--init-from {source.path}: k starts at {activation.k_at(0)} and falls to {activation.k} over "
            f"{activation.k_warmup_steps:,} steps, so trained latents become dense first; "
            "--set activation.k_start=1x starts at k"
        )


def _d_sae(config: RunConfig) -> int:
    assert isinstance(config.settings.transcoder.d_sae, int)
    return config.settings.transcoder.d_sae


def _of_library(path: Path, config: RunConfig) -> Initial:
    library, plain = read_transcoder(path)
    theirs: dict[str, object] = {
        "d_in": len(plain.W_enc),
        "d_out": len(plain.b_dec),
        "transcoder.d_sae": plain.d_sae,
        "transcoder.skip": plain.W_skip is not None,
        "use of learned thresholds": plain.k is None,
    }
    ours = _shape(config)
    _require_same(path, theirs, {name: ours[name] for name in theirs})
    if config.settings.transcoder.decoder_norm == "unit":
        raise _free_norms(path)
    crc32c = file_crc32c(declared(path, library).files[0])
    return Initial(path, InitialWeights(step=0, crc32c=crc32c, library=library), plain.d_sae, plain.copy_to)


def _free_norms(path: Path) -> UserError:
    return UserError(
        f"--init-from {path}: its decoder rows have free norms, and this run would set them to 1; use "
        "--set transcoder.decoder_norm=free"
    )


def _require_same(path: Path, theirs: dict[str, object], ours: dict[str, object]) -> None:
    for name, value in ours.items():
        if theirs[name] != value:
            kind = "; for thresholds use --set activation.kind=jumprelu" if name == "use of learned thresholds" else ""
            raise UserError(
                f"--init-from {path}: its {name} is {theirs[name]}, this run's is {value}; make them agree{kind}"
            )


def _shape(config: RunConfig) -> dict[str, object]:
    settings = config.settings
    return {
        "source": config.settings.source,
        "d_in": config.d_in,
        "d_out": config.d_out,
        "transcoder.d_sae": settings.transcoder.d_sae,
        "transcoder.skip": settings.transcoder.skip,
        "transcoder.source_rms_eps": settings.transcoder.source_rms_eps,
        "use of learned thresholds": settings.activation.learns_thresholds,
    }
