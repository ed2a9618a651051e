"""The card of an export: what it is, how good it is, where it comes from, and how to load it.

Its front matter is that of the Hugging Face hub's model cards.
"""

import json
from collections.abc import Sequence

from train.interchange.agreement import Agreement
from train.interchange.origin import Origin, origin_of
from train.interchange.plain_transcoder import PlainTranscoder
from train.run.load_run import LoadedRun

_LIBRARIES = {"hf": "saelens", "neuronpedia": None, "delphi": None}
"""Where the library has another name than the format, or there is none that loads a model."""
_LOADING = {
    "hf": """\
    from huggingface_hub import snapshot_download
    from sae_lens import SAE

    transcoder = SAE.load_from_disk(snapshot_download("OWNER/NAME"))""",
    "neuronpedia": """\
Put the folder of the model where a Neuronpedia looks for bulk data, and import the source as its administrator.
Its import reads release, model, sourceset and source, then features, then activations.""",
    "delphi": """\
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    dataset = LatentDataset("{name}/latents", SamplerConfig(), ConstructorConfig(), tokenizer=tokenizer)""",
    "saelens": """\
    from sae_lens import SAE

    transcoder = SAE.load_from_disk("{name}")""",
    "sparsify": """\
    from sparsify import SparseCoder

    transcoder = SparseCoder.load_from_disk("{name}")""",
    "circuit-tracer": """\
    from circuit_tracer import ReplacementModel

    model = ReplacementModel.from_pretrained("{model}", "/absolute/path/of/{name}")""",
}


def card(
    runs: Sequence[LoadedRun],
    plain: Sequence[PlainTranscoder],
    kind: str,
    name: str,
    found: Sequence[Agreement],
    licence: str | None = None,
) -> str:
    """Return README.md of an export, with the front matter that the Hugging Face hub reads."""
    first = runs[0].rows.store.request
    parts = [_front(kind, runs[0], licence), f"# Transcoders of {first.model.name}\n" if len(runs) > 1 else ""]
    parts += [_one(*one, kind) for one in zip(runs, plain, found, strict=True)]
    parts.append(_loading(kind, name, first.model.name))
    return "\n".join(part for part in parts if part)


def card_of_latents(loaded: LoadedRun, kind: str, told: str, name: str, licence: str | None = None) -> str:
    """Return README.md of an export of contexts and activations, which are `told`."""
    origin = origin_of(loaded)
    lines = [
        f"# Latents of {origin.model}, layer {origin.layer}",
        "",
        f"What the latents of a transcoder from `{origin.source_hook}` to `{origin.target_hook}` are active on:",
        f"{told}.",
        "Tokens whose rows are not stored count as not active.",
        "",
        "| | |",
        "|---|---|",
        *_provenance(origin),
        "",
    ]
    return "\n".join([_front(kind, loaded, licence), "\n".join(lines), _loading(kind, name, origin.model)])


def _loading(kind: str, name: str, model: str) -> str:
    return f"## Loading\n\n{_LOADING[kind].format(name=name, model=model)}\n"


def _front(kind: str, loaded: LoadedRun, licence: str | None) -> str:
    """Return the front matter. Names are quoted as JSON, which YAML reads."""
    request = loaded.rows.store.request
    lines = ["---"]
    if licence or kind == "hf":
        lines.append(f"license: {licence or 'unknown'}")
    if library := _LIBRARIES.get(kind, kind):
        lines.append(f"library_name: {library}")
    lines += ["tags:", "- transcoder", "- mechanistic-interpretability"]
    if kind == "hf":
        lines += ["- sparse-autoencoder", "- saelens"]
    if "/" in request.model.name:
        lines.append(f"base_model: {json.dumps(request.model.name)}")
    if request.corpus.revision:
        lines += ["datasets:", f"- {json.dumps(request.corpus.name)}"]
    return "\n".join([*lines, "---", ""])


def _one(loaded: LoadedRun, plain: PlainTranscoder, found: Agreement, kind: str) -> str:
    origin = origin_of(loaded)
    what = "Transcoder" if origin.is_transcoder else "Autoencoder"
    exported = found.exported
    lines = [
        f"# {what} of {origin.model}, layer {origin.layer}",
        "",
        f"Reads `{origin.source_hook}` and predicts `{origin.target_hook}`, in the model's own units.",
        "",
        "| | |",
        "|---|---|",
        f"| latents | {plain.d_sae:,} |",
        f"| active latents per row | {exported.l0:.2f} |",
        f"| unexplained variance (fvu) on held-out rows | {exported.fvu:.4f} |",
        f"| held-out rows | {found.rows:,}, without position 0 and outliers |",
        f"| skip connection | {'yes' if plain.W_skip is not None else 'no'} |",
        *_provenance(origin),
        "",
    ]
    if kind == "sparsify":
        lines += [
            f"This format has no thresholds: the {plain.k} largest latents of every row are active. By the "
            f"run's own thresholds fvu is {found.ours.fvu:.4f} at {found.ours.l0:.2f} active latents.",
            "",
        ]
    return "\n".join(lines)


def _provenance(origin: Origin) -> list[str]:
    """Return rows of a table: model, text and run."""
    return [
        f"| model | {origin.model}, weights sha256 {origin.weights[:12]} |",
        f"| text | {origin.text}, windows of {origin.context_size} tokens{', BOS first' if origin.bos else ''} |",
        f"| run | {origin.run} |",
        *([f"| imported from | {origin.imported} |"] if origin.imported else []),
    ]
