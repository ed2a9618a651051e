"""The latents of a run's transcoder that are active on the tokens of a prompt, and what changing them does.

Legend: T tokens, F latents.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from rich.table import Table
from torch import Tensor

from harvest.commands.repair import own_model
from harvest.llm.model import load_model
from harvest.splice.change_latents import LatentChange, change_latents, run_prompt
from harvest.splice.forward import left_out
from harvest.splice.replacements import Replacement, Strongest, of_run, open_run, prompt_page, read_replacement
from harvest.text.tokenizer_files import load_tokenizer
from shared.console.terminal import PlainConsole, say
from shared.errors import UserError
from shared.files import durable

_ABLATED = 12
"""Latents that a page shows ablated if the user names none: a pass of the LLM each."""
_NAMED = 5
"""Tokens that are named of each latent."""


class TokenLatents(NamedTuple):
    """One token of a prompt."""

    position: int
    token: int
    text: str
    active: int
    """Latents that are active."""
    latents: list[int]
    """The strongest of them, falling."""
    values: list[float]


class LatentLabel(NamedTuple):
    """What a latent can be called by."""

    latent: int
    name: str | None
    """By people, `train explain` or `train probe`; none: it has none."""
    strongest: Strongest | None
    """Where in the run's samples it is strongest; none: it has no samples."""
    promotes: list[str] | None
    """The tokens whose logits it raises most; none: not known."""


class NextShown(NamedTuple):
    """A token that may come after the prompt, with its text."""

    token: int
    text: str
    before: float
    """Probability by the unchanged model."""
    after: float


class ShownChange(NamedTuple):
    """What setting one latent to one value does."""

    latent: int
    value: float
    kl: list[float]
    """Of each token's next-token distribution, nats."""
    next: list[NextShown]
    """After the last token, those whose probability changes most."""


class PromptLatents(NamedTuple):
    """The tokens of a prompt, and the latents that are listed with them."""

    tokens: list[TokenLatents]
    labels: list[LatentLabel]
    changes: list[ShownChange]
    activations: dict[int, list[float]]
    """Of every latent that is listed or changed, at each token."""

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        labels = [one._asdict() | {"strongest": one.strongest and one.strongest._asdict()} for one in self.labels]
        changes = [one._asdict() | {"next": [token._asdict() for token in one.next]} for one in self.changes]
        return {"tokens": [one._asdict() for one in self.tokens], "latents": labels, "changes": changes}


class Changes(NamedTuple):
    """Which latents are changed, one at a time."""

    values: list[tuple[int, float]]
    """Latents, and the activation that each gets; 0 ablates it."""
    ablate_strongest: int
    """So many more are ablated: those that add most to the target of the last token, whose prediction is compared."""


def encode_prompt(
    run: Path,
    prompt: str,
    *,
    transcoder: Path | None,
    step: int | None,
    top: int,
    model: str | None,
    changes: Changes | None = None,
) -> PromptLatents:
    """Run the LLM on `prompt`, with BOS as in the store, and list each token's `top` strongest latents.

    With `changes`, also set latents to other values, and see how the predictions change: the whole LLM runs then, once
    more for each. Raises `UserError` when there is no such run, model, transcoder or latent, or the prompt is empty or
    too long.
    """
    loaded = open_run(run, step)
    store, request = loaded.rows.store, loaded.rows.store.request
    replacement = read_replacement(transcoder, store) if transcoder else of_run(loaded)
    files = own_model(request, model)
    tokenizer = load_tokenizer(files.folder)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if not 0 < len(ids) < request.context_size:
        raise UserError(f"--prompt has {len(ids):,} tokens, expected 1 to {request.context_size - 1:,}")
    ids = [tokenizer.bos_token_id, *ids] if request.bos else ids
    given = torch.tensor([ids], device=request.model.device)
    hooks = [request.source_hook, request.target_hook]
    if changes is None:
        hook = hooks[replacement.source == "target"]
        network = load_model(files.folder, request.model.dtype, request.model.device, [hook])
        latents, found = _encoded(replacement, network(given)[hook][0]), list[LatentChange]()
    else:
        network = load_model(files.folder, request.model.dtype, request.model.device, hooks, whole=True)
        clean = run_prompt(network, given, *hooks)
        latents = _encoded(replacement, clean.source if replacement.source == "source" else clean.target)
        values = _values(changes, replacement, latents)
        directions = dict(
            zip((one for one, _ in values), replacement.directions([one for one, _ in values]), strict=True)
        )
        kept = left_out(store.exclusion, clean.source, clean.target, torch.arange(len(ids), device=given.device)).cpu()
        found = change_latents(network, request.target_hook, clean, latents, directions, values, kept)
    tokens = [_token(i, token, latents[i], top, tokenizer) for i, token in enumerate(ids)]
    named = sorted({i for one in tokens for i in one.latents} | {one.latent for one in found})
    shown = [_shown(one, tokenizer) for one in found]
    activations = {latent: latents[:, latent].tolist() for latent in named}
    return PromptLatents(tokens, _labels(named, replacement, tokenizer), shown, activations)


def with_changes(ablate: Sequence[int], steer: Sequence[tuple[int, float]], *, page: bool) -> Changes | None:
    """Return what the command line asks to change; none: nothing. A `page` without any shows the strongest ablated."""
    values = [*((latent, 0.0) for latent in ablate), *steer]
    return Changes(values, _ABLATED if page and not values else 0) if values or page else None


def write_page(path: Path, run: Path, found: PromptLatents) -> None:
    """Write the page of a prompt. Raises `DiskFull`, and `UserError` when its folder cannot be written to."""
    durable.make_folder(path.parent)
    latents = run / "report" / "latents.html"
    browser = quote(os.path.relpath(latents, path.parent)) if latents.is_file() else None
    durable.publish_bytes(path, prompt_page(run.name, found.as_json() | {"activations": found.activations}, browser))


def _encoded(replacement: Replacement, rows: Tensor) -> Tensor:
    """Return latents [T, F] on the CPU."""
    with torch.inference_mode():
        return replacement.encode(rows.float().cpu())


def _values(changes: Changes, replacement: Replacement, latents: Tensor) -> list[tuple[int, float]]:
    """Return which latents get which values. Raises `UserError` when there is no such latent."""
    if wrong := [latent for latent, _ in changes.values if latent >= latents.shape[1]]:
        raise UserError(f"there is no latent {wrong[0]}; the transcoder has {latents.shape[1]:,}, from 0")
    last = latents[-1]
    active = last.nonzero().flatten().tolist()
    added = last[active] * replacement.directions(active).norm(dim=1)
    strongest = [active[i] for i in added.argsort(descending=True)[: changes.ablate_strongest].tolist()]
    given = dict.fromkeys(changes.values)
    return [*given, *((latent, 0.0) for latent in strongest if (latent, 0.0) not in given)]


def _shown(change: LatentChange, tokenizer: Any) -> ShownChange:
    named = [NextShown(one.token, tokenizer.decode([one.token]), one.before, one.after) for one in change.next]
    return ShownChange(change.latent, change.value, change.kl, named)


def _token(position: int, token: int, latents: Tensor, top: int, tokenizer: Any) -> TokenLatents:
    active = int((latents != 0).sum())
    best = latents.topk(min(top, active))
    text = tokenizer.decode([token])
    return TokenLatents(position, token, text, active, best.indices.tolist(), best.values.tolist())


def _labels(latents: list[int], replacement: Replacement, tokenizer: Any) -> list[LatentLabel]:
    found = replacement.strongest(latents) if replacement.strongest and latents else {}
    called = replacement.names() if replacement.names and latents else {}
    if replacement.strongest and latents and not found:
        say("the run has no samples that say what its latents are strongest on; make them with: train samples RUN")
    raised = replacement.promoted(latents, _NAMED) if replacement.promoted and latents else None
    names = [[tokenizer.decode([one]) for one in row] for row in raised] if raised else [None] * len(latents)
    return [
        LatentLabel(latent, called.get(latent), found.get(latent), words)
        for latent, words in zip(latents, names, strict=True)
    ]


def show(found: PromptLatents) -> None:
    """Print a line per token, one per latent (where it is strongest, which tokens it promotes), and one per change."""
    table = Table("position", "token", "active", "latent: value, the strongest first")
    for one in found.tokens:
        pairs = "  ".join(f"{i}: {value:.3g}" for i, value in zip(one.latents, one.values, strict=True))
        table.add_row(str(one.position), repr(one.text), f"{one.active:,}", pairs)
    console = PlainConsole()
    console.print(table)
    labelled = [one for one in found.labels if one.name or one.strongest or one.promotes]
    if labelled:
        called = any(one.name for one in labelled)
        names = Table("latent", *(["called"] if called else []), "strongest on", "its strongest sample", "promotes")
        for label in labelled:
            name = [label.name or ""] if called else []
            names.add_row(str(label.latent), *name, *_where(label.strongest), _words(label.promotes or []))
        console.print(names)
    if found.changes:
        changed = Table("latent", "set to", "KL at the last token", "next tokens: probability before -> after")
        for change in found.changes:
            told = "  ".join(
                f"{token.text!r}: {token.before:.3f} -> {token.after:.3f}" for token in change.next[:_NAMED]
            )
            changed.add_row(str(change.latent), f"{change.value:.4g}", f"{change.kl[-1]:.4f}", told)
        console.print(changed)


def _where(found: Strongest | None) -> tuple[str, str]:
    if found is None:
        return "", ""
    return _words(found.tokens[:_NAMED]), repr(f"{found.before}«{found.peak}»{found.after}")[1:-1]


def _words(words: list[str]) -> str:
    return " ".join(map(repr, words))
