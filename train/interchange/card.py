"""The card of an exported transcoder: what it is, how good it is, where it comes from, and how to load it."""

from collections.abc import Sequence

from train.interchange.agreement import Agreement
from train.interchange.origin import origin_of
from train.interchange.plain_transcoder import PlainTranscoder
from train.run.load_run import LoadedRun

_LOADING = {
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
    runs: Sequence[LoadedRun], plain: Sequence[PlainTranscoder], kind: str, name: str, found: Sequence[Agreement]
) -> str:
    """Return README.md of an export, with the front matter that the Hugging Face hub reads."""
    first = runs[0].rows.store.request
    parts = [_front(kind, first.model.name), f"# Transcoders of {first.model.name}\n" if len(runs) > 1 else ""]
    parts += [_one(*one, kind) for one in zip(runs, plain, found, strict=True)]
    parts.append(f"## Loading\n\n{_LOADING[kind].format(name=name, model=first.model.name)}\n")
    return "\n".join(part for part in parts if part)


def _front(kind: str, model: str) -> str:
    lines = ["---", f"library_name: {kind}", "tags:", "- transcoder", "- mechanistic-interpretability"]
    if "/" in model:
        lines.append(f"base_model: {model}")
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
        f"| model | {origin.model}, weights sha256 {origin.weights[:12]} |",
        f"| text | {origin.text}, windows of {origin.context_size} tokens{', BOS first' if origin.bos else ''} |",
        f"| run | {origin.run} |",
        *([f"| imported from | {origin.imported} |"] if origin.imported else []),
        "",
    ]
    if kind == "sparsify":
        lines += [
            f"This format has no thresholds: the {plain.k} largest latents of every row are active. By the "
            f"run's own thresholds fvu is {found.ours.fvu:.4f} at {found.ours.l0:.2f} active latents.",
            "",
        ]
    return "\n".join(lines)
