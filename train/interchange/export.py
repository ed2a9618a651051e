"""Write a trained transcoder in another library's format, and show that what was written is the same function.

Two formats hold what latents do, and no weights: there is nothing to compare.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from shared.console.terminal import say
from shared.errors import ProjectError, UserError
from shared.files import durable
from shared.hub import check_licence
from train.evaluation.evaluate import calibrate
from train.interchange import Format, circuit_tracer, delphi, neuronpedia, saelens, sparsify
from train.interchange.agreement import LARGEST_CHANGE, LARGEST_ERROR, Agreement, agreement
from train.interchange.card import card, card_of_latents
from train.interchange.foreign_tensors import ForeignTensors
from train.interchange.origin import origin_of
from train.interchange.plain_transcoder import PlainTranscoder
from train.run.load_run import LoadedRun

CARD = "README.md"
_ONE_LAYER = {"saelens": saelens, "hf": saelens, "sparsify": sparsify}
"""What writes and reads the weights of one run."""
_LATENTS: Mapping[str, Callable[[LoadedRun, Path], str]] = {"neuronpedia": neuronpedia.write, "delphi": delphi.write}
"""What writes contexts and activations of one run, and says what they are."""


class Exported(NamedTuple):
    """What `export` wrote."""

    path: Path
    agreements: tuple[Agreement, ...]
    """Of every run, in the order in which they were given; none where no weights are written."""


def export(
    runs: Sequence[LoadedRun],
    kind: Format,
    path: Path,
    *,
    prefix: int | None = None,
    layers: int | None = None,
    licence: str | None = None,
) -> Exported:
    """Export `runs` to the new folder `path`: one run, or for circuit-tracer one for each of some layers.

    Thresholds are calibrated on the store. `prefix`: the first so many latents alone. `layers`: how many the model has,
    for circuit-tracer. `licence`: the hub's name of one, for the card. Raises `UserError` when the format has no place
    for such a transcoder, and `ProjectError` when what was written is not the same function; nothing is written then.
    """
    if path.exists():
        raise UserError(f"{path} exists; pass another folder with --out, or remove it")
    if layers is not None and kind != "circuit-tracer":
        raise UserError("--layers is for --format circuit-tracer")
    if kind != "circuit-tracer" and len(runs) != 1:
        raise UserError(
            f"--format {kind} takes one run, got {len(runs)}; circuit-tracer's sets take one for each layer"
        )
    check_licence(licence)
    if kind in _LATENTS:
        return _export_latents(runs[0], kind, path, prefix, licence)
    plain = [_plain(loaded, prefix) for loaded in runs]
    with durable.publish_folder(path, 4 * sum(_numbers(one) for one in plain)) as folder:
        written = _write(runs, plain, kind, folder, layers)
        found = [agreement(one.transcoder, back, one.rows) for one, back in zip(runs, written, strict=True)]
        for loaded, one in zip(runs, found, strict=True):
            _require_same(loaded, kind, one)
        text = card(runs, written, kind, path.name, found, licence)
        durable.publish_bytes(folder / CARD, text.encode())
    return Exported(path, tuple(found))


def _export_latents(loaded: LoadedRun, kind: Format, path: Path, prefix: int | None, licence: str | None) -> Exported:
    if prefix is not None:
        raise UserError(f"--prefix is for formats that hold weights, and {kind} does not")
    with durable.publish_folder(path) as folder:
        told = _LATENTS[kind](loaded, folder)
        durable.publish_bytes(folder / CARD, card_of_latents(loaded, kind, told, path.name, licence).encode())
    say(f"{kind}: {told}")
    return Exported(path, ())


def _plain(loaded: LoadedRun, prefix: int | None) -> PlainTranscoder:
    transcoder = loaded.transcoder
    if prefix is not None and prefix not in transcoder.prefixes:
        raise UserError(f"--prefix {prefix}: {loaded.path} has the prefixes {list(transcoder.prefixes)}")
    threshold = calibrate(transcoder, loaded.rows)
    transcoder.inference_threshold.copy_(threshold)
    return PlainTranscoder.of(transcoder, threshold, prefix)


def _write(
    runs: Sequence[LoadedRun], plain: Sequence[PlainTranscoder], kind: Format, folder: Path, layers: int | None
) -> list[PlainTranscoder]:
    """Write one format, and return what is read back."""
    origins = [origin_of(loaded) for loaded in runs]
    if kind == "circuit-tracer":
        circuit_tracer.write(plain, origins, layers, folder)
        files = [folder / circuit_tracer.file_of(origin.layer) for origin in origins]
        return [circuit_tracer.read_layer(ForeignTensors(file)) for file in files]
    module = _ONE_LAYER[kind]
    module.write(plain[0], folder, origins[0])
    return [module.read(folder)]


def _require_same(loaded: LoadedRun, kind: Format, found: Agreement) -> None:
    """Raise `ProjectError` when an export is another function; sparsify's is one by its format."""
    if kind == "sparsify" or found.is_same:
        return
    raise ProjectError(
        f"the export of {loaded.path} is not the same function: the largest error of a row is "
        f"{found.largest_error:.2g} of its norm, expected at most {LARGEST_ERROR:g}; l0 is {found.exported.l0:.3f}, "
        f"expected {found.ours.l0:.3f} within {LARGEST_CHANGE:.1%}; nothing was written"
    )


def _numbers(plain: PlainTranscoder) -> int:
    tensors = (plain.W_enc, plain.b_enc, plain.W_dec, plain.b_dec, plain.threshold, plain.W_skip)
    return sum(tensor.numel() for tensor in tensors if tensor is not None)
