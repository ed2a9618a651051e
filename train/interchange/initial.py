"""The weights that a run starts from: those of another run, of an imported one, or of another library's file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from shared.errors import UserError
from shared.store.checks import file_crc32c
from train.interchange.declared import declared
from train.interchange.plain_transcoder import PlainTranscoder
from train.interchange.read_transcoder import read_transcoder
from train.live.run_files import CONFIG
from train.model import checkpoint
from train.model.transcoder import Transcoder
from train.run.bindings import require_own_config
from train.run.settings import InitialWeights, RunConfig, read_config


class Initial(NamedTuple):
    """Weights to start from."""

    path: Path
    """Of the checkpoint or the file."""
    weights: InitialWeights
    """What `config.json` records of them."""
    load: Callable[[Transcoder], object]
    """Gives them to a transcoder."""


def find_initial(path: Path, config: RunConfig) -> Initial:
    """Return the weights of a run's newest checkpoint, or of another library's transcoder, at `path`.

    Where `config` started already, those that it started from. They must fit `config`. Raises `UserError` with both
    shapes, or when what it started from is gone, or is other weights; and `CorruptData`.
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
    _require_same(run, _shape(before), _shape(config))
    if [one.settings.transcoder.decoder_norm for one in (before, config)] == ["free", "unit"]:
        raise _free_norms(run)
    weights = InitialWeights(step=found.step, crc32c=found.state.weights_crc32c)
    if before.imported is None:
        return Initial(found.path, weights, lambda model: model.load_checkpoint(found))
    imported = Transcoder.load(run, found.step)  # in the LLM's own units; the new run shifts and scales rows
    return Initial(found.path, weights, PlainTranscoder.of(imported, imported.inference_threshold).copy_to)


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
    return Initial(path, InitialWeights(step=0, crc32c=crc32c, library=library), plain.copy_to)


def _free_norms(path: Path) -> UserError:
    return UserError(
        f"--init-from {path}: its decoder rows have free norms, and this run would set them to 1; use "
        "transcoder.decoder_norm=free"
    )


def _require_same(path: Path, theirs: dict[str, object], ours: dict[str, object]) -> None:
    for name, value in ours.items():
        if theirs[name] != value:
            kind = "; for thresholds use activation.kind=jumprelu" if name == "use of learned thresholds" else ""
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
